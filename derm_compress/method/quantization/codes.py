"""Codes as bytes: planes of this package's own, and AutoAWQ's GEMM layout of 4-bit integers.

Planes have 2 or 4 bits a code; codes of 3 bits have two, of their 2 low bits and the high one.

GEMM is what vLLM and other readers of AWQ checkpoints take: qweight int32 [in, out / 8] and qzeros
int32 [in / g, out / 8] hold eight outputs each, in ORDER from the lowest bits up; scales fp16
[in / g, out]; weight = (code - zero) * scale.
"""

import torch
from torch.nn import functional as F

PLANES = {2: [(0, 2)], 3: [(0, 2), (2, 1)], 4: [(0, 4)], 8: [(0, 8)]}  # bits: (first, width) each
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes, bits):
    """uint8 codes as bytes, plane by plane; None and fractions (zeros of hqq) stay as they are.

    In a plane of width w a byte holds 8 / w codes in their order, the first in the lowest bits.
    """
    if codes is None or codes.is_floating_point():
        return codes
    planes = []
    for first, width in PLANES[bits]:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        fields = (codes.flatten() >> first) & (2**width - 1)
        fields = F.pad(fields, (0, -len(fields) % len(shifts))).view(-1, len(shifts))
        planes.append((fields << shifts).sum(1, dtype=torch.uint8))
    return torch.cat(planes)


def unpack(packed, bits, shape):
    """What pack() was given, of this shape."""
    if packed is None or packed.is_floating_point():
        return packed
    count, codes = shape.numel(), 0
    for first, width in PLANES[bits]:
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane, packed = packed.tensor_split([-(-count * width // 8)])
        fields = (plane[:, None] >> shifts) & (2**width - 1)
        codes = codes | (fields.flatten()[:count] << first)
    return codes.view(shape)


def to_gemm(codes, scales, zeros):
    """{qweight, qzeros, scales} of codes [out, in], scales and zeros [out, in / g] (None: 8)."""
    zeros = torch.full_like(scales, 8) if zeros is None else zeros
    scales = scales.T.contiguous()
    return {"qweight": pack_eight(codes.T), "qzeros": pack_eight(zeros.T), "scales": scales}


def from_gemm(tensors):
    """The codes [out, in], scales and zeros [out, in / g] that to_gemm() was given."""
    codes, zeros = (unpack_eight(tensors[name]).T.contiguous() for name in ("qweight", "qzeros"))
    return codes, tensors["scales"].T.contiguous(), zeros


def pack_eight(codes):
    """Codes [rows, out] of 4 bits, eight to an int32 [rows, out / 8]."""
    eights = codes.to(torch.int64).unflatten(1, (-1, 8))[..., ORDER]
    shifts = torch.arange(0, 32, 4, device=codes.device)
    packed = (eights << shifts).sum(2)
    return (packed - (packed >> 31 << 32)).to(torch.int32)  # the highest bit is the sign


def unpack_eight(packed):
    """The uint8 codes [rows, out] that pack_eight() was given."""
    shifts = torch.arange(0, 32, 4, device=packed.device)
    eights = ((packed[..., None].to(torch.int64) >> shifts) & 15).to(torch.uint8)
    return eights[..., [ORDER.index(i) for i in range(8)]].flatten(1)
