"""The calibration pass: its statistics against a model's own forward, its memory, its refusals."""

import pytest
import torch
from small_llava import asked, batch, collect_all, gram, loud_llava, small_llava

from derm_compress.errors import DermError
from derm_compress.method.quantization.scaling import InputStatistics, InputSums
from derm_compress.model import anatomy, prompts, removal

BATCHES = [batch(4, seed=1), asked()]


def rng(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return loud_llava(4)


@pytest.mark.parametrize("tokens", (40, 400))
def test_inputs_and_gram_matrix_give_the_same_losses(tokens):
    x, delta = torch.randn(tokens, 96, generator=rng(0)), torch.randn(5, 96, generator=rng(1))
    weight = torch.rand(tokens, generator=rng(2))
    sums = InputSums()
    for part, own in zip(x.split(30), weight.split(30), strict=True):
        sums.add(part, own)
    expected = (weight[:, None] * (x @ delta.T).square()).sum(0)
    for one in (InputStatistics.of(x, weight), sums.statistics()):
        assert (one.gram is None) == (tokens < 96)  # the smaller of X and H
        assert torch.allclose(one.row_errors(delta), expected, rtol=1e-4)
        assert torch.allclose(one.mean_abs, (weight @ x.abs()) / weight.sum(), rtol=1e-5)
        blocks = torch.stack([gram(one)[i : i + 32, i : i + 32] for i in (0, 32, 64)])
        assert torch.allclose(one.diagonal_blocks(32), blocks, rtol=1e-3, atol=1e-3)


def what_down_proj_reads(model, feed):
    """Inputs [rows, tokens, channels] of every block's down_proj, by the model's own forward."""
    seen, handles = [], []
    for block in anatomy.blocks(model):
        hook = block.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        handles.append(hook)
    with torch.no_grad():
        model(**{k: v for k, v in feed.items() if k != "token_weights"})
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("answer_weight", (1.0, 0.0, 3.0))
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("kind", ("whole", "grouped", "without 1.attention", "half"))
def test_what_prompts_share_is_computed_once_and_counts_as_often_as_it_is_read(
    kind, side, answer_weight
):
    model = small_llava(3, kv_heads=2 if kind == "grouped" else 4)
    if kind == "without 1.attention":
        removal.apply(model, [0, 1, 2], ["1.attention"])
    model = model.half() if kind == "half" else model
    feed, shapes, towers = asked(side, answer_weight=answer_weight), [], []
    weight = (feed["attention_mask"] * feed.get("token_weights", 1)).flatten().float()
    expected = [x.flatten(0, 1).float() for x in what_down_proj_reads(model, feed)]

    def look(_, args, kwargs):
        towers.append(len((args or (kwargs["pixel_values"],))[0]))

    tower = anatomy.parts(model)["vision_tower"]
    tower.register_forward_pre_hook(look, with_kwargs=True)
    first = anatomy.blocks(model)[0]
    first.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    found = collect_all(model, [feed])
    # the beginnings of two pictures, and the rest
    assert towers == [2] and shapes == [(2, 14), (6, 16)]
    rough = 10 if kind == "half" else 1
    for i, x in enumerate(expected):
        one, h = found[f"{i}.down"], x.T @ (x * weight[:, None])
        near = {"rtol": 1e-3 * rough, "atol": 1e-5 * rough**2 * h.max().item()}
        assert torch.allclose(gram(one), h, **near)
        assert torch.allclose(one.mean_abs, weight @ x.abs() / weight.sum(), rtol=1e-4 * rough**2)


def test_statistics_stream_and_see_the_picture(model):
    feed = batch(4, seed=3)
    halves = [{k: v[half] for k, v in feed.items()} for half in (slice(0, 2), slice(2, 4))]
    once, twice = collect_all(model, [feed]), collect_all(model, halves)
    other = collect_all(model, [feed | {"pixel_values": -feed["pixel_values"]}])
    for key, inputs in once.items():
        h = gram(inputs)
        assert torch.allclose(h, gram(twice[key]), rtol=1e-3, atol=1e-4 * h.max().item())
        assert not torch.allclose(h, gram(other[key]), rtol=1e-3)


def test_offloading_moves_one_block_at_a_time_and_changes_no_statistic(model, monkeypatch):
    moved, real, plain = [], torch.nn.Module.to, collect_all(model, BATCHES)
    monkeypatch.setattr(torch.nn.Module, "to", lambda m, d: moved.append((m, str(d))) or real(m, d))
    found = collect_all(model, BATCHES, device="cpu:0")  # another device by name alone
    known = list(anatomy.blocks(model))
    there = [(known.index(module), device) for module, device in moved if module in known]
    assert there == [(block, device) for block in range(4) for device in ("cpu:0", "cpu")]
    assert all(torch.equal(found[key].mean_abs, one.mean_abs) for key, one in plain.items())
    assert all(torch.equal(gram(found[key]), gram(one)) for key, one in plain.items())


def test_text_has_no_picture(pico, dataset):
    model, processor = pico
    asked = processor, dataset.of("train")[:2], dataset.images
    how = {"batch_size": 6, "device": "cpu"}
    (plain,), (text,) = (
        prompts.calibration_batches(*asked, **how, text_only=only) for only in (False, True)
    )
    assert "token_weights" not in plain and "pixel_values" not in text
    shown, told = (collect_all(model, [feed])["3.down"] for feed in (plain, text))
    assert told.tokens < shown.tokens


def test_bad_numbers_are_refused_by_place():
    model = small_llava(2)
    anatomy.blocks(model)[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(DermError, match="inputs at block.group 0.down"):
        collect_all(model, [batch()])
    model = small_llava(2).half()
    anatomy.blocks(model)[1].mlp.up_proj.weight.data[:] = 3e4  # activations beyond fp16
    with pytest.raises(DermError, match="NaN or infinite inputs at block.group 1.down"):
        collect_all(model, BATCHES)


def test_no_batch_is_an_error_and_the_mode_is_restored(model):
    model.train()
    with pytest.raises(DermError, match="no batch was given"):
        collect_all(model, [])
    assert model.training and not model.eval().training
