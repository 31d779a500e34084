"""Weights that were rounded before are told from others by rounding them anew."""

import pytest
import torch
from small_llava import small_llava

from derm_compress.method.quantization import source_grid
from derm_compress.method.quantization.grids import IntegerGrid
from derm_compress.model import anatomy


def error(frame, weights, bits):
    (found,) = frame[(frame.weights == weights) & (frame.bits == bits)].relative_error
    return found


def test_weights_on_our_own_grid_lose_nothing_until_noise_moves_them():
    model = small_llava(2, kv_heads=2)
    for block in anatomy.blocks(model):
        for linear in anatomy.linears(block).values():
            linear.weight.data = IntegerGrid(4, 64).rounded(linear.weight.data)
    found = source_grid.source_errors(model)
    assert error(found, "as they are", 4) < 1e-3 < 0.05 < error(found, "with noise", 4)
    assert error(found, "as they are", 3) > 0.1
    assert len(found) == 9 and found.equals(source_grid.source_errors(model))


def test_a_source_in_other_groups_is_as_any_weights():
    """Blocks of 32 with ends of their own: the case of the small model."""
    model = small_llava(2)
    for block in anatomy.blocks(model):
        for linear in anatomy.linears(block).values():
            low, high = linear.weight.data.unflatten(-1, (-1, 32)).aminmax(dim=-1, keepdim=True)
            step = (high - low) / 15
            codes = ((linear.weight.data.unflatten(-1, (-1, 32)) - low) / step).round()
            linear.weight.data = (codes * step + low).flatten(-2)
    found = source_grid.source_errors(model)
    for bits in (4, 3):
        beside = error(found, "with noise", bits), error(found, "normal", bits)
        assert error(found, "as they are", bits) == pytest.approx(beside[0], rel=0.05)
        assert error(found, "as they are", bits) == pytest.approx(beside[1], rel=0.05)


def test_normal_weights_lose_a_uniform_steps_share():
    """A step D leaves D^2 / 12 a weight."""
    weight = source_grid.normal(torch.randn(256, 512), torch.Generator().manual_seed(0))
    low, high = weight.unflatten(-1, (-1, 64)).aminmax(dim=-1)
    for bits in (4, 3):
        step = (high - low) / (2**bits - 1)
        wanted = (step.square().mean() / 12).sqrt() / weight.square().mean().sqrt()
        found = source_grid.relative_error(weight, IntegerGrid(bits, 64))
        assert found == pytest.approx(wanted.item(), rel=0.03)


def test_of_a_base_by_name_and_of_shapes_alone():
    how = {"group_size": 16, "seed": 0}
    found = source_grid.rounded_anew("pico", device="cpu", **how)
    assert len(found) == 9 and found.relative_error.between(0.01, 1).all()
    assert source_grid.rounded_anew("llava-1.5-7b", device="meta", **how).empty


def test_noise_is_as_wide_as_a_step_of_the_source():
    weight = torch.arange(32.0).repeat(2000, 1) * 15 / 31  # steps of 1
    moved = source_grid.with_noise(weight, torch.Generator().manual_seed(0)) - weight
    assert moved.abs().max() <= 0.5 and moved.std() == pytest.approx(12**-0.5, rel=0.01)
