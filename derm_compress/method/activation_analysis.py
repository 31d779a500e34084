"""What is measured of every variant's projections: their outputs, and those of Figure 4.

`block` in every frame is the index before pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from derm_compress.data.items import Item
from derm_compress.method import activations
from derm_compress.method.iterate import each_model, joined
from derm_compress.model.variants import paper_depth

INPUTS = ["block", "projection", "channels", "outlier_channels", "loudest", "variant"]
SURFACE = ["variant", "block", "projection", "token", "channel", "value"]


def activation_statistics(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batch_size: int,
) -> pd.DataFrame:
    """activations.projection_statistics of every variant."""
    read = {"items": items, "images": images, "batch_size": batch_size}
    frames = []
    for turn in each_model(variants, store, device, "activations"):
        work = partial(activations.projection_statistics, turn.model)
        frames.append(turn.original_blocks(turn.calibrated(work, "activations", **read)))
    return joined(frames, ["block", "projection", *activations.STATISTICS, "variant"])


def activation_inputs(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batch_size: int,
) -> pd.DataFrame:
    """activations.input_peaks of every variant."""
    read = {"items": items, "images": images, "batch_size": batch_size}
    frames = []
    for turn in each_model(variants, store, device, "inputs"):
        work = partial(activations.input_peaks, turn.model)
        frames.append(turn.original_blocks(turn.calibrated(work, "inputs", **read)))
    return joined(frames, INPUTS)


def activation_surface(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    block: int,
    projection: str,
    store,
    device: str,
) -> pd.DataFrame:
    """Figure 4's data: |x| of the first item's first prompt at a projection's output in a block.

    Columns: SURFACE. block: of 32, counted from 1 as the paper does; a variant without it is left
    out.
    """
    frames = []
    read = {"items": items[:1], "images": images, "batch_size": 1}
    for turn in each_model(variants, store, device, "Figure 4"):
        kept, index = turn.recipe.kept(), paper_depth(block, turn.recipe.blocks) - 1
        if index in kept:
            work = partial(_first_output, turn.model, kept.index(index), projection)
            values = np.abs(turn.calibrated(work, "Figure 4", **read))
            token, channel = np.indices(values.shape)
            told = {"variant": turn.variant, "block": index, "projection": projection}
            told |= {"token": token.ravel(), "channel": channel.ravel()}
            frames.append(pd.DataFrame(told | {"value": values.astype(np.float32).ravel()}))
    return joined(frames, SURFACE)


def _first_output(model, position: int, projection: str, batches) -> np.ndarray:
    return activations.projection_output(model, next(iter(batches)), position, projection)
