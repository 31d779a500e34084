"""Does a run fit its machine? What cannot work is refused before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from derm_compress.errors import DermError
from derm_compress.method.importance.rankings import rankings
from derm_compress.method.quantization import budgets, forms
from derm_compress.model import shapes
from derm_compress.model.memory import GIB, plan_weights
from derm_compress.model.shapes import Architecture
from derm_compress.study.needs import Needs

CONTEXT = 0.54  # GiB of a GPU that CUDA keeps: of the 14.74 that a T4 reports 14.2 are left
IMPORTANCE, QUANTIZATION = "03_layer_importance", "07_quantization"
EVALUATION = "08_evaluation"


@dataclass(frozen=True)
class Machine:
    """Where a run shall fit: GiB usable of each GPU, GB of disk that stay."""

    name: str
    gpus: int
    gib: float
    disk_gb: float = 20


KAGGLE = Machine("Kaggle, two T4", gpus=2, gib=14.2)


def check(plan) -> None:
    """DermError where a run (plan.Plan) cannot work: quantizers, embedder, judge, GPU, disk."""
    values = plan.values
    check_forms(values)
    if missing(plan, "02_finetune"):
        check_base(values)
    if missing(plan, IMPORTANCE):
        check_embedder(plan)
    if values["judge"] != "rubric" and missing(plan, EVALUATION):
        check_judge(values)
    if values["device"] == "cpu" and not missing(plan, QUANTIZATION):
        return
    arch = architecture(values)
    check_forms(values, arch)
    if values["device"] == "cuda":
        machine = here()
        if machine is None:
            raise DermError("device is cuda, and no GPU is there; allowed: cpu, or meta for sizes")
        if said := faults(values, arch, machine):
            raise DermError(f"this run does not fit {machine.name}: " + "; ".join(said))


def missing(plan, stage: str) -> bool:
    """Whether a stage has yet to be computed."""
    return stage in plan.keys and bool(plan.store.fault(stage, plan.keys[stage]))


def architecture(values: dict) -> Architecture:
    from derm_compress.model import loading

    return shapes.architecture(loading.config_of(values["model"]))


def says(plan) -> str:
    """What the stages of a run will need, of the machine at hand if it has a GPU, or Kaggle's."""
    machine = here() or KAGGLE
    arch = architecture(plan.values)
    lines = [f"{plan.run}, planned for {machine.name}:"]
    steps = Needs(plan.values, arch, machine.gpus).steps()
    for stage in dict.fromkeys(step.stage for step in steps):
        parts = [step for step in steps if step.stage == stage]
        most = max(parts, key=lambda step: step.gib(step.batch))
        disk = sum(step.disk for step in parts) / 1e9
        by = f"{most.what}, {most.parameter} {most.batch}" if most.parameter else most.what
        lines.append(f"{stage:<24} {most.gib(most.batch):5.1f} GiB ({by}), {disk:.2f} GB of disk")
    return "\n".join([*lines, *faults(plan.values, arch, machine)])


def here() -> Machine | None:
    """The machine at hand, where it has a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gib = min(gpu.total_memory for gpu in found) / GIB - CONTEXT
    return Machine(f"{len(found)} x {found[0].name}", len(found), round(gib, 1))


def faults(p: dict, arch: Architecture, machine: Machine = KAGGLE) -> list[str]:
    """What cannot fit, one line each with the parameter to change."""
    blocks = arch.blocks
    wrong = [block for block in p["protected"] if not -blocks <= block < blocks]
    said = []
    if wrong:
        known = f"blocks are 0 to {blocks - 1}, or -1 to -{blocks} from the end"
        said.append(f"protected {wrong}: {known}")
    steps = Needs(p, arch, machine.gpus).steps()
    for step in steps:
        if (gib := step.gib(step.batch)) > machine.gib:
            over = f"{gib:.1f} GiB of {machine.gib:g} on one GPU"
            said.append(f"{step.stage}, {step.what}: {over}; {advice(step, p, machine)}")
        if step.gpus > machine.gpus and sum(plan_weights(arch).values()) > machine.gib / 2:
            need = "two models at once need two GPUs; take a machine that has them"
            said.append(f"{step.stage}, {step.what}: {need}")
    disk = sum(step.disk for step in steps) / 1e9
    if disk > machine.disk_gb:
        lower = "set n_train lower, or smaller ranks"
        said.append(f"disk: {disk:.1f} GB of {machine.disk_gb:g}; {lower}")
    return said


def advice(step, p: dict, machine: Machine) -> str:
    """The largest value of a step's parameter that fits, or what else to do."""
    fits = [batch for batch in range(1, step.batch) if step.gib(batch) <= machine.gib]
    if fits:
        value = [fits[-1]] if isinstance(p[step.parameter], list) else fits[-1]
        return f"set {step.parameter}: {value}"
    if step.parameter == "importance_batch":
        return "leave it out of rankings, or take a smaller model or a larger GPU"
    return "take a smaller model or a larger GPU"


def check_base(values: dict) -> None:
    """DermError for a model folder that stage 02 would refuse; a hub's model is asked there."""
    from derm_compress.model import loading

    if values["device"] != "meta" and loading.is_here(values["model"]):
        loading.check_model(values["model"])


def check_embedder(plan) -> None:
    """DermError for a sentence transformer that is not found; the packaged one is there."""
    name, device = plan.values["embedder"], plan.values["device"]
    ranked = rankings(plan.values["rankings"])
    asked = any(ranking.criterion.name == "output_similarity" for ranking in ranked)
    if asked and name != "packaged" and device != "meta":
        from derm_compress.method.importance.embedder import Embedder

        folder = plan.root / name  # stages run in the project's root
        Embedder(str(folder) if folder.is_dir() else name)("any text")


def check_judge(values: dict) -> None:
    """DermError for a judge that stage 08 would refuse; nothing is asked yet."""
    from derm_compress.evaluate.judges.judge import choose_judge

    names = ("model", "url", "prompt", "concurrency")
    choose_judge(values["judge"], **{name: values[f"judge_{name}"] for name in names})


def check_forms(p: dict, arch: Architecture | None = None) -> None:
    """DermError for quantizers that stage 07 would refuse, on an architecture or on any."""
    if not p["methods"]:
        raise DermError("methods: name at least one, such as awq")
    inputs = {name: into for name, (_, into) in arch.linears.items()} if arch else {}
    asked = forms.forms(p["methods"], p["bits"], p["group_size"])
    if p["equal_bytes"]:
        asked.append(forms.Form(budgets.METHOD, group_size=p["group_size"]))
    forms.check_groups(asked, inputs)
    budgets.check(p["equal_bytes"], p["bits"][1:])
