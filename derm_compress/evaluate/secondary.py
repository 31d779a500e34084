"""Every answer in one frame, with scores that no judge gives.

Fact F1 counts the rubric's phrases, a diagnosis is the one disease that an answer to the name
question names, similarity is the cosine of two sentence embeddings, answer's and reference's.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from derm_compress.evaluate import schema
from derm_compress.evaluate.judges import rubric

NONE, SEVERAL = "none", "several"
LAST = "08_evaluation"


def predictions(
    earlier: dict[str, pd.DataFrame],
    answers: pd.DataFrame,
    *,
    alike: Collection[str] = (),
    device: str = "cpu",
) -> pd.DataFrame:
    """One row an answer to a test or held-out item, with its `stage`; of equal ones the last's.

    earlier: as schema.read_answers gives it; answers: stage 08's. Adds `fact_f1`, `diagnosis` (null
    but for the name question) and `similarity` (null but for the variants in `alike` on test
    items). report.results.load_results makes the frames of every score table of it.
    """
    frames = [frame[frame.split == "test"].assign(stage=stage) for stage, frame in earlier.items()]
    every = schema.latest([*frames, answers.assign(stage=LAST)])
    chosen = every[every.variant.isin(alike) & (every.split == "test")]
    return every.assign(
        fact_f1=fact_f1(every),
        diagnosis=diagnosis(every),
        similarity=similarity(chosen, device).reindex(every.index),
    )


def fact_f1(answers: pd.DataFrame) -> pd.Series:
    """F1 of an answer's facts against the reference's, 0 to 1; a runaway answer loses nothing."""
    asked = list(zip(answers.answer, answers.reference, answers.question, strict=True))
    known = {}
    for said, expected, kind in set(asked):
        facts = rubric.stated(said, kind), rubric.stated(expected, kind)
        known[said, expected, kind] = rubric.fact_f1(*facts)
    return pd.Series([known[key] for key in asked], index=answers.index, dtype=float)


def diagnosis(answers: pd.DataFrame) -> pd.Series:
    """The one disease that an answer names, `none` or `several`; null but for the name question."""
    named = answers.answer[answers.question == "name"].map(_diagnosed).astype(object)
    return named.reindex(answers.index).where(answers.question == "name", None)


def _diagnosed(text: str) -> str:
    named = rubric.stated(text, "name")
    if not named:
        return NONE
    return SEVERAL if len(named) > 1 else named.pop()


def similarity(answers: pd.DataFrame, device: str = "cpu") -> pd.Series:
    """Cosine of answer and reference by all-MiniLM-L6-v2, -1 to 1; each text is embedded once."""
    if answers.empty:
        return pd.Series([], index=answers.index, dtype=float)
    from derm_compress.method.importance.embedder import Embedder

    texts = sorted({*answers.answer, *answers.reference})
    vectors = Embedder(device=device).model.encode(
        texts, normalize_embeddings=True, show_progress_bar=False, batch_size=64
    )
    row = {text: i for i, text in enumerate(texts)}
    one, other = (vectors[answers[name].map(row)] for name in ("answer", "reference"))
    cosine = np.einsum("ij,ij->i", one, other).astype(float).round(6)
    return pd.Series(cosine, index=answers.index)
