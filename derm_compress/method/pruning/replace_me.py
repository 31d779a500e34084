"""ReplaceMe: linear algebra in place of training (Shopkhoev et al. 2025, arXiv:2505.02819).

The MLP of the block before a run of removed ones writes M [tokens, width] onto its residual Y. The
T that brings M T + Y nearest to L, the state behind the run, is folded into that MLP's last linear
(fuse.py): the model gets no part more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.method.activations import tap
from derm_compress.method.assemble import materialize
from derm_compress.method.pruning.fuse import fuse
from derm_compress.model import anatomy, devices, prompts, removal
from derm_compress.model.recipe import Recipe
from derm_compress.progress import track

# How strongly T is held at 1, which is plain removal: of the median diagonal of M^T M, since loud
# channels would raise the mean. On unseen pictures tiny is nearer to itself by it than by 1e-3.
RIDGE = 0.1


def fit_maps(
    folder: Path, recipe: Recipe, items: Sequence[Item], images: np.ndarray, *, store, device: str
) -> None:
    """The maps of a recipe that ends by pruning, as maps.safetensors: {block before a run: T}.

    Read are all questions about the items, with picture and reference answer.
    """
    maps = {}
    if device != anatomy.META:
        model, processor = materialize(recipe.until(-1), store, device)
        how = {"batch_size": len(dialogue.QUESTIONS), "device": model.device}
        batches = list(prompts.calibration_batches(processor, items, images, **how))
        maps = mend(model, batches, recipe)
        devices.let_go(model)
    save_file(maps, folder / "maps.safetensors")


def runs(recipe: Recipe) -> dict[int, int]:
    """{block that stays: the last of those removed right behind it}, where it has an MLP."""
    without = {unit.block for unit in recipe.absent() if unit.part == "mlp"}
    ends = itertools.pairwise([*recipe.kept(), recipe.blocks])
    return {block: end - 1 for block, end in ends if end - block > 1 and block not in without}


def mend(
    model, batches: Sequence[dict], recipe: Recipe, *, ridge: float = RIDGE
) -> dict[str, torch.Tensor]:
    """Prune a whole model as the recipe says, and mend it, in place; the maps by block.

    From the first run to the last, each with what stands before it already mended, so that a map
    makes up for what the maps before it left; L is the whole model's.
    """
    ends, layers, maps = runs(recipe), anatomy.blocks(model), {}
    behind = {block: [] for block in ends}

    def keep(block: int, x: torch.Tensor) -> None:
        behind[block].append(x.to(model.dtype).cpu())

    tap(model, batches, {block: layers[end] for block, end in ends.items()}, keep)
    removal.apply(model, recipe.kept(), recipe.absent())
    for block in track(list(ends), "runs of blocks mended"):
        found = sums(model, batches, layers[block], behind.pop(block))
        maps[str(block)] = nearest(*found, ridge=ridge)
        fuse(layers[block], maps[str(block)])
    return maps


def sums(model, batches: Sequence[dict], block, behind: Sequence) -> tuple[torch.Tensor, ...]:
    """M^T M and M^T (L - M - Y) [width, width], float64, over all tokens of the batches; `behind`:
    L of each batch."""
    gram, cross, states, written = 0.0, 0.0, iter(behind), None

    def see(part: str, x: torch.Tensor) -> None:
        nonlocal gram, cross, written
        if part == "mlp":
            written = x.double()
            return
        missing = next(states).to(x.device).double() - x.double()
        gram, cross = gram + written.T @ written, cross + written.T @ missing

    tap(model, batches, {"mlp": block.mlp.down_proj, "block": block}, see)
    return gram, cross


def nearest(gram: torch.Tensor, cross: torch.Tensor, *, ridge: float = RIDGE) -> torch.Tensor:
    """T, float32, of sums()."""
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    held = ridge * gram.diagonal().median().clamp(min=1e-30)
    return (one + torch.linalg.solve(gram + held * one, cross)).float().cpu()
