"""AutoAWQ's GEMM layout of 4-bit integers: what vLLM and other readers of AWQ checkpoints take.

qweight int32 [in, out / 8] and qzeros int32 [in / g, out / 8] hold eight outputs each, in ORDER
from the lowest bits up; scales fp16 [in / g, out]; weight = (code - zero) * scale.
"""

import torch

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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
