"""Quantization of a model in place: the decoder's linears onto a form's grid."""

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import nn

from derm_compress.errors import DermError
from derm_compress.method.quantization import folding
from derm_compress.method.quantization.forms import Form
from derm_compress.method.quantization.grids import Int8Grid, clip_ends, grid_of
from derm_compress.model import anatomy


@dataclass(frozen=True)
class Target:
    """A linear to quantize: its block, its name there, its grid."""

    index: int
    block: nn.Module
    name: str
    grid: object

    @property
    def key(self):
        return f"{self.index}.{self.name}"

    @property
    def linear(self):
        return self.block.get_submodule(self.name)


def targets(model, form):
    """The linears that a form quantizes; DermError where it fits another model."""
    blocks = anatomy.blocks(model)
    if beyond := [block for block in form.block_bits if not 0 <= block < len(blocks)]:
        said = f"bits are given for blocks {beyond}; the model has {len(blocks)}"
        raise DermError(f"quantize: {said}")
    found = []
    for index, block in enumerate(blocks):
        grid = grid_of(form, index)
        for name, linear in anatomy.linears(block).items():
            found.append(Target(index, block, name, grid))
            _check(linear, f"block {index} {name}", getattr(grid, "group_size", 1))
    return found


def _check(linear, where, size):
    if not anatomy.finite(linear.weight):
        told = f"weights of {where} are NaN, infinite or both; check the model's files"
        raise DermError(f"quantize: {told}")
    if size < 1 or linear.in_features % size:
        told = f"group size {size} does not divide the {linear.in_features} inputs of {where}"
        raise DermError(f"quantize: {told}; use a divisor")


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
    clips = {target.key: scales[target.key] for target in found if target.key in scales}
    folded = {key: s for key, s in scales.items() if key not in clips}
    if form.scaled or folded:
        folding.fold_scales(model, folded)
    for target in found:
        _replace(target, clips.get(target.key), packed)
    return model


def _replace(target, clip, packed):
    linear, grid = target.linear, target.grid
    ends = None if clip is None else clip_ends(clip, grid.bits, linear.weight.device)
    if packed or isinstance(grid, Int8Grid):
        target.block.set_submodule(target.name, grid.packed(linear, ends))
    else:
        rounded = grid.rounded(linear.weight, ends).to(linear.weight.dtype)
        if rounded.dtype != torch.float32 and not anatomy.finite(rounded):
            told = f"rounded weights of {target.key} overflow {rounded.dtype}; quantize in fp32"
            raise DermError(f"quantize: {told}")
        linear.weight.copy_(rounded)
    target.linear.grid = grid


def quantized_linears(model):
    """Number of quantized linears by part of the model."""
    parts = anatomy.parts(model)
    return {name: sum(hasattr(m, "grid") for m in part.modules()) for name, part in parts.items()}


def apply_step(model, step, store, *, packed=False):
    """Apply a recipe's step: a form's fields and, where it was searched, `ref` to its scales."""
    scales = load_file(store.resolve(step["ref"])) if step.get("ref") else None
    return quantize(model, Form.of(step), scales=scales, packed=packed)
