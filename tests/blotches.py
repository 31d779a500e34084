"""Photographs for tests, and a folder of them with a csv, read as a run reads it."""

import numpy as np
import pandas as pd
from PIL import Image

from derm_compress.data import load
from derm_compress.data.request import Request


def picture(seed, size=(60, 48), mode="RGB"):
    """A blotchy picture unlike that of any other seed."""
    blotches = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blotches).resize(size, Image.Resampling.BICUBIC).convert(mode)


def plant(root, n=20, named=(), **columns):
    """n photographs of two diseases in turn and labels.csv, whose columns may be given.

    named: other names for some of its columns.
    """
    root.mkdir(parents=True, exist_ok=True)
    names = [f"{i:02}.jpg" for i in range(n)]
    for i, name in enumerate(names):
        picture(i).save(root / name, quality=95)
    table = {"image": names, "label": ["melanoma", "rosacea"] * (n // 2)} | columns
    pd.DataFrame(table).rename(columns=dict(named)).to_csv(root / "labels.csv", index=False)
    return root


def read(root, source="folder", **asked):
    """(data set, report) of a folder's pictures in 24 px, four of them for the test."""
    asked = {"n_train": 0, "n_test": 4, "image_size": 24} | asked
    return load.load_source(Request(source, root, **asked))
