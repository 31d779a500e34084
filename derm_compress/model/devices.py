"""Models: loading, anatomy (the one place that knows where blocks, projector and head live), making, exporting."""

from __future__ import annotations

import torch

from derm_compress.model.anatomy import blocks


def let_go(model) -> None:
    """Give back a model's memory though names may still hold it: it is empty and of no use afterwards."""
    for module in list(model.modules()):
        for held in (module._modules, module._parameters, module._buffers):
            held.clear()


def beside(device: str) -> str:
    """Where a second model goes: the second GPU if there is one."""
    return "cuda:1" if device == "cuda" and torch.cuda.device_count() > 1 else device


def spread(model, over: int | None = None, **how) -> None:
    """Blocks over the GPUs, for generation: one T4 holds 7B in fp16 and hardly a batch beside it. In place.

    Nothing happens where one GPU has room enough; over: so many devices, numbered from 0. how: as dispatch_model's.
    """
    if over is None:
        over = torch.cuda.device_count() if model.device.type == "cuda" else 1
        held = sum(weight.nbytes for weight in model.parameters())
        if over < 2 or hasattr(model, "hf_device_map") or 2 * held < torch.cuda.mem_get_info()[1]:
            return
    from accelerate import dispatch_model

    dispatch_model(model, placement(model, over), skip_keys="past_key_values", **how)


def placement(model, over: int) -> dict[str, int]:
    """{module: GPU}: as many blocks on each, what comes before them on the first, what comes after on the last."""
    inner, count = "model.language_model", len(blocks(model))
    first = [
        "model.vision_tower",
        "model.multi_modal_projector",
        f"{inner}.embed_tokens",
        f"{inner}.rotary_emb",
    ]
    places = {f"{inner}.layers.{i}": i * over // count for i in range(count)}
    return dict.fromkeys(first, 0) | places | dict.fromkeys([f"{inner}.norm", "lm_head"], over - 1)


def half(device: str) -> torch.dtype:
    """What models compute in: fp32 on the CPU; on a GPU fp16, whatever is_bf16_supported says (a T4 emulates it)."""
    return torch.float32 if device == "cpu" else torch.float16
