"""What quantizing does to every block's output, beside the model as it was before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from derm_compress.data.items import Item
from derm_compress.errors import DermError
from derm_compress.method import activations
from derm_compress.method.iterate import Turn, each_model
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model import anatomy
from derm_compress.model.recipe import Recipe

COLUMNS = ["block", "relative_error", "variant"]


def each_quantized(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batch_size: int,
    known: Sequence[str] = (),
    **place,
) -> Iterator[tuple[Turn, pd.DataFrame]]:
    """A turn for every quantized variant, and the relative error of each block's output (COLUMNS).

    It is taken against the model before it was quantized, whose outputs wait on the host: at 7B
    0.16 GiB a prompt. Variants whose errors are `known` come with none. place: wide, processes as
    in each_model.
    """
    read = {"items": items, "images": images, "batch_size": batch_size}
    rows = with_sources(variants, known)
    for turn in each_model(rows, store, device, "quantized", quantize=quantize_step, **place):
        if not turn.recipe.quantized:
            outputs = turn.calibrated(partial(block_outputs, turn.model), "outputs", **read)
        elif turn.variant in known:
            yield turn, pd.DataFrame(columns=COLUMNS)
        else:
            work = partial(block_errors, outputs, turn.model)
            errors = pd.DataFrame(turn.calibrated(work, "errors", **read))
            yield turn, turn.original_blocks(errors)


def with_sources(variants: pd.DataFrame, known: Sequence[str] = ()) -> pd.DataFrame:
    """(variant, recipe) of quantized variants, before those of each source the source itself, if
    one is not `known`."""
    rows, source = [], None
    for row in variants.itertuples():
        before = Recipe.from_json(row.recipe).until(-1).to_json()
        if before != source and row.variant not in known:
            rows.append({"variant": row.source, "recipe": before})
            source = before
        rows.append({"variant": row.variant, "recipe": row.recipe})
    return pd.DataFrame(rows, columns=["variant", "recipe"])


def block_outputs(model, batches) -> dict[int, torch.Tensor]:
    """Every block's output for all real tokens [tokens, width], on the host, as it was computed."""
    parts = {block: [] for block in range(len(anatomy.blocks(model)))}

    def keep(block, x):
        parts[block].append(x.to("cpu", model.dtype))

    activations.tap(model, batches, dict(enumerate(anatomy.blocks(model))), keep)
    return {block: torch.cat(parts.pop(block)) for block in list(parts)}


def block_errors(outputs: dict[int, torch.Tensor], changed, batches) -> list[dict]:
    """Rows (block, relative_error): ||h' - h|| / ||h|| of every block's output h, real tokens.

    outputs: block_outputs() of the model before it was changed, of the same prompts.
    """
    blocks = dict(enumerate(anatomy.blocks(changed)))
    if len(outputs) != len(blocks):
        said = f"models of {len(outputs)} and {len(blocks)} blocks; compare equal depths"
        raise DermError(f"quantize: {said}")
    errors, sizes, seen = (dict.fromkeys(blocks, zero) for zero in (0.0, 0.0, 0))

    def compare(block, x):
        h = outputs[block][seen[block] : seen[block] + len(x)].to(x.device).float()
        seen[block] += len(x)
        errors[block] += (x - h).double().square().sum().item()
        sizes[block] += h.double().square().sum().item()

    activations.tap(changed, batches, blocks, compare)
    return [
        {"block": block, "relative_error": (errors[block] / max(sizes[block], 1e-30)) ** 0.5}
        for block in blocks
    ]
