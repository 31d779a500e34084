"""The rules by which a run reproduces the paper or not, and what they are tested on.

Shapes (parameters, memory) are tested on the planned 7B model. Scores are tested on the run's own
model: as values where that is the paper's size, else as directions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from derm_compress.evaluate import metrics
from derm_compress.report.paper import model
from derm_compress.report.results import Results, answers_of

REPRODUCED, NOT, UNTESTED = "reproduced", "not reproduced", "untestable here"
OURS = "not claimed"  # what is ours alone and stands beside a claim: no verdict on the paper
UNSCORED = "no scores of this model in this run"
LOOSE, LOOSE_GIB = 0.03, 0.30  # of planned against printed memory: a share at 16 bits, GiB at 4
NEAR = 5  # points from the floor that still count as unintelligible
LIMIT = 4.0  # GB that the abstract promises
TIMELY = 0.10  # of a printed latency, on the paper's model and GPU


class Verdict(NamedTuple):
    verdict: str
    why: str


class Tested(NamedTuple):
    """What the paper has as a number, how it was tested, and ours: a value, or one and its ends."""

    paper: float | None
    tested_as: str
    told: Verdict
    ours: Sequence[float | None] = ()

    def columns(self) -> dict:
        value, lo, hi = [*self.ours, None, None, None][:3]
        return {
            "verdict": self.told.verdict,
            "paper": self.paper,
            "ours": value,
            "ours_lo": lo,
            "ours_hi": hi,
            "tested_as": self.tested_as,
            "why": self.told.why,
        }


def verdict(holds: bool, why: str) -> Verdict:
    return Verdict(REPRODUCED if holds else NOT, why)


def rounds_to(printed: float, ours: float) -> Verdict:
    """Whether ours, rounded like the printed number, is the printed number."""
    digits = len(f"{printed:g}".partition(".")[2])
    same = abs(ours - printed) <= 0.5 * 10**-digits + 1e-9
    return verdict(same, f"rounds to {ours:.{digits}f}")


def fits(printed: float, gib: float, *, bits: int) -> Verdict:
    """Whether planned weights are near enough to the printed VRAM."""
    apart, allowed = abs(gib - printed), LOOSE * printed if bits == 16 else LOOSE_GIB
    return verdict(apart <= allowed, f"{apart:.2f} GiB apart, {allowed:.2f} allowed")


def lies_in(printed: float, lo: float, hi: float) -> Verdict:
    """Whether the paper's value lies in the run's interval."""
    inside = lo <= printed <= hi
    return verdict(inside, f"the paper's {printed:g} lies {'in' if inside else 'outside'} it")


def near(printed: float, ms: float) -> Verdict:
    """Whether a latency is near enough to the printed one."""
    apart = ms / printed - 1
    return verdict(abs(apart) <= TIMELY, f"{apart:+.0%} apart on a T4, {TIMELY:.0%} allowed")


def points_to(claimed: float, change: metrics.Difference) -> Verdict:
    """Whether a paired difference's interval lies on the claim's side of 0."""
    if not change.n:
        return Verdict(UNTESTED, "no scores of both models in this run")
    if change.lo <= min(0, claimed) and max(0, claimed) <= change.hi:
        why = f"too few answers: the interval holds 0 and the paper's {claimed:+.4g}"
        return Verdict(UNTESTED, why)
    if change.lo <= 0 <= change.hi:
        return Verdict(NOT, f"the interval holds 0 and not the paper's {claimed:+.4g}")
    if (change.lo > 0) == (claimed > 0):
        return Verdict(REPRODUCED, "the same direction")
    return Verdict(NOT, "the opposite direction, clearly")


def stable(blocks: int, change: metrics.Difference) -> Verdict:
    """Whether a loss of NEAR points can be excluded; too wide an interval tells nothing."""
    removed = f"{blocks} blocks removed"
    if change.hi < 0:
        return Verdict(NOT, f"{removed}, clearly below the unpruned model")
    if change.lo > -NEAR:
        return Verdict(REPRODUCED, f"{removed}, less than {NEAR} points lost")
    return Verdict(UNTESTED, f"{removed}, too few answers to exclude a loss of {NEAR} points")


def at_papers_size(results: Results) -> bool:
    """Whether the run's own model is as large as the paper's."""
    if results.memory is None:
        return False
    return abs(results.memory.params_b.max() * 1e9 / model.TOTAL - 1) < 0.01


def machine(results: Results) -> str:
    """The GPU that times were taken on; empty for a CPU."""
    known = results.one_prompt is not None and "gpu" in results.one_prompt
    return str(results.one_prompt.gpu.iloc[0]) if known else ""


def on_papers_machine(results: Results) -> bool:
    """Whether times are of the paper's model on its GPU."""
    return at_papers_size(results) and re.search(r"\bT4\b", machine(results)) is not None


def difference(answers, one: str | None, other: str | None) -> metrics.Difference:
    """Paired, for its interval alone."""
    pair = answers_of(answers, one), answers_of(answers, other)
    return metrics.paired_difference(*pair, n_permutations=1)
