"""Blocks as they were before any training, for models that can only learn anew."""

from __future__ import annotations

import torch

from derm_compress.model import anatomy


@torch.no_grad()
def reinitialize(model, seed: int) -> None:
    """Draw the matrices of all decoder blocks from N(0, initializer_range), in place; norms become
    1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    deviation = model.config.text_config.initializer_range
    for name, weights in anatomy.blocks(model).named_parameters():
        if weights.dim() > 1:
            weights.copy_(deviation * torch.randn(weights.shape, generator=generator))
        else:
            weights.fill_(0.0 if name.endswith("bias") else 1.0)
