"""Answers of every quantized variant and the errors of its blocks, while its model is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from derm_compress.data.items import Item
from derm_compress.evaluate.answers import answer, scored
from derm_compress.evaluate.dealing import Share, deal, with_pictures
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
    journal = journal or Journal()
    how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    read = {"store": store, "batch_size": quantization_batch}
    work = partial(measure_share, variants, *with_pictures(unseen, images), read=read, **how)
    deal(work, variants, items, images, device=device, journal=journal, **how)
    errors = [pd.DataFrame(journal.done.get(name, [])) for name in variants.variant]
    write_frame(folder / "errors.parquet", joined(errors, COLUMNS))
    write_frame(folder / "answers.parquet", scored(journal, variants, items, device))


def measure_share(
    variants: pd.DataFrame,
    unseen: Sequence[Item],
    pictures: np.ndarray,
    share: Share,
    *,
    journal: Journal,
    read: dict,
    **how,
) -> None:
    """answer() about a share's pictures, into the journal; the first share also takes errors."""
    known = list(variants.variant) if share.lane else journal.done
    read = {"known": known} | read | share.place
    for turn, errors in each_quantized(variants, unseen, pictures, **read):
        if turn.variant not in known:
            journal.add(turn.variant, errors.to_dict("records"))
        asked = {"variant": turn.variant, "journal": journal} | how
        answer(turn.model, turn.processor, share.items, share.images, **asked)
