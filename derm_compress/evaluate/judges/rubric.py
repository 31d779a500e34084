"""The rubric judge: checks the facts of an answer against the reference's and explains each point.

Scores on the paper's scale of 1 (wrong or unintelligible) to 4 (excellent). Deterministic, offline,
no model. Answers are untrusted text: they are searched for phrases, never interpreted.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache

import pandas as pd

from derm_compress.data import dialogue, synthetic
from derm_compress.evaluate.schema import SCORE

LIMIT = 2000  # characters of an answer that are read
ANCHORS = ((0.85, 4), (0.7, 3), (0.4, 2))  # F1 of the facts from which a score is given; else 1


@cache
def vocabulary(kind: str) -> dict[str, re.Pattern]:
    """Every fact that an answer to this kind of question can state: its phrases, as whole words."""
    facts: dict[str, list[str]] = {}
    if kind == "name":
        for spelling, name in dialogue.aliases().items():
            facts.setdefault(name, []).append(spelling)
    else:
        for entry in dialogue.book()["diseases"].values():
            facts |= entry[kind]["facts"]
    if kind == "features":
        counts = dialogue.book()["phrases"]["count"]
        for attribute, values in synthetic.ATTRIBUTES.items():
            for value in values:
                phrase = counts[value] if attribute == "count" else value
                facts[f"{attribute}: {value}"] = [phrase]
    patterns = {}
    for name, phrases in facts.items():
        either = "|".join(re.escape(phrase.lower()) + r"s?" for phrase in phrases)
        patterns[name] = re.compile(rf"\b(?:{either})\b")
    return patterns


def stated(text: str, kind: str) -> set[str]:
    text = text[:LIMIT].lower()
    return {name for name, pattern in vocabulary(kind).items() if pattern.search(text)}


def fact_f1(found: set[str], expected: set[str]) -> float:
    """F1 of stated facts against expected ones, 0 to 1."""
    return 2 * len(found & expected) / max(1, len(found) + len(expected))


def rate(answer: str, reference: str, kind: str, *, stopped: bool = True) -> tuple[int, str]:
    """Score 1 to 4 and why; an answer that never ends loses a point."""
    expected, found = stated(reference, kind), stated(answer, kind)
    f1 = fact_f1(found, expected)
    score = next((score for limit, score in ANCHORS if f1 >= limit), 1)
    sets = {"right": expected & found, "missing": expected - found, "wrong": found - expected}
    why = [f"facts F1 {f1:.2f}"]
    why += [f"{label}: {', '.join(sorted(facts))}" for label, facts in sets.items() if facts]
    if not stopped and score > 1:
        score -= 1
        why.append("never ends: one point less")
    return score, "; ".join(why)


def score_by_rubric(answers: pd.DataFrame) -> pd.DataFrame:
    """Answers with judge, score and why added, one row each."""
    rated = [
        rate(row.answer, row.reference, row.question, stopped=bool(row.stopped))
        for row in answers.itertuples()
    ]
    told = pd.DataFrame(rated, columns=["score", "why"], index=answers.index)
    return answers.assign(judge="rubric", score=told.score, why=told.why).astype(SCORE)


def explanation() -> str:
    """The rubric in words, from its own numbers: what Figure 6 shows."""
    known = ", ".join(f"{kind} {len(vocabulary(kind))}" for kind in dialogue.QUESTIONS)
    return "\n".join(
        [
            "Rubric judge (1 to 4, reported as mean/4 in percent)",
            "",
            "Facts are phrases from the reference answers; "
            "facts of other diseases or other picture",
            "attributes count as wrong. F1 = 2 x right / (expected + stated).",
            *(f"  {score}: F1 of at least {limit}" for limit, score in ANCHORS),
            "  1: anything else",
            "An answer without an end loses one point, not below 1.",
            "",
            f"Facts known: {known}",
        ]
    )


def frozen_hash() -> str:
    """Hash of everything the rubric rests on, so that a report can say which one scored it."""
    rules = {
        kind: {name: pattern.pattern for name, pattern in vocabulary(kind).items()}
        for kind in dialogue.QUESTIONS
    }
    text = json.dumps([rules, ANCHORS, LIMIT], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
