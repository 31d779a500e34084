"""A few tokens times 4-bit codes as they lie, for GPUs that torch has no int4 kernel for.

CUDA C, compiled by torch (NVRTC) when it is first needed.
"""

from __future__ import annotations

import functools

import torch

from derm_compress.errors import first_line
from derm_compress.progress import say

MOST = 8  # tokens; registers hold what is read of all
ROWS, WARPS = 4, 4  # outputs of a warp, and warps of a block
ZEROS = {  # of group `at`, by how they are held; symmetric grids have none
    None: "8.0f",
    torch.uint8: "(float)(((const unsigned char*)zeros)[at >> 1] >> 4 * (at & 1) & 15)",
    torch.float16: "from_half(((const unsigned short*)zeros)[at])",
}
HALVES = """
__device__ float from_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ unsigned short to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
"""
PRODUCT = """
// y [TOKENS, out] of x [TOKENS, in / 8], eight halves each, and codes [out, in / 8], eight each.
// A warp sums up ROWS outputs, a lane every 32nd eight of the inputs.
extern "C" __global__ void product(const uint4* x, const unsigned* codes,
        const unsigned short* scales, const void* zeros, unsigned short* y, int out, int in) {
    const int lane = threadIdx.x, first = (blockIdx.x * WARPS + threadIdx.y) * ROWS;
    float sums[ROWS][TOKENS] = {};
    for (int eight = lane; eight < in / 8; eight += 32) {
        float values[TOKENS][8], totals[TOKENS] = {};
        #pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const uint4 halves = x[t * (in / 8) + eight];
            const unsigned pairs[4] = {halves.x, halves.y, halves.z, halves.w};
            #pragma unroll
            for (int i = 0; i < 8; i++) {
                values[t][i] = from_half(pairs[i / 2] >> 16 * (i % 2) & 0xffff);
                totals[t] += values[t][i];
            }
        }
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = min(first + r, out - 1);
            const int at = row * (in / GROUP) + eight * 8 / GROUP;
            const unsigned packed = codes[row * (in / 8) + eight];
            const float scale = from_half(scales[at]), zero = ZERO;
            float dots[TOKENS] = {};
            #pragma unroll
            for (int i = 0; i < 8; i++) {
                // the last bits of 2^23, a conversion that costs a subtraction
                const float code = __uint_as_float(0x4b000000 | packed >> 4 * i & 15) - 8388608.0f;
                #pragma unroll
                for (int t = 0; t < TOKENS; t++) dots[t] += code * values[t][i];
            }
            #pragma unroll
            for (int t = 0; t < TOKENS; t++) sums[r][t] += scale * (dots[t] - zero * totals[t]);
        }
    }
    #pragma unroll
    for (int r = 0; r < ROWS; r++) {
        #pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float sum = sums[r][t];
            for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
            if (lane == 0 && first + r < out) y[t * out + first + r] = to_half(sum);
        }
    }
}
"""


def source(tokens: int, group_size: int, zeros: torch.dtype | None, halves: str = HALVES) -> str:
    """CUDA C for so many tokens; zeros: the type they are held in."""
    known = {"TOKENS": tokens, "GROUP": group_size, "ZERO": ZEROS[zeros]}
    known |= {"ROWS": ROWS, "WARPS": WARPS}
    return "".join(f"#define {name} {value}\n" for name, value in known.items()) + halves + PRODUCT


@functools.cache
def compiled(device: torch.device, *what):
    """The kernel of source(*what) on a device; None where torch cannot compile it."""
    try:
        with torch.cuda.device(device):
            return torch.cuda._compile_kernel(source(*what), "product")
    except (AttributeError, OSError, RuntimeError) as error:
        say(f"4-bit weights are decoded for every token: no kernel ({first_line(error)})")
        return None


def kernel(tokens: int, grid, shape, zeros: torch.Tensor | None, device: torch.device):
    """What product() needs for so many tokens of such a linear; None where there is none."""
    fits = grid.affine and grid.bits == 4 and grid.group_size % 8 == 0 and shape[1] % 8 == 0
    if device.type != "cuda" or not fits or not 0 < tokens <= MOST:
        return None
    return compiled(device, tokens, grid.group_size, None if zeros is None else zeros.dtype)


def product(kernel, x, codes, scales, zeros, shape) -> torch.Tensor:
    """fp16 x [tokens, in] times the transposed weight; codes, scales, zeros as PackedLinear's."""
    out, into = shape
    y = torch.empty(len(x), out, dtype=torch.float16, device=x.device)
    given = [x.contiguous(), codes, scales, codes if zeros is None else zeros, y, out, into]
    blocks = -(-out // (ROWS * WARPS))
    kernel(grid=(blocks, 1, 1), block=(32, WARPS, 1), args=given)
    return y
