"""Grids: which numbers a quantized weight may take (Eq. 1), and how a linear holds them packed.

Integer codes are chosen against scales already rounded to fp16, so that packed or not they are the
same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from derm_compress.errors import DermError
from derm_compress.method.quantization.groups import Grid, clipped, group_range
from derm_compress.method.quantization.nf4 import NF4Grid

FP16_MIN, FP16_MAX = 2.0**-24, 65504.0


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Integers of `bits` bits in groups along the input dimension: weight = (code - zero) * scale.

    Symmetric: Eq. 1, Delta = max|w| / 2^(N-1), codes within -2^(N-1) .. 2^(N-1) - 1. Asymmetric:
    min-max with a zero point, of a range that holds 0.
    """

    bits: int
    group_size: int
    symmetric: bool = False
    zeros: ClassVar = torch.uint8  # as they are held
    kind: ClassVar = "integer"
    affine: ClassVar = True

    @property
    def layout(self):
        return "autoawq" if self.bits == 4 else "own"

    @classmethod
    def of(cls, form, bits):
        return cls(bits, form.group_size, form.kind.symmetric)

    def levels(self, weight, ends=None):
        """Weight [..., in] -> codes [..., in / g, g], scales, zeros [..., in / g, 1], float32."""
        groups = weight.float().unflatten(-1, (-1, self.group_size))
        top = 2**self.bits - 1
        low, high = group_range(groups, ends)
        if self.symmetric:
            scales = _as_fp16(torch.maximum(-low, high) / 2 ** (self.bits - 1))
            zeros = torch.full_like(scales, 2 ** (self.bits - 1))
        else:
            scales = _as_fp16((high - low) / top)
            zeros = (-low / scales).round().clamp(0, top)
        return self.nearest(groups, scales, zeros), scales, zeros

    def nearest(self, weight, scales, zeros):
        """The codes of weights under these scales and zeros, float32."""
        return (weight / scales).round_().add_(zeros).clamp_(0, 2**self.bits - 1)

    def encode(self, weight, ends=None):
        """Weight [out, in] -> uint8 codes, fp16 scales, zeros [out, in / g] (symmetric: None)."""
        codes, scales, zeros = self.levels(weight, ends)
        zeros = None if self.symmetric else zeros.squeeze(-1).to(self.zeros)
        return codes.flatten(-2).to(torch.uint8), scales.squeeze(-1).half(), zeros

    def decode(self, codes, scales, zeros):
        """The weight [out, in] that encode() stands for, float32."""
        zeros = 2 ** (self.bits - 1) if zeros is None else zeros.float()[..., None]
        groups = codes.unflatten(-1, (-1, self.group_size)).float() - zeros
        return groups.mul_(scales.float()[..., None]).flatten(-2)

    def rounded(self, weight, ends=None):
        """Weight [..., in] on the grid, float32: decode(encode(weight)) without the packing."""
        codes, scales, zeros = self.levels(weight, ends)
        return codes.sub_(zeros).mul_(scales).flatten(-2)

    def packed(self, linear, ends=None):
        """The linear as a module that holds only codes."""
        from derm_compress.method.quantization.packed import PackedLinear

        return PackedLinear.of(self, *self.encode(linear.weight.data, ends), bias=linear.bias)


@dataclass(frozen=True)
class HQQGrid(IntegerGrid):
    """Integers with a fractional zero: hqq fits it and the scale to the weights alone."""

    zeros: ClassVar = torch.float16
    kind: ClassVar = "hqq"
    affine: ClassVar = True
    layout: ClassVar = "own"

    def levels(self, weight, ends=None):
        """As IntegerGrid's; the zero [..., in / g, 1] that hqq finds is no whole number."""
        from hqq.core.quantize import Quantizer

        weight = clipped(weight.float(), ends, self.group_size)
        _as_fp16(weight.abs().amax())  # refuse what cannot be rounded
        form = {"nbits": self.bits, "group_size": self.group_size, "axis": 1, "bitpack": False}
        _, made = Quantizer.quantize(weight, **form, optimize=True, device=str(weight.device))
        shape = *weight.shape[:-1], -1, 1
        scales = made["scale"].float().abs().view(shape).clamp(FP16_MIN, FP16_MAX).half().float()
        zeros = made["zero"].float().view(shape).clamp(-FP16_MAX, FP16_MAX).half().float()
        # the codes anew, as scale and zero are now fp16
        groups = weight.unflatten(-1, (-1, self.group_size))
        return self.nearest(groups, scales, zeros), scales, zeros

    def nearest(self, weight, scales, zeros):
        """As IntegerGrid's."""
        return (weight / scales).add_(zeros).round_().clamp_(0, 2**self.bits - 1)


@dataclass(frozen=True)
class Int8Grid(Grid):
    """LLM.int8 through bitsandbytes, packed alone: it rounds each row of weights and the inputs."""

    threshold: float = 6.0  # a channel with a larger input is multiplied in full precision
    bits: int = 8
    group_size: ClassVar = 1  # rows are groups, whatever their length
    kind: ClassVar = "int8"
    affine: ClassVar = False
    layout: ClassVar = ""

    @classmethod
    def of(cls, form, bits):
        return cls()

    def packed(self, linear, ends=None):
        """The linear as bitsandbytes' Linear8bitLt."""
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        size = linear.in_features, linear.out_features
        form = {"has_fp16_weights": False, "threshold": self.threshold}
        made = Linear8bitLt(*size, bias=False, device="meta", **form)
        weight = linear.weight.data.cpu().clone()  # it quantizes on the way from CPU to GPU alone
        weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        made.weight = weight.to(linear.weight.device)
        made.bias = linear.bias
        return made


GRIDS = {grid.kind: grid for grid in (IntegerGrid, HQQGrid, NF4Grid, Int8Grid)}


def grid_of(form, block=None, name=""):
    """The grid of a block's linear in a form (methods.Form)."""
    kind = form.kind.grid
    if kind not in GRIDS:
        said = f"{form.method} asks for grid {kind!r}; grids are {', '.join(GRIDS)}"
        raise DermError(f"quantize: {said}")
    return GRIDS[kind].of(form, form.bits_of(block, name))


def _as_fp16(scales):
    """Scales as fp16 holds them, never 0, in float32."""
    if not (scales <= FP16_MAX).all():  # false for NaN as well
        said = "weights are NaN, infinite or beyond fp16 scales; check the model's files"
        raise DermError(f"quantize: {said}")
    return scales.clamp(min=FP16_MIN).half().float()
