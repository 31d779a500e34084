"""One fine-tune by several processes: each reads its rows of a batch; gradients are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed


def rank() -> int:
    """This process's place among those of torch's process group; 0 where there is none."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def own(rows: Sequence) -> Sequence:
    """The rows of a batch that are this process's: dealt out in turn, all where it is alone."""
    return rows[rank() :: ranks()]


def averaged(found: Sequence[torch.Tensor], weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Means over all processes, each by its weight: tokens, where losses are means over tokens."""
    if ranks() == 1:
        return found
    flat = torch.cat([found[0].new_ones(1), *(each.flatten() for each in found)]) * weight
    distributed.all_reduce(flat)
    means = (flat[1:] / flat[0]).split([each.numel() for each in found])
    return [mean.view_as(each) for mean, each in zip(means, found, strict=True)]
