"""ReplaceMe's maps become part of the weights: a block's MLP writes M T where it wrote M."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import load_file

from derm_compress.errors import DermError
from derm_compress.model import anatomy


def apply_step(model, step: dict, store, kept: Sequence[int]) -> None:
    """Apply a recipe's step to a model of these original blocks, in place."""
    if step["kept"] != list(kept):
        said = f"the maps were fitted to blocks {step['kept']}, the model has {list(kept)}"
        raise DermError(f"replace_me: {said}; fit them anew")
    for block, T in load_file(store.resolve(step["ref"])).items():
        fuse(anatomy.blocks(model)[kept.index(int(block))], T)


@torch.no_grad()
def fuse(block, T: torch.Tensor) -> None:
    """Fold T [width, width] into the last linear of a block's MLP, in place."""
    for weights in block.mlp.down_proj.parameters():  # W [width, in], and a bias [width]
        weights.copy_(T.T.to(weights.device) @ weights.float())
        if not anatomy.finite(weights):
            said = f"weights overflow {weights.dtype}"
            raise DermError(f"replace_me: {said}; fit the maps to more pictures")
