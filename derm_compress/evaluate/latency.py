"""How long a model takes to read a prompt and to write each token, beside the least it can take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import pandas as pd
import torch
from torch import nn

from derm_compress.data.items import Item
from derm_compress.errors import DermError
from derm_compress.files import Journal
from derm_compress.method.assemble import materialize
from derm_compress.method.quantization import packed
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model import anatomy, devices, prompts, usage
from derm_compress.model.cache import SlotCache
from derm_compress.model.graphs import Recorded
from derm_compress.model.memory import GIB
from derm_compress.model.recipe import Recipe
from derm_compress.model.writing import Step, choose
from derm_compress.progress import say, track

SAMPLES = ("prefill_s", "decode_s")
ROUNDS = 2  # over all variants, the second backwards: what drifts meanwhile meets all alike


def time_variants(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batches: Sequence[int] = (1,),
    repeats: int = 20,
    journal: Journal | None = None,
    **how,
) -> pd.DataFrame:
    """One row a variant and batch, batch 1 first: milliseconds, memory, the floor of decoding.

    The repeats are shared by ROUNDS, and pooled. how: new_tokens, warmup as in sampled().
    Columns beside its own: weights_gib (packed), `floor`'s, times_floor (the time of a token over
    it), and usage.resident_gib's. Batches that exceed a GPU's memory have no row. The journal keeps
    what a round measured of each variant. Every round loads it anew: a model made in place, as for
    answers, would keep what was removed and a copy, in the memory that is measured here.
    """
    if device == anatomy.META:
        return pd.DataFrame(columns=["variant"])
    journal = journal or Journal()
    if "bandwidth" not in journal.done:
        journal.add("bandwidth", bandwidth(device))
    sizes, packing = sorted({1, *batches}), partial(quantize_step, packed=True)
    how["repeats"] = -(-repeats // ROUNDS)
    there = list(variants.itertuples())
    rounds = [there[:: -1 if number % 2 else 1] for number in range(ROUNDS)]
    turns = [(row, _key(row.variant, number)) for number, rows in enumerate(rounds) for row in rows]
    for row, key in track(turns, "latency measured"):
        if key not in journal.done:
            recipe = Recipe.from_json(row.recipe)
            model, processor = materialize(recipe, store, device, quantize=packing)
            asked = _requests(processor, items, images, sizes, model.device)
            told = _timed(model, row.variant, asked, speed=journal.done["bandwidth"], **how)
            journal.add(key, told)
            devices.let_go(model)
    rows = [
        {"variant": name} | told
        for name in variants.variant
        for told in _pooled([journal.done[_key(name, number)] for number in range(ROUNDS)])
    ]
    return pd.DataFrame(rows, columns=None if rows else ["variant"])


def _key(variant: str, number: int) -> str:
    return f"{variant}, round {number}"


def _pooled(rounds: Sequence[list[dict]]) -> Iterator[dict]:
    """A variant's rows, each by the samples of all rounds."""
    for told in zip(*rounds, strict=False):  # one may have met less free memory
        samples = {name: sum((one[name] for one in told), []) for name in SAMPLES}
        row = summary(told[0] | samples)
        yield row | {"times_floor": row["decode_ms_per_token"] / row["floor_ms"]}


def _requests(processor, items, images, batches: Sequence[int], device):
    """The inputs of one request each batch; items are asked again where they are too few."""
    text = prompts.prompt(processor, "features")
    for batch in batches:
        pictures = images[[items[i % len(items)].row for i in range(batch)]]
        yield prompts.prepare(processor, [text] * batch, pictures, device)


def _timed(model, name: str, requests, *, speed: float, **how) -> list[dict]:
    """A variant's samples by batch; the largest batches may be missing."""
    device, rows = model.device, []
    stored = usage.tensor_gib(model)  # before a kernel lays codes out anew and keeps steps beside
    card = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    usage.reset_peak(device)
    for inputs in requests:
        try:
            told = sampled(model, inputs, **how) | usage.resident_gib(device)
        except torch.OutOfMemoryError:
            batch = len(inputs["input_ids"])
            say(f"latency of {name}: out of GPU memory with {batch} at once; not measured")
            break
        rows.append({"weights_gib": stored} | told | card | floor(model, told, speed))
        usage.reset_peak(device)
    return rows


def floor(model, told: dict, speed: float) -> dict:
    """What a step of decoding reads, and how long that takes at `speed` bytes a second."""
    tokens = told["prompt_tokens"] + told["new_tokens"] / 2
    read = read_bytes(model, batch=told["batch"], tokens=tokens)
    floor_ms = 1000 * read / speed
    return {
        "read_mib": read / 2**20,
        "bandwidth_gb_s": speed / 1e9,
        "floor_ms": floor_ms,
        "kernel_share": packed.kernel_share(model),
    }


@torch.inference_mode()
def bandwidth(device: str, *, size: int | None = None, repeats: int = 5) -> float:
    """Bytes a second: the best of `repeats` copies (read and written) and sums on the device.

    size: bytes, by default 1 GiB on CUDA, else 256 MiB, more than a cache holds. A CPU uses torch's
    threads.
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
    """Bytes that a decoding step must read: blocks, last norm, head, a cache of `tokens` a row."""
    parts, blocks = anatomy.parts(model), anatomy.blocks(model)
    held = nn.ModuleList([*blocks, parts["decoder"].norm, parts["head"]])
    element = model.get_input_embeddings().weight.element_size()
    attentions = sum("qkv" in anatomy.groups(block) for block in blocks)
    width = anatomy.cache_width(model.config.text_config)
    cache = 2 * element * width * attentions  # keys and values of a token
    return GIB * usage.tensor_gib(held) + cache * batch * tokens


def sampled(model, inputs, *, new_tokens: int = 32, warmup: int = 3, repeats: int = 20) -> dict:
    """Sizes, and the seconds of each repeat (SAMPLES): of the prefill, and of decoding the rest.

    inputs: the processor's tensors on the model's device. Every row gets exactly `new_tokens`, the
    first from the prefill; a step counts once whatever the batch. Raises DermError under 2 tokens
    or without a repeat.
    """
    if new_tokens < 2 or repeats < 1:
        raise DermError("latency: needs at least 2 new tokens and 1 repeat")
    going = greedy_runs(model, inputs, new_tokens=new_tokens)
    runs = [times for _, *times in islice(going, warmup + repeats)]
    batch, prompt_tokens = inputs["input_ids"].shape
    told = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    return told | dict(zip(SAMPLES, map(list, zip(*runs[warmup:], strict=True)), strict=True))


def summary(told: dict) -> dict:
    """What sampled() tells, with milliseconds instead of samples: medians, quartiles as _lo, _hi.

    Of the prefill, of each decoded token, and of all per new token.
    """
    prefill, decode = (1000 * np.array(told[name]) for name in SAMPLES)  # [repeats] each
    samples = {
        "prefill_ms": prefill,
        "decode_ms_per_token": decode / (told["new_tokens"] - 1),
        "total_ms_per_token": (prefill + decode) / told["new_tokens"],
    }
    result = {name: value for name, value in told.items() if name not in SAMPLES}
    result["repeats"] = len(prefill)
    for name, sample in samples.items():
        lo, median, hi = np.quantile(sample, (0.25, 0.5, 0.75)).tolist()
        result |= {name: median, f"{name}_lo": lo, f"{name}_hi": hi}
    return result


@torch.inference_mode()
def greedy_runs(model, inputs, *, new_tokens: int) -> Iterator[tuple[torch.Tensor, float, float]]:
    """The same again and again: (tokens [B, new_tokens], prefill seconds, decode seconds).

    Greedy, deaf to end tokens, of prompts that are equally long. Tokens are written as answers are
    (writing.Step), into one cache, by a step that a GPU records.
    """
    device, (rows, asked) = model.device, inputs["input_ids"].shape
    cache = SlotCache(rows, asked + new_tokens, whole=device.type == "cuda")
    step, gates = Recorded(Step(model, cache), "latency"), torch.ones(rows, 0, device=device)
    while True:
        began = _clock(device)
        tokens = [_read(model, inputs, cache)]
        read = _clock(device)
        for place in range(asked, asked + new_tokens - 1):  # no waiting for the device in between
            places = torch.full((rows, 1), place, device=device)
            tokens.append(step(tokens[-1], places, gates)[0].clone())
        yield torch.cat(tokens, 1), read - began, _clock(device) - read


def _read(model, inputs, cache: SlotCache) -> torch.Tensor:
    """The first new token of every prompt [B, 1], whose keys and values go to the cache."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    layers = enumerate(out.past_key_values.layers)
    held = ((i, (layer.keys, layer.values)) for i, layer in layers if layer.is_initialized)
    cache.fill(slice(None), held)
    return choose(out.logits)[0]


def _clock(device) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
