"""Folding scales into the weights (Eq. 6): W diag(s), and 1 / s in the module before."""

import torch

from derm_compress.errors import DermError
from derm_compress.model import anatomy


def group_linears(block, group):
    """{name: linear} of a group of anatomy.groups()."""
    return {name: block.get_submodule(name) for name in anatomy.groups(block)[group].linears}


def absorbs(block, group):
    """Whether the module before a group fits s [in], in the last of its parts.

    Under grouped-query attention the values are narrower than what o_proj reads, which then stays
    unscaled.
    """
    told = anatomy.groups(block)[group]
    wide = block.get_submodule(told.linears[0]).in_features
    return len(block.get_submodule(told.before).weight) == told.parts * wide


def scale_groups(model):
    """{"block.group": (module before, linears)} of the decoder, where s [in] can be folded."""
    return {
        f"{index}.{group}": (
            block.get_submodule(told.before),
            list(group_linears(block, group).values()),
        )
        for index, block in enumerate(anatomy.blocks(model))
        for group, told in anatomy.groups(block).items()
        if absorbs(block, group)
    }


@torch.no_grad()
def fold_scales(model, scales):
    """Multiply each group's input columns by s and divide the module before by it, in place."""
    groups = scale_groups(model)
    widths = {key: linears[0].in_features for key, (_, linears) in groups.items()}
    if widths != {key: len(s) for key, s in scales.items()}:
        raise DermError("quantize: the scales belong to another model; run the search on this one")
    for key, (before, linears) in groups.items():
        s = scales[key].to(before.weight.device, torch.float32)
        for parameter in before.parameters():
            rows = s.view(-1, *[1] * (parameter.ndim - 1))
            last = parameter[-len(s) :]
            _set(last, last.float() / rows, key)
        for linear in linears:
            _set(linear.weight, linear.weight.float() * s, key)


def _set(parameter, value, key):
    parameter.copy_(value)
    if not anatomy.finite(parameter):
        raise DermError(f"quantize: scales of {key} overflow {parameter.dtype}; calibrate anew")
