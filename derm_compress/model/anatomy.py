"""The one place that knows where a LLaVA's blocks, their linears, its projector and head live."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from derm_compress.model.hf import LlavaForConditionalGeneration

META = "meta"  # the device of a model without values, of which only the shapes are known
LINEARS = (  # of a block, in the order of their use
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def decoder(model: LlavaForConditionalGeneration) -> nn.Module:
    """The LLaMA decoder: embedding, blocks, final norm."""
    return model.model.language_model


def blocks(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    """The decoder's transformer blocks, index 0 first."""
    return decoder(model).layers


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by name: seven, fewer where a sublayer was removed."""
    inside = dict(block.named_modules())
    return {name: inside[name] for name in LINEARS if name in inside}


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
