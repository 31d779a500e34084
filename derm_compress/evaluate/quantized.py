"""Answers of every quantized variant and the errors of its blocks, while its model is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from derm_compress.data.items import Item
from derm_compress.evaluate import schema
from derm_compress.evaluate.answers import answer
from derm_compress.evaluate.judges.rubric import score_by_rubric
from derm_compress.files import Journal, write_frame
from derm_compress.method.iterate import joined
from derm_compress.method.quantization.block_errors import COLUMNS, each_quantized


def measure_quantized(
    folder: Path,
    variants: pd.DataFrame,
    items: Sequence[Item],
    unseen: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batch_size: int,
    quantization_batch: int,
    max_new_tokens: int,
    journal: Journal | None = None,
) -> None:
    """answers.parquet to all questions about `items`, and errors.parquet, taken on `unseen`.

    The first as answers.answer_variants() gives them, the second block_errors.COLUMNS.
    """
    journal, answers = journal or Journal(), []
    how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "journal": journal}
    read = {"store": store, "device": device, "batch_size": quantization_batch}
    for turn, errors in each_quantized(variants, unseen, images, known=journal.done, **read):
        if turn.variant not in journal.done:
            journal.add(turn.variant, errors.to_dict("records"))
        asked = {"variant": turn.variant} | how
        answers.append(answer(turn.model, turn.processor, items, images, **asked))
    errors = [pd.DataFrame(journal.done.get(name, [])) for name in variants.variant]
    write_frame(folder / "errors.parquet", joined(errors, COLUMNS))
    every = score_by_rubric(schema.together(answers, schema.ANSWER))
    write_frame(folder / "answers.parquet", every)
