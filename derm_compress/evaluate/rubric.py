"""The rubric judge: checks the facts of an answer against the reference's and explains each point.

Scores on the paper's scale of 1 (wrong or unintelligible) to 4 (excellent). Deterministic, offline, no model.
Answers are untrusted text: they are searched for phrases, never interpreted.
"""

from __future__ import annotations

import json
import re
from functools import cache

import pandas as pd

from derm_compress.data import dialogue, synthetic

LIMIT = 2000  # characters of an answer that are read
ANCHORS = ((0.85, 4), (0.7, 3), (0.4, 2))  # F1 of the facts from which a score is given; else 1


@cache
def vocabulary(kind: str) -> dict[str, re.Pattern]:
    """Every fact that an answer to this kind of question can state, with its phrases: whole words only."""
    book = dialogue.book()["diseases"]
    facts: dict[str, list[str]] = {}
    if kind == "name":
        for spelling, name in dialogue.aliases().items():
            facts.setdefault(name, []).append(spelling)
    else:
        for entry in book.values():
            facts |= entry[kind]["facts"]
    if kind == "features":
        facts |= {
            f"{a}: {v}": _spoken(a, v) for a, values in synthetic.ATTRIBUTES.items() for v in values
        }
    ends = {
        name: "|".join(re.escape(p.lower()) + r"s?" for p in phrases)
        for name, phrases in facts.items()
    }
    return {name: re.compile(rf"\b(?:{pattern})\b") for name, pattern in ends.items()}


def _spoken(attribute: str, value: str) -> list[str]:
    return [dialogue.book()["phrases"]["count"][value]] if attribute == "count" else [value]


def stated(text: str, kind: str) -> set[str]:
    """Facts that a text states."""
    text = text[:LIMIT].lower()
    return {name for name, pattern in vocabulary(kind).items() if pattern.search(text)}


def rate(answer: str, reference: str, kind: str, *, stopped: bool = True) -> tuple[int, str]:
    """Score 1 to 4 and why. F1 of stated against expected facts; an answer that never ends loses a point."""
    expected, found = stated(reference, kind), stated(answer, kind)
    right, wrong, missing = expected & found, found - expected, expected - found
    f1 = 2 * len(right) / max(1, len(expected) + len(found))
    score = next((s for limit, s in ANCHORS if f1 >= limit), 1)
    why = f"facts F1 {f1:.2f}"
    for label, facts in (("right", right), ("missing", missing), ("wrong", wrong)):
        why += f"; {label}: {', '.join(sorted(facts))}" if facts else ""
    if not stopped and score > 1:
        return score - 1, why + "; never ends: one point less"
    return score, why


def rubric(answers: pd.DataFrame) -> pd.DataFrame:
    """Answers with judge, score and why added, one row each."""
    rated = [
        rate(a, r, q, stopped=bool(s))
        for a, r, q, s in zip(
            answers.answer, answers.reference, answers.question, answers.stopped, strict=True
        )
    ]
    return answers.assign(
        judge="rubric", score=[float(s) for s, _ in rated], why=[w for _, w in rated]
    )


def explanation() -> str:
    """The rubric in words, from its own numbers: what Figure 6 shows."""
    lines = ["Rubric judge (1 to 4, reported as mean/4 in percent)", ""]
    lines += [
        "Facts are phrases from the reference answers; facts of other diseases or other picture"
    ]
    lines += ["attributes count as wrong. F1 = 2 x right / (expected + stated)."]
    lines += [f"  {score}: F1 of at least {limit}" for limit, score in ANCHORS]
    lines += ["  1: anything else", "An answer without an end loses one point, not below 1.", ""]
    counts = {kind: len(vocabulary(kind)) for kind in dialogue.QUESTIONS}
    return "\n".join([*lines, "Facts known: " + ", ".join(f"{k} {n}" for k, n in counts.items())])


def frozen_hash() -> str:
    """Hash of everything the rubric rests on, so that a report can say which one scored it."""
    import hashlib

    rules = {
        kind: {n: p.pattern for n, p in vocabulary(kind).items()} for kind in dialogue.QUESTIONS
    }
    return hashlib.sha256(json.dumps([rules, ANCHORS, LIMIT], sort_keys=True).encode()).hexdigest()[
        :16
    ]
