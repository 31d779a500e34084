"""The tap and the statistics of the projections' outputs, against direct computation."""

import copy
import math

import pytest
import torch
from small_llava import batch, small_llava

from derm_compress.errors import DermError
from derm_compress.method.activations import (
    STATISTICS,
    Summary,
    input_peaks,
    projection_output,
    projection_statistics,
    projections,
    tap,
)
from derm_compress.method.quantization.block_errors import block_errors, block_outputs
from derm_compress.model import anatomy


@pytest.fixture(scope="module")
def model():
    """q_proj of block 1 has one loud output channel."""
    model = small_llava(2)
    anatomy.blocks(model)[1].self_attn.q_proj.weight.data[5] *= 100
    return model


def outputs(model, feed, block, projection):
    """Outputs of a projection at the unmasked positions, by a hook of its own."""
    seen, linear = [], projections(model)[block, projection]
    handle = linear.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(**feed)
    handle.remove()
    return seen[0][feed["attention_mask"].bool()]


def summary(x):
    found = Summary()
    found.add(x)
    return found.row()


def test_statistics_equal_direct_ones(model):
    feed = batch(3, seed=1, padding=4, side="left")
    frame = projection_statistics(model, [feed])
    assert list(frame) == ["block", "projection", *STATISTICS]
    assert len(frame) == 14 and not frame.isna().any().any()
    for row in frame.itertuples():
        x = outputs(model, feed, row.block, row.projection).double()
        z = (x - x.mean()) / x.std(correction=0)
        assert row.mean_abs == pytest.approx(x.abs().mean().item(), rel=1e-5)
        assert row.max == pytest.approx(x.abs().max().item(), rel=1e-6)
        assert row.kurtosis == pytest.approx((z**4).mean().item(), rel=1e-4)
        rank = x.abs().flatten().kthvalue(int(-(-0.99 * x.numel() // 1))).values.item()
        assert row.p99 == pytest.approx(rank, rel=0.004)
    loud = frame.set_index(["block", "projection"]).outlier_channels
    assert loud[1, "q_proj"] == 1 and loud[0, "q_proj"] == 0


def test_the_outlier_rule_is_six_times_the_median_channel():
    x = torch.ones(10, 9)
    x[3, :4] = torch.tensor([5.9, -6.1, 60.0, 6.0])
    assert summary(x)["outlier_channels"] == 2


def test_what_projections_read_is_looked_at_as_what_they_write():
    loud = small_llava(2)
    anatomy.blocks(loud)[1].input_layernorm.weight.data[3] *= 1000  # read by q, k and v alone
    told = input_peaks(loud, [batch(), batch()]).set_index(["block", "projection"])
    assert len(told) == 14 and list(told) == ["channels", "outlier_channels", "loudest"]
    reads = told.loc[[(1, name) for name in ("q_proj", "k_proj", "v_proj")]]
    assert (reads.outlier_channels == 1).all() and (reads.loudest > 100).all()
    assert (told.loc[0].outlier_channels == 0).all() and (told.loc[0].loudest < 6).all()
    caught = []
    hook = projections(loud)[0, "down_proj"].register_forward_pre_hook(
        lambda _, x: caught.append(x)
    )
    feed = batch()
    with torch.no_grad():
        loud(**feed)
    hook.remove()
    peaks = caught[0][0][feed["attention_mask"].bool()].abs().amax(0)
    assert told.loudest[0, "down_proj"] == pytest.approx((peaks.max() / peaks.quantile(0.5)).item())


def test_statistics_stream(model):
    feed = batch(4, seed=2)
    halves = [{k: v[half] for k, v in feed.items()} for half in (slice(0, 2), slice(2, 4))]
    frames = [projection_statistics(model, batches) for batches in ([feed], halves)]
    once, twice = (frame.set_index(["block", "projection"]) for frame in frames)
    assert (once / twice - 1).drop(columns="outlier_channels").abs().max().max() < 5e-3
    assert (once.outlier_channels == twice.outlier_channels).all()


def test_kurtosis_of_known_distributions():
    rng = torch.Generator().manual_seed(0)
    assert summary(torch.randn(4000, 50, generator=rng))["kurtosis"] == pytest.approx(3, abs=0.05)
    assert summary(torch.tensor([[-1.0, 1.0]]))["kurtosis"] == pytest.approx(1)
    still = summary(torch.full((3, 4), 2.0))
    assert math.isnan(still["kurtosis"]) and still["max"] == 2  # undefined, not made up


def test_quantile_of_zeros_is_zero():
    assert summary(torch.zeros(5, 3))["p99"] == 0


def test_projection_output_is_what_the_projection_wrote(model):
    feed = batch(2, seed=4, padding=3)
    found = projection_output(model, feed, 1, "self_attn.q_proj")
    assert found.dtype == "float32" and found.shape == (int(feed["attention_mask"].sum()), 64)
    assert torch.equal(torch.from_numpy(found), outputs(model, feed, 1, "q_proj"))
    assert projection_output(model, feed, 0, "down_proj").shape[1] == 64


@pytest.mark.parametrize("where", [(2, "q_proj"), (0, "x_proj")])
def test_an_unknown_place_is_refused_with_the_known_ones(model, where):
    with pytest.raises(DermError, match="blocks are 0 to 1, names q_proj, .*down_proj"):
        projection_output(model, batch(), *where)


def test_the_tap_leaves_no_hooks_and_restores_the_mode(model):
    def fail(key, x):
        raise RuntimeError("seen")

    model.train()
    watched = projections(model)
    with pytest.raises(RuntimeError, match="seen"):
        tap(model, [batch()], watched, fail)
    assert model.training and not any(linear._forward_hooks for linear in watched.values())
    model.eval()


def test_labels_are_ignored_and_no_batch_is_an_error(model):
    feed = batch()
    projection_statistics(model, [feed | {"labels": feed["input_ids"]}])
    with pytest.raises(DermError, match="no batch"):
        projection_statistics(model, [])


def test_infinite_outputs_are_refused():
    model = small_llava(1)
    anatomy.blocks(model)[0].mlp.gate_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(DermError, match="block 0 gate_proj"):
        projection_statistics(model, [batch()])


def test_block_errors_are_relative_norms(model):
    feed, changed = batch(2, seed=4), copy.deepcopy(model)
    outputs = block_outputs(model, [feed])
    assert all(row["relative_error"] == 0 for row in block_errors(outputs, changed, [feed]))
    last = anatomy.blocks(changed)[1]
    for linear in (last.self_attn.o_proj, last.mlp.down_proj):
        linear.weight.data.zero_()  # the block passes its input on
    seen = {}
    tap(model, [feed], dict(enumerate(anatomy.blocks(model))), seen.__setitem__)
    first, second = block_errors(outputs, changed, [feed])
    assert first == {"block": 0, "relative_error": 0} and second["block"] == 1
    expected = ((seen[0] - seen[1]).norm() / seen[1].norm()).item()
    assert second["relative_error"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DermError, match="1 and 2 blocks"):
        block_errors({0: outputs[0]}, model, [feed])
