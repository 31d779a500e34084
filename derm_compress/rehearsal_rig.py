"""The rig of a rehearsal: a device, the shapes that are tried on it, what it can do at best.

Times have floors that nothing goes below: FLOPs over the rate of a large matrix product here or, for decoding, the
bytes that every token reads over the rate of a large copy here.
"""

from __future__ import annotations

import functools
import gc
import platform
import re
import statistics
import time
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from derm_compress.errors import DermError
from derm_compress.method.quantization import quantize
from derm_compress.method.quantization.grids import NF4Grid
from derm_compress.model import loading, memory, removal, usage
from derm_compress.model.shapes import Architecture, architecture, llava_7b_config

FORMS = {
    "fp16": {},
    "NF4": {"method": "bitsandbytes", "bits": 4, "group_size": 64},
    "packed W4": {"method": "rtn", "bits": 4, "group_size": 64},
}
SIZES = ("prompt_tokens", "new_tokens", "text_tokens", "conversations", "draft_tokens")


@dataclass(frozen=True)
class Rig:
    """What is rehearsed where: `shapes` 7b or small (a few blocks, seconds on a CPU), and the sizes of the requests."""

    shapes: str
    device: str
    prompt_tokens: int = 64  # beside a picture's
    new_tokens: int = 32
    text_tokens: int = 128  # of a conversation
    conversations: int = 8
    draft_tokens: int = 48  # of an answer that is verified
    seconds: float = 10.0  # for one timing; the first run always ends

    def config(self):
        """A fresh LlavaConfig: pruning writes into it."""
        if self.shapes == "7b":
            return llava_7b_config()
        config = AutoConfig.from_pretrained(loading.TINY)
        config.text_config.num_hidden_layers = 12
        return config

    @cached_property
    def arch(self) -> Architecture:
        return architecture(self.config())

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


def find(shapes: str) -> Rig:
    """The rig of these shapes; DermError where 7b finds no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if shapes == "7b":
        if device == "cpu":
            raise DermError(
                "rehearsal: torch sees no CUDA device; run it on an NVIDIA GPU, or with --shapes small"
            )
        return Rig(shapes, device)
    torch.set_num_threads(1)
    return Rig(
        shapes,
        device,
        prompt_tokens=8,
        new_tokens=3,
        text_tokens=8,
        conversations=2,
        draft_tokens=4,
        seconds=0.0,
    )


def place(rig: Rig) -> dict:
    """Device, shapes, sizes and versions: what a finished step belongs to."""
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    sizes = {name: getattr(rig, name) for name in SIZES}
    return sizes | {
        "image_tokens": rig.arch.image_tokens,
        "device": torch.cuda.get_device_name() if rig.cuda else "CPU", "shapes": rig.shapes,
        "device_gib": round(torch.cuda.mem_get_info()[1] / memory.GIB, 1) if rig.cuda else None,
        "python": platform.python_version(), **libraries,
        "bitsandbytes": "not usable" if nf4_trouble(rig.device) else version("bitsandbytes"),
    }  # fmt: skip


@functools.cache
def nf4_trouble(device: str) -> str:
    """Why bitsandbytes cannot quantize here, in one line without paths; empty where it can."""
    try:
        NF4Grid(64).rounded(torch.ones(64, 64, dtype=torch.float16, device=device))
    except Exception as error:  # a library that misses its CUDA part may fail in any way
        line = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
        return f"bitsandbytes: {re.sub(r'/[^ ]*/', '', line).strip()}"
    return ""


def need(rig: Rig, form: str) -> None:
    """DermError where a form of the weights is not to be had here."""
    if form == "NF4" and (trouble := nf4_trouble(rig.device)):
        raise DermError(trouble)


def build(rig: Rig, *, removed: int = 0, form: str = "fp16"):
    """The model with random fp16 weights, `removed` blocks gone, the decoder's linears in that form."""
    need(rig, form)
    torch.manual_seed(0)
    with torch.device(
        rig.device
    ):  # no copy on the host; buffers that no file holds are made as ever
        model = (
            AutoModelForImageTextToText.from_config(rig.config(), dtype=torch.float16)
            .eval()
            .requires_grad_(False)
        )
    removal.apply(model, range(rig.arch.kept(removed)))
    return quantize.quantize(model, **FORMS[form], packed=True) if FORMS[form] else model


def request(rig: Rig, batch: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """Random words about one random picture a row, as the processor would give them."""
    config, arch = rig.config(), rig.arch
    side, image = config.vision_config.image_size, config.image_token_id
    with torch.device(rig.device):
        words = torch.randint(arch.vocabulary - 1, (batch, text_tokens))
        ids = torch.cat(
            [torch.full((batch, arch.image_tokens), image), words + (words >= image)], 1
        )
        pixels = torch.randn(batch, 3, side, side, dtype=torch.float16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def release(rig: Rig) -> float:
    """Give back what nobody holds and start the peak anew; GiB still allocated on the GPU."""
    if not rig.cuda:
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / memory.GIB


def weights_gib(rig: Rig, model, before: float) -> float:
    """GiB that the model has taken of the GPU since `before`; on a CPU its tensors'."""
    return release(rig) - before if rig.cuda else usage.tensor_gib(model)


def peak_gib(rig: Rig) -> float | None:
    """Peak GiB allocated since release(); unknown on a CPU, where a process's peak cannot start anew."""
    return usage.peak_gib(rig.device) if rig.cuda else None


def timed(rig: Rig, work, most: int = 5) -> float:
    """Median seconds of work(): after one run that does not count, as many as fit into the rig's seconds."""
    samples = []
    while len(samples) < 2 or (len(samples) <= most and sum(samples) < rig.seconds):
        began = _now(rig)
        work()
        samples.append(_now(rig) - began)
    return statistics.median(samples[1:])


def _now(rig: Rig) -> float:
    if rig.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def limits(rig: Rig) -> dict[str, float]:
    """Bytes/s of a large copy (read and written), FLOP/s of large fp16 and fp32 products."""
    wide, numel = (8192, 2**29) if rig.cuda else (256, 2**20)
    with torch.device(rig.device):
        source, target = torch.zeros(2, numel, dtype=torch.float16)
        found = {"copy": 4 * numel / timed(rig, lambda: target.copy_(source))}
        for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
            a, b = torch.randn(2, wide, wide, dtype=dtype)
            found[name] = 2 * wide**3 / timed(rig, partial(torch.mm, a, b))
    return found


def forward_floor(
    rig: Rig, batch: int, text_tokens: int, *, removed: int = 0, passes: int = 1, logits: int = 1
):
    """Seconds of 2 FLOPs a weight and token, `passes` times through the decoder; attention's 1 % left out."""
    arch, outside = rig.arch, rig.arch.outside
    decoder = (text_tokens + arch.image_tokens) * arch.kept(removed) * arch.block_linears
    picture = (arch.image_tokens + 1) * outside["vision_tower"] + arch.image_tokens * outside[
        "projector"
    ]
    return (
        2
        * batch
        * (passes * decoder + picture + passes * logits * outside["head"])
        / limits(rig)["fp16"]
    )


def decode_floor(rig: Rig, plan: dict[str, float]) -> float:
    """Seconds to read once what every token needs: decoder, head and the KV cache at its final length."""
    read = (
        "decoder_linears",
        "quantization_scales",
        "block_norms",
        "final_norm",
        "head",
        "kv_cache",
    )
    return sum(plan[part] for part in read) * memory.GIB / limits(rig)["copy"]
