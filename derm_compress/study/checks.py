"""What a stage would refuse after hours is refused before the first: one line, what to set."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection
from importlib.util import find_spec

from derm_compress.data import load
from derm_compress.data.request import Request
from derm_compress.data.rows import check_survey
from derm_compress.errors import DermError
from derm_compress.method.importance.criteria import PUBLISHED
from derm_compress.method.importance.rankings import Ranking, check_weights, rankings
from derm_compress.method.pruning.depths import choose_operating_point, plan_depths
from derm_compress.method.pruning.plan import Plan, published_plan
from derm_compress.method.quantization import methods, wanted
from derm_compress.model import shapes
from derm_compress.model.shapes import Architecture
from derm_compress.model.units import Unit
from derm_compress.model.variants import RIVAL, paper_depth


def check(plan, stages: Collection[str]) -> None:
    """DermError for parameters (of a plan.Plan) with which one of these stages must fail."""
    p, todo = plan.values, {stage[:2] for stage in stages}
    plan.settle_models()
    if "01" in todo:
        check_source(p, plan.root)
    if "08" in todo:
        check_judge(p)
    if todo - {"01"}:
        check_device(p)
        from derm_compress.model import loading

        config = loading.config_of(p["model"])
        arch = shapes.architecture(config)
        if "03" in todo:
            check_rankings(p, arch.blocks)
            check_embedder(p)
        if "05" in todo:
            check_rivals(p)
        if todo & {"04", "05", "07"}:
            check_depths(p, arch.blocks, todo)
        if "06" in todo:
            check_projection(p, arch)
        if "07" in todo:
            check_forms(p, arch)
        if "09" in todo:
            check_allocation(p, arch)
        if p["device"] == "cuda":
            check_memory(p, arch, stages)
        if "02" in todo:  # last: the small model may have to be fetched
            check_base(p, config)


def check_device(p: dict) -> None:
    if p["device"] == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise DermError("device is cuda, and no GPU is there; allowed: cpu, or meta for sizes")


def check_source(p: dict, root) -> None:
    """The folder of photographs, its table and labels, and what is to be known of them.

    No picture is opened.
    """
    request = Request.of(p, project=root)
    load.check_request(request)
    if request.source != load.DRAWN:
        survey = load.survey(request)
        check_survey(survey, request)
        for note in survey.told.get("notes", ()):
            print(f"{p['run']}: note: {note}", flush=True)
    elif request.n_train < 2:
        raise DermError("n_train: synthetic pictures need a number, 2 at least")
    elif request.image_size % 4:
        raise DermError(
            f"image_size: synthetic pictures have a multiple of 4, not {p['image_size']}"
        )


def check_base(p: dict, config) -> None:
    """The model as far as it can be known without a weight, and pictures of the size it reads."""
    from derm_compress.model import loading

    if p["device"] == "meta":
        return
    if loading.is_here(p["model"]) or p["model"] == loading.SEVEN_B:  # a hub's: once it is there
        loading.check_model(p["model"])
    size, wanted = p["image_size"], config.vision_config.image_size
    if size != wanted:
        raise DermError(
            f"image_size is {size}, but {p['model']} reads {wanted} px: set image_size: {wanted}"
        )


def check_rankings(p: dict, blocks: int) -> None:
    wrong = [block for block in p["protected"] if not -blocks <= block < blocks]
    if wrong:
        known = f"blocks are 0 to {blocks - 1}, or -1 to -{blocks} from the end"
        raise DermError(f"protected {wrong}: {known}")
    if p["device"] == "meta":
        check_weights(rankings(p["rankings"]))
    own_plan(p, blocks)
    if PUBLISHED.name in p["rankings"] and blocks != published_plan().blocks:
        said = f"published is an order of {published_plan().blocks} blocks"
        raise DermError(f"rankings: {said}, and {p['model']} has {blocks}; leave it out")


def check_rivals(p: dict) -> None:
    """Rivals to heal are ranked, and remove whole blocks; the default may be missing."""
    if missing := [name for name in p["sft_rivals"] if name not in {*p["rankings"], RIVAL}]:
        raise DermError(f"sft_rivals: {missing} are not among rankings; add them there, too")
    whole = {PUBLISHED.name, *(one.name for one in rankings(p["rankings"]) if not one.parts)}
    if parts := [name for name in p["sft_rivals"] if name not in {*whole, RIVAL}]:
        raise DermError(f"sft_rivals: {parts} remove attentions or MLPs; name rankings of blocks")


def check_embedder(p: dict) -> None:
    """The sentence transformer, which some rankings ask; the packaged one is there."""
    ranked = rankings(p["rankings"])
    asked = any(ranking.criterion.name == "output_similarity" for ranking in ranked)
    if asked and p["embedder"] != "packaged" and p["device"] != "meta":
        from derm_compress.method.importance.embedder import Embedder

        Embedder(p["embedder"])("any text")


def check_depths(p: dict, blocks: int, todo: set[str]) -> None:
    """Depths that the study's own plan reaches; those of 05 and 07 among them, of 07 healed."""
    plan = own_plan(p, blocks)
    with contextlib.redirect_stdout(io.StringIO()):  # what it leaves out is said by stage 04
        depths = set(plan_depths(p["depths"], plan))
        plan_depths(p["rival_depths"], plan)
    chosen = set()
    if p["operating_blocks"]:
        told = choose_operating_point(None, plan, p["operating_blocks"])
        chosen = {told["operating"], told["deeper"]}
    for stage, name in (("05", "sft_depths"), ("07", "equal_bytes")):
        missing = [n for n in p[name] if paper_depth(n, blocks) not in depths | chosen]
        if stage in todo and missing:
            raise DermError(f"{name}: {missing} of 32 are not among depths; add them there, too")
    if "07" not in todo or not p["equal_bytes"]:
        return
    healed = {paper_depth(n, blocks) for n in p["sft_depths"]} | chosen
    if missing := [n for n in p["equal_bytes"] if paper_depth(n, blocks) not in healed]:
        raise DermError(f"equal_bytes: {missing} of 32 are not healed; add them to sft_depths, too")
    if plan.starts:
        said = "the first ranking takes runs of blocks and orders none; name another first"
        raise DermError(f"equal_bytes: {said}")


def own_plan(p: dict, blocks: int) -> Plan:
    """What is known of the study's own plan before it is measured: how far it goes."""
    name = p["rankings"][0]
    if name == PUBLISHED.name:
        return published_plan()
    ranking = Ranking.of(name)
    spared = {block % blocks for block in p["protected"]}
    if "unprotected" in ranking.options:
        spared = set()
    free = [block for block in range(blocks) if block not in spared]
    if not free:
        raise DermError(f"protected: {p['protected']} are all {blocks} blocks; none is left to go")
    told = {"criterion": name, "protected": tuple(spared), "blocks": blocks}
    if "contiguous" in ranking.options:
        return Plan(order=(), starts=tuple(run_starts(free)), **told)
    most = p["iterative_blocks"] if "iterative" in ranking.options else blocks
    return Plan(order=tuple(map(Unit, free[:most])), **told)


def run_starts(free: list[int]) -> list[int]:
    """Where 1, 2, ... free neighbours first begin, as far as there are so many."""
    starts: list[int] = []
    while found := [n for n in free if {*range(n, n + len(starts) + 1)} <= {*free}]:
        starts.append(found[0])
    return starts


def check_projection(p: dict, arch: Architecture) -> None:
    """Figure 4's projection is one that the decoder has; some decoders fuse several."""
    names = [name.rpartition(".")[2] for name in arch.linears]
    if p["shown_projection"] not in names:
        known = ", ".join(names)
        raise DermError(f"shown_projection is {p['shown_projection']}; {p['model']} has {known}")


def check_forms(p: dict, arch: Architecture) -> None:
    """Quantizers, their widths, groups and budgets."""
    for name, example in (("methods", "awq"), ("bits", "4")):
        if not p[name]:
            raise DermError(f"{name}: name at least one, such as {example}")
    inputs = {name: into for name, (_, into) in arch.linears.items()}
    asked = methods.forms(p["methods"], p["bits"], p["group_size"])
    if p["equal_bytes"]:
        asked.append(methods.Form(wanted.METHOD, group_size=p["group_size"]))
    methods.check_groups(asked, inputs)
    wanted.check_budgets(p["equal_bytes"], p["bits"][1:])
    if p["device"] != "meta" and any(form.kind.scaling == "autoawq" for form in asked):
        if find_spec("awq") is None:
            raise DermError("methods: autoawq is not installed, it is for Linux; leave it out")
        if p["answer_weight"] != 1:
            raise DermError("answer_weight: autoawq weighs all tokens alike; set it to 1")


def check_allocation(p: dict, arch: Architecture) -> None:
    """Budgets that some depth fits, groups, and pictures to decide by."""
    from derm_compress.method.allocation import sizes, ways

    if p["device"] == "meta":
        raise DermError("budget_gib: bits are chosen by gradients, and device meta has no weights")
    if not p["n_dev"]:
        raise DermError("budget_gib: development pictures decide; set n_dev")
    methods.check_groups(
        [methods.Form(p["allocation_method"], group_size=p["group_size"])],
        {name: into for name, (_, into) in arch.linears.items()},
    )
    plan = own_plan(p, arch.blocks)
    how = {"method": p["allocation_method"], "group_size": p["group_size"]}
    problem = ways.Problem(p["model"], "", arch, plan, **how)
    depths = ways.drop_depths(p["drop_depths"], plan)
    for budget in sizes.own_budgets(p["budget_gib"], arch).values():
        problem.fitting(depths, budget)


def check_judge(p: dict) -> None:
    """The judge, its address and key; nothing is asked yet."""
    from derm_compress.evaluate.judges import server
    from derm_compress.evaluate.judges.judge import choose_judge

    names = ("model", "url", "prompt", "concurrency")
    choose_judge(p["judge"], **{name: p[f"judge_{name}"] for name in names})
    if p["judge"] != "rubric":
        server.key_for(p["judge_url"])


def check_memory(p: dict, arch: Architecture, stages: Collection[str]) -> None:
    from derm_compress.study import preflight

    machine = preflight.here()
    if said := preflight.faults(p, arch, machine, stages):
        raise DermError(f"this run does not fit {machine.name}: " + "; ".join(said))
