"""Every answer in one frame, with scores beside the judge's: facts, the disease named, likeness to the reference.

No judge decides these: fact F1 counts the rubric's phrases, a diagnosis is the one disease that an answer to the name
question names, similarity is the cosine of two sentence embeddings.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd

from derm_compress.evaluate import rubric
from derm_compress.evaluate.judging import ANSWERING
from derm_compress.files import read_frame

KEYS = ["variant", "item", "question"]
NONE, SEVERAL = "none", "several"
LAST = "08_evaluation"


def read_answers(folders: dict[str, Path]) -> dict[str, pd.DataFrame]:
    """{stage: its answers} of the earlier stages that answer."""
    return {
        stage: read_frame(folders[stage] / "answers.parquet")
        for stage in ANSWERING
        if stage in folders
    }


def predictions(
    earlier: dict[str, pd.DataFrame],
    answers: pd.DataFrame,
    *,
    alike: Collection[str] = (),
    device: str = "cpu",
) -> pd.DataFrame:
    """One row an answer of any stage to a test or held-out item, with its `stage`; of equal ones the last stage's.

    earlier: as read_answers gives it; answers: stage 08's. Adds `fact_f1`, `diagnosis` (null but for the name question)
    and `similarity` (null but for the variants in `alike` on test items). results.of_predictions makes the frames of
    every score table of it.
    """
    frames = [frame[frame.split == "test"].assign(stage=stage) for stage, frame in earlier.items()]
    every = pd.concat([*frames, answers.assign(stage=LAST)], ignore_index=True)
    every = every.drop_duplicates(KEYS, keep="last", ignore_index=True)
    every = every.assign(fact_f1=fact_f1(every), diagnosis=diagnosis(every))
    chosen = every[every.variant.isin(alike) & (every.split == "test")]
    return every.assign(similarity=similarity(chosen, device).reindex(every.index))


def fact_f1(answers: pd.DataFrame) -> pd.Series:
    """F1 of the facts that an answer states against those of the reference, 0 to 1; a runaway answer loses nothing."""
    asked = list(zip(answers.answer, answers.reference, answers.question, strict=True))
    known = {}
    for said, expected, kind in set(asked):
        one, other = rubric.stated(said, kind), rubric.stated(expected, kind)
        known[said, expected, kind] = 2 * len(one & other) / max(1, len(one) + len(other))
    return pd.Series([known[key] for key in asked], index=answers.index, dtype=float)


def diagnosis(answers: pd.DataFrame) -> pd.Series:
    """The one disease that an answer to the name question names, `none` or `several`; null for other questions."""
    named = [rubric.stated(text, "name") if kind == "name" else None
             for text, kind in zip(answers.answer, answers.question, strict=True)]  # fmt: skip
    told = [
        None if n is None else next(iter(n)) if len(n) == 1 else SEVERAL if n else NONE
        for n in named
    ]
    return pd.Series(told, index=answers.index, dtype=object)


def similarity(answers: pd.DataFrame, device: str = "cpu") -> pd.Series:
    """Cosine of answer and reference by all-MiniLM-L6-v2, -1 to 1; every distinct text is embedded once, in batches."""
    if answers.empty:
        return pd.Series([], index=answers.index, dtype=float)
    from derm_compress.method.importance.criteria import Embedder

    texts = sorted({*answers.answer, *answers.reference})
    vectors = Embedder(device=device).model.encode(
        texts, normalize_embeddings=True, show_progress_bar=False, batch_size=64
    )
    row = {text: i for i, text in enumerate(texts)}
    pair = [vectors[answers[name].map(row)] for name in ("answer", "reference")]
    return pd.Series(np.einsum("ij,ij->i", *pair).astype(float).round(6), index=answers.index)
