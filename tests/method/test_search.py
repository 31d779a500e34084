"""Searches over a decoder: clipping, the duo form, exceptions, mixed widths, resuming, token weights, references."""

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from small_llava import asked, batch, collect_all, small_llava

from derm_compress.data import dialogue
from derm_compress.errors import DermError
from derm_compress.method.quantization import (
    calibration,
    folding,
    grids,
    packed,
    quantize,
    scaling,
    search,
)
from derm_compress.method.quantization.calibration import InputStatistics
from derm_compress.method.quantization.grids import IntegerGrid, NF4Grid
from derm_compress.model import anatomy, prompts, removal

BATCHES = [batch(4, seed=1), asked()]
PLAIN = {"bits": 4, "group_size": 64}


def rng(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    made = small_llava(4)
    for block in anatomy.blocks(made):
        block.input_layernorm.weight.data[torch.arange(6) * 9] *= 20
    return made


def logits(model):
    with torch.no_grad():
        return model(**batch(2, seed=7)).logits


def quantized(model, method="awq", bits=4, **options):
    form = quantize.Form(method, bits, 64, **options)
    scales = search.search_one(model, BATCHES, method=method, bits=bits, group_size=64, **options)[
        0
    ]
    how = {"scales": scales if form.searched else None, **options}
    return quantize.quantize(copy.deepcopy(model), method=method, bits=bits, group_size=64, **how)


def first_error(model, found):
    return quantize.block_errors(model, found, [batch(4, seed=9)])[0]["relative_error"]


@pytest.mark.parametrize("tokens", (40, 400))
def test_inputs_and_gram_matrix_give_the_same_losses(tokens):
    x, delta = torch.randn(tokens, 96, generator=rng(0)), torch.randn(5, 96, generator=rng(1))
    weight = torch.rand(tokens, generator=rng(2))
    found, sums = InputStatistics.of(x, weight), calibration.InputSums()
    for part, own in zip(x.split(30), weight.split(30), strict=True):
        sums.add(part, own)
    expected = (weight[:, None] * (x @ delta.T).square()).sum(0)
    for one in (found, sums.statistics()):
        assert (one.gram is None) == (tokens < 96)
        assert torch.allclose(one.row_errors(delta), expected, rtol=1e-4)
        assert torch.allclose(one.mean_abs, (weight @ x.abs()) / weight.sum(), rtol=1e-5)
        blocks = torch.stack([one.matrix()[i : i + 32, i : i + 32] for i in (0, 32, 64)])
        assert torch.allclose(one.diagonal_blocks(32), blocks, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_of_rows_costs_at_most_one_percent_of_the_loss(seed):
    weight, x = (
        torch.randn(1024, 128, generator=rng(seed)),
        torch.randn(64, 128, generator=rng(seed + 9)),
    )
    x[:, [5, 40, 90]] *= 30
    inputs = InputStatistics.of(x)
    sampled, exact = (
        scaling.search_scale(weight, inputs, IntegerGrid(3, 64), sample=n)[2]
        for n in (scaling.SAMPLE, 2000)
    )
    assert exact <= sampled <= 1.01 * exact


@pytest.mark.parametrize(
    "grid", (IntegerGrid(4, 64), IntegerGrid(2, 64), IntegerGrid(3, 32, True), NF4Grid(64)), ids=str
)
def test_clipping_lowers_every_rows_loss_or_leaves_it(grid):
    weight, x = torch.randn(40, 128, generator=rng(0)), torch.randn(500, 128, generator=rng(1))
    weight[::2, 7] *= 8
    inputs, s = InputStatistics.of(x), torch.ones(128)
    index = scaling.search_clip(weight, s, inputs, grid)
    ends = folding.clip_ends(index, grid.bits, "cpu")
    plain = inputs.row_errors(grid.rounded(weight) - weight)
    found = inputs.row_errors(grid.rounded(weight, ends) - weight)
    assert (found <= plain * 1.0001).all() and found.sum() < 0.97 * plain.sum()
    unclipped = (index == 0).all(1)
    assert torch.equal(grid.rounded(weight, ends)[unclipped], grid.rounded(weight)[unclipped])


def test_clipping_and_the_duo_form_lower_the_decoders_error(model):
    plain, clip, duo = (
        first_error(model, quantized(model, bits=3, **o))
        for o in ({}, {"clip": True}, {"duo": True})
    )
    assert clip < plain and duo != plain
    rtn, clipped = (first_error(model, quantized(model, "rtn", 3, clip=c)) for c in (False, True))
    assert clipped < rtn


def test_plain_rounding_is_exponent_0_and_none_of_the_duo_form():
    weight = torch.randint(0, 16, (32, 128), generator=rng(0)).float()
    weight.view(32, 2, 64)[..., :2] = torch.tensor([0.0, 15.0])  # on the grid already
    inputs = InputStatistics.of(torch.randn(300, 128, generator=rng(1)))
    (s, alpha, *_), (duo_s, none, *_) = (
        scaling.search_scale(weight, inputs, IntegerGrid(4, 64), duo=d) for d in (0, 1)
    )
    assert alpha == 0 and math.isnan(none) and torch.equal(s, duo_s) and (s == 1).all()


def test_packed_and_unpacked_are_the_same_numbers_when_clipped(model):
    scales = search.search_one(model, BATCHES, clip=True, **PLAIN)[0]
    how = {"method": "awq", "clip": True, "scales": scales, **PLAIN}
    full, small = (quantize.quantize(copy.deepcopy(model), packed=p, **how) for p in (False, True))
    for a, b in zip(anatomy.blocks(full), anatomy.blocks(small), strict=True):
        for name, linear in anatomy.linears(a).items():
            assert torch.equal(linear.weight, b.get_submodule(name).dequantized())


def test_awq_nf4_beats_nf4(model):
    assert first_error(model, quantized(model, "awq_nf4")) < first_error(
        model, quantized(model, "bitsandbytes")
    )


def test_exceptions_and_mixed_widths_are_what_was_asked(model):
    found = quantized(model, keep=("*.down_proj", "1.self_attn.*"), block_bits={0: 2, 2: 8, 3: 16})
    grids_of = {
        (i, name.rpartition(".")[2]): getattr(linear, "grid", None)
        for i, block in enumerate(anatomy.blocks(found))
        for name, linear in anatomy.linears(block).items()
    }
    assert {g and g.bits for (i, _), g in grids_of.items() if i == 0} == {2, None}
    assert {name for (i, name), g in grids_of.items() if i == 1 and g} == {"gate_proj", "up_proj"}
    assert all(g is None for (i, _), g in grids_of.items() if i == 3)
    assert quantize.quantized_linears(found)["decoder"] == 6 + 2 + 6
    before, after = (dict(anatomy.linears(anatomy.blocks(m)[3])) for m in (model, found))
    assert all(torch.equal(before[name].weight, after[name].weight) for name in before)


def test_folding_with_exceptions_changes_no_answer(model):
    form = {"keep": ("2.*", "*.o_proj")}
    scales = search.search_one(model, BATCHES, **PLAIN, **form)[0]
    folded = copy.deepcopy(model)
    folding.fold_scales(
        folded,
        scales,
        quantize.left_out(model, quantize.targets(model, quantize.Form("awq", 4, 64, **form))),
    )
    assert (
        not {key for key in scales if key.startswith("2.") or key.endswith(".o")}
        and len(scales) == 9
    )
    expected = logits(model)
    assert torch.allclose(
        logits(folded), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )


def test_other_parts_are_quantized_where_asked():
    model = small_llava(1)
    how = {
        "method": "rtn",
        "bits": 8,
        "group_size": 32,
        "parts": ("decoder", "projector", "head", "vision_tower"),
    }
    counts = quantize.quantized_linears(quantize.quantize(model, **how))
    assert (
        counts["decoder"] == 7
        and counts["projector"] == 2
        and counts["head"] == 1
        and counts["vision_tower"] >= 6
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"block_bits": {9: 2}}, "for blocks \\[9\\]; the model has 4"),
        ({"block_bits": {0: 5}}, "not 5 bits"),
        ({"parts": ("ear",)}, "no part \\['ear'\\]"),
        ({"keep": "31.*"}, "keep is '31.\\*'; write a list"),
        ({"parts": "decoder"}, "parts is 'decoder'; write a list"),
        ({"keep": ("2.*", "down_proj")}, "keep has 'down_proj', which no linear is called"),
        ({"keep": ("*",)}, "leaves every linear as it is"),
        ({"block_bits": dict.fromkeys(range(4), 16)}, "leaves every linear as it is"),
    ],
)
def test_wrong_exceptions_are_refused(model, wrong, said):
    with pytest.raises(DermError, match=said):
        quantize.quantize(copy.deepcopy(model), method="rtn", **PLAIN, **wrong)


def test_a_step_is_read_with_defaults_and_unknown_fields_are_refused():
    old = {"step": "quantize", "method": "awq", "bits": 4, "group_size": 64, "ref": "x"}
    assert quantize.Form.of(old) == quantize.Form("awq", 4, 64)
    assert quantize.Form.of(old | {"block_bits": {"3": 2}}).grid(3).bits == 2
    with pytest.raises(DermError, match="unknown fields \\['clips'\\]"):
        quantize.Form.of(old | {"clips": True})


def test_a_killed_search_goes_on_at_its_block(model, tmp_path, monkeypatch):
    forms = {"a": quantize.Form("awq", 4, 64, clip=True), "b": quantize.Form("awq_nf4", 4, 64)}
    expected, done = search.search(model, BATCHES, forms), []
    real = scaling.search_block
    monkeypatch.setattr(scaling, "search_block", _killed_at(2, real, done))
    with pytest.raises(KeyboardInterrupt):
        search.search(model, BATCHES, forms, scratch=tmp_path)
    monkeypatch.setattr(scaling, "search_block", _killed_at(None, real, done := []))
    found = search.search(model, BATCHES, forms, scratch=tmp_path)
    assert set(done) == {2, 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"block-{i}.safetensors" for i in range(4)
    ]
    for name, (tensors, rows) in expected.items():
        assert found[name][1] == rows and found[name][0].keys() == tensors.keys()
        assert all(torch.equal(found[name][0][key], t) for key, t in tensors.items())


def _killed_at(block, real, done):
    def run(model, index, *args, **kwargs):
        if index == block:
            raise KeyboardInterrupt
        done.append(index)
        return real(model, index, *args, **kwargs)

    return run


def test_the_model_is_left_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search.search_one(model, BATCHES, clip=True, **PLAIN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(b._forward_pre_hooks for b in model.modules())


def test_half_precision_on_the_cpu_gives_nearly_the_same_scales(model):
    full, half = (
        search.search_one(m, BATCHES, **PLAIN)[1] for m in (model, copy.deepcopy(model).half())
    )
    assert all(
        abs(a["loss"] - b["loss"]) < 0.05 * a["loss"] for a, b in zip(full, half, strict=True)
    )


def test_token_weights_count_the_answers_and_text_has_no_picture(pico, dataset):
    model, processor = pico
    how = {"batch_size": 6, "device": "cpu"}
    items = dataset.of("train")[:2]
    plain, heavy, text = (
        next(prompts.calibration_batches(processor, items, dataset.images, **how, **o))
        for o in ({}, {"answer_weight": 4.0}, {"text_only": True})
    )
    assert "token_weights" not in plain and "pixel_values" not in text
    assert text["input_ids"].shape[1] < plain["input_ids"].shape[1]
    row = heavy["input_ids"][0][heavy["token_weights"][0] == 4]
    asked = [(item, kind) for item in items for kind in dialogue.QUESTIONS][0]
    told = dialogue.reference(asked[0].disease, asked[0].facts, asked[1])
    assert processor.tokenizer.decode(row).strip() == told
    a, b, c = (collect_all(model, [x])["3.down"] for x in (plain, heavy, text))
    assert not torch.allclose(a.mean_abs, b.mean_abs) and c.tokens < a.tokens == b.tokens


def what_down_proj_reads(model, feed):
    """Inputs [rows, tokens, channels] of every block's down_proj, by the model's own forward."""
    seen = []
    linears = [block.mlp.down_proj for block in anatomy.blocks(model)]
    handles = [
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for linear in linears
    ]
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
    tower = anatomy.parts(model)["vision_tower"].register_forward_pre_hook(
        lambda _, args, kw: towers.append(len((args or (kw["pixel_values"],))[0])), with_kwargs=True
    )
    block = anatomy.blocks(model)[0].register_forward_pre_hook(
        lambda _, args: shapes.append(args[0].shape[:2])
    )
    found = collect_all(model, [feed])
    block.remove()
    tower.remove()
    assert towers == [2] and shapes == [
        (6, 30),
        (2, 14),
        (6, 16),
    ]  # entered, then the two beginnings and the rest
    rough = 10 if kind == "half" else 1
    for i, x in enumerate(expected):
        one, h = found[f"{i}.down"], x.T @ (x * weight[:, None])
        assert torch.allclose(
            one.matrix(), h, rtol=1e-3 * rough, atol=1e-5 * rough**2 * h.max().item()
        )
        assert torch.allclose(one.mean_abs, weight @ x.abs() / weight.sum(), rtol=1e-4 * rough**2)


def test_pictures_are_shared_where_each_row_has_one_and_it_is_the_same(model):
    feed = batch(4, seed=4)
    assert calibration.pictures(asked()) == [0, 1, 0, 1, 1, 0] and calibration.pictures(feed) == [
        0,
        1,
        2,
        3,
    ]
    assert calibration.pictures({"input_ids": feed["input_ids"]}) == [0] * 4  # text alone
    several = {k: v[:2] for k, v in feed.items()} | {"pixel_values": feed["pixel_values"]}
    assert calibration.pictures(several) == [0, 1]


def test_the_quantizer_of_autoawq_enters_with_what_the_model_itself_computes(model):
    """Its hidden states come from pictures that were looked at once."""
    feed, seen = asked("right"), []
    handle = anatomy.blocks(model)[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(**feed)
    handle.remove()
    assert torch.allclose(calibration.enter(model, feed)[0], seen[0], atol=1e-6)


def test_llm_int8_rounds_inputs_too_and_is_counted(model):
    found = quantized(model, "llm_int8", 8)
    assert quantize.quantized_linears(found) == dict.fromkeys(anatomy.parts(model), 0) | {
        "decoder": 28
    }
    assert 0 < first_error(model, found) < 0.05


def test_hqq_beats_rounding_without_calibration(model):
    pytest.importorskip("hqq")
    hqq, rtn = (first_error(model, quantized(model, method, 3)) for method in ("hqq", "rtn"))
    assert hqq < rtn
    linear = anatomy.blocks(model)[0].mlp.up_proj
    made = grids.HQQGrid(3, 64).packed(linear)
    assert torch.equal(made.dequantized(), grids.HQQGrid(3, 64).rounded(linear.weight.data))


def test_autoawq_chooses_through_the_same_call(model, tmp_path):
    pytest.importorskip("awq", reason="autoawq is for Linux")
    forms = {"theirs": quantize.Form("autoawq", 4, 64, clip=True)}
    tensors, rows = search.search_forms(model, BATCHES, forms)["theirs"]
    assert len(rows) == 16 and len(tensors) == 16 + 4 * 5
    save_file(tensors, tmp_path / "s.safetensors")
    found = quantize.quantize(
        copy.deepcopy(model), method="autoawq", clip=True, scales=tensors, **PLAIN
    )
    plain = quantized(model, "rtn")
    assert first_error(model, found) < first_error(model, plain)


@pytest.mark.parametrize(
    ("form", "weights", "said"),
    [
        ({"group_size": 48}, False, "48 does not divide"),
        ({"keep": ("2.*",)}, False, "whole blocks at one width"),
        ({"block_bits": {1: 4}}, False, "whole blocks at one width"),
        ({}, True, "autoawq weighs all tokens alike; set answer_weight to 1"),
    ],
)
def test_what_autoawq_does_not_know_is_refused_before_any_forward(
    model, monkeypatch, form, weights, said
):
    monkeypatch.setattr(calibration, "enter", lambda *_: pytest.fail("a forward"))
    feeds = [
        feed | {"token_weights": torch.ones(feed["input_ids"].shape)} if weights else feed
        for feed in BATCHES
    ]
    forms = {
        "ours": quantize.Form("awq", 4, 64),
        "theirs": quantize.Form("autoawq", 4, **{"group_size": 64} | form),
    }
    with pytest.raises(DermError, match=said):
        search.search_forms(model, feeds, forms)


def test_a_model_without_some_sublayers_is_searched_and_quantized(model):
    cut = copy.deepcopy(model)
    removal.apply(cut, [0, 1, 3], ["0.mlp", "1.attention"])
    found = quantized(cut, bits=3, clip=True)
    assert quantize.quantized_linears(found)["decoder"] == 4 + 3 + 7
    assert 0 < quantize.block_errors(cut, found, BATCHES)[-1]["relative_error"] < 1
    with pytest.raises(DermError, match="whole blocks"):
        search.search_one(cut, BATCHES, method="autoawq", **PLAIN)


@pytest.mark.skipif(not packed.cpu_block(), reason="torch has no int4 kernel for this CPU")
def test_the_kernel_agrees_to_one_percent_and_keeps_one_copy():
    linear, x = torch.nn.Linear(128, 192), torch.randn(1, 4, 128, generator=rng(0))
    for grid in (IntegerGrid(4, 64), IntegerGrid(4, 32, True)):
        made = grid.packed(linear)
        codes, weight = made.codes.clone(), made.dequantized()
        expected = torch.nn.functional.linear(x, weight, linear.bias)
        shares = [packed.kernel_share(made), packed.kernel_share(torch.nn.Sequential(linear, made))]
        found = made(x)
        assert (
            shares == [0, 0]
            and packed.kernel_share(torch.nn.Sequential(made, grid.packed(linear))) == 0.5
        )
        assert made.steps is not None and 0 < (found - expected).norm() < 0.01 * expected.norm()
        assert made.codes.nbytes == codes.nbytes and torch.equal(made.dequantized(), weight)
        assert torch.equal(packed.kernel_codes(made.codes, made.shape), made.encoded()[0])
        assert torch.equal(copy.deepcopy(made)(x), found)
        assert torch.equal(made.state_dict()["codes"], codes) and made.steps is None
        packed.use_kernels(made, False)
        assert torch.allclose(made(x), expected, atol=1e-6)
        assert torch.equal(
            made(x.repeat(1, 64, 1)),
            torch.nn.functional.linear(x.repeat(1, 64, 1), weight, linear.bias),
        )
