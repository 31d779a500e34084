"""A quantized model: the same numbers packed or not, planned bytes, folding, refusals."""

import copy
from types import SimpleNamespace

import pytest
import torch
from asking import logits
from safetensors.torch import save_file
from small_llava import batch, loud_llava, scales_of, small_llava

from derm_compress.errors import DermError
from derm_compress.method.quantization import scaling
from derm_compress.method.quantization.block_errors import block_errors, block_outputs
from derm_compress.method.quantization.methods import METHODS, Form
from derm_compress.method.quantization.packed import PackedLinear, use_kernels
from derm_compress.method.quantization.quantize import (
    fold_scales,
    quantize,
    quantize_step,
    quantized_linears,
    scale_groups,
    targets,
)
from derm_compress.model import anatomy

BATCHES = [batch(4, seed=1), batch(4, seed=2)]
FORMS = {
    form.name: form
    for form in (
        Form("rtn", 4),
        Form("rtn", 3),
        Form("rtn", 2),
        Form("rtn_symmetric", 4),
        Form("awq", 4),
        Form("awq", 3, clip=True),
        Form("gptq", 3, actorder=True),
        Form("awq_gptq", 4, clip=True),
        Form("hqq", 3),
        Form("bitsandbytes", 4),
        Form("rtn", 4, block_bits={0: 2}),
    )
}


@pytest.fixture(scope="module")
def model():
    return loud_llava(2)


@pytest.fixture(scope="module")
def scales(model):
    """{form: tensors of its search, or None} of FORMS."""
    return {name: scales_of(model, BATCHES, form) for name, form in FORMS.items()}


@pytest.mark.parametrize("name", FORMS)
def test_packed_and_unpacked_are_the_same_numbers(model, scales, name):
    feed = batch(2, seed=5, padding=2)
    how = {"scales": scales[name]}
    plain = quantize(copy.deepcopy(model), FORMS[name], **how)
    made = quantize(copy.deepcopy(model), FORMS[name], packed=True, **how)
    use_kernels(made, False)
    expected = logits(plain, feed)
    for _ in range(2):
        assert (logits(made, feed) - expected).abs().max() <= 1e-4 * expected.abs().max()
    for module, linear in zip(made.modules(), plain.modules(), strict=False):
        if isinstance(module, PackedLinear):
            assert torch.equal(module.dequantized(), linear.weight)


@pytest.mark.parametrize("name", FORMS)
def test_only_the_decoders_linears_are_quantized(model, scales, name):
    found = quantize(copy.deepcopy(model), FORMS[name], scales=scales[name])
    assert quantized_linears(found) == dict.fromkeys(anatomy.parts(model), 0) | {"decoder": 14}
    state = found.state_dict()
    for key, value in model.state_dict().items():
        if ".layers." not in key or "language_model" not in key:
            assert torch.equal(state[key], value), key
    for index, block in enumerate(anatomy.blocks(found)):
        levels = 2 ** FORMS[name].block_bits.get(index, FORMS[name].bits)
        for linear in anatomy.linears(block).values():
            groups = linear.weight.detach().view(-1, 64)
            assert max(len(group.unique()) for group in groups) <= levels


def test_alpha_0_is_asymmetric_rounding_bit_for_bit(model, scales):
    ones = {key: scaling.activation_scale(s, 0.0) for key, s in scales["awq4"].items()}
    scaled = quantize(copy.deepcopy(model), Form("awq"), scales=ones).state_dict()
    rtn = quantize(copy.deepcopy(model), Form("rtn")).state_dict()
    assert all(torch.equal(rtn[name], value) for name, value in scaled.items())


def test_folding_changes_no_answer(model, scales):
    folded, feed = copy.deepcopy(model), batch(2, seed=7)
    before = logits(model, feed)
    fold_scales(folded, scales["awq4"])
    q, old = (anatomy.blocks(one)[0].self_attn.q_proj.weight for one in (folded, model))
    assert (q - old).abs().max() > 1e-2
    near = 1e-4 * before.abs().max().item()
    assert torch.allclose(logits(folded, feed), before, rtol=1e-4, atol=near)


def test_llm_int8_rounds_inputs_too(model):
    found = quantize(copy.deepcopy(model), Form("llm_int8", 8))
    assert quantized_linears(found)["decoder"] == 14
    feeds = [batch(4, seed=9)]
    outputs = block_outputs(model, feeds)
    assert 0 < block_errors(outputs, found, feeds)[0]["relative_error"] < 0.05


def test_a_recipes_step_reads_its_scales(model, scales, tmp_path):
    save_file(scales["awq4"], tmp_path / "scales.safetensors")
    store = SimpleNamespace(resolve=lambda ref: tmp_path / ref)
    step = {"step": "quantize"} | Form("awq").step | {"ref": "scales.safetensors"}
    found = quantize_step(copy.deepcopy(model), step, store).state_dict()
    expected = quantize(copy.deepcopy(model), Form("awq"), scales=scales["awq4"]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("form", "scales", "said"),
    [
        ({"group_size": 48}, None, "48 does not divide the 64 inputs of block 0 self_attn.q_proj"),
        ({"group_size": 0}, None, "0 does not divide"),
        ({"block_bits": {9: 2}}, None, "for blocks \\[9\\]; the model has 1"),
        ({"method": "awq"}, None, "awq4 needs the scales"),
        ({}, {}, "rtn4 takes no scales"),
        ({"method": "awq"}, {"0.qkv": torch.ones(64)}, "another model"),
    ],
)
def test_wrong_requests_are_refused_before_anything_changes(form, scales, said):
    model = small_llava(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DermError, match=said) as refusal:
        quantize(model, Form(**{"method": "rtn"} | form), scales=scales)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_no_numbers_are_refused_by_every_method_and_by_name(method):
    model = small_llava(1)
    anatomy.blocks(model)[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(DermError, match="weights of block 0 mlp.up_proj are NaN"):
        targets(model, Form(method, METHODS[method].widths[-1]))


def test_what_overflows_half_precision_is_refused():
    model = small_llava(1).half()
    groups = scale_groups(model)
    scales = {key: torch.ones(linears[0].in_features) for key, (_, linears) in groups.items()}
    scales["0.qkv"][3] = 1e7
    with pytest.raises(DermError, match="scales of 0.qkv overflow torch.float16"):
        fold_scales(model, scales)
    model = small_llava(1).half()
    weight = anatomy.blocks(model)[0].mlp.up_proj.weight.data
    weight[0, :2] = torch.tensor([-65504.0, 500.0])  # 15 steps of 4400, which fp16 does not hold
    before = weight.clone()
    with pytest.raises(DermError, match="rounded weights of 0.mlp.up_proj overflow torch.float16"):
        quantize(model, Form("rtn"))
    assert torch.equal(weight, before)
