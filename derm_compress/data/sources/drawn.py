"""Synthetic pictures with known facts, as a source: nothing to download, no patients."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pandas as pd

from derm_compress.data import photographs, splits, synthetic
from derm_compress.data.items import Dataset
from derm_compress.data.request import Request
from derm_compress.data.rows import repeats


def read(request: Request) -> tuple[Dataset, dict]:
    """Each split is drawn from its own seed; dev is taken out of train."""
    drawn = synthetic.make(
        n_train=request.n_train,
        n_test=request.n_test,
        n_heldout=request.n_heldout,
        size=request.image_size,
        seed=request.seed,
    )
    train = {item.group: Counter([item.disease]) for item in drawn.of("train")}
    home = splits.split(train, sizes={"dev": request.n_dev}, seed=request.seed)
    items = tuple(replace(item, split=home.get(item.group, item.split)) for item in drawn.items)
    frame = pd.DataFrame({"id": [item.id for item in items]})
    frame["pixels"] = [photographs.pixel_hash(drawn.images[item.row]) for item in items]
    return Dataset(items, drawn.images), {"exact_duplicates": repeats(frame, "pixels")}
