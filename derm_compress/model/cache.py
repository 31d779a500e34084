"""Keys and values of tokens that were read, and what later tokens may see of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class PrefixCache:
    """Keys and values by layer, for attention modules; those of a row's picture lie in `prefix`."""

    def __init__(self, prefix: PrefixCache | None = None, picture: torch.Tensor | None = None):
        self.held, self.prefix, self.picture = {}, prefix, picture

    def update(self, keys, values, layer, *_):
        self.held[layer] = keys, values
        if not self.prefix:
            return keys, values
        return self.joined(layer, slice(None))

    def joined(self, layer: int, rows) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) [rows, heads, tokens, head size], those of the rows' pictures first."""
        before = self.prefix.held[layer]
        return tuple(
            torch.cat([first[self.picture[rows]], own[rows]], 2)
            for first, own in zip(before, self.held[layer], strict=True)
        )


class SlotCache:
    """A cache for rows of different lengths: [lines, width, heads, head size] a layer.

    whole: what is read of it has always its whole width, as a recording needs.
    """

    def __init__(self, lines: int, width: int, *, whole: bool = False):
        self.lines, self.width, self.whole, self.held = lines, width, whole, {}

    def fill(self, lines: slice, layers: Iterable[tuple[int, tuple]]) -> None:
        """Copies (layer, (keys, values) [rows, heads, tokens, head size]) to as many lines."""
        for layer, pair in layers:
            _, heads, tokens, size = pair[0].shape
            if layer not in self.held:
                shape = self.lines, self.width, heads, size
                self.held[layer] = tuple(part.new_zeros(shape) for part in pair)
            for place, part in zip(self.held[layer], pair, strict=True):
                place[lines, :tokens] = part.transpose(1, 2)

    def aim(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Sets where the next tokens go [rows, tokens]; returns visible() of what they may see."""
        self.rows = len(positions)
        self.seen = self.width if self.whole else int(positions.max()) + 1
        first = self.width * torch.arange(self.rows, device=positions.device)[:, None]
        self.spots = (first + positions).flatten()
        there = torch.arange(self.seen, device=positions.device) <= positions[..., None]
        return visible(there[:, None], dtype)

    def update(self, keys, values, layer, *_):
        for place, new in zip(self.held[layer], (keys, values), strict=True):
            self.spots = self.spots.to(place.device)  # where the next layers are, too
            place.flatten(0, 1).index_copy_(0, self.spots, new.transpose(1, 2).flatten(0, 1))
        return tuple(part[: self.rows, : self.seen].transpose(1, 2) for part in self.held[layer])

    def move(self, lines: list[int], to: list[int]) -> None:
        for pair in self.held.values() if lines else ():
            for part in pair:
                part[to] = part[lines]


def visible(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention's scores so that only `seen` (bool) counts; made once for all."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
