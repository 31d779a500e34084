"""Codes as bytes: planes of 2 or 4 bits, or of 1 and 2 for 3 bits."""

import torch
from torch.nn import functional as F

PLANES = {2: [(0, 2)], 3: [(0, 2), (2, 1)], 4: [(0, 4)], 8: [(0, 8)]}  # bits: (first, width) each


def pack(codes, bits):
    """uint8 codes as bytes, plane by plane (3 bits: a plane of the 2 low bits, then the high bit).

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
