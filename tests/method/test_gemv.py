"""The CUDA kernel's own source, compiled for a CPU: a warp's lanes take turns there."""

import ctypes
import shutil
import subprocess
from contextlib import nullcontext

import pytest
import torch
from asking import about
from torch import nn

from derm_compress.method.quantization import gemv, packed
from derm_compress.method.quantization.grids import IntegerGrid
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize
from derm_compress.model import loading

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
LANES = """
#include <algorithm>
#include <cstring>
using std::min;
#define __device__ static
#define __global__
struct uint4 { unsigned x, y, z, w; };
static struct { int x, y; } blockIdx, threadIdx;
static float given[1024][32];  // what each lane gave to each exchange of values
static int exchanges;
static float __shfl_xor_sync(unsigned, float value, int by) {
    float* lanes = given[exchanges++];
    lanes[threadIdx.x] = value;
    return lanes[threadIdx.x ^ by];
}
static float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static float from_half(unsigned short bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}
static unsigned short to_half(float value) {
    _Float16 half = value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
"""
LAUNCH = """
extern "C" void launch(int blocks, const void* x, const void* codes, const void* scales,
        const void* zeros, void* y, int out, int in) {
    const int depth = 5;  // exchanges that a sum takes; each turn knows what one more has given
    for (int block = 0; block < blocks; block++)
        for (int warp = 0; warp < WARPS; warp++)
            for (int turn = 0; turn <= depth; turn++)
                for (int lane = 0; lane < 32; lane++) {
                    blockIdx.x = block, threadIdx.x = lane, threadIdx.y = warp, exchanges = 0;
                    product((const uint4*)x, (const unsigned*)codes, (const unsigned short*)scales,
                        zeros, (unsigned short*)y, out, in);
                }
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    made = {}

    def compiled(device, *what):
        if what not in made:
            folder = tmp_path_factory.mktemp("gemv")
            (folder / "gemv.cpp").write_text(gemv.source(*what, halves=LANES) + LAUNCH)
            words = ["g++", "-O1", "-w", "-shared", "-fPIC", "gemv.cpp", "-o", "gemv.so"]
            subprocess.run(words, cwd=folder, check=True)
            made[what] = ctypes.CDLL(str(folder / "gemv.so")).launch
        return lambda grid, block, args: made[what](grid[0], *map(argument, args))

    return compiled


def argument(value):
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else value


@pytest.fixture
def on_cpu(compiled, monkeypatch):
    """Packed linears think that they are on a GPU which torch has no kernel for."""
    real = gemv.kernel
    monkeypatch.setattr(gemv, "compiled", compiled)
    monkeypatch.setattr(packed, "has_kernel", lambda *_: False)
    monkeypatch.setattr(gemv, "kernel", lambda *asked: real(*asked[:-1], torch.device("cuda")))


@pytest.mark.parametrize(
    ("grid", "zeros", "tokens", "out", "into"),
    [
        (IntegerGrid(4, 64), torch.uint8, 1, 37, 320),  # no whole number of warps' rows or inputs
        (IntegerGrid(4, 128), torch.uint8, 8, 16, 384),
        (IntegerGrid(4, 16, True), None, 3, 5, 48),  # fewer inputs than a warp has lanes
        (IntegerGrid(4, 32), torch.float16, 2, 21, 288),  # as hqq's
    ],
)
def test_the_kernel_gives_what_decoded_weights_give(on_cpu, grid, zeros, tokens, out, into):
    torch.manual_seed(0)
    linear = nn.Linear(into, out)
    linear.weight.data += 0.02  # zeros that differ
    small = grid.packed(linear)
    if zeros == torch.float16:
        fractions = torch.rand(out, into // grid.group_size) * 15
        codes, scales, _ = small.encoded()
        small = packed.PackedLinear.of(grid, codes, scales, fractions.half(), bias=linear.bias)
    assert (small.zeros is None) == (zeros is None)
    x = torch.randn(1, tokens, into).half()
    expected = nn.functional.linear(x.float(), small.dequantized(), linear.bias)
    found = small.half()(x)
    assert small.by_kernel and found.shape == expected.shape and found.dtype == x.dtype
    assert torch.allclose(found.float(), expected, rtol=2e-3, atol=2e-3)
    assert not torch.equal(found, found.flip(-1))


def test_others_are_decoded(on_cpu):
    small, many = IntegerGrid(4, 64).packed(nn.Linear(64, 8)).half(), gemv.MOST + 1
    small(torch.randn(many, 64).half())
    IntegerGrid(3, 64).packed(nn.Linear(64, 8)).half()(torch.randn(1, 64).half())
    assert not small.by_kernel
    small(torch.randn(many - 1, 64).half())
    assert small.by_kernel


def test_a_model_says_the_same_by_the_kernel_and_without(on_cpu, dataset):
    model, processor = loading.load_base("pico", dtype=torch.float16)
    small = quantize(model, Form("rtn", 4, 16), packed=True)
    asked = about(processor, dataset.images, "name")
    with torch.inference_mode():
        cache = small(**asked, use_cache=True).past_key_values
        tokens = torch.tensor([[5, 7, 11]])
        assert packed.kernel_share(small) == 0
        found = small(input_ids=tokens, past_key_values=cache).logits
        assert packed.kernel_share(small) == 1
        cache.crop(-3)
        packed.use_kernels(small, False)
        expected = small(input_ids=tokens, past_key_values=cache).logits
    assert torch.allclose(found, expected, atol=0.02 * expected.abs().max())


def test_what_cannot_be_compiled_is_decoded_and_said(capsys, monkeypatch):
    def fails(*_):
        raise OSError("CUDA_HOME environment variable is not set.\nMore.")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", fails, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    gemv.compiled.cache_clear()
    asked = 1, IntegerGrid(4, 64), torch.Size((8, 64)), None, torch.device("cuda")
    assert gemv.kernel(*asked) is None and gemv.kernel(*asked) is None
    gemv.compiled.cache_clear()
    assert capsys.readouterr().out.count("no kernel (CUDA_HOME environment variable") == 1
