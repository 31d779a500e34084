"""Grids: which numbers a quantized weight may take (Eq. 1), and how a linear holds them packed.

Integer codes are chosen against scales already rounded to fp16, so that packed or not they are the
same numbers. `ends` of a group are the shares of its lowest and of its highest weight to which it
is clipped.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from derm_compress.errors import DermError

FP16_MIN, FP16_MAX = 2.0**-24, 65504.0


@dataclass(frozen=True)
class IntegerGrid:
    """Integers of `bits` bits in groups along the input dimension: weight = (code - zero) * scale.

    Symmetric: Eq. 1, Delta = max|w| / 2^(N-1), codes within -2^(N-1) .. 2^(N-1) - 1. Asymmetric:
    min-max with a zero point, of a range that holds 0.
    """

    bits: int
    group_size: int
    symmetric: bool = False
    zeros: ClassVar = torch.uint8  # as they are held

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
        return (groups / scales).round_().add_(zeros).clamp_(0, top), scales, zeros

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
        return (groups / scales).add_(zeros).round_().clamp_(0, 2**self.bits - 1), scales, zeros


@dataclass(frozen=True)
class NF4Grid:
    """The NF4 codebook in blocks along the input dimension, through bitsandbytes.

    A block has an fp32 absmax; `double` holds 256 of them in 8 bits each with an fp32 constant.
    """

    group_size: int
    double: bool = False
    bits: int = 4

    @property
    def _format(self):
        form = {"quant_type": "nf4", "compress_statistics": self.double}
        return form | {"blocksize": self.group_size}

    def rounded(self, weight, ends=None):
        """Weight [..., in] on the grid, in its own dtype."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = clipped(weight, ends, self.group_size)
        flat = weight.flatten(0, -2).contiguous()
        return dequantize_4bit(*quantize_4bit(flat, **self._format)).view(weight.shape)

    def packed(self, linear, ends=None):
        """The linear as bitsandbytes' Linear4bit."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        made = Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = clipped(linear.weight.data, ends, self.group_size)
        made.weight = Params4bit(weight, **self._format).to(linear.weight.device)
        # not by module=made: a cycle, which holds memory until it is collected
        made.quant_state = made.weight.quant_state
        made.bias = linear.bias
        made.compute_dtype = linear.weight.dtype
        made.compute_type_is_set = True
        # On AVX512-BF16 CPUs its first forward would repack the weight in place and compute in
        # bfloat16: other numbers, and no way to save them afterwards.
        made.support_avx512bf16_for_cpu = False
        return made


@dataclass(frozen=True)
class Int8Grid:
    """LLM.int8 through bitsandbytes, packed alone: it rounds each row of weights and the inputs."""

    threshold: float = 6.0  # a channel with a larger input is multiplied in full precision
    bits: int = 8

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


def grid_of(form, block=None):
    """The grid of a block's linears in a form (methods.Form)."""
    bits = form.block_bits.get(block, form.bits)
    match form.kind.grid:
        case "integer":
            return IntegerGrid(bits, form.group_size)
        case "symmetric":
            return IntegerGrid(bits, form.group_size, symmetric=True)
        case "hqq":
            return HQQGrid(bits, form.group_size)
        case "nf4":
            return NF4Grid(form.group_size, form.double)
        case "int8":
            return Int8Grid()
    raise AssertionError(f"no grid of kind {form.kind.grid}")


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


def _as_fp16(scales):
    """Scales as fp16 holds them, never 0, in float32."""
    if not (scales <= FP16_MAX).all():  # false for NaN as well
        said = "weights are NaN, infinite or beyond fp16 scales; check the model's files"
        raise DermError(f"quantize: {said}")
    return scales.clamp(min=FP16_MIN).half().float()
