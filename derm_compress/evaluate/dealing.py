"""Pictures dealt out between GPUs: on each a process with a whole model of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from derm_compress import progress
from derm_compress.data.items import Item
from derm_compress.files import Journal
from derm_compress.method.finetune.workers import side_by_side
from derm_compress.model import devices, loading, usage
from derm_compress.model.recipe import Recipe


@dataclass(frozen=True)
class Share:
    """What one process asks; that of `lane` 0 does what is done once for all.

    place: device, wide, processes as method.iterate.Source takes them.
    """

    items: Sequence[Item]
    images: np.ndarray
    place: dict
    lane: int = 0


def deal(
    work: Callable,
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    device: str,
    batch_size: int,
    max_new_tokens: int,
    journal: Journal,
) -> None:
    """work(share, journal=journal): of all here, or of every GPU's in a process there, at once.

    Here, too, where no GPU holds a model and its answers, which is then spread (share.wide).
    Rounds of `batch_size` pictures stay whole, so that answers are those of one GPU.
    """
    rounds = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    places, wide = cards(device), False
    if len(places) > 1 and len(variants):
        config = loading.config_of(Recipe.from_json(variants.recipe.iloc[0]).base)
        size = {"batch": batch_size, "new_tokens": max_new_tokens}
        wide = devices.too_small(config, device, **size)
    lanes = min(len(places), len(rounds))
    if wide or lanes < 2:
        work(Share(items, images, {"device": device, "wide": wide}), journal=journal)
        return
    shares = []
    for lane, place in enumerate(places[:lanes]):
        own = [item for some in rounds[lane::lanes] for item in some]
        where = {"device": place, "processes": lanes}
        shares.append(Share(*with_pictures(own, images), where, lane))
    usage.reset_peak(device)  # else this process keeps a GPU's memory from them
    with tempfile.TemporaryDirectory() as scratch:
        path = journal.path or Path(scratch, "journal")
        kept = Journal(path)
        kept.done = journal.done
        side_by_side(partial(work_there, work=work, journal=kept), shares)
        journal.done |= Journal(path).done


def cards(device: str) -> list[str]:
    """Every GPU, where a run has them; else the device."""
    count = torch.cuda.device_count() if device == "cuda" else 1
    return [f"cuda:{gpu}" for gpu in range(count)] if count > 1 else [device]


def with_pictures(items: Sequence[Item], images: np.ndarray) -> tuple[list[Item], np.ndarray]:
    """The items, and no pictures but theirs."""
    rows = [replace(item, row=row) for row, item in enumerate(items)]
    return rows, images[[item.row for item in items]]


def work_there(share: Share, *, work: Callable, journal: Journal) -> None:
    """A share's work in a process of its own."""
    if share.place["device"] != "cpu":
        torch.cuda.set_device(share.place["device"])
    if share.lane:
        progress.mute()
    work(share, journal=journal)
