"""Groups of weights along a linear's inputs, and what each grid says of itself.

`ends` of a group are the shares of its lowest and of its highest weight to which it is clipped.
"""

from __future__ import annotations

import functools

import torch

from derm_compress.errors import DermError
from derm_compress.model import anatomy


class Grid:
    """Numbers that weights may take. Every kind says for itself, whatever it inherits:

    kind: its name in methods and files. affine: whether weight = (code - zero) * scale, all that
    torch's int4 kernel knows. layout: of its files, autoawq, bitsandbytes or own; "" for none.
    """

    def __init_subclass__(cls):
        if missing := [word for word in ("kind", "affine", "layout") if word not in vars(cls)]:
            raise TypeError(f"grid {cls.__name__} does not say its {', '.join(missing)}")


def group_range(groups, ends=None):
    """Lowest and highest value [..., 1] of groups [..., g] and 0, or the shares `ends` of them."""
    low = groups.amin(-1, keepdim=True).clamp_(max=0)
    high = groups.amax(-1, keepdim=True).clamp_(min=0)
    return (low, high) if ends is None else (low * ends[..., :1], high * ends[..., 1:])


def clipped(weight, ends, group_size):
    """Weight [..., in] with each group within the shares `ends` [..., in / g, 2] of its range."""
    if ends is None:
        return weight
    groups = weight.unflatten(-1, (-1, group_size))
    low, high = group_range(groups, ends)
    return groups.maximum(low).minimum(high).flatten(-2)


@functools.cache
def clip_shares(bits, device):
    """Shares [16, 2] of a group's lowest and highest weight to try; the first changes nothing."""
    step = 0.1 if bits > 3 else 0.15  # the fewer levels, the more a narrower range helps
    shares = 1 - step * torch.arange(4, device=device)
    return torch.cartesian_prod(shares, shares)


def clip_ends(found, bits, device):
    """Shares [out, in / g, 2] of a search's clip tensor: indices into clip_shares, or shares."""
    if found.is_floating_point():
        return found.to(device, torch.float32)
    return clip_shares(bits, device)[found.to(device).long()]


def check_linear(linear, where, size):
    """DermError for a linear whose weights no grid has, or that groups of `size` do not divide."""
    if not anatomy.finite(linear.weight):
        told = f"weights of {where} are NaN, infinite or both; check the model's files"
        raise DermError(f"quantize: {told}")
    if size < 1 or linear.in_features % size:
        told = f"group size {size} does not divide the {linear.in_features} inputs of {where}"
        raise DermError(f"quantize: {told}; use a divisor")
