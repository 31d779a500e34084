"""What LLaVA-1.5-7B's shapes cost on an NVIDIA GPU, with random weights: memory beside its plan.

Weights and peaks stand beside the plans of derm_compress.model.memory, decoding beside the time to
read its bytes once. Neither weights nor a network are needed; without a GPU small shapes run on the
CPU. `--out FOLDER` keeps README.md, rehearsal.csv and rehearsal.json. Last line: one JSON object,
with the range of measured / planned of each quantity.
"""

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose awq.py would stand before AutoAWQ's package

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from derm_compress.errors import DermError
from derm_compress.evaluate import latency
from derm_compress.files import atomic, write_json
from derm_compress.method.finetune import train
from derm_compress.method.quantization import calibration, nf4, scaling
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize
from derm_compress.model import anatomy, loading, memory, removal, usage
from derm_compress.model.shapes import Architecture, architecture, llava_7b_config

FORMS = {"fp16": None, "NF4": Form("bitsandbytes", 4, 64), "packed W4": Form("rtn", 4, 64)}
COLUMNS = ["step", "variant", "quantity", "unit", "measured", "planned"]
Rows = Iterator[tuple[str, str, float | None, float | None]]  # from "quantity"; None: unknown


@dataclass(frozen=True)
class Rig:
    """What is measured where: `shapes` 7b or small (12 tiny blocks), and the sizes of requests."""

    shapes: str
    device: str
    prompt_tokens: int = 64  # beside a picture's
    new_tokens: int = 32
    text_tokens: int = 128  # of a conversation
    conversations: int = 8
    draft_tokens: int = 48  # of an answer that is verified
    repeats: int = 3  # of each timing, after one run that does not count

    def config(self):
        """A fresh LlavaConfig: pruning writes into it."""
        if self.shapes == "7b":
            return llava_7b_config()
        config = AutoConfig.from_pretrained(loading.TINY)
        config.text_config.num_hidden_layers = 12
        return config

    @functools.cached_property
    def arch(self) -> Architecture:
        return architecture(self.config())


SMALL = Rig("small", "cpu", 8, 3, 8, 2, 4, 1)


@functools.cache
def nf4_trouble(device: str) -> str:
    """Why bitsandbytes cannot quantize here, in one line; empty where it can."""
    try:
        nf4.NF4Grid(64).rounded(torch.ones(64, 64, dtype=torch.float16, device=device))
    except Exception as error:  # a library that misses its CUDA part may fail in any way
        return f"bitsandbytes does not work here: {type(error).__name__}"
    return ""


def build(rig: Rig, *, removed: int = 0, form: str = "fp16"):
    """The model with random fp16 weights, `removed` blocks gone, the decoder in that form."""
    torch.manual_seed(0)
    with torch.device(rig.device):  # no copy on the host
        model = AutoModelForImageTextToText.from_config(rig.config(), dtype=torch.float16)
    model.eval().requires_grad_(False)
    removal.apply(model, range(rig.arch.kept(removed)))
    return quantize(model, FORMS[form], packed=True) if FORMS[form] else model


def request(rig: Rig, batch: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """Random words about one random picture a row, as the processor would give them."""
    config = rig.config()
    side, image = config.vision_config.image_size, config.image_token_id
    with torch.device(rig.device):
        pictures = torch.full((batch, rig.arch.image_tokens), image)
        ids = torch.cat([pictures, torch.randint(image, (batch, text_tokens))], 1)
        pixels = torch.randn(batch, 3, side, side, dtype=torch.float16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def release(rig: Rig) -> float:
    """Give back what nobody holds and start the peak anew; GiB still allocated on the GPU."""
    gc.collect()
    if rig.device == "cpu":
        return 0.0
    usage.reset_peak(rig.device)
    return torch.cuda.memory_allocated() / memory.GIB


def held_gib(rig: Rig, model, before: float) -> float:
    """GiB that the model has taken of the GPU since `before`; on a CPU its tensors'."""
    return usage.tensor_gib(model) if rig.device == "cpu" else release(rig) - before


def peak_gib(rig: Rig) -> float | None:
    """Peak GiB allocated since release(); unknown on a CPU, whose peak cannot start anew."""
    return None if rig.device == "cpu" else usage.peak_gib(rig.device)


def timed(rig: Rig, work) -> float:
    """Median seconds of work(), after one run that does not count."""
    samples = []
    for _ in range(1 + rig.repeats):
        began = time.perf_counter()
        work()
        if rig.device == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples[1:])


bandwidth = functools.cache(latency.bandwidth)


def limits(rig: Rig) -> Rows:
    """What the device does with large tensors; a copy counts bytes read and written."""
    yield "copy on the device", "GB/s", bandwidth(rig.device) / 1e9, None
    wide = 8192 if rig.device == "cuda" else 256
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        a, b = torch.randn(2, wide, wide, dtype=dtype, device=rig.device)
        seconds = timed(rig, functools.partial(torch.mm, a, b))
        yield f"{name} product", "TFLOP/s", 2e-12 * wide**3 / seconds, None


def weights(rig: Rig, *, removed: int) -> Rows:
    """The fp16 model as it lies in memory, beside `memory.plan_weights`."""
    before, model = release(rig), build(rig, removed=removed)
    plan = memory.plan_weights(rig.arch, blocks_removed=removed)
    yield "parameters", "", model.num_parameters(), rig.arch.parameters(removed)
    yield "weights", "GiB", held_gib(rig, model, before), sum(plan.values())


def generate(rig: Rig, *, form: str, removed: int, batch: int) -> Rows:
    """Answering: peak beside `memory.plan_peak`, decoding beside the time to read its bytes."""
    before, model = release(rig), build(rig, removed=removed, form=form)
    held, inputs = held_gib(rig, model, before), request(rig, batch, rig.prompt_tokens)
    release(rig)
    long = {"new_tokens": rig.new_tokens}
    told = latency.measure_latency(model, inputs, warmup=1, repeats=rig.repeats, **long)
    peak, floor = peak_gib(rig), latency.floor(model, told, bandwidth(rig.device))["floor_ms"]
    what = {"blocks_removed": removed}
    if FORMS[form]:
        what["form"] = FORMS[form].format()
    sizes = {"batch": batch, "prompt_tokens": rig.prompt_tokens} | long
    kernel = any(getattr(module, "steps", None) is not None for module in model.modules())
    plan = memory.plan_peak(rig.arch, int4_kernel=kernel, **sizes, **what)
    yield "weights", "GiB", held, sum(memory.plan_weights(rig.arch, **what).values())
    yield "peak", "GiB", peak, sum(plan.values())
    yield "prefill", "ms", told["prefill_ms"], None
    yield "decode", "ms/token", told["decode_ms_per_token"], floor


def training(rig: Rig, *, removed: int, batch: int, checkpointing: bool) -> Rows:
    """QLoRA, a picture and its conversation a row: peak beside `memory.plan_training`."""
    settings = train.Training(16, 8, learning_rate=1e-4, steps=1, batch_size=1, seed=0)
    model = build(rig, removed=removed)
    tuned = train.attach(model, settings).train()
    if checkpointing:
        anatomy.decoder(model).gradient_checkpointing_enable()
    inputs = request(rig, batch, rig.text_tokens)
    learned = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned)

    def step():
        loss = tuned(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()

    release(rig)
    seconds, peak = timed(rig, step), peak_gib(rig)
    sizes = {"batch": batch, "text_tokens": rig.text_tokens, "checkpointing": checkpointing}
    plan = memory.plan_training(rig.arch, blocks_removed=removed, rank=16, **sizes)
    yield "peak", "GiB", peak, sum(plan.values())
    yield "step", "s", seconds, None
    yield "speed", "tokens/s", inputs["input_ids"].numel() / seconds, None


def awq(rig: Rig, *, blocks: int) -> Rows:
    """Activation-aware quantization: a block's share of the statistics and the search."""
    model = build(rig, removed=rig.arch.blocks - blocks)
    batches = [request(rig, 1, rig.text_tokens) for _ in range(rig.conversations)]
    form = Form("awq", 4, 64)

    def search():
        for i, found in kept.items():
            scaling.search_block(model, i, found, form)

    before = release(rig)
    kept = dict(calibration.collect(model, batches))
    held = (release(rig) - before) / blocks if before else None
    calibrating = timed(rig, lambda: dict(calibration.collect(model, batches)))
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    widths = [rig.arch.linears[told.linears[0]][1] for told in anatomy.SEPARATE.values()]
    values = sum(width * min(width, tokens) for width in widths)  # H = X^T X, or X if smaller
    yield "statistics of a block", "GiB", held, memory.FP32 * values / memory.GIB
    yield "calibration of a block", "s", calibrating / blocks, None
    yield "search of a block", "s", timed(rig, search) / blocks, None


def importance(rig: Rig, *, batch: int) -> Rows:
    """Verifying a draft answer in one pass, beside answering anew."""
    model, asked, draft = build(rig), rig.prompt_tokens, rig.draft_tokens
    prompt, drafted = request(rig, batch, asked), request(rig, batch, asked + draft)

    @torch.inference_mode()
    def verify():
        model(**drafted, use_cache=False, logits_to_keep=draft + 1)

    verifying = timed(rig, verify)
    answering = timed(rig, lambda: latency.greedy_tokens(model, prompt, new_tokens=draft))
    yield "verifying a draft", "s", verifying, None
    yield "answering", "s", answering, None
    yield "answering over verifying", "", answering / verifying, None


STEPS = {step.__name__: step for step in (limits, weights, generate, training, awq, importance)}


def cases(rig: Rig) -> Iterator[tuple[str, str, dict]]:
    """(step, variant, its settings), in the order of the page."""
    whole = rig.arch.blocks
    yield "limits", "large tensors", {}
    for removed in (0, 6, 7, 8, 9, 10):
        yield "weights", f"fp16, {whole - removed} blocks", {"removed": removed}
    forms = (("fp16", 0), ("fp16", 6), ("NF4", 0), ("packed W4", 0), ("packed W4", 6))
    for (form, removed), batch in product(forms, (1, 8)):
        name = f"{form}, {whole - removed} blocks, batch {batch}"
        yield "generate", name, {"form": form, "removed": removed, "batch": batch}
    for removed, checkpointing, batch in product((0, 6), (False, True), (1, 4)):
        how = {"removed": removed, "batch": batch, "checkpointing": checkpointing}
        name = f"NF4, {whole - removed} blocks, batch {batch}"
        yield "training", f"{name}, checkpointing" if checkpointing else name, how
    yield "awq", "fp16, 2 blocks", {"blocks": 2}
    yield "importance", f"fp16, {whole} blocks, batch 8", {"batch": 8}


def measure(rig: Rig, chosen) -> tuple[pd.DataFrame, list[dict]]:
    """Of the chosen cases the rows, tidy, and what was skipped with the reason."""
    rows, skipped = [], []
    for step, variant, settings in chosen:
        print(f"{step}: {variant}", flush=True)
        try:
            if "NF4" in variant and (trouble := nf4_trouble(rig.device)):
                raise DermError(trouble)
            rows += [(step, variant, *row) for row in STEPS[step](rig, **settings)]
        except (torch.OutOfMemoryError, DermError) as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            skipped.append({"step": step, "variant": variant, "reason": reason})
        release(rig)
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"measured": float, "planned": float})
    return frame.assign(ratio=frame.measured / frame.planned), skipped


ABOUT = """# Rehearsal of the {shapes} shapes on {device}

What do they cost here, and do the plans of `derm_compress.model.memory` hold? The weights are
random: no answer and no loss means anything, only what it costs. A cell is "measured of planned
(ratio)"; times are medians of {repeats} runs after one that does not count. Memory carries over to
another device where attention is fused, times do not. It is what tensors hold once the model
stands: a CUDA context and the allocator's reserve come on top."""


def number(value: float) -> str:
    """Three digits, or whole from a thousand on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(rows: pd.DataFrame) -> str:
    """Markdown with a line a variant."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows.itertuples():
        cell = number(row.measured)
        if not pd.isna(row.planned):
            cell += f" of {number(row.planned)} ({number(row.ratio)})"
        head = f"{row.quantity}, {row.unit}".strip(", ")
        lines.setdefault(row.variant, {})[head] = cell
    heads = next(iter(lines.values()))
    text = [f"| variant | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    text += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in lines.items()]
    return "\n".join(text)


def write(out: Path, where: dict, rows: pd.DataFrame, skipped: list[dict]) -> None:
    """README.md, rehearsal.csv and rehearsal.json."""
    parts = [ABOUT.format(**where)]
    for step, part in rows.groupby("step", sort=False):
        parts += [f"## {step}", STEPS[step].__doc__, table(part)]
    if skipped:
        parts += [
            "## Skipped",
            *("{step} ({variant}): {reason}".format(**case) for case in skipped),
        ]
    facts = ", ".join(f"{name} {value}" for name, value in where.items())
    parts += ["## Provenance", f"`make rehearsal-gpu`; {facts}. All rows: `rehearsal.csv`."]
    texts = {"README.md": "\n\n".join(parts) + "\n", "rehearsal.csv": rows.to_csv(index=False)}
    for name, text in texts.items():
        with atomic(out / name) as file:
            file.write_text(text, encoding="utf-8")
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    write_json(out / "rehearsal.json", {"where": where, "rows": records, "skipped": skipped})


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--out", type=Path)
    out, device = asked.parse_args().out, "cuda" if torch.cuda.is_available() else "cpu"
    if out and device == "cpu":
        asked.error("--out needs an NVIDIA GPU: torch sees no CUDA device")
    rig = Rig("7b", device) if device == "cuda" else SMALL
    rows, skipped = measure(rig, cases(rig))
    libraries = ("torch", "transformers", "peft", "accelerate")
    where = asdict(rig) | {name: version(name) for name in libraries}
    if device == "cuda":
        where["device"] = torch.cuda.get_device_name()
    if out:
        write(out, where, rows, skipped)
    planned = rows.dropna(subset="ratio").groupby(rows.step + " " + rows.quantity).ratio
    ranges = {name: [ratios.min(), ratios.max()] for name, ratios in planned}
    print(json.dumps({**where, "skipped": len(skipped), "measured_over_planned": ranges}))


if __name__ == "__main__":
    main()
