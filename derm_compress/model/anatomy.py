"""The one place that knows where a LLaVA's blocks, their linears, its projector and head live."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from derm_compress.errors import DermError

if TYPE_CHECKING:
    from derm_compress.model.hf import LlavaForConditionalGeneration

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
META = "meta"  # the device of a model without values, of which only the shapes are known
TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # tokens before the patches
TEXT = 1024  # tokens that a conversation may take beside its picture's


@dataclass(frozen=True)
class Group:
    """Linears of a block that read one input, and the module before them, which can scale it.

    Of that module's outputs, in `parts` equal parts, the input is linear in the last.
    """

    linears: tuple[str, ...]
    before: str
    parts: int = 1


SEPARATE = {
    "qkv": Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    "o": Group(("self_attn.o_proj",), "self_attn.v_proj"),
    "gate_up": Group(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    "down": Group(("mlp.down_proj",), "mlp.up_proj"),
}
FUSED = {
    "qkv": Group(("self_attn.qkv_proj",), "input_layernorm"),
    "o": Group(("self_attn.o_proj",), "self_attn.qkv_proj", parts=3),
    "gate_up": Group(("mlp.gate_up_proj",), "post_attention_layernorm"),
    "down": Group(("mlp.down_proj",), "mlp.gate_up_proj", parts=2),
}
DECODERS = {"llama": SEPARATE, "mistral": SEPARATE, "qwen2": SEPARATE, "phi3": FUSED}
# attention reads the product of queries and keys, not them
QUERIES_AND_KEYS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.qkv_proj")
# every linear of every block, in a whole model
ADAPTED = r".*language_model.*\.(q|k|v|qkv|o|gate|up|gate_up|down)_proj"


def decoder(model: LlavaForConditionalGeneration) -> nn.Module:
    """The LLaMA decoder: embedding, blocks, final norm."""
    return model.model.language_model


def blocks(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    """The decoder's transformer blocks, index 0 first."""
    return decoder(model).layers


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by name, in the order of their use."""
    inside = dict(block.named_modules())
    return {name: inside[name] for group in groups(block).values() for name in group.linears}


def groups(block: nn.Module) -> dict[str, Group]:
    """The groups of a block's linears by name: four, two where a sublayer was removed."""
    inside = dict(block.named_modules())
    fused = any(group.linears[0] in inside for group in (FUSED["qkv"], FUSED["gate_up"]))
    family = FUSED if fused else SEPARATE
    return {name: group for name, group in family.items() if group.linears[0] in inside}


def inputs(model: LlavaForConditionalGeneration) -> dict[str, int]:
    """How many inputs each linear of a block has; the same in all blocks that have it."""
    found = {}
    for block in blocks(model):
        for name, linear in linears(block).items():
            found[name] = linear.in_features
    return found


def parts(model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """Vision tower, projector, decoder and head by name."""
    return {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "decoder": decoder(model),
        "head": model.lm_head,
    }


def image_tokens(config) -> int:
    """Tokens that one picture takes in the decoder, by a LlavaConfig."""
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + TOWERS[vision.model_type]
    return tokens - (config.vision_feature_select_strategy == "default")


def cache_width(text_config) -> int:
    """Values of a token's keys in one block, and as many of its values."""
    size = getattr(text_config, "head_dim", None)
    size = size or text_config.hidden_size // text_config.num_attention_heads
    return text_config.num_key_value_heads * size


def tied(model: LlavaForConditionalGeneration) -> bool:
    """Whether the head is the embedding."""
    return model.lm_head.weight is model.get_input_embeddings().weight


def check(name: str, config) -> None:
    """DermError for a LlavaConfig with a tower or decoder that this module does not know."""
    vision, text = config.vision_config, config.text_config
    for part, inner, known in (("tower", vision, TOWERS), ("decoder", text, DECODERS)):
        if inner.model_type not in known:
            raise DermError(
                f"model {name}: its {part} is {inner.model_type}; known: {', '.join(known)}"
            )
    try:
        needed = image_tokens(config) + TEXT
    except (ArithmeticError, TypeError) as error:
        sizes = f"{vision.image_size} px in patches of {vision.patch_size}"
        raise DermError(f"model {name}: its tower reads no pictures of {sizes}") from error
    window = getattr(text, "sliding_window", None)
    if window and window < needed:
        raise DermError(
            f"model {name}: its blocks see {window} tokens back; a picture and what is said of it "
            f"may take {needed}"
        )


def fingerprint(model: LlavaForConditionalGeneration) -> str:
    """16 hex digits of the architecture and of 64 values of every weight."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if not weight.is_meta:
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def has_values(model: LlavaForConditionalGeneration) -> bool:
    """Whether there are weights to compute with; a model on the meta device has shapes alone."""
    return model.device.type != META


def finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    # its sum says so at once, unless the sum itself overflows
    return bool(tensor.sum().isfinite() or torch.isfinite(tensor).all())
