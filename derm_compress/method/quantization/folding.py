"""Activation-aware scaling and clipping (paper, Eqs. 6-8): which scales, and where to clip, on any grid.

Eq. 7's square is tr(D H D^T) for a weight error D [out, in] and H = X^T X, so that tokens are read once.
"""

import functools

import torch

from derm_compress.errors import DermError
from derm_compress.model import anatomy


def scale_groups(model, left_out=()):
    """{"block.group": (module before, linears)} of the decoder, where s [in] fits the module before.

    Under grouped-query attention v_proj is narrower than o_proj, which then stays unscaled. Groups of which every
    linear is `left_out` ("block.name") have nothing to scale.
    """
    found = {}
    for index, block in enumerate(anatomy.blocks(model)):
        there = anatomy.linears(block)
        for group, (before, names) in GROUPS.items():
            if _absorbs(block, there, group) and not all(
                f"{index}.{name}" in left_out for name in names
            ):
                found[f"{index}.{group}"] = (
                    block.get_submodule(before),
                    [there[name] for name in names],
                )
    return found


def _absorbs(block, there, group):
    before, (first, *_) = GROUPS[
        group
    ]  # there: the block's linears, fewer where a sublayer was removed
    return first in there and len(block.get_submodule(before).weight) == there[first].in_features


@functools.cache
def clip_shares(bits, device):
    """Shares [16, 2] of a group's lowest and of its highest weight that are tried; the first leaves it as it is."""
    step = 0.1 if bits > 3 else 0.15  # the fewer levels, the more a narrower range helps
    shares = 1 - step * torch.arange(4, device=device)
    return torch.cartesian_prod(shares, shares)


def clip_ends(found, bits, device):
    """Shares [out, in / g, 2] that a search's clip tensor stands for: indices into clip_shares, or shares already."""
    if found.is_floating_point():
        return found.to(device, torch.float32)
    return clip_shares(bits, device)[found.to(device).long()]


@torch.no_grad()
def fold_scales(model, scales, left_out=()):
    """Multiply each group's input columns by s and divide the module before by it: the same function."""
    groups = scale_groups(model, left_out)
    if {key: len(s) for key, s in scales.items()} != {
        key: ls[0].in_features for key, (_, ls) in groups.items()
    }:
        raise DermError("quantize: the scales belong to another model; run the search on this one")
    for key, (before, linears) in groups.items():
        s = scales[key].to(before.weight.device, torch.float32)
        folded = [(p, p.float() / s.view(-1, *[1] * (p.ndim - 1))) for p in before.parameters()]
        for parameter, value in folded + [
            (linear.weight, linear.weight.float() * s) for linear in linears
        ]:
            parameter.copy_(value)
            if not anatomy.finite(parameter):
                raise DermError(
                    f"quantize: scales of {key} overflow {parameter.dtype}; calibrate anew"
                )


GROUPS = {  # linears that read one input, and the module before them that can absorb 1 / s
    "qkv": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "o": ("self_attn.v_proj", ("self_attn.o_proj",)),
    "gate_up": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "down": ("mlp.up_proj", ("mlp.down_proj",)),
}
