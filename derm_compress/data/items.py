"""One typed data set, whatever its source: pictures, diseases, groups and splits. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import load_file, save_file

from derm_compress.errors import DermError

SPLITS = ("train", "dev", "test", "heldout")


@dataclass(frozen=True)
class Item:
    """One picture; `row` is its place in the images, `facts` what is known to be seen in it.

    subgroups: what a source says of the person or the place, {column: value} without unknown ones.
    """

    id: str
    split: str
    disease: str
    group: str
    row: int
    facts: dict
    source: str
    subgroups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """Items and their pictures, uint8 [N, S, S, 3]; a group never crosses splits."""

    items: tuple[Item, ...]
    images: np.ndarray

    def __post_init__(self):
        kind, shape = self.images.dtype, self.images.shape
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise DermError(f"images must be uint8 [N, S, S, 3], not {kind} {shape}")
        seen: set[str] = set()
        homes: dict[str, str] = {}
        for item in self.items:
            if item.id in seen:
                raise DermError(f"item id {item.id!r} occurs twice; ids must be unique")
            if item.split not in SPLITS or not 0 <= item.row < len(self.images):
                raise DermError(
                    f"item {item.id!r} has no split {item.split!r} or no picture {item.row}"
                )
            if homes.setdefault(item.group, item.split) != item.split:
                raise DermError(
                    f"group {item.group!r} lies in {homes[item.group]} and {item.split}: a leak"
                )
            seen.add(item.id)

    def of(self, split: str) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.split == split)

    def picture(self, item: Item, size: int = 216) -> Image.Image:
        """An item's picture, enlarged for the eye: what a notebook shows."""
        found = Image.fromarray(self.images[item.row])
        return found.resize((size, size), Image.Resampling.NEAREST)

    def frame(self) -> pd.DataFrame:
        """One row per item; facts and subgroups as JSON."""
        dumped = partial(json.dumps, sort_keys=True)
        rows = [_with_dicts(asdict(item), dumped) for item in self.items]
        return pd.DataFrame(rows, columns=[field.name for field in fields(Item)])


def save_dataset(folder: Path, dataset: Dataset) -> None:
    """Write items.parquet and images.safetensors; equal data sets give equal bytes."""
    dataset.frame().to_parquet(Path(folder) / "items.parquet", index=False)
    save_file({"images": np.ascontiguousarray(dataset.images)}, Path(folder) / "images.safetensors")


def load_dataset(folder: Path) -> Dataset:
    items, images = Path(folder) / "items.parquet", Path(folder) / "images.safetensors"
    for path in (items, images):
        if not path.is_file():
            raise DermError(f"{path} is missing; run stage 01_data again")
    rows = pd.read_parquet(items).to_dict("records")
    read = tuple(Item(**_with_dicts(row, json.loads)) for row in rows)
    return Dataset(read, load_file(images)["images"])


def _with_dicts(row: dict, change: Callable) -> dict:
    return row | {name: change(row[name]) for name in ("facts", "subgroups")}


def sample(items: Sequence[Item], n: int, seed: int) -> list[Item]:
    """n items (or all), drawn without replacement, in their own order: what calibrations read."""
    chosen = np.random.default_rng([seed, 5]).choice(len(items), min(n, len(items)), replace=False)
    return [items[i] for i in sorted(chosen)]
