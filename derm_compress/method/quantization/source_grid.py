"""Does a model that was rounded before it came here sit on our grids? Its linears rounded anew.

On a grid of its own a weight would lose nothing. So the error as it stands is put beside that
after noise that takes it off its source's grid, and beside normal weights, which never had one.
"""

from __future__ import annotations

import math

import pandas as pd
import torch

from derm_compress.method.quantization.grids import IntegerGrid
from derm_compress.model import anatomy, devices, loading

BLOCK, STEPS = 32, 15  # of GGUF's Q4_1: a block's range in steps
WEIGHTS = ("as they are", "with noise", "normal")
BITS = (4, 3, 2)
ROWS = 2048  # of a linear at most, evenly spaced: memory beside a model that fills a GPU
COLUMNS = ["weights", "bits", "relative_error"]


def rounded_anew(base: str, *, device: str, group_size: int, seed: int) -> pd.DataFrame:
    """source_errors of a base; without rows where there are shapes alone."""
    if device == anatomy.META:
        return pd.DataFrame(columns=COLUMNS)
    model, _ = loading.load_base(base, device)
    found = source_errors(model, group_size=group_size, seed=seed)
    devices.let_go(model)
    return found


def source_errors(model, *, group_size: int = 64, seed: int = 0) -> pd.DataFrame:
    """Rows (COLUMNS) for WEIGHTS x BITS: ||Q(w) - w|| / ||w||, the mean over linears.

    Q: the asymmetric integer grid. Noise: uniform, as wide as one step of the source.
    """
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for block in anatomy.blocks(model):
        for linear in anatomy.linears(block).values():
            weight = linear.weight.detach()
            weight = weight[:: math.ceil(len(weight) / ROWS)].float()
            versions = weight, with_noise(weight, drawn), normal(weight, drawn)
            for name, version in zip(WEIGHTS, versions, strict=True):
                for width in BITS:
                    error = relative_error(version, IntegerGrid(width, group_size))
                    found.append((name, width, error))
    frame = pd.DataFrame(found, columns=COLUMNS)
    return frame.groupby(["weights", "bits"], sort=False, as_index=False).mean()


def relative_error(weight: torch.Tensor, grid) -> float:
    return ((grid.rounded(weight) - weight).norm() / weight.norm()).item()


def with_noise(weight: torch.Tensor, drawn: torch.Generator) -> torch.Tensor:
    """Each weight moved by up to half a step of its source, which a block's range tells."""
    blocks = weight.unflatten(-1, (-1, math.gcd(BLOCK, weight.shape[-1])))
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / STEPS
    noise = torch.rand(blocks.shape, generator=drawn).sub_(0.5).to(weight.device)
    return blocks.addcmul(step, noise).flatten(-2)


def normal(weight: torch.Tensor, drawn: torch.Generator) -> torch.Tensor:
    """Normal weights of the same spread."""
    return torch.randn(weight.shape, generator=drawn).to(weight.device) * weight.std()
