"""Grids, packing, calibration, Eqs. 6-8 and the one call, on a small random LLaVA and on single matrices."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from small_llava import asked, batch, collect_all, small_llava
from torch import nn

from derm_compress.errors import DermError
from derm_compress.method.quantization import calibration, folding, quantize, scaling
from derm_compress.method.quantization.calibration import InputStatistics
from derm_compress.method.quantization.codes import pack, unpack
from derm_compress.method.quantization.grids import IntegerGrid, NF4Grid
from derm_compress.method.quantization.packed import PackedLinear, use_kernels
from derm_compress.method.quantization.search import search_one
from derm_compress.model import anatomy

FORMS = [("rtn", 4), ("rtn", 3), ("rtn", 2), ("rtn_symmetric", 4), ("awq", 4), ("bitsandbytes", 4)]
BATCHES = [batch(4, seed=1), batch(4, seed=2)]
INTEGER_GRIDS = [
    IntegerGrid(bits, 32, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)
]


def random_weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def outlier_model():
    """Six channels of every norm are 20 times as loud, so that activation-aware scaling has something to do."""
    model = small_llava(4)
    for block in anatomy.blocks(model):
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[torch.arange(6) * 9] *= 20
    return model


@pytest.fixture(scope="module")
def statistics(outlier_model):
    return collect_all(outlier_model, BATCHES)


@pytest.fixture(scope="module")
def scales(outlier_model):
    return search_one(outlier_model, BATCHES, bits=4, group_size=64)[0]


def quantized(model, method, bits, scales, **kwargs):
    scales = scales if method == "awq" else None
    return quantize.quantize(
        copy.deepcopy(model), method=method, bits=bits, group_size=64, scales=scales, **kwargs
    )


def logits(model, feed):
    with torch.no_grad():
        return model(**feed).logits


@pytest.mark.parametrize("grid", INTEGER_GRIDS, ids=str)
def test_codes_stay_in_range_and_err_by_half_a_step_at_most(grid):
    weight = random_weight(40, 128)
    weight[:, 5] *= 30
    codes, step, zeros = grid.encode(weight)
    top = 2**grid.bits - 1
    assert codes.dtype == torch.uint8 and int(codes.max()) <= top
    assert (zeros is None) == grid.symmetric and (zeros is None or int(zeros.max()) <= top)
    steps = step.float().repeat_interleave(32, 1)
    error = (grid.rounded(weight) - weight).abs() / steps
    inside = (codes > 0) & (codes < top)
    assert inside.any() and error[inside].max() <= 0.5 + 1e-3
    assert (
        error.max() <= 1.01 + top * 2**-11
    )  # at the ends clamping may add half a step, and fp16 rounds steps


def test_symmetric_grid_is_equation_1():
    weight = torch.tensor([[2.0, -2.0, 0.9, 0.2]])  # N = 2: Delta = 2 / 2 = 1, codes -2 .. 1
    codes, step, _ = IntegerGrid(2, 4, symmetric=True).encode(weight)
    assert step.item() == 1 and codes.tolist() == [[3, 0, 3, 2]]
    assert IntegerGrid(2, 4, symmetric=True).rounded(weight).tolist() == [[1, -2, 1, 0]]


def test_asymmetric_grid_by_hand():
    weight = torch.tensor([[-1.0, 0.0, 0.9, 2.0]])  # 2 bits: step 3 / 3 = 1, zero 1
    codes, step, zero = IntegerGrid(2, 4).encode(weight)
    assert (step.item(), zero.item(), codes.tolist()) == (1, 1, [[0, 1, 2, 3]])


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_rows_of_one_value_or_one_sign_and_zero_rows_are_represented(bits):
    weight = torch.stack(
        [torch.full((32,), v) for v in (0.0, 0.7, -0.7, 1e-6)] + [torch.linspace(5, 6, 32)]
    )
    for symmetric in (False, True):
        grid = IntegerGrid(bits, 32, symmetric)
        assert (grid.encode(weight)[1] > 0).all()
        assert torch.isfinite(grid.rounded(weight)).all() and (grid.rounded(weight)[0] == 0).all()
    rounded = IntegerGrid(bits, 32).rounded(weight)
    assert torch.allclose(rounded[1:3], weight[1:3], rtol=2**-10)
    assert ((rounded[4] - weight[4]).abs() <= 0.51 * 6 / (2**bits - 1)).all()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_packing_is_exact_for_all_codes_and_dense(bits):
    codes = (
        torch.arange(2**bits, dtype=torch.uint8).repeat(5)[: 5 * 2**bits - 1].view(1, -1)
    )  # an odd count
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) <= codes.numel() * bits / 8 + 2
    assert torch.equal(unpack(packed, bits, codes.shape), codes)


def test_documented_byte_layout():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    eight = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    assert pack(eight, 3).tolist() == [0b11100100, 0b11100100, 0b11110000]


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
    packed, x = NF4Grid(64).packed(linear).eval(), random_weight(3, 64)
    before = packed.weight.data.clone()
    with torch.no_grad():
        found = packed(x)
    assert torch.equal(packed.weight.data, before)
    assert torch.allclose(found, x @ NF4Grid(64).rounded(linear.weight.data).T, atol=1e-6)


@pytest.mark.parametrize(
    "grid", (IntegerGrid(4, 64), IntegerGrid(2, 64, True), NF4Grid(64)), ids=str
)
def test_equation_7_by_gram_matrix_equals_the_norm(grid):
    x, weight = random_weight(300, 128), random_weight(48, 128, seed=1)
    x[:, [3, 77]] *= 100
    s = scaling.activation_scale(x.abs().mean(0), 0.5)
    direct = ((x / s) @ grid.rounded(weight * s).T - x @ weight.T).double().square().sum()
    for inputs in (InputStatistics.of(x), InputStatistics(x.abs().mean(0), 300, inputs=x)):
        found = inputs.row_errors(grid.rounded(weight * s) / s - weight).sum()
        assert found.item() == pytest.approx(direct.item(), rel=1e-4)


def test_scale_is_a_power_of_the_mean_normalised_by_its_extremes():
    mean_abs = torch.tensor([1.0, 4.0, 16.0])
    assert torch.allclose(scaling.activation_scale(mean_abs, 0.5), torch.tensor([0.5, 1, 2]))
    assert torch.equal(scaling.activation_scale(mean_abs, 0.0), torch.ones(3))


def test_alpha_0_is_asymmetric_rounding_bit_for_bit(outlier_model, scales):
    ones = {key: scaling.activation_scale(s, 0.0) for key, s in scales.items()}
    scaled = quantized(outlier_model, "awq", 4, ones).state_dict()
    rtn = quantized(outlier_model, "rtn", 4, None).state_dict()
    assert all(torch.equal(rtn[name], value) for name, value in scaled.items())


def test_rows_hold_the_losses_of_equation_7(outlier_model, statistics):
    scales, rows = search_one(outlier_model, BATCHES, bits=3, group_size=64)
    assert len(rows) == len(scales) == 16 and {row["group"] for row in rows} == set(folding.GROUPS)
    assert all(
        0 < row["loss"] <= row["loss_rtn"] and row["alpha"] in scaling.ALPHAS for row in rows
    )
    weight, inputs = (
        anatomy.blocks(outlier_model)[2].mlp.down_proj.weight.data,
        statistics["2.down"],
    )
    plain = inputs.row_errors(IntegerGrid(3, 64).rounded(weight) - weight).sum()
    row = next(row for row in rows if (row["block"], row["group"]) == (2, "down"))
    assert row["loss_rtn"] == pytest.approx(
        (plain / inputs.row_errors(weight).sum()).item(), rel=1e-5
    )


def test_folding_changes_no_answer(outlier_model, scales):
    folded, feed = copy.deepcopy(outlier_model), batch(2, seed=7)
    before = logits(outlier_model, feed)
    folding.fold_scales(folded, scales)
    q = "self_attn.q_proj"
    changed = (
        anatomy.blocks(folded)[0].get_submodule(q).weight
        - anatomy.blocks(outlier_model)[0].get_submodule(q).weight
    )
    assert changed.abs().max() > 1e-2
    assert torch.allclose(
        logits(folded, feed), before, rtol=1e-4, atol=1e-4 * before.abs().max().item()
    )


def test_planted_outliers_make_awq_beat_rounding_by_the_computed_margin():
    x, weight = random_weight(2000, 64), random_weight(256, 64, seed=1)
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
    # the loud channel, once scaled, sets the range of its group: its own errors are not quite uniform noise
    assert loss / plain == pytest.approx(margin, rel=0.25)


def test_awq_beats_rounding_on_held_out_inputs(outlier_model, scales):
    errors = {}
    for method in ("awq", "rtn"):
        model = quantized(outlier_model, method, 4, scales)
        errors[method] = quantize.block_errors(outlier_model, model, [batch(4, seed=9)])[-1][
            "relative_error"
        ]
    assert errors["awq"] < 0.9 * errors["rtn"]


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_changes_no_statistics(outlier_model, side):
    plain = collect_all(outlier_model, [batch(3, seed=3)])
    padded = collect_all(outlier_model, [batch(3, seed=3, padding=5, side=side)])
    for key, inputs in plain.items():
        assert inputs.tokens == padded[key].tokens == 3 * 30  # 21 words and 9 image tokens a row
        h = inputs.matrix()
        assert torch.allclose(h, padded[key].matrix(), rtol=1e-3, atol=1e-4 * h.max().item())
        assert torch.allclose(inputs.mean_abs, padded[key].mean_abs, rtol=1e-3)


def test_statistics_stream_and_see_the_picture(outlier_model):
    feed = batch(4, seed=3)
    halves = [{k: v[half] for k, v in feed.items()} for half in (slice(0, 2), slice(2, 4))]
    once, twice = (collect_all(outlier_model, batches) for batches in ([feed], halves))
    other = collect_all(outlier_model, [feed | {"pixel_values": -feed["pixel_values"]}])
    for key, inputs in once.items():
        h = inputs.matrix()
        assert torch.allclose(h, twice[key].matrix(), rtol=1e-3, atol=1e-4 * h.max().item())
        assert (inputs.gram is None) == (
            inputs.tokens < len(inputs.mean_abs)
        )  # the smaller of X and H
        assert not torch.allclose(h, other[key].matrix(), rtol=1e-3)


def test_memory_does_not_grow_with_calibration(outlier_model, tmp_path):
    """What is alive beside the first block's statistics is as much for 16 batches as for 8."""

    def alive(count):
        feeds = (asked(seed=seed) for seed in range(count))
        for _ in calibration.collect(outlier_model, feeds, folder=tmp_path):
            gc.collect()
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
            return sum(held.values())

    def tensors():
        return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]

    few, many = alive(8), alive(16)  # enough tokens for H instead of X
    assert many == few


def test_statistics_are_the_same_from_a_folder(outlier_model, tmp_path):
    feeds = [batch(3, seed=0, padding=2), asked(seed=1)]
    held, kept = (collect_all(outlier_model, feeds, folder=folder) for folder in (None, tmp_path))
    assert all(torch.equal(one.matrix(), kept[key].matrix()) for key, one in held.items())


def test_same_inputs_same_scales_and_weights(outlier_model, scales):
    found, _ = search_one(outlier_model, BATCHES, bits=4, group_size=64)
    assert found.keys() == scales.keys() and all(
        torch.equal(found[k], s) for k, s in scales.items()
    )


@pytest.mark.parametrize(("method", "bits"), FORMS)
def test_packed_forward_equals_the_dequantized_one(outlier_model, scales, method, bits):
    feed = batch(2, seed=5, padding=2)
    made, plain = (quantized(outlier_model, method, bits, scales, packed=p) for p in (True, False))
    use_kernels(made, False)
    expected = logits(plain, feed)
    for _ in range(2):
        assert (logits(made, feed) - expected).abs().max() <= 1e-4 * expected.abs().max()
    for module, linear in zip(made.modules(), plain.modules(), strict=False):
        if isinstance(module, PackedLinear):
            assert torch.equal(module.dequantized(), linear.weight)


def held_bytes(model):
    held = 0
    for module in (m for m in model.modules() if hasattr(m, "grid")):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        tensors = [module.weight, state.absmax] if state else module.buffers()
        held += sum(tensor.nbytes for tensor in tensors)
    return held


@pytest.mark.parametrize(("method", "bits"), FORMS)
def test_held_bytes_are_the_planned_ones(outlier_model, scales, method, bits):
    weights = sum(
        m.weight.numel() for b in anatomy.blocks(outlier_model) for m in anatomy.linears(b).values()
    )
    overhead = {"bitsandbytes": 4, "rtn_symmetric": 2}.get(method, 2 + bits / 8)
    held = held_bytes(quantized(outlier_model, method, bits, scales, packed=True))
    assert held == pytest.approx(weights * (bits / 8 + overhead / 64), rel=0.02)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize(("method", "bits"), FORMS)
def test_only_the_decoders_linears_are_quantized(outlier_model, scales, method, bits, packed):
    model = quantized(outlier_model, method, bits, scales, packed=packed)
    assert quantize.quantized_linears(model) == dict.fromkeys(anatomy.parts(model), 0) | {
        "decoder": 28
    }
    state = model.state_dict()
    for name, value in outlier_model.state_dict().items():
        if ".layers." not in name or "language_model" not in name:
            assert torch.equal(state[name], value), name
    if not packed:
        for block in anatomy.blocks(model):
            for linear in anatomy.linears(block).values():
                groups = linear.weight.detach().view(-1, 64)
                assert max(len(group.unique()) for group in groups) <= 2**bits


def test_a_wrongly_quantized_part_is_noticed():
    model = small_llava(1)
    model.lm_head.grid = "planted"
    with pytest.raises(AssertionError, match="'head': 1"):
        quantize.quantize(model, method="rtn", bits=4, group_size=64)


def test_recipe_step_reads_its_scales(outlier_model, scales, tmp_path):
    save_file(scales, tmp_path / "scales.safetensors")
    store = SimpleNamespace(resolve=lambda ref: tmp_path / ref)
    step = {
        "step": "quantize",
        "method": "awq",
        "bits": 4,
        "group_size": 64,
        "ref": "scales.safetensors",
    }
    model = quantize.apply_step(copy.deepcopy(outlier_model), step, store)
    expected = quantized(outlier_model, "awq", 4, scales).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    quantize.apply_step(model, step | {"method": "rtn", "ref": ""}, store)


def test_dead_channels_keep_scales_finite():
    weight, x = random_weight(32, 64), random_weight(100, 64, seed=1)
    x[:, :10] = 0
    for rows in (x, torch.zeros_like(x)):
        inputs = InputStatistics.of(rows)
        s, _, loss, plain = scaling.search_scale(weight, inputs, IntegerGrid(4, 64))
        assert torch.isfinite(s).all() and s.min() > 0 and s.max() / s.min() <= 1 / scaling.FLOOR
        assert 0 <= loss <= plain


def test_grouped_query_attention_leaves_o_proj_unscaled():
    model = small_llava(2, kv_heads=2)
    scales, rows = search_one(model, [batch()], bits=4, group_size=32)
    assert {row["group"] for row in rows} == {"qkv", "gate_up", "down"}
    quantize.quantize(model, method="awq", bits=4, group_size=32, scales=scales)
    assert quantize.quantized_linears(model)["decoder"] == 14


def test_biases_and_half_precision_are_kept():
    linear = nn.Linear(64, 8).half()
    for grid in (IntegerGrid(4, 64), NF4Grid(64)):
        x = random_weight(2, 64).half()
        expected = nn.functional.linear(x, grid.rounded(linear.weight.data).half(), linear.bias)
        assert torch.allclose(grid.packed(linear)(x), expected, atol=2e-3)


def test_block_errors_are_relative_norms(outlier_model):
    feed = batch(2, seed=4)
    other, (first, second) = (
        copy.deepcopy(outlier_model),
        (anatomy.blocks(outlier_model)[b] for b in (0, 1)),
    )
    assert all(
        r["relative_error"] == 0 for r in quantize.block_errors(outlier_model, other, [feed])
    )
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        anatomy.blocks(other)[1].get_submodule(
            name
        ).weight.data.zero_()  # block 1 passes its input on
    seen = {}
    for block in (first, second):
        block.register_forward_hook(lambda b, _, out: seen.__setitem__(b, out))
    rows = quantize.block_errors(outlier_model, other, [feed])
    expected = (seen[first] - seen[second]).norm() / seen[second].norm()
    assert rows[0] == {"block": 0, "relative_error": 0}
    assert rows[1]["relative_error"] == pytest.approx(expected.item(), rel=1e-5)
    first._forward_hooks.clear(), second._forward_hooks.clear()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"group_size": 48}, "48 does not divide the 64 inputs of block 0 self_attn.q_proj"),
        ({"group_size": 128}, "128 does not divide"),
        ({"group_size": 0}, "0 does not divide"),
        ({"method": "gptq"}, "unknown method 'gptq'"),
        ({"bits": 5}, "not 5 bits"),
        ({"method": "bitsandbytes", "bits": 3}, "bitsandbytes has 4 bits"),
        ({"method": "bitsandbytes", "group_size": 16}, "in groups of 16"),
        ({"method": "awq"}, "needs the scales"),
        (
            {"method": "llm_int8", "bits": 8, "clip": True},
            "llm_int8 has no clip; options of it: none",
        ),
        ({"duo": True}, "rtn has no duo; options of it: clip"),
        ({"double": True}, "rtn has no double"),
        ({"scales": {}}, "rtn takes none"),
        ({"method": "awq", "scales": {"0.qkv": torch.ones(64)}}, "another model"),
    ],
)
def test_wrong_requests_are_refused_before_anything_changes(wrong, said):
    model = small_llava(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DermError, match=said) as refusal:
        quantize.quantize(model, **{"method": "rtn", "bits": 4, "group_size": 64} | wrong)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_numbers_are_refused():
    model = small_llava(1)
    anatomy.blocks(model)[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(DermError, match="inputs at block.group 0.down"):
        collect_all(model, [batch()])
    with pytest.raises(DermError, match="NaN, infinite"):
        quantize.quantize(model, method="rtn", bits=4, group_size=64)


def test_scales_that_overflow_half_precision_are_refused():
    model = small_llava(1).half()
    scales = {
        key: torch.ones(ls[0].in_features) for key, (_, ls) in folding.scale_groups(model).items()
    }
    scales["0.qkv"][3] = 1e7
    with pytest.raises(DermError, match="scales of 0.qkv overflow torch.float16"):
        folding.fold_scales(model, scales)


def test_rounded_weights_that_overflow_half_precision_are_refused():
    model = small_llava(1).half()
    weight = anatomy.blocks(model)[0].mlp.up_proj.weight.data
    weight[0, :2] = torch.tensor([-65504.0, 500.0])  # 15 steps of 4400, which fp16 does not hold
    before = weight.clone()
    with pytest.raises(DermError, match="rounded weights of 0.mlp.up_proj overflow torch.float16"):
        quantize.quantize(model, method="rtn", bits=4, group_size=64)
    assert torch.equal(weight, before)


def test_depths_must_agree():
    with pytest.raises(DermError, match="1 and 2 blocks"):
        quantize.block_errors(small_llava(1), small_llava(2), [batch()])
