"""How long a model takes to read a prompt and to write each token, beside what reading its weights takes at least."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from derm_compress.errors import DermError
from derm_compress.files import Journal
from derm_compress.method.assemble import materialize
from derm_compress.method.quantization import packed
from derm_compress.model import anatomy, devices, memory, usage
from derm_compress.model.recipe import Recipe
from derm_compress.progress import track

if TYPE_CHECKING:
    import pandas as pd

    from derm_compress.data.items import Item


def of_variants(
    variants: pd.DataFrame, store, items: Sequence[Item], images: np.ndarray, *, device: str,
    batches: Sequence[int] = (1,), journal: Journal | None = None, **how,
) -> pd.DataFrame:  # fmt: skip
    """One row a variant and batch, batch 1 first: milliseconds, memory and the floor of decoding with packed weights.

    how: new_tokens, repeats, warmup as in measure_latency. Columns beside its own: weights_gib, read_mib (what a step
    reads), bandwidth_gb_s (of the device, measured here), floor_ms, times_floor, packed.kernel_share's, and
    memory.resident_gib's. Batches that exceed a GPU's memory have no row. The journal keeps what was measured of each
    variant.
    """
    import pandas as pd  # a machine that only rehearses may lack it

    if device == anatomy.META:
        return pd.DataFrame(columns=["variant"])
    journal = journal or Journal()
    if "bandwidth" not in journal.done:
        journal.add("bandwidth", bandwidth(device))
    for row in track(list(variants.itertuples()), "latency measured"):
        if row.variant not in journal.done:
            asked = {
                "device": device,
                "batches": sorted({1, *batches}),
                "speed": journal.done["bandwidth"],
            }
            told = _of_variant(row.recipe, row.variant, store, items, images, **asked, **how)
            journal.add(row.variant, told)
    rows = [{"variant": name} | told for name in variants.variant for told in journal.done[name]]
    return pd.DataFrame(rows, columns=None if rows else ["variant"])


def _of_variant(
    recipe: str, name: str, store, items, images, *, device, batches, speed: float, **how
) -> list[dict]:
    """A variant's rows; the largest batches may be missing."""
    from derm_compress.model import (
        prompts,
    )  # data needs scipy, which a machine that only rehearses may lack

    model, processor = materialize(Recipe.from_json(recipe), store, device, packed=True)
    stored, rows = (
        usage.tensor_gib(model),
        [],
    )  # before a kernel lays codes out anew and keeps steps beside them
    for batch in batches:
        usage.reset_peak(device)
        rows_of = [items[i % len(items)].row for i in range(batch)]
        texts = [prompts.prompt(processor, "features")] * batch
        try:
            inputs = prompts.prepare(processor, texts, images[rows_of], model.device)
            told = measure_latency(model, inputs, **how) | usage.resident_gib(device)
        except torch.OutOfMemoryError:
            print(
                f"latency of {name}: out of GPU memory with {batch} at once; not measured",
                flush=True,
            )
            break
        told |= (
            {"gpu": torch.cuda.get_device_name(device)} if str(device).startswith("cuda") else {}
        )
        told |= floor(model, told, speed)
        rows.append({"weights_gib": stored} | told)
    devices.let_go(model)
    return rows


def floor(model, told: dict, speed: float) -> dict:
    """What a step of measure_latency's reads, and how far its time is above that at `speed` bytes a second."""
    read = read_bytes(
        model, batch=told["batch"], tokens=told["prompt_tokens"] + told["new_tokens"] / 2
    )
    found = {
        "read_mib": read / 2**20,
        "bandwidth_gb_s": speed / 1e9,
        "floor_ms": 1000 * read / speed,
    }
    found["kernel_share"] = packed.kernel_share(model)
    return found | {"times_floor": told["decode_ms_per_token"] / found["floor_ms"]}


@torch.inference_mode()
def bandwidth(device: str, *, size: int | None = None, repeats: int = 5) -> float:
    """Bytes a second: the best of `repeats` copies (read and written) and sums of `size` bytes on the device.

    `size`: by default 1 GiB on CUDA, else 256 MiB, more than a cache holds. A CPU uses torch's threads.
    """
    size = size or (2**30 if str(device).startswith("cuda") else 2**28)
    source = torch.ones(size // 4, device=device)
    target, best = torch.empty_like(source), 0.0
    for moved, move in ((2 * size, lambda: target.copy_(source)), (size, source.sum)):
        for _ in range(repeats + 1):  # the first one maps the pages
            began = _clock(source.device)
            move()
            best = max(best, moved / (_clock(source.device) - began))
    return best


def read_bytes(model, *, batch: int, tokens: float) -> float:
    """Bytes that a decoding step cannot help reading: all blocks, last norm, head, and the cache of `tokens` a row."""
    parts = anatomy.parts(model)
    held = nn.ModuleList([*anatomy.blocks(model), parts["decoder"].norm, parts["head"]])
    text, element = model.config.text_config, model.get_input_embeddings().weight.element_size()
    width = text.num_key_value_heads * (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    attentions = sum(
        "self_attn.k_proj" in anatomy.linears(block) for block in anatomy.blocks(model)
    )
    return memory.GIB * usage.tensor_gib(held) + 2 * element * width * attentions * batch * tokens


def measure_latency(
    model, inputs, *, new_tokens: int = 32, warmup: int = 3, repeats: int = 20
) -> dict:
    """Milliseconds: prefill, each decoded token, and all of it per new token; medians, quartiles as _lo, _hi.

    inputs: the processor's tensors on the model's device. Every row gets exactly `new_tokens`, the first from the
    prefill; a step counts once whatever the batch. Raises DermError under 2 tokens or without a repeat.
    """
    if new_tokens < 2 or repeats < 1:
        raise DermError("measure_latency: needs at least 2 new tokens and 1 repeat")
    runs = [
        greedy_tokens(model, inputs, new_tokens=new_tokens)[1:] for _ in range(warmup + repeats)
    ]
    prefill, decode = 1000 * np.array(runs[warmup:]).T  # [repeats] each
    samples = {"prefill_ms": prefill, "decode_ms_per_token": decode / (new_tokens - 1)}
    samples["total_ms_per_token"] = (prefill + decode) / new_tokens
    batch, prompt_tokens = inputs["input_ids"].shape
    result = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
    for name, sample in samples.items():
        lo, median, hi = np.quantile(sample, (0.25, 0.5, 0.75)).tolist()
        result |= {name: median, f"{name}_lo": lo, f"{name}_hi": hi}
    return result


def greedy_tokens(model, inputs, *, new_tokens: int):
    """(tokens [B, new_tokens], prefill seconds, decode seconds): greedy, cached, deaf to end-of-sequence."""
    step, mask, tokens, clock = inputs, inputs["attention_mask"], [], [_clock(model.device)]
    with torch.inference_mode():
        while len(tokens) < new_tokens:
            out = model(**step, use_cache=True, logits_to_keep=1)
            tokens.append(out.logits.argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            step = {
                "input_ids": tokens[-1],
                "attention_mask": mask,
                "past_key_values": out.past_key_values,
            }
            if len(tokens) in (1, new_tokens):  # no waiting for the device in between
                clock.append(_clock(model.device))
    return torch.cat(tokens, 1), clock[1] - clock[0], clock[2] - clock[1]


def _clock(device) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
