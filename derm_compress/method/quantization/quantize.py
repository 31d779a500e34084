"""Quantization of a model in place: scales folded in (Eq. 6), the decoder's linears onto a grid."""

import torch
from safetensors.torch import load_file

from derm_compress.errors import DermError
from derm_compress.method.quantization.grids import Int8Grid, grid_of
from derm_compress.method.quantization.groups import check_linear, clip_ends
from derm_compress.method.quantization.methods import WHOLE, Form
from derm_compress.method.quantization.packed import PackedLinear
from derm_compress.model import anatomy


def targets(model, form):
    """{"block.name": (block, name, grid)} of what a form quantizes; DermError if it cannot."""
    blocks, found = anatomy.blocks(model), {}
    if beyond := [block for block in form.block_bits if not 0 <= block < len(blocks)]:
        said = f"bits are given for blocks {beyond}; the model has {len(blocks)}"
        raise DermError(f"quantize: {said}")
    for index, block in enumerate(blocks):
        for name, linear in anatomy.linears(block).items():
            if form.bits_of(index, name) != WHOLE:
                grid = grid_of(form, index, name)
                check_linear(linear, f"block {index} {name}", grid.group_size)
                found[f"{index}.{name}"] = block, name, grid
    known = {f"{i}.{name}" for i, block in enumerate(blocks) for name in anatomy.linears(block)}
    if beyond := sorted(form.linear_bits.keys() - known):
        raise DermError(f"quantize: bits are given for {beyond[0]}, which the model has not")
    return found


@torch.no_grad()
def quantize(model, form, *, scales=None, packed=False):
    """Quantize in place and return the model; `scales`: a search's tensors, where form.searched.

    packed=False writes the rounded weights back (the same numbers, at full speed); packed=True
    replaces the linears by modules that hold only codes. LLM.int8 is always packed.
    """
    found = targets(model, form)
    if form.searched != (scales is not None):
        has = "needs the scales of a search" if form.searched else "takes no scales"
        raise DermError(f"quantize: {form.name} {has}")
    scales = scales or {}
    folded = {
        key: s for key, s in scales.items() if not {key, key.rpartition(".")[0]} & found.keys()
    }
    if form.scaled or folded:
        fold_scales(model, folded)
    for index, block in enumerate(anatomy.blocks(model)):
        round_block(block, index, form, scales, packed=packed)
    return model


@torch.no_grad()
def round_block(block, index, form, scales, *, packed=False):
    """quantize() of one block in place, once its scales are folded in."""
    for name, linear in anatomy.linears(block).items():
        if form.bits_of(index, name) == WHOLE:
            continue
        grid, key, made, ends = grid_of(form, index, name), f"{index}.{name}", None, None
        if form.coded:
            made = _of_codes(linear, grid, key, scales)
        elif key in scales:
            ends = clip_ends(scales[key], grid.bits, linear.weight.device)
        if packed or isinstance(grid, Int8Grid):
            linear = made or grid.packed(linear, ends)
            block.set_submodule(name, linear)
        else:
            weight = made.dequantized() if made else grid.rounded(linear.weight, ends)
            _set(linear.weight, weight, f"rounded weights of {key}", "quantize in fp32")
        linear.grid = grid


def _of_codes(linear, grid, key, scales):
    codes, steps, zeros = (scales.get(f"{key}.{name}") for name in ("codes", "scales", "zeros"))
    size = linear.out_features, linear.in_features // grid.group_size
    if codes is None or steps.shape != size:
        raise DermError("quantize: the codes belong to another model; run the search on this one")
    held = PackedLinear(grid, linear.weight.shape, codes, steps, zeros)
    held.to(linear.weight.device).bias = linear.bias
    return held


def _set(parameter, value, what, advice):
    value = value.to(parameter.dtype)
    if not anatomy.finite(value):
        raise DermError(f"quantize: {what} overflow {parameter.dtype}; {advice}")
    parameter.copy_(value)


def quantized_linears(model):
    """Number of quantized linears by part of the model."""
    parts = anatomy.parts(model)
    return {name: sum(hasattr(m, "grid") for m in part.modules()) for name, part in parts.items()}


def quantize_step(model, step, store, *, packed=False):
    """Apply a recipe's step: a form's fields and, where it was searched, `ref` to its scales."""
    scales = load_file(store.resolve(step["ref"])) if step.get("ref") else None
    return quantize(model, Form.of(step), scales=scales, packed=packed)


def group_linears(block, group):
    """{name: linear} of a group of anatomy.groups()."""
    return {name: block.get_submodule(name) for name in anatomy.groups(block)[group].linears}


def absorber(block, group):
    """The module before a group's linears, where s [in] fits the last of its parts, else None.

    Under grouped-query attention the values are narrower than what o_proj reads, which then stays
    unscaled.
    """
    told = anatomy.groups(block)[group]
    before, wide = block.get_submodule(told.before), block.get_submodule(told.linears[0])
    return before if len(before.weight) == told.parts * wide.in_features else None


def scale_groups(model):
    """{"block.group": (module before, linears)} of the decoder, where s [in] can be folded."""
    return {
        f"{index}.{group}": (before, list(group_linears(block, group).values()))
        for index, block in enumerate(anatomy.blocks(model))
        for group in anatomy.groups(block)
        if (before := absorber(block, group)) is not None
    }


@torch.no_grad()
def fold_scales(model, scales):
    """Multiply each group's input columns by s and divide the module before by it, in place."""
    groups = scale_groups(model)
    widths = {key: linears[0].in_features for key, (_, linears) in groups.items()}
    if widths != {key: len(s) for key, s in scales.items()}:
        raise DermError("quantize: the scales belong to another model; run the search on this one")
    for index, block in enumerate(anatomy.blocks(model)):
        fold_block(block, index, scales)


@torch.no_grad()
def fold_block(block, index, scales):
    """fold_scales() of one block in place, as far as there are scales."""
    for group in anatomy.groups(block):
        key = f"{index}.{group}"
        if key not in scales:
            continue
        before, told = absorber(block, group), f"scales of {key}"
        s = scales[key].to(before.weight.device, torch.float32)
        for parameter in before.parameters():
            rows = s.view(-1, *[1] * (parameter.ndim - 1))
            last = parameter[-len(s) :]
            _set(last, last.float() / rows, told, "calibrate anew")
        for linear in group_linears(block, group).values():
            _set(linear.weight, linear.weight.float() * s, told, "calibrate anew")
