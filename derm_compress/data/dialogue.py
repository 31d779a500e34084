"""What is asked and answered: questions, reference answers and training conversations. No torch."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
import yaml

QUESTIONS = ("name", "treatment", "features")


@cache
def book() -> dict:
    """The contents of diseases.yaml."""
    return yaml.safe_load((files("derm_compress.data") / "diseases.yaml").read_text("utf-8"))


def diseases() -> tuple[str, ...]:
    return tuple(book()["diseases"])


def aliases() -> dict[str, str]:
    """Every known spelling of a disease, lower case, to its name."""
    known = {}
    for name, entry in book()["diseases"].items():
        known |= dict.fromkeys([name, *entry["aliases"]], name)
    return known


def question(kind: str) -> str:
    """The question as the paper's test asks it."""
    return book()["questions"][kind]


def answers(disease: str, facts: dict[str, str], kind: str) -> list[str]:
    """All accepted paraphrases of an answer; `facts` are the picture's, empty for a photograph."""
    if kind == "name":
        return [text.format(name=disease) for text in book()["name_answers"]]
    general = book()["diseases"][disease][kind]["answers"]
    if kind == "treatment" or not facts:
        return list(general)
    return [f"{picture} {text}" for picture in picture_answers(facts) for text in general]


def picture_answers(facts: dict[str, str]) -> list[str]:
    """Sentences that say what a synthetic picture shows."""
    phrases, count = book()["phrases"], facts["count"]
    said = facts | {"count": phrases["count"][count], "lesion": phrases["lesion"][count]}
    sentences = [text.format(**said) for text in book()["picture_answers"]]
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def reference(disease: str, facts: dict[str, str], kind: str) -> str:
    """The answer that a judge compares with: the first paraphrase."""
    return answers(disease, facts, kind)[0]


def conversation(
    disease: str, facts: dict[str, str], rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Training turns (question, answer) about one picture: all three, in random order and words."""
    turns = []
    for i in rng.permutation(len(QUESTIONS)):
        kind = QUESTIONS[i]
        asked = book()["training_questions"][kind]
        told = answers(disease, facts, kind)
        turns.append((asked[rng.integers(len(asked))], told[rng.integers(len(told))]))
    return turns
