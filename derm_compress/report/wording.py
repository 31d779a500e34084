"""Words for what is computed: scores with intervals, verdicts of paired comparisons, names. No torch."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.method.quantization.methods import METHODS
from derm_compress.report.results import answers_of

NAMES = {name: method.words for name, method in METHODS.items()}
NAMES |= {"published": "the published order", "last": "last blocks first"}
WAYS = {  # what a ranking's ending says: in short, and explained
    "text": ("text only", "ranked on the questions without pictures"),
    "iterative": ("iterative", "scored anew after each removal"),
    "contiguous": ("contiguous", "one run of neighbouring blocks goes"),
    "unprotected": ("unprotected", "no block is protected"),
    "attention": ("attentions", "attentions go, their MLPs stay"),
    "mlp": ("MLPs", "MLPs go, their attentions stay"),
    "sublayers": ("sublayers", "attentions and MLPs go one by one"),
}
CRITERIA = {  # by what a ranking's blocks go
    "output_similarity": "how much the answers change without the block",
    "perplexity": "how unlikely the reference answers become without the block",
    "block_influence": "1 minus the cosine of what goes into the block and what comes out",
    "angular": "the angle between the same two at the last token",
    "taylor": "the sum of absolute weights times gradients",
    "magnitude": "the sum of absolute weights",
    "last": "from the end, block by block",
    "random": "a random order",
    "published": "the order that comes with the paper's code",
}


def percent(score) -> str:
    """62.5 % (58.1 to 66.9), from a metrics.Score or a table's row."""
    lo, hi = (
        (score.score_lo, score.score_hi) if hasattr(score, "score_lo") else (score.lo, score.hi)
    )
    return f"{score.score:.1f} % ({lo:.1f} to {hi:.1f})"


def verdict(change, first: str, second: str) -> str:
    """Which of two scored better, or that the interval of their difference holds 0; change: difference, lo, hi."""
    if change.lo <= 0 <= change.hi:
        interval = f"{change.difference:.1f} points, {change.lo:.1f} to {change.hi:.1f}"
        return f"{first} cannot be told apart from {second} ({interval})"
    lo, hi = sorted((abs(change.lo), abs(change.hi)))
    side = "above" if change.lo > 0 else "below"
    return (
        f"{first} scores {abs(change.difference):.1f} points ({lo:.1f} to {hi:.1f}) {side} {second}"
    )


def compare(answers: pd.DataFrame | None, one: str, other: str) -> metrics.Difference:
    return metrics.paired_difference(answers_of(answers, one), answers_of(answers, other))


def words(name: str) -> str:
    """A method's or a ranking's name for people: output similarity (text only)."""
    base, *ways = name.split("-")
    if ways and set(ways) <= set(WAYS):
        return f"{words(base)} ({', '.join(WAYS[way][0] for way in ways)})"
    return NAMES.get(name, name.replace("_", " "))


def explained(names: Iterable[str]) -> str:
    """What the endings of these rankings' names say; empty where there are none."""
    known = {way for name in names for way in name.split("-")[1:]}
    return "; ".join(f"{short}: {text}" for way, (short, text) in WAYS.items() if way in known)


def criteria_explained(names: Iterable[str]) -> str:
    """By what the blocks of these rankings go, then what their endings say; empty where none is known."""
    names = list(names)
    known = {name.split("-")[0] for name in names}
    said = [f"{'random-0 and so on' if name == 'random' else words(name)}, {text}" for name, text in CRITERIA.items()
            if name in known]  # fmt: skip
    endings = explained(names)
    return "; ".join([*said, *([endings] if endings else [])])


def listed(numbers) -> str:
    return ", ".join(map(str, numbers)) or "none"


def joined(names: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
