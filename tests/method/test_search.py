"""Eqs. 6-8: scales by closed forms, clipping, searches over a decoder, AutoAWQ's choice."""

import copy
import math
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
from small_llava import asked, batch, collect_all, loud_llava, quantized, search_one, small_llava

from derm_compress.errors import DermError
from derm_compress.method.quantization import calibration, groups, scaling
from derm_compress.method.quantization.block_errors import block_errors, block_outputs
from derm_compress.method.quantization.grids import IntegerGrid
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.nf4 import NF4Grid
from derm_compress.method.quantization.quantize import quantize
from derm_compress.method.quantization.scaling import InputStatistics
from derm_compress.method.quantization.search import search_forms
from derm_compress.model import anatomy, removal

BATCHES = [batch(4, seed=1), asked()]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return loud_llava(4)


def error(model, found, block=0):
    """Of a block's output on batches that no search has seen."""
    feeds = [batch(4, seed=9)]
    outputs = block_outputs(model, feeds)
    return block_errors(outputs, found, feeds)[block]["relative_error"]


def test_equation_8_is_a_power_of_the_mean_normalised_by_its_extremes():
    mean_abs = torch.tensor([1.0, 4.0, 16.0])
    assert torch.allclose(scaling.activation_scale(mean_abs, 0.5), torch.tensor([0.5, 1, 2]))
    assert torch.equal(scaling.activation_scale(mean_abs, 0.0), torch.ones(3))


GRIDS = (IntegerGrid(4, 64), IntegerGrid(2, 64), IntegerGrid(3, 32, True), NF4Grid(64))


def test_by_hand_on_one_matrix_the_equations_find_the_exponent_of_the_search(model):
    weight, grid = anatomy.blocks(model)[2].mlp.down_proj.weight.data, IntegerGrid(3, 64)
    inputs = collect_all(model, BATCHES)["2.down"]
    losses = {}
    for alpha in scaling.ALPHAS:
        s = scaling.activation_scale(inputs.mean_abs, alpha)  # Eq. 8
        changed = grid.rounded(weight * s) / s - weight  # Eqs. 1, 6
        losses[alpha] = inputs.row_errors(changed).sum().item()  # Eq. 7
    _, alpha, loss, plain = scaling.search_scale(weight, inputs, grid)
    whole = inputs.row_errors(weight).sum().item()
    assert alpha == min(losses, key=losses.get) > 0
    assert (loss, plain) == pytest.approx((losses[alpha] / whole, losses[0] / whole), rel=1e-4)
    _, rows = search_one(model, BATCHES, Form("awq", 3, 64))
    (row,) = (row for row in rows if (row["block"], row["group"]) == (2, "down"))
    assert row["alpha"] == alpha and row["loss"] == pytest.approx(loss, rel=1e-3)
    assert {row["group"] for row in rows} == set(anatomy.SEPARATE) and len(rows) == 16
    assert all(0 < row["loss"] <= row["loss_rtn"] for row in rows)


def test_planted_outliers_make_awq_beat_rounding_by_the_computed_margin():
    x, weight = random(2000, 64), random(256, 64, seed=1)
    x[:, 10] *= 50
    inputs = InputStatistics.of(x)

    def expected(alpha):
        """Rounding errors as uniform noise of variance step^2 / 12 in each weight, undone by s."""
        s = scaling.activation_scale(inputs.mean_abs, alpha)
        step = IntegerGrid(4, 64).encode(weight * s)[1].float()
        return (step.square() / 12 * (inputs.gram.diagonal() / s.square()).sum()).sum().item()

    margin = min(map(expected, scaling.ALPHAS)) / expected(0.0)
    s, alpha, loss, plain = scaling.search_scale(weight, inputs, IntegerGrid(4, 64))
    assert margin < 0.3 and alpha > 0 and int(s.argmax()) == 10
    # the loud channel, once scaled, sets the range of its group: its own errors are not uniform
    assert loss / plain == pytest.approx(margin, rel=0.25)


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_of_rows_costs_at_most_one_percent_of_the_loss(seed):
    weight, x = random(1024, 128, seed=seed), random(64, 128, seed=seed + 9)
    x[:, [5, 40, 90]] *= 30
    inputs, grid = InputStatistics.of(x), IntegerGrid(3, 64)
    sampled = scaling.search_scale(weight, inputs, grid)[2]
    exact = scaling.search_scale(weight, inputs, grid, sample=2000)[2]
    assert exact <= sampled <= 1.01 * exact


def test_plain_rounding_is_exponent_0_and_none_of_the_duo_form():
    weight = torch.randint(0, 16, (32, 128), generator=torch.Generator().manual_seed(0)).float()
    weight.view(32, 2, 64)[..., :2] = torch.tensor([0.0, 15.0])  # on the grid already
    inputs = InputStatistics.of(random(300, 128, seed=1))
    s, alpha, *_ = scaling.search_scale(weight, inputs, IntegerGrid(4, 64))
    duo, none, *_ = scaling.search_scale(weight, inputs, IntegerGrid(4, 64), duo=True)
    assert alpha == 0 and math.isnan(none) and torch.equal(s, duo) and (s == 1).all()


def test_dead_channels_keep_scales_finite():
    weight, x = random(32, 64), random(100, 64, seed=1)
    x[:, :10] = 0
    for rows in (x, torch.zeros_like(x)):
        inputs = InputStatistics.of(rows)
        s, _, loss, plain = scaling.search_scale(weight, inputs, IntegerGrid(4, 64))
        assert torch.isfinite(s).all() and s.min() > 0 and s.max() / s.min() <= 1 / scaling.FLOOR
        assert 0 <= loss <= plain


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_clipping_lowers_every_rows_loss_or_leaves_it(grid):
    weight, s = random(40, 128), torch.ones(128)
    weight[::2, 7] *= 8
    inputs = InputStatistics.of(random(500, 128, seed=1))
    index = scaling.search_clip(weight, s, inputs, grid)
    ends = groups.clip_ends(index, grid.bits, "cpu")
    plain = inputs.row_errors(grid.rounded(weight) - weight)
    found = inputs.row_errors(grid.rounded(weight, ends) - weight)
    assert (found <= plain * 1.0001).all() and found.sum() < 0.97 * plain.sum()
    unclipped = (index == 0).all(1)
    assert torch.equal(grid.rounded(weight, ends)[unclipped], grid.rounded(weight)[unclipped])


def test_what_each_part_of_a_quantizer_is_worth_on_held_out_inputs(model):
    rtn, awq, clip, duo, rtn_clip, hqq, nf4, awq_nf4 = (
        error(model, quantized(model, BATCHES, form))
        for form in (
            Form("rtn", 3),
            Form("awq", 3),
            Form("awq", 3, clip=True),
            Form("awq", 3, duo=True),
            Form("rtn", 3, clip=True),
            Form("hqq", 3),
            Form("bitsandbytes"),
            Form("awq_nf4"),
        )
    )
    assert clip < awq < 0.9 * rtn and max(rtn_clip, hqq) < rtn and duo != awq and awq_nf4 < nf4


def test_a_search_repeats_itself_and_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (first, _), (second, _) = (search_one(model, BATCHES, Form("awq", clip=True)) for _ in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_half_precision_on_the_cpu_gives_nearly_the_same_losses(model):
    full, half = (
        search_one(one, BATCHES, Form("awq"))[1] for one in (model, copy.deepcopy(model).half())
    )
    assert [row["loss"] for row in half] == pytest.approx([row["loss"] for row in full], rel=0.05)


def test_a_killed_search_goes_on_at_its_block(model, tmp_path, monkeypatch):
    forms = {"a": Form("awq", clip=True), "b": Form("awq_nf4")}
    expected, real, done = search_forms(model, BATCHES, forms), scaling.search_block, []

    def search_block(model, index, *others):
        if index == 2 and done == [0, 0, 1, 1]:
            raise KeyboardInterrupt
        done.append(index)
        return real(model, index, *others)

    monkeypatch.setattr(scaling, "search_block", search_block)
    with pytest.raises(KeyboardInterrupt):
        search_forms(model, BATCHES, forms, scratch=tmp_path)
    done.append("killed")
    found = search_forms(model, BATCHES, forms, scratch=tmp_path)
    assert done == [0, 0, 1, 1, "killed", 2, 2, 3, 3]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"{i}.safetensors" for i in range(4)]
    for name, (tensors, rows) in expected.items():
        assert found[name][1] == rows and found[name][0].keys() == tensors.keys()
        assert all(torch.equal(found[name][0][key], t) for key, t in tensors.items())


def test_grouped_query_attention_leaves_o_proj_unscaled():
    model, form = small_llava(2, kv_heads=2), Form("awq", group_size=32)
    scales, rows = search_one(model, [batch()], form)
    assert {row["group"] for row in rows} == {"qkv", "gate_up", "down"}
    quantize(model, form, scales=scales)


def test_a_model_without_some_sublayers_is_searched_and_quantized(model):
    cut = copy.deepcopy(model)
    removal.apply(cut, [0, 1, 3], ["0.mlp", "1.attention"])
    found = quantized(cut, BATCHES, Form("awq", 3, clip=True))
    assert 0 < error(cut, found, -1) < 1
    with pytest.raises(DermError, match="whole blocks"):
        search_one(cut, BATCHES, Form("autoawq"))


@pytest.mark.skipif(not find_spec("awq"), reason="autoawq is for Linux")
def test_autoawq_chooses_through_the_same_call_and_says_no_farewell(model, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "awq"]:
        monkeypatch.delitem(sys.modules, name)  # its first import says it
    form = Form("autoawq", clip=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors, rows = search_one(model, BATCHES, form)
    assert len(rows) == 16 and len(tensors) == 16 + 4 * 5
    found = quantize(copy.deepcopy(model), form, scales=tensors)
    assert error(model, found) < error(model, quantized(model, BATCHES, Form("rtn")))


@pytest.mark.parametrize(
    ("form", "weights", "said"),
    [
        ({"group_size": 48}, False, "48 does not divide"),
        ({"block_bits": {1: 4}}, False, "whole blocks at one width"),
        ({}, True, "autoawq weighs all tokens alike; set answer_weight to 1"),
    ],
)
def test_what_autoawq_does_not_know_is_refused_before_any_forward(
    model, monkeypatch, form, weights, said
):
    monkeypatch.setattr(calibration, "enter", lambda *_: pytest.fail("a forward"))
    feeds = [dict(feed) for feed in BATCHES]
    for feed in feeds if weights else ():
        feed["token_weights"] = torch.ones(feed["input_ids"].shape)
    with pytest.raises(DermError, match=said):
        search_forms(model, feeds, {"ours": Form("awq"), "theirs": Form("autoawq", **form)})


def test_autoawq_enters_with_what_the_model_itself_computes(model):
    """Its hidden states come from pictures that were looked at once."""
    feed, seen = asked("right"), []
    first = anatomy.blocks(model)[0]
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**feed)
    handle.remove()
    assert torch.allclose(calibration.enter(model, feed), seen[0], atol=1e-6)
