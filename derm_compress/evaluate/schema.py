"""The columns of an answer and who adds them: one schema for all frames of answers. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.files import read_frame

ANSWER = {  # answers.answer: one row an answer; `item` is the picture, `question` its kind
    "variant": "str",
    "item": "str",
    "split": "str",
    "disease": "str",
    "question": "str",
    "prompt": "str",
    "answer": "str",
    "reference": "str",
    "tokens": "int64",
    "stopped": "bool",
}
SCORE = {"judge": "str", "score": "float64", "why": "str"}  # every judge; score of 1 to 4 or null
REPLY = {  # a judging model: mark on its own scale, what it said, why there is no score, its name
    "value": "float64",
    "reply": "str",
    "error": "str",
    "served": "str",
    "without": "str",  # fields of the request that its server refuses
}
KEY = ["variant", "item", "question"]  # one answer
ANSWERING = ("02_finetune", "04_pruning", "05_sft", "07_quantization")  # stages before the last


def asked(item: Item, kind: str) -> dict:
    """What is known of an answer before it is given."""
    return {
        "item": item.id,
        "split": item.split,
        "disease": item.disease,
        "question": kind,
        "prompt": dialogue.question(kind),
        "reference": dialogue.reference(item.disease, item.facts, kind),
    }


def frame(rows: Iterable[Mapping], columns: Mapping[str, str]) -> pd.DataFrame:
    """Rows in the order and types of a schema, which an empty frame has too."""
    return pd.DataFrame(rows, columns=list(columns)).astype(dict(columns))


def together(frames: Iterable[pd.DataFrame], columns: Mapping[str, str]) -> pd.DataFrame:
    """Frames of one schema as one."""
    frames = [found for found in frames if len(found)]
    return pd.concat(frames, ignore_index=True) if frames else frame([], columns)


def read_answers(folders: Mapping[str, Path]) -> dict[str, pd.DataFrame]:
    """{stage: its answers to test items} of the earlier stages, from {stage: folder}."""
    stages = [stage for stage in ANSWERING if stage in folders]
    found = {stage: read_frame(folders[stage] / "answers.parquet") for stage in stages}
    return {stage: answers[answers.split == "test"] for stage, answers in found.items()}


def latest(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """All answers in one frame, each once: of equal ones the last frame's."""
    every = pd.concat(list(frames), ignore_index=True)
    return every.drop_duplicates(KEY, keep="last", ignore_index=True)
