"""Which device a model goes to, in which type, and how it gives its memory back."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from derm_compress.model.anatomy import blocks, tied
from derm_compress.model.memory import GIB

# cuDNN's, which torch prefers on an H200, gives gradients of padded rows that are NaN
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_with_gradients():
    """A context in which attention takes a kernel whose gradients are right; around both passes."""
    return sdpa_kernel(ATTENTION)


def loss_scale(dtype: torch.dtype) -> int:
    """What a loss is multiplied by, so that no fp16 gradient vanishes; it changes no digit."""
    return 2**10 if dtype == torch.float16 else 1


def half(device: str) -> torch.dtype:
    """What models compute in: fp32 on the CPU, fp16 on a GPU."""
    # is_bf16_supported would say yes on a T4, which only emulates it
    return torch.float32 if device == "cpu" else torch.float16


def let_go(model) -> None:
    """Give back a model's memory though names may still hold it: it is empty afterwards."""
    for module in list(model.modules()):
        for held in (module._modules, module._parameters, module._buffers):
            held.clear()


def room(gpu) -> float:
    """GiB of a GPU that this process may use: what is free, and what it holds already."""
    return (torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu)) / GIB


def rooms() -> list[float]:
    return [room(gpu) for gpu in range(torch.cuda.device_count())]


def spread(model, over: int | None = None, **how) -> None:
    """Blocks over the GPUs, for generation: one T4 holds 7B in fp16 and hardly a batch beside it.

    In place; nothing happens where one GPU has room enough, unless `over` says over how many
    devices. how: as accelerate's dispatch_model takes it.
    """
    if over is None:
        over = torch.cuda.device_count() if model.device.type == "cuda" else 1
        held = sum(weight.nbytes for weight in model.parameters())
        if over < 2 or hasattr(model, "hf_device_map") or 2 * held < torch.cuda.mem_get_info()[1]:
            return
    from accelerate import dispatch_model

    dispatch_model(model, placement(model, over), skip_keys="past_key_values", **how)


def is_spread(model) -> bool:
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def placement(model, over: int) -> dict[str, int]:
    """{module: GPU}: blocks evenly, the rest by the first or the last, a tied head by the first."""
    inner, count = "model.language_model", len(blocks(model))
    head = 0 if tied(model) else over - 1
    places = {
        "model.vision_tower": 0,
        "model.multi_modal_projector": 0,
        f"{inner}.embed_tokens": 0,
        f"{inner}.rotary_emb": 0,
    }
    for i in range(count):
        places[f"{inner}.layers.{i}"] = i * over // count
    return places | {f"{inner}.norm": over - 1, "lm_head": head}
