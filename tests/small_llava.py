"""A small random LLaVA and batches for it, without tokenizer or files."""

import copy

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from derm_compress.method.quantization import calibration
from derm_compress.method.quantization.quantize import quantize
from derm_compress.method.quantization.search import search_forms
from derm_compress.model import anatomy

IMAGE, PAD, IMAGE_TOKENS = 199, 0, 9


def small_llava(blocks=4, *, seed=0, hidden=64, kv_heads=4, std=0.1):
    """LLaVA with a decoder of `blocks` x `hidden` and a one-layer tower of 9 image tokens."""
    text = {
        "model_type": "llama",
        "vocab_size": 200,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "initializer_range": std,
        "pad_token_id": PAD,
    }
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=36,
        patch_size=12,
    )
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2
    )
    return LlavaForConditionalGeneration(config).eval()


def loud_llava(blocks=4, **how):
    """small_llava with six channels of every norm 20 times as loud: scaling has something to do."""
    model = small_llava(blocks, **how)
    for block in anatomy.blocks(model):
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[torch.arange(6) * 9] *= 20
    return model


def batch(rows=3, words=20, *, seed=0, padding=0, side="right"):
    """A processor's output: an image and `words` words a row, and `padding` at one `side`."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, IMAGE, (rows, 1 + words), generator=rng)
    ids = torch.cat([ids[:, :1], torch.full((rows, IMAGE_TOKENS), IMAGE), ids[:, 1:]], 1)
    pixels = torch.randn(rows, 3, 36, 36, generator=rng)
    mask = torch.ones_like(ids)
    if padding:
        pad = torch.full((rows, padding), PAD)
        order = slice(None) if side == "right" else slice(None, None, -1)
        ids = torch.cat([ids, pad][order], 1)
        mask = torch.cat([mask, torch.zeros_like(pad)][order], 1)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def asked(side="left", *, answer_weight=1.0, seed=4):
    """Two pictures, in turns, with prompts that begin alike; the last five tokens are answers."""
    feed, lengths = batch(6, words=20, seed=seed), (30, 28, 25, 30, 22, 29)
    rows, mask, weights = feed["input_ids"], torch.zeros(6, 30, dtype=torch.long), torch.ones(6, 30)
    rows[:, 0], rows[:, 10:14] = 7, rows[:1, 10:14]  # a word, 9 image tokens, four words
    ids = torch.full_like(rows, PAD)
    for row, length in enumerate(lengths):
        first = 30 - length if side == "left" else 0
        ids[row, first : first + length] = rows[row, :length]
        mask[row, first : first + length], weights[row, first + length - 5 : first + length] = (
            1,
            answer_weight,
        )
    feed |= {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": feed["pixel_values"][[0, 1, 0, 1, 1, 0]],
    }
    return feed if answer_weight == 1 else feed | {"token_weights": weights}


def collect_all(model, batches, **how):
    """{"block.group": InputStatistics} of the whole decoder."""
    found = calibration.collect(model, batches, **how)
    return {f"{block}.{group}": one for block, groups in found for group, one in groups.items()}


def gram(inputs):
    """H [in, in] of InputStatistics."""
    return inputs.inputs.T @ inputs.inputs if inputs.gram is None else inputs.gram


def search_one(model, batches, form):
    """(tensors, rows) of one form."""
    return search_forms(model, batches, {form.name: form})[form.name]


def scales_of(model, batches, form):
    """The tensors of a form's search; None where it has none."""
    return search_one(model, batches, form)[0] if form.searched else None


def quantized(model, batches, form):
    """A copy of the model, quantized by what its search finds, if it has one."""
    scales = scales_of(model, batches, form)
    return quantize(copy.deepcopy(model), form, scales=scales)
