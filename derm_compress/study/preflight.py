"""Does a run fit a machine? What each stage needs is said before any weight is loaded, and refused if it is not there.

No torch until a GPU is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.method.importance.rankings import rankings
from derm_compress.method.quantization import budgets, forms
from derm_compress.model import memory, shapes
from derm_compress.model.memory import GIB
from derm_compress.model.shapes import Architecture
from derm_compress.study import cost
from derm_compress.study.stage_costs import ANSWER, PROMPT, Costs, Step, by_stage

CONTEXT = 0.54  # GiB of a GPU that CUDA keeps: 14.2 of the 14.74 that a T4 reports are left
TIMES = [
    "variant",
    "blocks_removed",
    "bits",
    "disk_gib",
    "t4_prefill_ms",
    "t4_decode_ms_per_token",
    "t4_total_ms_per_token",
]
TABLE = ["stage", "gpu_gib", "set_by", "disk_gib", "minutes", "session"]


@dataclass(frozen=True)
class Machine:
    """Where a run shall fit: GiB usable of each GPU, GB of disk that stay, hours of one session."""

    name: str
    device: cost.Device
    gpus: int
    gib: float
    disk_gb: float
    hours: float


SESSION = 11.3  # hours, of the 12 that Kaggle gives: the rest is for saving
KAGGLE = Machine("Kaggle, two T4", cost.T4, gpus=2, gib=14.2, disk_gb=20, hours=SESSION)


def table(p: dict, arch: Architecture, machine: Machine = KAGGLE) -> pd.DataFrame:
    """TABLE: one row a stage; `set_by` is what needs most memory, `session` the SESSION that it falls into."""
    rows, session, hours = [], 1, 0.0
    for stage, steps in by_stage(Costs(p, arch, machine.device, machine.gpus).steps()).items():
        most = max(steps, key=lambda step: step.gib(step.batch))
        taken = sum(step.seconds for step in steps) / 3600
        session, hours = (
            (session + 1, taken)
            if hours and hours + taken > machine.hours
            else (session, hours + taken)
        )
        by = f"{most.what}, {most.parameter} {most.batch}" if most.parameter else most.what
        disk = sum(step.disk for step in steps) / GIB
        rows.append((stage, most.gib(most.batch), by, disk, 60 * taken, session))
    return pd.DataFrame(rows, columns=TABLE)


def times(
    variants: pd.DataFrame, arch: Architecture, device: cost.Device = cost.T4
) -> pd.DataFrame:
    """TIMES: milliseconds of one question (ANSWER new tokens) on a device, and the size of a checkpoint, by variant."""
    rows, before = [], arch.image_tokens + PROMPT
    for row in variants.to_dict("records"):
        removed = {key: int(row.get(key, 0)) for key in memory.REMOVED}
        form = removed | {key: row[key] for key in ("method", "bits", "group_size")}
        prefill = cost.prefill_seconds(
            arch, device, tokens=before, blocks_removed=removed["blocks_removed"]
        )
        decode = cost.decode_seconds(arch, device, batch=1, tokens=ANSWER, before=before, **form)
        size = sum(memory.plan_weights(arch, **form).values())
        told = 1e3 * prefill, 1e3 * decode / ANSWER, 1e3 * (prefill + decode) / ANSWER
        rows.append((row["variant"], row["blocks_removed"], row["bits"], size, *told))
    return pd.DataFrame(rows, columns=TIMES)


def faults(p: dict, arch: Architecture, machine: Machine = KAGGLE) -> list[str]:
    """What cannot fit, one line each with the parameter to change."""
    blocks = arch.blocks
    wrong = [block for block in p["protected"] if not -blocks <= block < blocks]
    said = (
        [f"protected {wrong}: blocks are 0 to {blocks - 1}, or -1 to -{blocks} from the end"]
        if wrong
        else []
    )
    steps = Costs(p, arch, machine.device, machine.gpus).steps()
    for step in steps:
        gib = step.gib(step.batch)
        if gib > machine.gib:
            fits = [batch for batch in range(1, step.batch) if step.gib(batch) <= machine.gib]
            least = "leave it out of rankings, or " * (step.parameter == "importance_batch")
            most = fits and ([fits[-1]] if isinstance(p[step.parameter], list) else fits[-1])
            change = (
                f"set {step.parameter}: {most}"
                if fits
                else f"{least}take a smaller model or a larger GPU"
            )
            said.append(
                f"{step.stage}, {step.what}: {gib:.1f} GiB of {machine.gib:g} on one GPU; {change}"
            )
        if step.gpus > machine.gpus and sum(memory.plan_weights(arch).values()) > machine.gib / 2:
            said.append(
                f"{step.stage}, {step.what}: two models at once need two GPUs; take a machine that has them"
            )
    disk = sum(step.disk for step in steps) / 1e9
    if disk > machine.disk_gb:
        said.append(
            f"disk: {disk:.1f} GB of {machine.disk_gb:g}; set n_train lower, or smaller ranks"
        )
    for stage, parts in by_stage(steps).items():
        if (hours := sum(step.seconds for step in parts) / 3600) > machine.hours:
            said.append(
                f"{stage}: {hours:.1f} h of {machine.hours:g} in one session; {shorter(parts)}"
            )
    return said


def shorter(parts: list[Step]) -> str:
    """Which parameter makes a stage shorter."""
    longest = max(parts, key=lambda step: step.seconds)
    known = {"fine-tuning": {"02_finetune": "finetune_steps", "05_sft": "sft_steps"}}
    known |= {
        "search": "quantization_items",
        "errors": "quantization_items",
        "statistics": "activation_items",
    }
    others = {"08_evaluation": "n_heldout", "03_layer_importance": "importance_items"}
    name = known.get(longest.what, others.get(longest.stage, "n_test"))
    return f"set {name[longest.stage] if isinstance(name, dict) else name} lower"


def says(p: dict, arch: Architecture, machine: Machine = KAGGLE) -> str:
    """The table as text, with totals."""
    made = table(p, arch, machine)
    shown = made.assign(
        gpu_gib=made.gpu_gib.round(1), disk_gib=made.disk_gib.round(2), minutes=made.minutes.round()
    )
    total = f"{made.minutes.sum() / 60:.1f} h in {made.session.max()} session(s) of at most {machine.hours:g} h"
    return f"planned for {machine.name}:\n{shown.to_string(index=False)}\n{total}, {made.disk_gib.sum():.1f} GiB of disk"


def here(device: str) -> Machine:
    """The machine at hand where it has a GPU, at a T4's pace; else Kaggle's."""
    import torch

    if device == "cuda" and torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        usable = min(found.total_memory for found in names) / GIB - CONTEXT
        return replace(
            KAGGLE, name=f"{len(names)} x {names[0].name}", gpus=len(names), gib=round(usable, 1)
        )
    return KAGGLE


def foresee(plan, *, refuse: bool) -> None:
    """Prints what the stages of a run will need; before a GPU is asked for it, DermError where that is not to be had.

    plan: plan.Plan. Nothing is said of what a run on a CPU needs. A judging model is told by the headers of its
    weights; its hours are not planned.
    """
    values, device = plan.values, plan.values["device"]
    if refuse:
        check_forms(values)
        check_embedder(plan)
    if device == "cpu" and not (refuse and _missing(plan, "07_quantization")):
        return
    from derm_compress.evaluate import judging
    from derm_compress.model import loading

    arch = shapes.architecture(loading.config_of(values["model"]))
    if refuse:
        check_forms(values, arch)
    if device == "cpu" or (device == "meta" and refuse):  # the report says it
        return
    machine = here(device)
    print(f"{plan.run}, {says(values, arch, machine)}", flush=True)
    if device == "cuda" and refuse:
        check(values, arch, machine)
        if values["judge"] == "transformers":
            how = {"form": values["judge_prompt"], "device": device, "root": plan.root}
            judging.choose("transformers", model=values["judge_model"], **how).foresee()
    for fault in faults(values, arch, machine):
        print(fault, flush=True)


def _missing(plan, stage: str) -> bool:
    """Whether a stage has yet to be computed."""
    return stage in plan.keys and bool(plan.store.fault(stage, plan.keys[stage]))


def check_embedder(plan) -> None:
    """DermError for a sentence transformer that stage 03 will need and not find; the packaged one is there."""
    name, stage = plan.values["embedder"], "03_layer_importance"
    asks = any(
        ranking.criterion == "output_similarity" for ranking in rankings(plan.values["rankings"])
    )
    if not asks or name == "packaged" or plan.values["device"] == "meta":
        return
    if _missing(plan, stage):
        from derm_compress.method.importance import criteria

        folder = (
            plan.root / name
        )  # a relative one as stages, which run in the project's root, find it
        criteria.Embedder(str(folder) if folder.is_dir() else name)("any text")


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


def check(p: dict, arch: Architecture, machine: Machine = KAGGLE) -> None:
    """DermError with all that cannot fit."""
    if said := faults(p, arch, machine):
        raise DermError(f"this run does not fit {machine.name}: " + "; ".join(said))
