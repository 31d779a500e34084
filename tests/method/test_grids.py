"""Grids by hand and by their properties, codes as bytes, and the linears that hold them."""

import copy

import pytest
import torch
from torch import nn

from derm_compress.method.quantization import packed
from derm_compress.method.quantization.codes import pack, unpack
from derm_compress.method.quantization.grids import HQQGrid, Int8Grid, IntegerGrid
from derm_compress.method.quantization.nf4 import NF4Grid

INTEGER = [IntegerGrid(bits, 32, symmetric) for bits in (2, 3, 4, 8) for symmetric in (0, 1)]


def random_weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_symmetric_grid_is_equation_1():
    weight = torch.tensor([[2.0, -2.0, 0.9, 0.2]])  # N = 2: Delta = 2 / 2 = 1, codes -2 .. 1
    codes, step, _ = IntegerGrid(2, 4, symmetric=True).encode(weight)
    assert step.item() == 1 and codes.tolist() == [[3, 0, 3, 2]]
    assert IntegerGrid(2, 4, symmetric=True).rounded(weight).tolist() == [[1, -2, 1, 0]]


def test_asymmetric_grid_by_hand():
    weight = torch.tensor([[-1.0, 0.0, 0.9, 2.0]])  # 2 bits: step 3 / 3 = 1, zero 1
    codes, step, zero = IntegerGrid(2, 4).encode(weight)
    assert (step.item(), zero.item(), codes.tolist()) == (1, 1, [[0, 1, 2, 3]])


@pytest.mark.parametrize("grid", INTEGER, ids=str)
def test_codes_stay_in_range_and_err_by_half_a_step_at_most(grid):
    weight = random_weight(40, 128)
    weight[:, 5] *= 30
    codes, step, zeros = grid.encode(weight)
    top = 2**grid.bits - 1
    assert int(codes.max()) <= top and (zeros is None) == grid.symmetric
    error = (grid.rounded(weight) - weight).abs() / step.float().repeat_interleave(32, 1)
    inside = (codes > 0) & (codes < top)
    assert inside.any() and error[inside].max() <= 0.5 + 1e-3
    # at the ends clamping may add half a step, and fp16 rounds steps
    assert error.max() <= 1.01 + top * 2**-11
    assert torch.equal(grid.rounded(weight), grid.decode(codes, step, zeros))


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_rows_of_one_value_or_one_sign_and_zero_rows_are_represented(bits):
    rows = [torch.full((32,), value) for value in (0.0, 0.7, -0.7, 1e-6)]
    weight = torch.stack([*rows, torch.linspace(5, 6, 32)])
    for symmetric in (False, True):
        rounded = IntegerGrid(bits, 32, symmetric).rounded(weight)
        assert torch.isfinite(rounded).all() and (rounded[0] == 0).all()
    rounded = IntegerGrid(bits, 32).rounded(weight)
    assert torch.allclose(rounded[1:3], weight[1:3], rtol=2**-10)
    assert ((rounded[4] - weight[4]).abs() <= 0.51 * 6 / (2**bits - 1)).all()


@pytest.mark.parametrize("value", (0.0, 0.7, -1e-6))
@pytest.mark.parametrize("grid", (HQQGrid(3, 64), NF4Grid(64), NF4Grid(64, True)), ids=str)
def test_constant_rows_are_represented_on_other_grids_too(grid, value):
    weight = torch.full((64, 128), value)
    assert (grid.rounded(weight) - weight).abs().max() <= 1e-3 * abs(value) + 2e-8


def test_nf4_is_bitsandbytes_own():
    from bitsandbytes import functional as bnb

    weight = random_weight(24, 128)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    rounded = NF4Grid(64).rounded(weight)
    assert torch.equal(rounded, bnb.dequantize_4bit(codes, state))
    blocks = rounded.view(-1, 64) / weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert len(blocks.flatten().mul(1e4).round().unique()) <= 16


def test_nf4_codes_survive_a_forward_where_bitsandbytes_would_repack_them(monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    linear = nn.Linear(64, 32, bias=False)
    made, x = NF4Grid(64).packed(linear).eval(), random_weight(3, 64)
    before = made.weight.data.clone()
    with torch.no_grad():
        found = made(x)
    assert torch.equal(made.weight.data, before)
    assert torch.allclose(found, x @ NF4Grid(64).rounded(linear.weight.data).T, atol=1e-6)


def test_dead_rows_of_llm_int8_stay_zero():
    linear = nn.Linear(64, 8, bias=False)
    linear.weight.data[3] = 0
    with torch.no_grad():
        found = Int8Grid().packed(linear)(torch.randn(2, 64))
    assert torch.isfinite(found).all() and not found[:, 3].any()


def test_biases_and_half_precision_are_kept():
    linear = nn.Linear(64, 8).half()
    for grid in (IntegerGrid(4, 64), NF4Grid(64)):
        x = random_weight(2, 64).half()
        expected = nn.functional.linear(x, grid.rounded(linear.weight.data).half(), linear.bias)
        assert torch.allclose(grid.packed(linear)(x), expected, atol=2e-3)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_packing_is_exact_for_all_codes_and_dense(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(5)[1:].view(1, -1)  # an odd count
    held = pack(codes, bits)
    assert held.dtype == torch.uint8 and len(held) <= codes.numel() * bits / 8 + 2
    assert torch.equal(unpack(held, bits, codes.shape), codes)


def test_documented_byte_layout():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    eight = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    assert pack(eight, 3).tolist() == [0b11100100, 0b11100100, 0b11110000]


@pytest.mark.skipif(not packed.cpu_block(), reason="torch has no int4 kernel for this CPU")
@pytest.mark.parametrize("grid", (IntegerGrid(4, 64), IntegerGrid(4, 32, True)), ids=str)
def test_the_kernel_agrees_to_one_percent_and_keeps_one_copy(grid):
    linear, x = nn.Linear(128, 192), random_weight(1, 4, 128)
    made, unused = grid.packed(linear), grid.packed(linear)
    codes, weight = made.codes.clone(), made.dequantized()
    expected = nn.functional.linear(x, weight, linear.bias)
    assert packed.kernel_share(made) == 0
    found = made(x)
    assert made.steps is not None and 0 < (found - expected).norm() < 0.01 * expected.norm()
    assert packed.kernel_share(nn.Sequential(linear, made, unused)) == 0.5
    assert made.codes.nbytes == codes.nbytes and torch.equal(made.dequantized(), weight)
    assert torch.equal(copy.deepcopy(made)(x), found)
    assert torch.equal(made.state_dict()["codes"], codes) and made.steps is None
    many = x.repeat(1, 64, 1)
    assert torch.equal(made(many), nn.functional.linear(many, weight, linear.bias))
    packed.use_kernels(made, False)
    assert torch.allclose(made(x), expected, atol=1e-6)
