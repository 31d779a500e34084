"""Rehearsal on a GPU: the 7B shapes with random fp16 weights, every cost measured beside its plan.

Needs torch, transformers, peft and accelerate, no weights and no network; bitsandbytes where it works.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from derm_compress import rehearsal_page
from derm_compress import rehearsal_rig as rigs
from derm_compress.errors import DermError
from derm_compress.evaluate import latency
from derm_compress.files import read_json, write_json
from derm_compress.method.finetune import train
from derm_compress.method.quantization import calibration, folding, scaling
from derm_compress.method.quantization.grids import IntegerGrid
from derm_compress.model import anatomy, memory
from derm_compress.rehearsal_rig import FORMS, Rig

RANK, ALPHA = 16, 8


def row(quantity: str, unit: str, measured: float | None, planned: float | None = None) -> dict:
    """One number beside its plan; None where unknown."""
    return {"quantity": quantity, "unit": unit, "measured": measured, "planned": planned}


def limits(rig: Rig) -> list[dict]:
    """What the floors of all times rest on."""
    found = rigs.limits(rig)
    rows = [row("copy on the device", "GB/s", found["copy"] / 1e9)]
    return rows + [
        row(f"{kind} product", "TFLOP/s", found[kind] / 1e12) for kind in ("fp16", "fp32")
    ]


def weights(rig: Rig, *, removed: int) -> list[dict]:
    """The fp16 model as it lies in memory."""
    before = rigs.release(rig)
    model = rigs.build(rig, removed=removed)
    count, plan = (
        sum(p.numel() for p in model.parameters()),
        memory.plan_weights(rig.arch, blocks_removed=removed),
    )
    return [
        row("parameters", "", count, rig.arch.parameters(removed)),
        row("weights", "GiB", rigs.weights_gib(rig, model, before), sum(plan.values())),
    ]


def generate(rig: Rig, *, form: str, removed: int, batch: int) -> list[dict]:
    """Weights, peak, prefill and decoding; DermError where fp16 overflows."""
    before, what = rigs.release(rig), {"blocks_removed": removed} | FORMS[form]
    model = rigs.build(rig, removed=removed, form=form)
    held, inputs = rigs.weights_gib(rig, model, before), rigs.request(rig, batch, rig.prompt_tokens)
    with torch.inference_mode():
        if not model(**inputs, logits_to_keep=1).logits.isfinite().all():
            raise DermError("the logits are not finite")
    rigs.release(rig)
    _, prefill, decode = latency.greedy_tokens(model, inputs, new_tokens=rig.new_tokens)
    repeats = max(1, min(5, int(rig.seconds / (prefill + decode))))
    told = latency.measure_latency(
        model, inputs, new_tokens=rig.new_tokens, warmup=0, repeats=repeats
    )
    sizes = {"batch": batch, "prompt_tokens": rig.prompt_tokens, "new_tokens": rig.new_tokens}
    kernel = any(getattr(module, "steps", None) is not None for module in model.modules())
    plan, floor = (
        memory.plan_peak(rig.arch, int4_kernel=kernel, **sizes, **what),
        rigs.forward_floor,
    )
    return [
        row("weights", "GiB", held, sum(memory.plan_weights(rig.arch, **what).values())),
        row("peak", "GiB", rigs.peak_gib(rig), sum(plan.values())),
        row(
            "prefill",
            "ms",
            told["prefill_ms"],
            1e3 * floor(rig, batch, rig.prompt_tokens, removed=removed),
        ),
        row("decode", "ms/token", told["decode_ms_per_token"], 1e3 * rigs.decode_floor(rig, plan)),
    ]


def training(rig: Rig, *, form: str, removed: int, batch: int, checkpointing: bool) -> list[dict]:
    """Steps as finetune.train takes them, of a picture and its conversation a row."""
    tuned = adapted(rig, form, removed, checkpointing)
    inputs = rigs.request(rig, batch, rig.text_tokens)
    step = stepper(tuned.train(), inputs | {"labels": inputs["input_ids"]})
    rigs.release(rig)
    seconds, tokens = rigs.timed(rig, step), inputs["input_ids"].numel()
    work = {"removed": removed, "passes": 2 + checkpointing, "logits": tokens // batch}
    floor = rigs.forward_floor(rig, batch, rig.text_tokens, **work)
    sizes = {
        "rank": RANK,
        "batch": batch,
        "text_tokens": rig.text_tokens,
        "checkpointing": checkpointing,
    }
    base = "bitsandbytes" if form == "NF4" else "fp16"
    plan = memory.plan_training(rig.arch, blocks_removed=removed, method=base, **sizes)
    return [
        row("peak", "GiB", rigs.peak_gib(rig), sum(plan.values())),
        row("step", "s", seconds, floor),
        row("speed", "tokens/s", tokens / seconds, tokens / floor),
    ]


def adapted(rig: Rig, form: str, removed: int, checkpointing: bool):
    """A model with finetune's adapters, on NF4 or, where there is none, on fp16."""
    rigs.need(rig, form)
    model = rigs.build(rig, removed=removed)
    if form == "NF4":
        settings = {"learning_rate": 1e-4, "steps": 1, "batch_size": 1, "seed": 0}
        tuned = train.attach(model, train.Training(RANK, ALPHA, **settings))
    else:
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=train.TARGETS, lora_dropout=0.0
        )
        tuned = get_peft_model(model, config)
    if checkpointing:
        anatomy.decoder(model).gradient_checkpointing_enable()
    return tuned


def stepper(tuned, batch: dict):
    """A training step on the batch as a function without arguments: forward, backward, clipping, AdamW."""
    learned = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)

    def step():
        loss = tuned(**batch, use_cache=False).loss
        if not loss.isfinite():
            raise DermError("the loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()

    return step


def activation_aware(rig: Rig, *, blocks: int) -> list[dict]:
    """Input statistics and search of activation-aware quantization, a block's share; the conversations one by one."""
    model = rigs.build(rig, removed=rig.arch.blocks - blocks)
    batches = [rigs.request(rig, 1, rig.text_tokens) for _ in range(rig.conversations)]
    before = rigs.release(rig)
    statistics = dict(calibration.collect(model, batches))
    held = (rigs.release(rig) - before) / blocks if rig.cuda else None
    calibrate = rigs.timed(rig, lambda: dict(calibration.collect(model, batches))) / blocks
    grids = dict.fromkeys(rig.arch.linears, IntegerGrid(4, 64))
    search = rigs.timed(
        rig,
        lambda: [scaling.search_block(model, i, statistics[i], grids) for i in statistics],
        most=1,
    )
    search /= blocks
    kept, calibrate_floor, search_floor = awq_floors(rig, blocks)
    return [
        row("statistics of a block", "GiB", held, kept),
        row("calibration of a block", "s", calibrate, calibrate_floor),
        row("search of a block", "s", search, search_floor),
    ]


def awq_floors(rig: Rig, blocks: int) -> tuple[float, float, float]:
    """For a block: GiB of each group's H = X^T X [in, in] or X [tokens, in], seconds to sum it, and of dW H or dW X^T.

    The search looks at every alpha for a sample of a weight's rows, and for all rows at the best ones and at plain
    rounding.
    """
    tokens, fp32 = (
        rig.conversations * (rig.arch.image_tokens + rig.text_tokens),
        rigs.limits(rig)["fp32"],
    )
    values = sums = products = 0
    for _, names in folding.GROUPS.values():
        into, out = rig.arch.linears[names[0]][1], sum(rig.arch.linears[name][0] for name in names)
        factor, sample = min(into, tokens), min(out, scaling.SAMPLE)
        values += into * factor
        sums += 2 * tokens * into**2 * (into <= tokens)
        products += (
            2 * into * factor * (len(scaling.ALPHAS) * sample + (scaling.FINALISTS + 1) * out)
        )
    forward = rigs.forward_floor(
        rig, rig.conversations, rig.text_tokens, removed=rig.arch.blocks - blocks
    )
    return memory.FP32 * values / memory.GIB, forward / blocks + sums / fp32, products / fp32


def importance(rig: Rig, *, batch: int) -> list[dict]:
    """What it saves to verify a draft answer in one pass instead of answering anew."""
    model, draft = rigs.build(rig), rig.draft_tokens
    prompt, drafted = (rigs.request(rig, batch, rig.prompt_tokens + more) for more in (0, draft))
    with torch.inference_mode():
        verify = rigs.timed(
            rig, lambda: model(**drafted, use_cache=False, logits_to_keep=draft + 1)
        )
    answer = rigs.timed(rig, lambda: latency.greedy_tokens(model, prompt, new_tokens=draft), most=2)
    plan = memory.plan_peak(
        rig.arch, batch=batch, prompt_tokens=rig.prompt_tokens, new_tokens=draft
    )
    verify_floor = rigs.forward_floor(rig, batch, rig.prompt_tokens + draft, logits=draft + 1)
    answer_floor = rigs.forward_floor(rig, batch, rig.prompt_tokens) + (
        draft - 1
    ) * rigs.decode_floor(rig, plan)
    return [
        row("verifying a draft", "s", verify, verify_floor),
        row("answering", "s", answer, answer_floor),
        row("answering over verifying", "", answer / verify, answer_floor / verify_floor),
    ]


def cases(rig: Rig) -> dict:
    """{step: (what measures it, {variant: its settings})}, in the order of the page."""

    def named(form="fp16", removed=0, batch=0, checkpointing=False) -> str:
        kind = f"{form}, {rig.arch.kept(removed)} blocks"
        return kind + (f", batch {batch}" if batch else "") + ", checkpointing" * checkpointing

    def listed(asked) -> dict:
        return {named(**case): case for case in asked}

    generated = product(
        (("fp16", 0), ("fp16", 6), ("NF4", 0), ("packed W4", 0), ("packed W4", 6)), (1, 8)
    )
    bases = ("NF4", "fp16") if rigs.nf4_trouble(rig.device) else ("NF4",)
    trained = product(bases, (0, 6), (False, True), (1, 4))
    return {
        "limits": (limits, {"large tensors": {}}),
        "weights": (weights, listed({"removed": removed} for removed in (0, 6, 7, 8, 9, 10))),
        "generate": (
            generate,
            listed({"form": f, "removed": r, "batch": b} for (f, r), b in generated),
        ),
        "training": (
            training,
            listed(
                {"form": f, "removed": r, "batch": b, "checkpointing": c} for f, r, c, b in trained
            ),
        ),
        "awq": (activation_aware, {"fp16, 2 blocks": {"blocks": 2}}),
        "importance": (importance, listed([{"batch": 8}])),
    }


STEPS = ("limits", "weights", "generate", "training", "awq", "importance")


def finished(path: Path, where: dict) -> dict | None:
    """What a step left in `path`, if it was made at this place."""
    told = read_json(path) if path.exists() else None
    return told if told and told["where"] == where else None


def run_step(rig: Rig, step: str, path: Path) -> None:
    """Leave in `path` a step's rows and what it skipped, unless they are there."""
    where = rigs.place(rig)
    if finished(path, where):
        return
    measure, variants = cases(rig)[step]
    rows, skipped, began = [], [], time.perf_counter()
    for variant, settings in variants.items():
        print(f"{step}: {variant}", flush=True)
        key = {"step": step, "variant": variant}
        try:
            rows += [key | found for found in measure(rig, **settings)]
        except (torch.OutOfMemoryError, DermError) as error:
            skipped.append(key | {"reason": str(error).splitlines()[0].split(". ")[0]})
        rigs.release(rig)
    seconds = round(time.perf_counter() - began, 1)
    write_json(path, {"where": where, "rows": rows, "skipped": skipped, "seconds": seconds})


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 no GPU."""
    asked = argparse.ArgumentParser(prog="python -m derm_compress.rehearsal", description=__doc__)
    asked.add_argument("out", nargs="?", type=Path, default=Path("reports/gpu-rehearsal"))
    asked.add_argument("--shapes", choices=("7b", "small"), default="7b")
    asked.add_argument(
        "--only", choices=STEPS, help="this step alone; the page holds what was finished before too"
    )
    asked.add_argument(
        "--page", action="store_true", help="measure nothing, render OUT's rehearsal.json again"
    )
    a = asked.parse_args(argv)
    if a.page:
        rehearsal_page.again(a.out)
        return 0
    try:
        rig = rigs.find(a.shapes)
    except DermError as error:
        print(error, file=sys.stderr)
        return 2
    paths = {step: a.out / "steps" / f"{step}.json" for step in STEPS}
    for step in [a.only] if a.only else STEPS:
        run_step(rig, step, paths[step])
    told = {
        step: found for step, path in paths.items() if (found := finished(path, rigs.place(rig)))
    }
    rehearsal_page.write(a.out, rigs.place(rig), told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
