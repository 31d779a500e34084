"""Allocations as variants of the study: measured together, decided by what they really do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from derm_compress.files import digest
from derm_compress.method.allocation.allocation import (
    BITS,
    CANDIDATE,
    JOINT,
    PROBE,
    RANDOM,
    Allocation,
)
from derm_compress.method.allocation.ways import Problem, joint, rivals
from derm_compress.method.iterate import each_model
from derm_compress.method.quantization.methods import MIXED
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model.memory import FP16
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import HEALED, ORIGINAL, find, recipe_of, variant

PROBED = 3  # bits of every linear: what a unit of cost is in nats is read off this one model


def allocations(
    problem: Problem,
    costs: pd.DataFrame,
    budgets: Mapping[float, int],
    *,
    operating: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """A row for the PROBE, and for each candidate within every budget {GiB: bytes of this model}.

    operating: the paper's depth here, where rivals are wanted, too. Columns: budget_gib,
    budget_bytes, way, variant (one name for equal ones), units_removed, mean_bits, bytes_planned,
    cost, allocation (JSON).
    """
    rows = [row(problem, costs, PROBE, problem.uniform(0, PROBED))]
    for gib, budget in budgets.items():
        found = [(CANDIDATE, one) for one in joint(problem, costs, budget)]
        if operating is not None:
            found += [(BITS, one) for _, one in found if not one.removed]
            found += rivals(problem, costs, budget, operating=operating, seed=seed)
        for way, one in found:
            told = {"budget_gib": gib, "budget_bytes": budget}
            rows.append(row(problem, costs, way, one) | told)
    return pd.DataFrame(rows)


def row(problem: Problem, costs: pd.DataFrame, way: str, found: Allocation) -> dict:
    sizes = {name: out * into for name, (out, into) in problem.arch.linears.items()}
    weights = {name: sizes[name.partition(".")[2]] for name in found.bits}
    bits = sum(weights[name] * bits for name, bits in found.bits.items())
    known = costs[costs.units_removed == len(found.removed)]
    places = known.block.astype(str) + "." + known.linear
    chosen = known.bits.to_numpy() == places.map(found.bits).to_numpy()
    return {
        "way": way,
        "variant": f"allocated-{digest(found.to_dict())[:8]}",
        "units_removed": len(found.removed),
        "mean_bits": bits / sum(weights.values()),
        "bytes_planned": sum(found.bytes.values()),
        "cost": known.cost[chosen].sum() if len(known) else None,
        "allocation": json.dumps(found.to_dict()),
    }


def allocated_variants(
    asked: pd.DataFrame, problem: Problem, original: Recipe, depths: Sequence[int]
) -> pd.DataFrame:
    """The original, it without the plan's first units, and what is asked: a variants frame."""
    rows = {ORIGINAL: variant(ORIGINAL, original)}
    for n in depths:
        if n:
            bare = original.pruned(problem.plan.kept(n), problem.plan.absent(n))
            rows[f"bare-{n}"] = variant(f"bare-{n}", bare, criterion=problem.plan.criterion)
    for one in asked.sort_values("units_removed", kind="stable").itertuples():
        recipe = Allocation.from_json(one.allocation).applied(original, problem.fingerprint)
        rows[one.variant] = described(one.variant, recipe, problem, one.mean_bits)
    return pd.DataFrame(rows.values())


def described(name: str, recipe: Recipe, problem: Problem, bits: float, **known) -> dict:
    how = {"method": problem.method, "quantizer": f"{problem.method}-{MIXED}", "bits": bits}
    return variant(name, recipe, criterion=problem.plan.criterion, **how, **known)


def decided(asked: pd.DataFrame, divergences: pd.DataFrame) -> pd.DataFrame:
    """What was asked, with `kl` and `predicted`; of each budget's candidates the nearest is JOINT.

    predicted: of the removal alone, and of the bits at the rate of the PROBE.
    """
    kl = divergences.groupby("variant").kl.mean()
    table = asked.assign(kl=asked.variant.map(kl))
    probe = table[table.way == PROBE].iloc[0]
    bare = [kl.get(f"bare-{n}") if n else 0.0 for n in table.units_removed]
    table["predicted"] = pd.Series(bare, table.index, dtype=float) + table.cost * (
        probe.kl / max(probe.cost, 1e-30)
    )
    candidates = table[table.way == CANDIDATE]
    best = candidates.loc[candidates.groupby("budget_gib").kl.idxmin()]
    return pd.concat([best.assign(way=JOINT), table], ignore_index=True)


def to_answer(
    table: pd.DataFrame, variants: pd.DataFrame, known: pd.DataFrame, problem: Problem
) -> pd.DataFrame:
    """Variants that answer: the original, what each way but chance has found, and the same bits
    for the healed model of the same removals, where stage 05 has one."""
    named = table[~table.way.isin([CANDIDATE, RANDOM, PROBE])].drop_duplicates("variant")
    rows = [variants[variants.variant.isin([ORIGINAL, *named.variant])]]
    for one in named.itertuples():
        source = find(known, one.units_removed, problem.plan.criterion, healed=True)
        if source:
            recipe = Allocation.from_json(one.allocation).quantized(recipe_of(known, source))
            name = one.variant + HEALED
            told = described(name, recipe, problem, one.mean_bits, healed=True, source=source)
            rows.append(pd.DataFrame([told]))
    return pd.concat(rows, ignore_index=True)


def held_bytes(variants: pd.DataFrame, *, store, device: str) -> pd.DataFrame:
    """variant, held: bytes of its packed weights, unquantized ones as in half precision."""
    pack = partial(quantize_step, packed=True)
    rows = []
    for turn in each_model(variants, store, device, "models packed", quantize=pack):
        tensors = {t.data_ptr(): t for t in turn.model.state_dict().values()}  # tied ones once
        held = [FP16 * t.numel() if t.is_floating_point() else t.nbytes for t in tensors.values()]
        rows.append({"variant": turn.variant, "held": sum(held)})
    return pd.DataFrame(rows, columns=["variant", "held"])
