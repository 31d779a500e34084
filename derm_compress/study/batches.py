"""Batch sizes that a run leaves open: as many as fit a GPU, one number each on a CPU. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from derm_compress.progress import say

if TYPE_CHECKING:
    from derm_compress.model.shapes import Architecture

OPEN = 0
ON_CPU = {  # fixed: a neighbour in a batch may move a last digit
    "batch_size": 120,
    "importance_batch": 120,
    "activation_batch": 12,
    "quantization_batch": 12,
}
SIZES = (1, 2, *(3 * 2**k for k in range(9)))  # few, so that a run resumed elsewhere keeps its own
SHARE = 0.8  # of a GPU's memory: plans hold tensors only


def of_stage(plan, stage: str, *, measure: bool) -> dict:
    """The values of a stage's parameters (of a plan.Plan) with numbers for open batch sizes.

    measure: look at the memory of the GPUs, where the run uses them.
    """
    values = plan.parameters(stage)
    left = [name for name in ON_CPU if values.get(name) == OPEN]
    rooms = []
    if left and measure and plan.values["device"] == "cuda":
        from derm_compress.model import devices

        rooms = devices.rooms()
    if not rooms:  # where a GPU is asked for and missing, the checks say so
        return values | {name: ON_CPU[name] for name in left}
    from derm_compress.model import loading, shapes

    arch = shapes.architecture(loading.config_of(plan.values["model"]))
    found = settled(plan.values, arch, len(rooms), min(rooms))
    for name in left:
        say(f"{name}: {found[name]}, as many as {min(rooms):.1f} GiB of GPU memory hold")
    return values | {name: found[name] for name in left}


def settled(p: dict, arch: Architecture, gpus: int, gib: float) -> dict:
    """The parameters with the largest of SIZES for open batch sizes, planned for `gib` a GPU.

    1 where none fits: what to do then, the preflight says.
    """
    left = [name for name in ON_CPU if p[name] == OPEN]
    if not left:
        return p
    from derm_compress.study.needs import Needs  # half a second that no CPU needs

    needs = Needs(p, arch, gpus, gib)
    found = {}
    for name in left:
        steps = [step for step in needs.steps() if step.parameter == name]
        fitting = [n for n in SIZES if all(step.gib(n) <= SHARE * gib for step in steps)]
        found[name] = max(fitting, default=1)
    return p | found
