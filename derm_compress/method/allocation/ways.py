"""Allocations within a budget: the programme's at every depth, and what they are to beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from derm_compress.errors import DermError
from derm_compress.method.allocation.allocation import (
    DROPS,
    LAST,
    PAPER,
    RANDOM,
    UNIFORM,
    WIDTHS,
    Allocation,
)
from derm_compress.method.allocation.programme import best_bits
from derm_compress.method.allocation.sizes import around, linear_bytes, planned_bytes
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization.methods import WHOLE
from derm_compress.model.loading import config_of
from derm_compress.model.memory import GIB
from derm_compress.model.recipe import Recipe
from derm_compress.model.shapes import Architecture, architecture
from derm_compress.model.units import SUBLAYERS, Unit
from derm_compress.model.variants import paper_depth

DROPPED = 4  # bits where blocks alone make a model small, as in the paper
DRAWS = 5
PART_OF = dict(zip(("self_attn", "mlp"), SUBLAYERS, strict=True))


@dataclass(frozen=True)
class Problem:
    """One model by its shapes, the order in which its units go, and how linears are rounded."""

    source: str
    fingerprint: str
    arch: Architecture
    plan: Plan
    method: str = "rtn"
    group_size: int = 64
    tied: bool = True

    def linears(self, removed: int) -> list[tuple[int, str]]:
        """(original block, name) of every linear that is left."""
        absent = set(self.plan.absent(removed))
        return [
            (block, name)
            for block in self.plan.kept(removed)
            for name in self.arch.linears
            if Unit(block, PART_OF[name.partition(".")[0]]) not in absent
        ]

    def allocation(self, removed: int, bits: dict[str, int]) -> Allocation:
        units = self.plan.removed(removed)
        planned = planned_bytes(self.arch, units, bits, self.method, self.group_size)
        how = {"method": self.method, "group_size": self.group_size, "bytes": planned}
        return Allocation(self.source, self.fingerprint, self.plan.blocks, bits, units, **how)

    def uniform(self, removed: int, width: int) -> Allocation:
        bits = {f"{block}.{name}": width for block, name in self.linears(removed)}
        return self.allocation(removed, bits)

    def least_cost(self, costs: pd.DataFrame, removed: int, budget: int) -> Allocation:
        """The programme's, for costs (block, linear, bits, cost) at this depth."""
        if fits(whole := self.uniform(removed, WHOLE), budget):
            return whole
        options = costs[["block", "linear", "bits", "cost"]].copy()
        options["bytes"] = [
            sum(linear_bytes(self.arch.linears[name], bits, self.method, self.group_size))
            for name, bits in zip(options.linear, options.bits, strict=True)
        ]
        room = budget - sum(around(self.arch, self.plan.removed(removed)).values())
        return self.allocation(removed, best_bits(options, room, tied=self.tied))

    def fitting(self, depths: Sequence[int], budget: int) -> list[int]:
        """Depths at which the narrowest width fits; DermError, with the least, for none."""
        least = {n: sum(self.uniform(n, WIDTHS[0]).bytes.values()) for n in depths}
        if min(least.values()) > budget:
            size = min(least.values())
            told = f"{budget} bytes are too few; the smallest that is feasible is {size}"
            raise DermError(f"budget: {told} ({size / GIB:.6f} GiB)")
        return [n for n in depths if least[n] <= budget]


def drop_depths(of_32: Sequence[int], plan: Plan) -> list[int]:
    """Depths to try, as the same fractions of this model and as far as the plan reaches; and 0."""
    return sorted({0, *(paper_depth(n, plan.blocks) for n in of_32)} & {*range(plan.most + 1)})


def fits(allocation: Allocation, budget: int) -> bool:
    return sum(allocation.bytes.values()) <= budget


def joint(problem: Problem, costs: pd.DataFrame, budget: int) -> Iterator[Allocation]:
    """The programme's best at each depth of the costs that fits; DermError for none."""
    by_depth = dict(list(costs.groupby("units_removed")))
    for n in problem.fitting(list(by_depth), budget):
        yield problem.least_cost(by_depth[n], n, budget)


def rivals(
    problem: Problem, costs: pd.DataFrame, budget: int, *, operating: int, seed: int
) -> Iterator[tuple[str, Allocation]]:
    """(way, allocation) of those that spend the same bytes by a rule, or by chance, as they fit."""
    every = (problem.uniform(n, DROPPED) for n in range(problem.plan.most + 1))
    if found := next((one for one in every if fits(one, budget)), None):
        yield DROPS, found
    paper = problem.uniform(operating, DROPPED)
    if fits(paper, budget):
        yield PAPER, paper
    widths = [width for width in WIDTHS if fits(problem.uniform(0, width), budget)]
    if widths:
        yield UNIFORM, problem.uniform(0, widths[-1])
        yield LAST, last_wide(problem, widths[-1], budget)
    draw, depths = np.random.default_rng([seed, 23]), costs.units_removed.unique()
    depths = problem.fitting(depths.tolist(), budget)
    for _ in range(DRAWS):
        n = int(draw.choice(depths))
        known = costs[costs.units_removed == n]
        yield RANDOM, problem.least_cost(known.assign(cost=draw.random(len(known))), n, budget)


def last_wide(problem: Problem, width: int, budget: int) -> Allocation:
    """All blocks at a width, and as many of the last as fit at the next."""
    found = problem.uniform(0, width)
    wider = next((bits for bits in WIDTHS if bits > width), width)
    for block in reversed(range(problem.plan.blocks)):
        own = {name: wider for name in found.bits if name.startswith(f"{block}.")}
        more = problem.allocation(0, found.bits | own)
        if not fits(more, budget):
            break
        found = more
    return found


def problem_of(recipe: Recipe, plan: Plan, method: str, group_size: int, *, tied: bool) -> Problem:
    """Of a recipe's model and the plan that was made for it."""
    arch = architecture(config_of(recipe.base))
    fingerprint = plan.fingerprint or recipe.fingerprint  # a published plan is for any model
    return Problem(recipe.base, fingerprint, arch, plan, method, group_size, tied)
