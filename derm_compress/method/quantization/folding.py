"""Folding scales into the weights (Eq. 6): W diag(s), and 1 / s in the module before."""

import torch

from derm_compress.errors import DermError
from derm_compress.model import anatomy

GROUPS = {  # linears that read one input, and the module before them that can absorb 1 / s
    "qkv": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "o": ("self_attn.v_proj", ("self_attn.o_proj",)),
    "gate_up": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "down": ("mlp.up_proj", ("mlp.down_proj",)),
}


def group_linears(block, group):
    """{name: linear} of a group; none where the sublayer was removed."""
    there = anatomy.linears(block)
    return {name: there[name] for name in GROUPS[group][1] if name in there}


def absorbs(block, group):
    """Whether the module before a group fits s [in].

    Under grouped-query attention v_proj is narrower than o_proj, which then stays unscaled.
    """
    linears = list(group_linears(block, group).values())
    before = GROUPS[group][0]
    return bool(linears) and len(block.get_submodule(before).weight) == linears[0].in_features


def scale_groups(model):
    """{"block.group": (module before, linears)} of the decoder, where s [in] can be folded."""
    return {
        f"{index}.{group}": (
            block.get_submodule(before),
            list(group_linears(block, group).values()),
        )
        for index, block in enumerate(anatomy.blocks(model))
        for group, (before, _) in GROUPS.items()
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
            _set(parameter, parameter.float() / rows, key)
        for linear in linears:
            _set(linear.weight, linear.weight.float() * s, key)


def _set(parameter, value, key):
    parameter.copy_(value)
    if not anatomy.finite(parameter):
        raise DermError(f"quantize: scales of {key} overflow {parameter.dtype}; calibrate anew")
