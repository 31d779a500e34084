"""Does a run fit its machine? GPU memory and disk, planned from shapes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from derm_compress.model import shapes
from derm_compress.model.memory import CONTEXT
from derm_compress.model.shapes import Architecture
from derm_compress.study import batches
from derm_compress.study.needs import Needs, Step

CLOSE = 0.3  # GiB: a plan holds tensors only


@dataclass(frozen=True)
class Machine:
    """Where a run shall fit: GiB usable of each GPU, GB of disk that stay."""

    name: str
    gpus: int
    gib: float
    disk_gb: float = 20


KAGGLE = Machine("Kaggle, two T4", gpus=2, gib=14.56 - CONTEXT)


def architecture(values: dict) -> Architecture:
    from derm_compress.model import loading

    return shapes.architecture(loading.config_of(values["model"]))


def says(plan, stages: Collection[str]) -> str:
    """What stages of a run will need, of the machine at hand if it has a GPU, or Kaggle's."""
    machine = here() or KAGGLE
    arch = architecture(plan.values)
    spread = Needs(plan.values, arch, machine.gpus, machine.gib).spread
    over = ", over all of which the model lies when it answers" if spread else ""
    lines = [f"{plan.run}, planned for {machine.name}{over}:"]
    steps = steps_of(stages, plan.values, arch, machine)
    for stage in dict.fromkeys(step.stage for step in steps):
        parts = [step for step in steps if step.stage == stage]
        most = max(parts, key=lambda step: step.gib(step.batch))
        disk = sum(step.disk for step in parts) / 1e9
        by = f"{most.what}, {most.parameter} {most.batch}" if most.parameter else most.what
        lines.append(f"{stage:<24} {most.gib(most.batch):5.1f} GiB ({by}), {disk:.2f} GB of disk")
        if 0 <= machine.gib - most.gib(most.batch) < CLOSE:
            lines[-1] += f"; close to the {machine.gib:.2f} GiB of one GPU"
    return "\n".join([*lines, *faults(plan.values, arch, machine, stages)])


def steps_of(stages: Collection[str], p: dict, arch: Architecture, machine: Machine) -> list[Step]:
    """The parts of these stages, of all where none is named."""
    p = batches.settled(p, arch, machine.gpus, machine.gib)
    steps = Needs(p, arch, machine.gpus, machine.gib).steps()
    return [step for step in steps if not stages or step.stage in stages]


def share(plan, stage: str, machine: Machine | None) -> tuple[int, float]:
    """How many of a machine's GPUs a stage of a run (a plan.Plan) uses, and GiB of each."""
    machine = machine or here() or KAGGLE
    arch = architecture(plan.values)
    steps = steps_of([stage], plan.values, arch, machine)
    gib = max((step.gib(step.batch) for step in steps), default=0.0)
    if not gib:
        return 0, 0.0
    spread = Needs(plan.values, arch, machine.gpus, machine.gib).spread
    return machine.gpus if spread else 1, gib


def here() -> Machine | None:
    """The machine at hand, where it has a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    from derm_compress.model import devices

    gib = devices.usable()
    return Machine(f"{len(gib)} x {torch.cuda.get_device_name()}", len(gib), min(gib))


def faults(
    p: dict, arch: Architecture, machine: Machine = KAGGLE, stages: Collection[str] = ()
) -> list[str]:
    """What cannot fit of these stages (or all), one line each with the parameter to change."""
    said = []
    steps = steps_of(stages, p, arch, machine)
    for step in steps:
        if (gib := step.gib(step.batch)) > machine.gib:
            over = f"{gib:.2f} GiB of {machine.gib:.2f} on one GPU"
            said.append(f"{step.stage}, {step.what}: {over}; {advice(step, p, machine)}")
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
