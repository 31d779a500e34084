"""GPTQ by closed forms and properties, and through the search of a whole decoder."""

import copy

import pytest
import torch
from small_llava import asked, batch, loud_llava, quantized, search_one

from derm_compress.errors import DermError
from derm_compress.method.quantization import gptq
from derm_compress.method.quantization.block_errors import block_errors, block_outputs
from derm_compress.method.quantization.grids import IntegerGrid
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize
from derm_compress.method.quantization.scaling import InputStatistics
from derm_compress.method.quantization.search import search_forms
from derm_compress.model import anatomy

BATCHES = [batch(8, seed=1), asked(answer_weight=3.0)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(inputs=128, tokens=1000):
    """H of inputs that are mixtures of fewer, of unequal loudness."""
    x = random(tokens, inputs // 4) @ random(inputs // 4, inputs, seed=1)
    x = x + 2 * random(tokens, inputs, seed=2)
    x = x * torch.linspace(0.2, 3, inputs)[torch.randperm(inputs, generator=rng(3))]
    return x.T @ x


def rng(seed):
    return torch.Generator().manual_seed(seed)


def loss(weight, gram, grid, **how):
    delta = grid.decode(*gptq.encode(weight, gram.clone(), grid, **how)) - weight
    return ((delta @ gram) * delta).sum().item()


@pytest.fixture(scope="module")
def model():
    return loud_llava(2)


@pytest.mark.parametrize("actorder", (False, True))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_where_inputs_have_nothing_in_common_it_is_rounding_bit_by_bit(bits, actorder):
    weight, grid = random(48, 128), IntegerGrid(bits, 32)
    for gram in (
        torch.eye(128),
        torch.diag(torch.rand(128, generator=rng(5))),
        torch.zeros(128, 128),
    ):
        found = gptq.encode(weight, gram.clone(), grid, actorder=actorder)
        assert all(map(torch.equal, found, grid.encode(weight)))


@pytest.mark.parametrize("actorder", (False, True))
def test_each_weight_is_rounded_from_the_optimum_of_all_that_are_left(actorder):
    """The paper's own words, in float64 and by brute force: Eqs. 2 and 3 of GPTQ."""
    weight, grid, gram = random(6, 64), IntegerGrid(4, 16), correlated(64)
    damped = gram.double() + gptq.DAMPING * gram.diagonal().mean().double() * torch.eye(64)
    order = torch.arange(64)
    if actorder:
        order = gram.diagonal().argsort(descending=True)
    _, scales, zeros = grid.levels(weight)
    left, codes = weight.double().clone(), torch.empty(6, 64)
    for i, place in enumerate(order.tolist()):
        group = place // 16
        codes[:, place] = grid.nearest(
            left[:, place].float(), scales[:, group, 0], zeros[:, group, 0]
        )
        value = (codes[:, place] - zeros[:, group, 0]) * scales[:, group, 0]
        error = value.double() - left[:, place]
        rest = order[i + 1 :]
        move = torch.linalg.solve(damped[rest][:, rest], damped[rest, place])
        left[:, rest] -= error[:, None] * move
    found = gptq.encode(weight, gram.clone(), grid, actorder=actorder)[0]
    assert (found == codes).float().mean() > 0.99  # ties of float32 alone differ


def test_correlated_inputs_make_it_beat_rounding_by_the_computed_margin():
    """Errors are uniform in a step: rounding's cost tr H of them each, and these L's diagonal."""
    weight, grid, gram = random(2000, 128), IntegerGrid(8, 128), correlated()
    factor = gptq.factored(gram.clone())
    margin = (factor.diagonal().square().sum() / gram.diagonal().sum()).item()
    delta = grid.rounded(weight) - weight
    rounding = ((delta @ gram) * delta).sum().item()
    assert margin < 0.5
    assert loss(weight, gram, grid) / rounding == pytest.approx(margin, rel=0.1)


def test_scales_stay_those_of_rounding_in_every_group_whatever_the_order():
    weight, grid, gram = random(16, 128), IntegerGrid(3, 32), correlated()
    plain = grid.encode(weight)
    found = [gptq.encode(weight, gram.clone(), grid, actorder=one) for one in (False, True)]
    for codes, scales, zeros in found:
        assert torch.equal(scales, plain[1]) and torch.equal(zeros, plain[2])
        assert codes.max() <= 7 and codes.dtype == torch.uint8
    assert not torch.equal(found[0][0], found[1][0])
    delta = grid.rounded(weight) - weight
    for one in (False, True):
        assert loss(weight, gram, grid, actorder=one) < 0.7 * ((delta @ gram) * delta).sum()


def test_dead_inputs_are_rounded_and_twins_are_no_trouble():
    weight, grid, x = random(16, 64), IntegerGrid(4, 32), random(200, 64, seed=1)
    x[:, 10:20] = 0
    x[:, 40] = x[:, 41]
    codes, *_ = gptq.encode(weight, x.T @ x, grid)
    assert torch.equal(codes[:, 10:20], grid.encode(weight)[0][:, 10:20])


def test_statistics_of_divided_inputs():
    x, s, delta = random(40, 64), 0.5 + torch.rand(64, generator=rng(1)), random(3, 64, seed=2)
    for rows in (x, torch.cat([x, x])):  # the inputs, and their H
        one, other = InputStatistics.of(rows).divided(s), InputStatistics.of(rows / s)
        assert torch.allclose(one.row_errors(delta), other.row_errors(delta), rtol=1e-4)
        assert torch.allclose(one.gram_matrix(), other.gram_matrix(), rtol=1e-3, atol=1e-3)
        assert torch.allclose(one.mean_abs, other.mean_abs, rtol=1e-5)


def test_what_it_is_worth_on_held_out_inputs(model):
    feeds = [batch(8, seed=9)]
    outputs = block_outputs(model, feeds)

    def error(form):
        return block_errors(outputs, quantized(model, BATCHES, form), feeds)[-1]["relative_error"]

    rtn, awq, alone, both = (error(Form(name, 3)) for name in ("rtn", "awq", "gptq", "awq_gptq"))
    assert alone < rtn and both < awq < rtn
    assert error(Form("gptq", 2, clip=True)) < error(Form("gptq", 2))


def test_blocks_read_what_quantized_ones_leave(model):
    """The second block's codes are those of a model whose first block is quantized already."""
    form = Form("gptq", 2)
    tensors, rows = search_one(model, BATCHES, form)
    first = {key: tensor for key, tensor in tensors.items() if key.startswith("0.")}
    whole = Form("gptq", 2, linear_bits={f"1.{name}": 16 for name in names(model)})
    cut = quantize(copy.deepcopy(model), whole, scales=first)
    again, _ = search_one(cut, BATCHES, whole_first(model))
    for key, tensor in again.items():
        assert key.startswith("0.") or torch.equal(tensor, tensors[key]), key
    other, _ = search_one(model, BATCHES, whole_first(model))
    assert any(not torch.equal(tensor, tensors[key]) for key, tensor in other.items())
    assert len(rows) == 8 and all(0 < row["loss"] < row["loss_rtn"] for row in rows)


def names(model):
    return list(anatomy.linears(anatomy.blocks(model)[0]))


def whole_first(model):
    """GPTQ of all blocks but the first."""
    return Form("gptq", 2, linear_bits={f"0.{name}": 16 for name in names(model)})


def test_a_search_repeats_itself_goes_on_at_its_block_and_leaves_the_model(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forms = {"a": Form("awq_gptq", 3), "b": Form("gptq", 3, actorder=True), "c": Form("awq", 3)}
    expected = search_forms(model, iter(BATCHES), forms, scratch=tmp_path)
    for lost in ("a/1", "b/0", "1"):
        (tmp_path / f"{lost}.safetensors").unlink()
    found = search_forms(model, BATCHES, forms, scratch=tmp_path)
    for name, (tensors, rows) in expected.items():
        assert found[name][1] == rows and found[name][0].keys() == tensors.keys()
        assert all(torch.equal(found[name][0][key], t) for key, t in tensors.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_codes_of_another_model_are_refused(model):
    form = Form("gptq")
    scales = search_one(loud_llava(1), BATCHES, form)[0]
    with pytest.raises(DermError, match="the codes belong to another model"):
        quantize(copy.deepcopy(model), form, scales=scales)
