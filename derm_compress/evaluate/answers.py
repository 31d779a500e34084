"""Answers of a model to the study's questions: greedy, batched, kept item by item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.model import anatomy, devices, oom
from derm_compress.model.generate import generate
from derm_compress.model.prompts import prepare, prompt
from derm_compress.progress import track

COLUMNS = [
    "variant", "item", "split", "disease", "question", "prompt", "answer", "reference", "tokens", "stopped",
]  # fmt: skip


def answer(
    model,
    processor,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    variant: str,
    batch_size: int,
    max_new_tokens: int,
    questions: Sequence[str] = dialogue.QUESTIONS,
    journal=None,
    what: str | None = None,
) -> pd.DataFrame:
    """One row per item and question (COLUMNS); answers already in the journal are not generated again.

    A model without values says nothing: no row.
    """
    if not anatomy.has_values(model):
        return pd.DataFrame(columns=COLUMNS)
    devices.spread(model)
    done = dict(journal.done) if journal else {}
    asked = [(item, kind) for kind in questions for item in items]
    batches = []  # of one kind of question each: a batch goes on until its longest answer ends
    for kind in questions:
        todo = [(i, kind) for i in items if f"{variant} {i.id} {kind}" not in done]
        batches += [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    what = what or f"answers of {variant}"

    def replies(part):
        texts = [prompt(processor, kind) for _, kind in part]
        inputs = prepare(processor, texts, images[[item.row for item, _ in part]], model.device)
        return zip(*generate(model, processor, inputs, max_new_tokens=max_new_tokens), strict=True)

    for part, told in oom.in_parts(replies, track(batches, what), what):
        for (item, kind), (text, tokens, stopped) in zip(part, told, strict=True):
            row = _row(variant, item, kind, text, tokens, stopped)
            done[f"{variant} {item.id} {kind}"] = row
            if journal:
                journal.add(f"{variant} {item.id} {kind}", row)
    return pd.DataFrame([done[f"{variant} {i.id} {k}"] for i, k in asked], columns=COLUMNS)


def _row(variant: str, item: Item, kind: str, text: str, tokens: int, stopped: bool) -> dict:
    told = dialogue.reference(item.disease, item.facts, kind)
    values = (
        variant,
        item.id,
        item.split,
        item.disease,
        kind,
        dialogue.question(kind),
        text,
        told,
        tokens,
        stopped,
    )
    return dict(zip(COLUMNS, values, strict=True))
