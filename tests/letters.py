"""A processor whose tokens are letters, what it is asked, and a small model that reads it."""

from contextlib import contextmanager

import torch
from small_llava import IMAGE, IMAGE_TOKENS, small_llava

from derm_compress.model import anatomy
from derm_compress.model.units import Unit

PICTURES = torch.randn(3, 3, 36, 36, generator=torch.Generator().manual_seed(1))
QUESTIONS = {"long": "what do you see there", "short": "what is it"}


class Words:
    """A processor whose tokens are letters, for small_llava."""

    chat_template, image_token = "", "#"

    class tokenizer:
        bos_token, eos_token, eos_token_id = None, chr(IMAGE - 1), IMAGE - 1
        added_tokens_decoder = {IMAGE - 1: chr(IMAGE - 1)}

        def __new__(cls, text, **_):
            return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, turns, **_):
        return "".join(part.get("text", "#") for turn in turns for part in turn["content"])

    def __call__(self, text, images, **_):
        ids = [[IMAGE] * IMAGE_TOKENS if letter == "#" else [ord(letter)] for letter in f"<{text}>"]
        return {"input_ids": [sum(ids, [])]}

    @staticmethod
    def image_processor(pictures, **_):
        return {"pixel_values": torch.stack(pictures)}


def inputs_of(question, picture):
    ids = torch.tensor(Words()(f"#{question}", [picture])["input_ids"])
    return {"input_ids": ids, "pixel_values": picture[None], "attention_mask": torch.ones_like(ids)}


@contextmanager
def altered(model, unit):
    """The same layers, of which this unit's add nothing."""
    silent = []
    if unit is not None:
        unit = Unit.of(unit)
        block = anatomy.blocks(model)[unit.block]
        silent += [block.self_attn.o_proj] if unit.part != "mlp" else []
        silent += [block.mlp.down_proj] if unit.part != "attention" else []
    kept = [linear.weight.data.clone() for linear in silent]
    for linear in silent:
        linear.weight.data.zero_()
    yield
    for linear, weight in zip(silent, kept, strict=True):
        linear.weight.data.copy_(weight)


def speaker():
    """A small model that never says the picture's own token."""
    model = small_llava(kv_heads=2)
    model.lm_head.weight.data[IMAGE].zero_()
    return model
