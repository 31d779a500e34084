"""Which device a model goes to, in which type, and how it gives its memory back."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from derm_compress.model import memory, shapes
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


def usable() -> list[float]:
    """GiB of every GPU but for CUDA's own; none is touched, which would take memory there."""
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [gpu.total_memory / GIB - memory.CONTEXT for gpu in found]


def too_small(config, device, **asked) -> bool:
    """Whether none of several GPUs holds a model of a LlavaConfig and the answers that are asked.

    asked: batch, new_tokens as in memory.too_small, by which the preflight plans.
    """
    gib = usable() if str(device).startswith("cuda") else []
    if len(gib) < 2:
        return False
    return memory.too_small(shapes.architecture(config), len(gib), min(gib), **asked)


def spread(model, over: int | None = None, **how) -> None:
    """Blocks over all GPUs, or so many devices, in place; once is enough.

    how: as accelerate's dispatch_model takes it.
    """
    if hasattr(model, "hf_device_map"):
        return
    from accelerate import dispatch_model

    places = placement(model, over or torch.cuda.device_count())
    dispatch_model(model, places, skip_keys="past_key_values", **how)


def beside(module, read):
    """What a module of a spread model reads, on its device; a cache has its parts on all."""
    if not hasattr(module, "_hf_hook"):
        return read
    from accelerate.utils import send_to_device

    where = module._hf_hook.execution_device
    return send_to_device(read, where, skip_keys=["past_key_values"])


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
