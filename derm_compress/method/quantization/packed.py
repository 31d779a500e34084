"""The W4 linear: what a quantized linear becomes for inference, with one copy of its codes.

Planes of bytes (codes.py), as gemv.py's kernel reads them, too, or what torch's int4 kernel reads
once few enough tokens come for it.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from derm_compress.method.quantization import gemv
from derm_compress.method.quantization.codes import pack, unpack

FEW = 128  # tokens up to which torch's int4 kernel was faster on a CPU than decoding all weights
ROWS = 1024  # decoded at a time
KERNEL_GROUPS = (32, 64, 128, 256)
INNER_TILES = 8  # of the CUDA layout: the inputs must be a multiple of 16 times as many
TILE = (8, 16 * INNER_TILES)  # outputs and inputs of its tiles


class PackedLinear(nn.Module):
    """A linear holding packed codes, fp16 scales [out, in / g] and, if asymmetric, zeros.

    Without a kernel (other grids or widths, long inputs, `kernels` off) the forward decodes the
    whole weight: the same numbers as an unpacked model, on any device, and no faster.
    torch's int4 kernel computes in bfloat16, and keeps 4 / g bytes a weight more. On a GPU that it
    is not for, as a T4, gemv.py's reads a few tokens in fp16.
    """

    kernels = True
    by_kernel = False  # whether one has read it

    def __init__(self, grid, shape, codes, scales, zeros=None, *, bias=None):
        """codes, zeros: as codes.pack() gives them."""
        super().__init__()
        self.grid, self.shape, self.bias = grid, torch.Size(shape), bias
        self.out_features, self.in_features = shape
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("steps", None, persistent=False)  # the kernel's scales and offsets

    @classmethod
    def of(cls, grid, codes, scales, zeros=None, *, bias=None):
        """Of codes [out, in], scales and zeros [out, in / g] as grid.encode gives them."""
        held = pack(codes, grid.bits), scales, pack(zeros, grid.bits)
        return cls(grid, codes.shape, *held, bias=bias)

    def encoded(self):
        """(codes [out, in], scales, zeros [out, in / g]) as grid.encode gave them."""
        zeros = unpack(self.zeros, self.grid.bits, self.scales.shape)
        if self.steps is None:
            return unpack(self.codes, self.grid.bits, self.shape), self.scales, zeros
        return kernel_codes(self.codes, self.shape), self.scales, zeros

    def dequantized(self, dtype=torch.float32):
        """Weight [out, in], some rows at a time so that no second copy in float32 is needed."""
        codes, scales, zeros = self.encoded()
        weight = torch.empty(self.shape, dtype=dtype, device=codes.device)
        for start in range(0, len(codes), ROWS):
            rows = slice(start, start + ROWS)
            own = None if zeros is None else zeros[rows]
            weight[rows] = self.grid.decode(codes[rows], scales[rows], own)
        return weight

    def forward(self, x):
        out = self._by_kernel(x.reshape(-1, self.in_features)) if self.kernels else None
        if out is None:
            return F.linear(x, self.dequantized(x.dtype), self.bias)
        self.by_kernel = True
        out = out.to(x.dtype)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def _by_kernel(self, x):
        """The product of x [tokens, in] without bias; None where no kernel reads so many."""
        if len(x) <= FEW and has_kernel(self.grid, self.shape, x.device):
            if self.steps is None:
                self._to_kernel()
            return int4_product(x.to(torch.bfloat16), self.codes, self.grid.group_size, self.steps)
        if self.steps is not None or x.dtype != torch.float16:
            return None
        kernel = gemv.kernel(len(x), self.grid, self.shape, self.zeros, x.device)
        return kernel and gemv.product(kernel, x, self.codes, self.scales, self.zeros, self.shape)

    def _to_kernel(self):
        codes, scales, zeros = self.encoded()
        zeros = 8.0 if zeros is None else zeros.float()
        scales = scales.float()
        self.codes, self.steps = kernel_layout(codes), kernel_steps(scales, (8 - zeros) * scales)

    def _to_planes(self):
        if self.steps is not None:
            self.codes, self.steps = pack(self.encoded()[0], self.grid.bits), None

    def _apply(self, fn, recurse=True):
        self._to_planes()  # a kernel's layout is one device's
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args):
        self._to_planes()
        super()._save_to_state_dict(*args)


def packed_linears(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def use_kernels(model, use):
    """Let the packed linears of a model use a kernel where there is one (the default), or never."""
    for module in packed_linears(model):
        module.kernels = use


def kernel_share(model):
    """Of a model's packed linears, the share that a kernel has read; nan without any."""
    used = [module.by_kernel for module in packed_linears(model)]
    return sum(used) / len(used) if used else float("nan")


def has_kernel(grid, shape, device):
    """Whether torch has an int4 kernel for such a linear here; on CUDA from capability 8.0 on."""
    if not grid.affine or grid.bits != 4 or grid.group_size not in KERNEL_GROUPS:
        return False
    if device.type == "cpu":
        return shape[0] % 64 == 0 and cpu_block() > 0
    fits = shape[0] % TILE[0] == 0 and shape[1] % TILE[1] == 0
    return device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= (8, 0)


def int4_product(x, codes, group_size, steps):
    """x [tokens, in] times the transposed weight, in bfloat16, by torch's int4 kernel."""
    if x.device.type == "cpu":
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group_size, steps)
    return torch.ops.aten._weight_int4pack_mm(x, codes, group_size, steps)


def kernel_layout(codes):
    """uint8 codes [out, in] as the int4 kernel of their device reads them."""
    if codes.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), INNER_TILES)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)


def kernel_steps(scales, offsets):
    """What kernels take for weights (code - 8) * scale + offset: bfloat16 [in / g, out, 2]."""
    return torch.stack([scales, offsets], 2).transpose(0, 1).to(torch.bfloat16).contiguous()


def kernel_codes(layout, shape):
    """The codes [out, in] that kernel_layout() was given."""
    if layout.device.type == "cpu":
        return _cpu_codes(layout, cpu_block())
    return _cuda_codes(layout, shape)


def _cuda_codes(layout, shape):
    """The CUDA layout is made of tiles of TILE codes, each in the same order."""
    (rows, columns), (out, into) = TILE, shape
    grid = out // rows, into // columns
    found = _nibbles(layout).view(*grid, rows * columns)
    tiles = torch.empty_like(found)
    tiles[..., _tile_order(layout.device)] = found
    return tiles.view(*grid, rows, columns).transpose(1, 2).reshape(out, into)


def _nibbles(layout):
    """The 4-bit fields of int32, lowest first, as uint8."""
    octets = layout.contiguous().view(torch.uint8)
    return torch.stack([octets & 15, octets >> 4], -1).flatten()


@functools.cache
def _tile_order(device):
    """Which code of a tile, counted row by row, stands in each of its places."""
    index = torch.arange(TILE[0] * TILE[1], device=device).view(TILE)
    order = torch.zeros(index.numel(), dtype=torch.long, device=device)
    for shift in (0, 4, 8):
        digit = ((index >> shift) & 15).to(torch.uint8)
        order += _nibbles(kernel_layout(digit)).long() << shift
    return order


def _cpu_codes(layout, block):
    """A byte on the CPU holds one input's codes of two outputs, half a block of outputs apart."""
    halves = layout.view(-1, layout.shape[1] * 2, block // 2)  # [out / block, in, block / 2]
    return torch.cat([halves & 15, halves >> 4], 2).transpose(1, 2).reshape(len(layout), -1)


@functools.cache
def cpu_block():
    """Outputs in a block of the CPU's layout: 64 (AVX-512), 32 (AVX2), 0 where it is another."""
    codes = ((torch.arange(64 * 64).view(64, 64) * 7919) >> 3) & 15
    codes = codes.to(torch.uint8)
    try:
        layout = kernel_layout(codes)
        return next((b for b in (64, 32) if torch.equal(_cpu_codes(layout, b), codes)), 0)
    except (RuntimeError, AttributeError):
        return 0
