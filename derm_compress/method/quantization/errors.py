"""What quantizing does to each block's output, variant by variant."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from derm_compress.data.items import Item
from derm_compress.files import Journal
from derm_compress.method import activations
from derm_compress.method.iterate import Source, each_model, joined, without_last
from derm_compress.model import devices


def quantization_errors(
    variants: pd.DataFrame,
    store,
    *,
    items: Sequence[Item],
    images: np.ndarray,
    batch_size: int,
    device: str,
    journal: Journal | None = None,
) -> pd.DataFrame:
    """Relative error of each block's output against the model before it was quantized, of every variant."""
    journal = journal or Journal()
    todo = variants[~variants.variant.isin(journal.done)]
    whole = Source(store, devices.beside(device))
    for turn in each_model(todo, store, device, "errors by block"):
        source, _ = whole.take(without_last(turn.recipe))
        work = partial(activations.block_errors, source, turn.model)
        found = turn.calibrated(work, items, images, batch_size=batch_size, what="errors")
        journal.add(turn.variant, turn.original_blocks(pd.DataFrame(found)).to_dict("records"))
    whole.let_go()
    frames = [pd.DataFrame(journal.done.get(name, [])) for name in variants.variant]
    return joined(frames, ["block", "relative_error", "variant"])
