"""Keys and values of tokens that were read, and what later tokens may see of them."""

from __future__ import annotations

import torch


class Memory:
    """Keys and values by layer, as attention modules fill a cache; those of a row's picture lie in `prefix`, once."""

    def __init__(self, prefix: Memory | None = None, picture: torch.Tensor | None = None):
        self.held, self.prefix, self.picture = {}, prefix, picture

    def update(self, keys, values, layer, *_):
        self.held[layer] = keys, values
        if self.prefix is None:
            return keys, values
        begun = [part[self.picture] for part in self.prefix.held[layer]]
        return torch.cat([begun[0], keys], 2), torch.cat([begun[1], values], 2)

    def parts(self, layer: int, rows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) [rows, heads, tokens, head size] of these rows: of their pictures, if any, then their own."""
        before = self.prefix.parts(layer, self.picture[rows]) if self.prefix else []
        return [*before, tuple(part[rows] for part in self.held[layer])]


def visible(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention's scores so that only `seen` (bool) counts: made once, not in every block."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
