"""Removals whose effect is known on pretrained decoders: what no criterion has to find. No torch.

The first block carries all the others' input, a run of deep blocks is hardly missed (Gromov et al.
2024), and a criterion is worth its cost where it beats chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from derm_compress.method.pruning.plan import Plan
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import ORIGINAL, paper_depth, variant

MODERATE = 8  # of 32 blocks, a quarter
ORDERS = 5  # random ones
WHOLE, PROTECTED, CHOSEN, RUN, RANDOM = "whole", "protected", "chosen", "run", "random"


def removal_controls(original: Recipe, plan: Plan, run: Plan | None) -> pd.DataFrame:
    """The original without each protected block alone, and without a quarter of its blocks.

    A variants frame; its column `control` says which these are: the plan's first, a run of
    neighbours, and those of ORDERS random draws.
    """
    n = min(paper_depth(MODERATE, plan.blocks), plan.most)
    rows = [_without(original, WHOLE, ())]
    rows += [_without(original, PROTECTED, [block], block) for block in plan.protected]
    rows.append(_without(original, CHOSEN, [unit.block for unit in plan.removed(n)]))
    if run and n <= run.most:
        rows.append(_without(original, RUN, [unit.block for unit in run.removed(n)]))
    rows += [_without(original, RANDOM, drawn(plan, n, draw), draw) for draw in range(ORDERS)]
    return pd.DataFrame(rows)


def drawn(plan: Plan, n: int, draw: int) -> list[int]:
    """n blocks that may go, by chance."""
    free = [block for block in range(plan.blocks) if block not in plan.protected]
    return np.random.default_rng([draw, 13]).choice(free, n, replace=False).tolist()


def _without(original: Recipe, control: str, gone: Sequence[int], number: int | None = None):
    kept = [block for block in range(original.blocks) if block not in gone]
    recipe = original.pruned(kept) if gone else original
    name = "-".join([ORIGINAL, control] + ([] if number is None else [str(number)]))
    return variant(name, recipe) | {"control": control}
