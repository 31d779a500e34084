"""Models: loading, anatomy (the one place that knows where blocks, projector and head live), making, exporting."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

META = "meta"  # the device of a model without values: of shapes alone, from which sizes and costs follow


def decoder(model: LlavaForConditionalGeneration) -> nn.Module:
    """The LLaMA decoder: embedding, blocks, final norm."""
    return model.model.language_model


def blocks(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    """The decoder's transformer blocks, index 0 first."""
    return decoder(model).layers


def finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; its sum says so at once, unless that alone overflows."""
    return bool(tensor.sum().isfinite() or torch.isfinite(tensor).all())


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by name, in the order of their use: seven, fewer where a sublayer was removed."""
    parts = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    asked = [(part, f"{name}_proj") for part, names in parts.items() for name in names]
    found = {f"{part}.{name}": getattr(getattr(block, part), name, None) for part, name in asked}
    return {name: linear for name, linear in found.items() if linear is not None}


def inputs(model: LlavaForConditionalGeneration) -> dict[str, int]:
    """How many inputs each linear of a block has, by name; the same in all blocks that have it."""
    return {
        name: linear.in_features
        for block in blocks(model)
        for name, linear in linears(block).items()
    }


def parts(model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """Vision tower, projector, decoder and head by name."""
    inner = model.model
    tower = {"vision_tower": inner.vision_tower, "projector": inner.multi_modal_projector}
    return tower | {"decoder": inner.language_model, "head": model.lm_head}


def fingerprint(model: LlavaForConditionalGeneration) -> str:
    """16 hex digits of the architecture and of 64 values of every weight: tells two models apart at any size."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = (
            b""
            if flat.is_meta
            else flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes()
        )
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample)
    return digest.hexdigest()[:16]


def has_values(model: LlavaForConditionalGeneration) -> bool:
    """Whether there are weights to compute with; a model on the meta device has shapes alone."""
    return model.device.type != META
