"""Plans against the paper's figures, real tensors and tracked allocations."""

import os
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_llava import IMAGE, IMAGE_TOKENS, batch, small_llava
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from derm_compress.data import dialogue
from derm_compress.errors import DermError
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize
from derm_compress.model import anatomy, memory, shapes, usage, writing
from derm_compress.model.reading import Prompts
from derm_compress.study import needs


def config_of(blocks=2, *, intermediate=192, vision_blocks=2, tied=False, kv_heads=4):
    config = small_llava(blocks, kv_heads=kv_heads).config
    config.text_config.intermediate_size = intermediate
    config.vision_config.num_hidden_layers = vision_blocks
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    return config


GB = 2**30 / 1e9


class Allocated(TorchDispatchMode):
    """Bytes of the tensors alive that were made under this mode: `now` and `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            id(t.untyped_storage())
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage(), given)
        return out

    def _meet(self, storage, given):
        if id(storage) in self.known or id(storage) in given:
            return
        self.known[id(storage)] = storage.nbytes()
        weakref.finalize(storage, self._free, id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _free(self, key):
        self.now -= self.known.pop(key)


@pytest.fixture(scope="module")
def llava():
    return shapes.llava_7b()


@pytest.fixture(scope="module")
def small():
    return shapes.architecture(config_of())


def total(plan):
    return sum(plan.values())


def test_llava_7b_is_counted_exactly(llava):
    with pytest.raises(DermError, match="32 of 32 blocks"):
        llava.parameters(32)
    assert llava.parameters() == 7_063_427_072
    assert llava.parameters() - llava.parameters(1) == 202_383_360
    assert llava.outside["vision_tower"] == 303_507_456
    assert llava.outside["projector"] == 20_979_712
    assert (llava.image_tokens, llava.blocks) == (576, 32)


@pytest.mark.parametrize("kind", [{}, {"tied": True}, {"kv_heads": 2}])
def test_an_architecture_counts_what_a_real_model_holds(kind):
    config = config_of(blocks=3, **kind)
    model, arch = LlavaForConditionalGeneration(config), shapes.architecture(config)
    assert arch.parameters() == sum(p.numel() for p in model.parameters())
    del anatomy.blocks(model)[1]
    assert arch.parameters(1) == sum(p.numel() for p in model.parameters())
    assert (arch.outside["head"] == 0) == kind.get("tied", False)
    cache = model(**batch(1), use_cache=True).past_key_values
    assert arch.cache_width == cache.layers[0].keys.shape[1] * cache.layers[0].keys.shape[3]
    assert arch.image_tokens == IMAGE_TOKENS


FP16, NF4 = memory.Format(), Form("bitsandbytes").format()
TABLE_1 = {0: 13.16, 2: 12.40, 4: 11.65, 7: 10.52, 8: 10.14, 9: 9.76, 10: 9.39}
AWQ = {0: 4.35, 6: 3.74, 7: 3.63, 9: 3.43}


@pytest.mark.parametrize(
    ("form", "gib"),
    [
        (FP16, TABLE_1),
        (Form("awq").format(), AWQ),
        (Form("rtn").format(), AWQ),
        (NF4, {0: 4.82 / GB, 7: 4.02 / GB}),
        (Form("bitsandbytes", double=True).format(), {0: 4.52 / GB, 7: 3.78 / GB}),
    ],
)
def test_weights_at_7b(llava, form, gib):
    for removed, expected in gib.items():
        plan = memory.plan_weights(llava, blocks_removed=removed, form=form)
        assert total(plan) == pytest.approx(expected, abs=0.006)


CODEBOOK = 64  # bytes of NF4's


@pytest.mark.parametrize(
    ("form", "beside"),
    [
        (Form("rtn", 4), 0),
        (Form("rtn", 3), 0),
        (Form("rtn_symmetric", 4), 0),
        (Form("hqq", 3), 0),
        (Form("rtn", 4, block_bits={0: 2}), 0),
        (Form("llm_int8", 8), 0),
        (Form("bitsandbytes"), CODEBOOK),
        (Form("bitsandbytes", double=True), CODEBOOK + 4 * 256 + 64),
    ],
)
def test_the_plan_is_what_packed_blocks_hold(form, beside, small):
    """But for `beside` bytes a linear, which only bitsandbytes has."""
    model = quantize(small_llava(2).half(), form, packed=True)
    plan = memory.plan_weights(small, form=form.format(2))
    planned = plan["decoder_linears"] + plan["quantization_scales"] + plan["block_norms"]
    more = (usage.tensor_gib(anatomy.blocks(model)) - planned) * memory.GIB
    assert (0.9 if beside else 0) * 14 * CODEBOOK <= more + 1e-6 <= 14 * beside + 2e-6


@pytest.mark.parametrize("tied", [False, True])
def test_a_real_model_in_fp16_holds_its_plan(tied):
    """What is shared counts once; buffers are not planned."""
    config = config_of(tied=tied)
    model, plan = LlavaForConditionalGeneration(config).half(), shapes.architecture(config)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    held = usage.tensor_gib(model) * memory.GIB - buffers
    assert held == pytest.approx(total(memory.plan_weights(plan)) * memory.GIB)


def test_the_cache_takes_half_a_mebibyte_a_token_at_7b(llava):
    how = {"prompt_tokens": 100, "new_tokens": 24}
    plan = memory.plan_peak(llava, **how)
    assert plan["kv_cache"] * memory.GIB == 524_288 * 700
    longer = memory.plan_peak(llava, batch=3, blocks_removed=16, **how)
    assert longer["kv_cache"] == pytest.approx(plan["kv_cache"] * 1.5)
    assert plan["workspace"] == 0 < memory.plan_peak(llava, form=NF4)["workspace"]


@pytest.mark.parametrize("size, bytes_", [(64, 4), (128, 2), (None, 0)])
def test_the_kernels_steps_are_counted(llava, size, bytes_):
    form = Form("awq", 4, size).format() if size else FP16
    steps = memory.plan_peak(llava, int4_kernel=True, form=form)["kernel_steps"]
    assert steps * memory.GIB == bytes_ * llava.decoder_linears() // 64
    assert memory.plan_peak(llava, form=form)["kernel_steps"] == 0


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "sizes, words", [({}, 80), ({"kv_heads": 2}, 20), ({"vision_blocks": 48}, 3)]
)
def test_the_prefill_plan_is_what_a_real_prefill_allocates(sizes, words, rows):
    config = config_of(**sizes)
    model, arch = LlavaForConditionalGeneration(config).eval(), shapes.architecture(config)
    inputs = batch(rows, words=words)
    tokens = inputs["input_ids"].shape[1]
    plan = memory.plan_peak(arch, batch=rows, prompt_tokens=tokens - IMAGE_TOKENS, new_tokens=0)
    with torch.inference_mode(), Allocated() as allocated:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    assert out.past_key_values.get_seq_length() == tokens
    in_tower = arch.tower_values > tokens * 11 * arch.hidden  # there before there is a cache
    assert in_tower == ("vision_blocks" in sizes)
    planned = plan["activations"] + (0 if in_tower else plan["kv_cache"])
    assert allocated.peak / 2 == pytest.approx(planned * memory.GIB, rel=0.05)  # planned in fp16


@pytest.mark.parametrize(("blocks", "most", "batch"), [(8, 8, 24), (12, 24, 9), (8, 16, 12)])
def test_the_plan_of_answers_is_what_writing_them_allocates(blocks, most, batch):
    """With the next pictures read while lines of full length are under way."""
    model = small_llava(blocks)
    question = range(10, 10 + needs.PROMPT)
    prompts = Prompts(
        prefix=torch.tensor([7] * (needs.PROMPT // 2) + [IMAGE] * IMAGE_TOKENS),
        rest={kind: [IMAGE - 1 - i, *question[1:]] for i, kind in enumerate(dialogue.QUESTIONS)},
        ends=[],
        processor=SimpleNamespace(image_processor=CLIPImageProcessor(crop_size=36)),
        device=model.device,
    )
    items = [SimpleNamespace(id=str(row), row=row) for row in range(max(2, 2 * batch // 3))]
    images = np.zeros((len(items), 36, 36, 3), np.uint8)
    with Allocated() as allocated:
        how = {"batch_size": batch, "max_new_tokens": most}
        answers = [*writing.greedy_answers(model, prompts, items, images, **how)]
    assert {len(answer.tokens) for answer in answers} == {most}
    asked = {"batch_size": batch, "max_new_tokens": most, "rankings": [], "sft_rivals": []}
    plan = needs.Needs(asked, shapes.architecture(model.config))
    taken = allocated.peak / 2  # planned in fp16
    assert taken <= (plan.answering(batch) - plan.weights) * memory.GIB <= 1.15 * taken


def adapted(blocks, checkpointing=False):
    model = LlavaForConditionalGeneration(config_of(blocks))
    peft = get_peft_model(
        model, LoraConfig(r=8, lora_dropout=0.0, target_modules=r".*language_model.*_proj")
    )
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model, sum(p.numel() for p in peft.parameters() if p.requires_grad)


def held_after_forward(blocks, checkpointing):
    model, _ = adapted(blocks, checkpointing)
    with Allocated() as allocated:
        logits = model(**batch(1, words=40), use_cache=False).logits
        assert logits.requires_grad
        return allocated.now


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_training_plan_is_what_a_block_keeps_for_backward(checkpointing):
    two, four = (held_after_forward(blocks, checkpointing) for blocks in (2, 4))
    text_tokens = batch(1, words=40)["input_ids"].shape[1] - IMAGE_TOKENS
    how = {"rank": 8, "text_tokens": text_tokens, "element": 4, "checkpointing": checkpointing}
    plan = memory.plan_training(shapes.architecture(config_of(2)), **how)
    assert four - two == pytest.approx(plan["activations"] * memory.GIB, rel=0.02)


def test_adapters_gradients_and_adam_are_counted(llava):
    plan = memory.plan_training(llava, rank=16)
    assert plan["adapters"] * memory.GIB == 4 * 39_976_960
    assert plan["optimiser"] == 2 * plan["gradients"] == 2 * plan["adapters"]
    _, trained = adapted(blocks=2)
    small = memory.plan_training(shapes.architecture(config_of()), rank=8)
    assert small["adapters"] * memory.GIB == 4 * trained


def test_what_training_takes_follows_from_the_base_and_from_checkpointing(llava):
    on_nf4, on_fp16 = (memory.plan_training(llava, form=form) for form in (NF4, FP16))
    whole = memory.plan_weights(llava)
    assert {part: on_fp16[part] for part in whole} == whole
    assert on_fp16["workspace"] == 0 < on_nf4["workspace"]
    assert on_fp16["activations"] == on_nf4["activations"]
    kept, redone = (memory.plan_training(llava, checkpointing=c, batch=4) for c in (False, True))
    assert redone["activations"] < 0.1 * kept["activations"]
    assert total(redone) < 8 < 20 < total(kept)
    wide = memory.plan_training(llava, rest=4)
    assert wide["head"] == 2 * kept["head"] and wide["decoder_linears"] == kept["decoder_linears"]


def test_variants_are_planned_at_the_same_fraction_of_7b(llava):
    twelve = shapes.architecture(config_of(12))
    variants = pd.DataFrame(
        [("original", 0, 16, 0, 0), ("pruned-4", 4, 16, 0, 0), ("pruned-4|awq4", 4, 4, 64, 2.5)],
        columns=["variant", "blocks_removed", "bits", "group_size", "group_bytes"],
    )
    plan = memory.plan_variants(variants, twelve, llava, prompt_tokens=30).set_index("variant")
    assert plan["blocks_removed_7b"].tolist() == [0, 11, 11]  # 10.7
    assert plan.loc["original", "params_b_7b"] == 7.063427072
    assert plan.loc["pruned-4", "params_b"] == twelve.parameters(4) / 1e9
    assert plan.loc["pruned-4|awq4", "vram_gib_7b"] == total(
        memory.plan_weights(llava, blocks_removed=11, form=Form("awq").format())
    )
    assert (plan["peak_gib_7b"] > plan["vram_gib_7b"]).all()
    assert (plan["peak_gib"] > plan["vram_gib"]).all()
    assert not plan.isna().any().any()


def test_resident_memory_follows_an_allocation():
    before = usage.resident_gib()
    block = np.ones(2**26, dtype=np.uint8)
    after = usage.resident_gib()
    assert after["rss_gib"] - before["rss_gib"] > 0.9 * block.nbytes / memory.GIB
    assert after["rss_peak_gib"] >= 0.99 * after["rss_gib"]
    assert usage.peak_gib() == pytest.approx(after["rss_peak_gib"], rel=0.01)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="a process keeps its peak off Linux"
)
def test_a_process_peak_starts_anew_after_what_was_freed():
    block = np.ones(2**28, dtype=np.uint8)
    size, before = block.nbytes / memory.GIB, usage.peak_gib()
    del block
    assert usage.peak_gib() == pytest.approx(before, rel=0.01)
    usage.reset_peak()
    after = usage.resident_gib()
    assert after["rss_peak_gib"] < before - 0.9 * size
    assert after["rss_peak_gib"] == pytest.approx(after["rss_gib"], rel=0.05)
