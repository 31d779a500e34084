"""The paper's depths on a model of any size, and the rule of the operating point. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from derm_compress.errors import DermError
from derm_compress.method.pruning.plan import Plan
from derm_compress.model.variants import half_up, paper_depth
from derm_compress.progress import say

if TYPE_CHECKING:
    import pandas as pd

PAPER_DEPTHS = {"operating": 6, "deeper": 9}  # of 32 blocks
FLOOR = 25.0  # percent, what no answer scores below
LOST = 1 / 3  # of the score above it, at the operating point


def plan_depths(of_32: Sequence[int], plan: Plan) -> list[int]:
    """The paper's depths (of 32) as the same fractions of this model, as far as the plan reaches.

    Says which it does not reach; DermError if it is none.
    """
    asked = sorted({paper_depth(n, plan.blocks) for n in of_32})
    found = [depth for depth in asked if depth <= plan.most]
    reach = f"plan {plan.criterion} goes as far as {plan.most} units"
    if asked and not found:
        limit = "depths lower"
        if "iterative" in plan.criterion:
            limit = "iterative_blocks higher"
        raise DermError(f"pruning {reach}, and depths begin at {asked[0]}; set {limit}")
    if beyond := asked[len(found) :]:
        say(f"{reach}: depths {beyond} are left out")
    return found


def choose_operating_point(scores: pd.DataFrame | None, plan: Plan, fixed: int = 0) -> dict:
    """Depth where about a third of the score above the floor is gone, and one half as deep again.

    As in the paper, where 80.12 -> 62.50 over a floor of 25 at 6 of 32. `scores` has blocks_removed
    and score (percent) on development items. `fixed` (of 32) overrules; where no depth loses from
    half and one and a half times that share, the paper's fractions are taken. Returns the
    plan's criterion, operating, deeper (blocks of its model) and why.
    """
    if fixed:
        why = "set by the parameter operating_blocks"
        if paper_depth(fixed, plan.blocks) > plan.most:
            why += ", as far as the plan goes"
        return _beside(min(paper_depth(fixed, plan.blocks), plan.most), plan, why)
    known = scores.dropna(subset="score").set_index("blocks_removed").score
    if known.empty:
        return _papers(plan, "there are no scores, so the paper's fractions")
    if known.get(0, FLOOR) <= FLOOR:
        return _papers(plan, "no score above the floor: the paper's fractions")
    lost = (known[0] - known.drop(0)) / (known[0] - FLOOR)
    lost = lost[lost.between(LOST / 2, 1.5 * LOST)]
    if lost.empty:
        why = "no depth loses about a third of the score above the floor: the paper's fractions"
        return _papers(plan, why)
    depth = int((lost - LOST).abs().idxmin())
    why = (
        f"removing {depth} blocks loses {lost[depth]:.0%} of the development score above the floor"
    )
    return _beside(depth, plan, why)


def _beside(depth: int, plan: Plan, why: str) -> dict:
    """A depth and one half as deep again."""
    deeper = min(half_up(1.5 * depth), plan.most)
    return {"criterion": plan.criterion, "operating": depth, "deeper": deeper, "why": why}


def _papers(plan: Plan, why: str) -> dict:
    depth, deeper = (paper_depth(n, plan.blocks) for n in PAPER_DEPTHS.values())
    depth = min(depth, plan.most)
    deeper = min(max(deeper, depth + 1), plan.most)
    return {"criterion": plan.criterion, "operating": depth, "deeper": deeper, "why": why}
