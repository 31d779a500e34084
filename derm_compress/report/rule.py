"""The one rule for every claim: on which side of a bound does an interval lie?

A claim of so many points holds beyond its bound, the claim less its margin. It holds where the
whole interval lies beyond it, does not hold where the whole interval falls short of it, and is
open else: claims of a difference and of none are tested alike (two one-sided tests, TOST). The
margins are fixed in paper/margins.yaml.
"""

from __future__ import annotations

from math import copysign
from pathlib import Path
from statistics import NormalDist

import pandas as pd
import yaml

from derm_compress.evaluate import metrics

FILE = Path(__file__).with_name("paper") / "margins.yaml"
MARGINS = yaml.safe_load(FILE.read_text("utf-8"))
POINTS, PERCENT, SURE = MARGINS["points"], MARGINS["percent"], MARGINS["sure"]
HOLDS, NOT, OPEN, UNTESTABLE = "holds", "does not hold", "open", "untestable here"
Z = NormalDist().inv_cdf(metrics.TAILS[1])


def bound(claimed: float, margin: float) -> float:
    """The claim less its margin, or less its half where that is nearer."""
    return claimed - copysign(min(margin, MARGINS["share_of_claim"] * abs(claimed)), claimed)


def p_value(value: float, lo: float, hi: float, at: float) -> float:
    """Two-sided p of a true value `at`, from a 95 % interval; below 0.05 where it lies outside."""
    reach = value - lo if at < value else hi - value
    if reach <= 0:
        return 1.0 if value == at else 0.0
    return 2 * NormalDist().cdf(-Z * abs(value - at) / reach)


def side(lo: float, hi: float, at: float, above: bool) -> str:
    """Whether the interval lies beyond the bound, short of it, or on both sides."""
    if lo <= at <= hi:
        return OPEN
    return HOLDS if (lo > at) == above else NOT


def alike(lo: float, hi: float) -> bool:
    """Whether a larger difference than the margin can be excluded either way."""
    return lo > -POINTS and hi < POINTS


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """`p`, `p_holm` and `verdict` beside claims: ours, lo, hi, bound, above, counted, untestable.

    Only counted claims that can be tested share Holm's correction.
    """
    known = table.ours.notna() & table.lo.notna() & ~table.untestable
    rows = table[known & table.counted]
    p = [p_value(*row) for row in rows[["ours", "lo", "hi", "bound"]].to_numpy(float)]
    table = table.assign(p=pd.Series(p, rows.index, dtype=float))
    table["p_holm"] = metrics.holm(table.p)
    sides = table[["lo", "hi", "bound", "above"]].itertuples(index=False)
    table["verdict"] = [side(*row) for row in sides]
    table.loc[table.p_holm.ge(SURE), "verdict"] = OPEN
    return table.assign(verdict=table.verdict.where(known, UNTESTABLE))


def widened(value: float, lo: float, hi: float, variance: float) -> tuple[float, float]:
    """An interval over pictures with a variance of trainings added to it."""
    if variance <= 0:
        return lo, hi
    more = Z**2 * variance
    return value - ((value - lo) ** 2 + more) ** 0.5, value + ((hi - value) ** 2 + more) ** 0.5
