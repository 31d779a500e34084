"""A model folder within a budget of memory: layers and bits chosen by what the model then says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from derm_compress.data.items import Item
from derm_compress.errors import DermError
from derm_compress.evaluate.export import export_model
from derm_compress.files import Journal, check_new, write_json
from derm_compress.method.allocation.allocation import JOINT, Allocation
from derm_compress.method.allocation.candidates import allocated_variants, allocations, decided
from derm_compress.method.allocation.costs import bit_costs
from derm_compress.method.allocation.divergence import divergences
from derm_compress.method.allocation.ways import Problem
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.measure import measure_importance, protected_blocks
from derm_compress.method.importance.plans import pruning_plans
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model import anatomy, devices, loading, removal, shapes
from derm_compress.model.memory import GIB
from derm_compress.model.recipe import Recipe
from derm_compress.model.units import Unit
from derm_compress.model.variants import paper_depth
from derm_compress.progress import say

PROTECTED = (0, 1, -1)  # the paper's
DEPTHS = (0, 2, 4, 6, 9, 12)  # of 32 blocks, that may go
ALLOCATION = "allocation.json"


def allocate_folder(
    name: str,
    path: Path,
    budget_gib: float,
    items: Sequence[Item],
    unseen: Sequence[Item],
    images: np.ndarray,
    *,
    ranking: str,
    device: str = "cpu",
    batch_size: int = 12,
    **how,
) -> Allocation:
    """Write a model within so many GiB, weights and running together, and its allocation.json.

    `items` order the blocks and cost the bits; `unseen` ones decide. how: of a Problem.
    """
    check_new(path, "allocate")
    config, budget = loading.config_of(name), int(budget_gib * GIB)
    if getattr(config, "quantization_config", None):
        raise DermError(f"allocate: {name} is quantized; allocate the model that it was made of")
    arch = shapes.architecture(config)
    depths = sorted({paper_depth(n, arch.blocks) for n in DEPTHS})
    free = map(Unit, range(arch.blocks))
    anyhow = Problem(name, "", arch, Plan("", tuple(free), (), arch.blocks), **how)
    anyhow.fitting(depths, budget)  # refuses before a weight is read
    recipe, plan = _plan(name, items, images, ranking, device, depths[-1])
    problem = replace(anyhow, fingerprint=recipe.fingerprint, plan=plan)
    where = {"store": None, "device": device}
    rounding = {"method": problem.method, "group_size": problem.group_size}
    costs = bit_costs(recipe, plan, depths, items, images, **where, **rounding)
    asked = allocations(problem, costs, {budget_gib: budget})
    variants = allocated_variants(asked, problem, recipe, depths)
    told = {"batch_size": batch_size, "quantize": quantize_step}
    table = decided(asked, divergences(variants, unseen, images, **where, **told))
    best = table[table.way == JOINT].iloc[0]
    found = replace(Allocation.from_json(best.allocation), predicted=float(best.predicted))
    applied = found.applied(recipe, recipe.fingerprint)
    export_model(applied.to_json(), None, path, half=True)
    write_json(path / ALLOCATION, found.to_dict())
    say(
        f"{best.bytes_planned} of {budget} bytes: {best.units_removed} of {arch.blocks} blocks "
        f"removed, {best.mean_bits:.2f} bits, divergence {best.kl:.4f} nats a token"
    )
    return found


def _plan(name, items, images, ranking: str, device: str, most: int) -> tuple[Recipe, Plan]:
    """The model's recipe, and the order in which a ranking would remove its blocks."""
    model, processor = loading.load_base(name, device)
    if lacking := removal.lacking(model):
        raise DermError(f"allocate: {name} lacks {lacking[0]}; allocate the model it was made of")
    recipe = Recipe(name, anatomy.fingerprint(model), len(anatomy.blocks(model)))
    c, journal = Calibration(model, processor, items, images), Journal()
    measured = measure_importance([ranking], c, journal)
    spared = protected_blocks(model, PROTECTED)
    plans = pruning_plans([ranking], measured, c, protected=spared, most=most, journal=journal)
    devices.let_go(model)
    return recipe, Plan.from_dict(plans[ranking])
