"""What quantizing does to every block's output, beside the model as it was before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from derm_compress.data.items import Item
from derm_compress.errors import DermError
from derm_compress.files import Journal
from derm_compress.method import activations
from derm_compress.method.iterate import Source, each_model, joined, without_last
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model import anatomy, devices


def quantization_errors(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batch_size: int,
    journal: Journal | None = None,
) -> pd.DataFrame:
    """Relative error of each block's output against the model before it was quantized.

    Columns: block, relative_error, variant.
    """
    read = {"items": items, "images": images, "batch_size": batch_size}
    journal = journal or Journal()
    todo = variants[~variants.variant.isin(journal.done)]
    whole = Source(store, devices.beside(device))
    for turn in each_model(todo, store, device, "errors by block", quantize=quantize_step):
        source, _ = whole.take(without_last(turn.recipe))
        work = partial(block_errors, source, turn.model)
        found = turn.original_blocks(pd.DataFrame(turn.calibrated(work, "errors", **read)))
        journal.add(turn.variant, found.to_dict("records"))
    whole.let_go()
    frames = [pd.DataFrame(journal.done.get(name, [])) for name in variants.variant]
    return joined(frames, ["block", "relative_error", "variant"])


def block_errors(model, changed, batches):
    """Rows (block, relative_error): ||h' - h|| / ||h|| of every block's output h, real tokens."""
    full, other = (dict(enumerate(anatomy.blocks(one))) for one in (model, changed))
    if len(full) != len(other):
        said = f"models of {len(full)} and {len(other)} blocks; compare equal depths"
        raise DermError(f"quantize: {said}")
    errors, sizes, held = dict.fromkeys(full, 0.0), dict.fromkeys(full, 0.0), {}

    def compare(block, x):
        h = held.pop(block).to(x.device)
        errors[block] += (x - h).double().square().sum().item()
        sizes[block] += h.double().square().sum().item()

    for batch in batches:
        activations.tap(model, [batch], full, held.__setitem__)
        activations.tap(changed, [batch], other, compare)
    return [
        {"block": block, "relative_error": (errors[block] / max(sizes[block], 1e-30)) ** 0.5}
        for block in full
    ]
