"""Grids: which numbers a quantized weight may take, and how a linear holds them packed.

Integer codes are chosen against scales already rounded to fp16, so that both ways are the same numbers.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from derm_compress.errors import DermError

PLANES = {2: [(0, 2)], 3: [(0, 2), (2, 1)], 4: [(0, 4)], 8: [(0, 8)]}  # bits: first bit, width of each plane
FP16_MIN, FP16_MAX = 2.0**-24, 65504.0


@dataclass(frozen=True)
class IntegerGrid:
    """Integers of `bits` bits in groups along the input dimension: weight = (code - zero) * scale.

    Asymmetric: min-max with a zero point; the range always holds 0, so that a group of one sign or one value
    is represented too. Symmetric: Eq. 1, Delta = max|w| / 2^(N-1), codes within -2^(N-1) .. 2^(N-1) - 1.
    """

    bits: int
    group_size: int
    symmetric: bool = False

    def encode(self, weight):
        """Weight [out, in] -> unsigned codes [out, in], fp16 scales and zeros (symmetric: None) [out, in / g]."""
        groups, top = weight.float().unflatten(1, (-1, self.group_size)), 2**self.bits - 1
        if self.symmetric:
            scales = _as_fp16(groups.abs().amax(2) / 2 ** (self.bits - 1))
            zeros = torch.full_like(scales, 2 ** (self.bits - 1))
        else:
            low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
            scales = _as_fp16((high - low) / top)
            zeros = (-low / scales).round().clamp(0, top)
        codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, top)
        codes, zeros = codes.flatten(1).to(torch.uint8), zeros.to(torch.uint8)
        return codes, scales.half(), None if self.symmetric else zeros

    def decode(self, codes, scales, zeros):
        """The weight [out, in] that encode() stands for, float32."""
        zeros = 2 ** (self.bits - 1) if zeros is None else zeros.float()[..., None]
        groups = codes.unflatten(1, (-1, self.group_size)).float() - zeros
        return (groups * scales.float()[..., None]).flatten(1)

    def rounded(self, weight):
        """Weight [out, in] on the grid, float32."""
        return self.decode(*self.encode(weight))

    def packed(self, linear):
        """The linear as a module that holds only codes."""
        return PackedLinear(linear, self)


def _as_fp16(scales):
    """Scales as fp16 holds them, never 0, in float32."""
    if not (scales <= FP16_MAX).all():  # false for NaN as well
        raise DermError("quantize: weights are NaN, infinite or beyond fp16 scales; check the model's files")
    return scales.clamp(min=FP16_MIN).half().float()


@dataclass(frozen=True)
class NF4Grid:
    """The NF4 codebook in blocks along the input dimension, through bitsandbytes (fp32 absmax per block)."""

    group_size: int

    def rounded(self, weight):
        """Weight [out, in] on the grid, in its own dtype."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        return dequantize_4bit(*quantize_4bit(weight.contiguous(), blocksize=self.group_size, quant_type="nf4"))

    def packed(self, linear):
        """The linear as bitsandbytes' Linear4bit."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        kind = {"blocksize": self.group_size, "quant_type": "nf4", "compress_statistics": False}
        made = Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta")
        made.weight = Params4bit(linear.weight.data, module=made, **kind).to(linear.weight.device)
        made.bias, made.compute_dtype, made.compute_type_is_set = linear.bias, linear.weight.dtype, True
        # On AVX512-BF16 CPUs its first forward would repack the weight in place and compute in bfloat16:
        # other numbers, and no way to save them afterwards.
        made.support_avx512bf16_for_cpu = False
        return made


def pack(codes, bits):
    """uint8 codes as bytes, plane by plane (3 bits: a plane of the 2 low bits, then one of the high bit).

    In a plane of width w a byte holds 8 / w codes in their order, the first in the lowest bits.
    """
    planes = []
    for first, width in PLANES[bits]:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        fields = (codes.flatten() >> first) & (2**width - 1)
        fields = F.pad(fields, (0, -len(fields) % len(shifts))).view(-1, len(shifts))
        planes.append((fields << shifts).sum(1, dtype=torch.uint8))
    return torch.cat(planes)


def unpack(packed, bits, shape):
    """The uint8 codes of `shape` that pack() was given."""
    count, codes = shape.numel(), 0
    for first, width in PLANES[bits]:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane, packed = packed.tensor_split([-(-count * width // 8)])
        fields = (plane[:, None] >> shifts) & (2**width - 1)
        codes = codes | (fields.flatten()[:count] << first)
    return codes.view(shape)


class PackedLinear(nn.Module):
    """A linear holding packed codes, fp16 scales and, if asymmetric, packed zeros; its forward dequantizes.

    bits / 8 + 2 / g bytes a weight, and bits / 8 / g for zeros: it saves memory, on any device, not time.
    """

    def __init__(self, linear, grid):
        super().__init__()
        self.grid, self.shape, self.bias = grid, linear.weight.shape, linear.bias
        codes, scales, zeros = grid.encode(linear.weight.data)
        self.register_buffer("codes", pack(codes, grid.bits))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", None if zeros is None else pack(zeros, grid.bits))

    def dequantized(self):
        """Weight [out, in], float32."""
        bits, scales = self.grid.bits, self.scales
        zeros = None if self.zeros is None else unpack(self.zeros, bits, scales.shape)
        return self.grid.decode(unpack(self.codes, bits, self.shape), scales, zeros)

    def forward(self, x):
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)
