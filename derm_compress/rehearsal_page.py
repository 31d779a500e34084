"""The page of a rehearsal: what was measured beside its plan, what follows from it, what was skipped. No torch."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace

from derm_compress.files import atomic, read_json, write_json

COLUMNS = ["step", "variant", "quantity", "unit", "measured", "planned", "ratio"]
T4_GIB = 14  # it shows 14.6, of which the CUDA context takes some
SEARCH = "search of a block"
FP32_SEARCH = (
    "AWQ's calibration casts inputs to fp32 and its search rounds the weights at every exponent; its floors count the "
    "products alone."
)
TOPICS = {
    "limits": (
        "What the device can do",
        "Large tensors: a copy counts bytes read and written. The floors of times rest on these.",
    ),
    "weights": ("Weights", "Planned: `memory.plan_weights`."),
    "generate": (
        "Answering",
        "Questions of {prompt_tokens} tokens, each about a picture of {image_tokens}; {new_tokens} new tokens. Peak "
        "beside `memory.plan_peak`, its parts added as if they peaked at once. Prefill beside the FLOPs of all weights "
        "over the fp16 product's rate, decoding beside the bytes of decoder, head and KV cache over the copy's rate: "
        "floors, so a ratio says how far the time is above them.",
    ),
    "training": (
        "Training",
        "Conversations of {text_tokens} tokens, each about a picture of {image_tokens}. LoRA of rank 16 on the "
        "decoder's linears, fp32 adapters, AdamW. Peak beside `memory.plan_training`; step and speed beside the FLOPs "
        "of forward and backward (with checkpointing, of a second forward too), a floor.",
    ),
    "awq": (
        "Activation-aware quantization",
        "Two blocks, so that any device holds their statistics; a block's share of one pass over {conversations} "
        "such conversations, the picture's tower included, and of the search. Beside the FLOPs in fp32, a floor.",
    ),
    "importance": (
        "Verifying drafts",
        "One pass over question and draft answer of {draft_tokens} tokens, beside answering: prefill and decoding.",
    ),
}


def write(folder: Path, where: dict, steps: dict[str, dict]) -> None:
    """README.md, rehearsal.json and rehearsal.csv in the folder, from what the steps left."""
    steps = {step: steps[step] for step in TOPICS if step in steps}
    rows = listed(steps)
    write_json(folder / "rehearsal.json", {"where": where, "steps": steps})
    for name, text in (("rehearsal.csv", as_csv(rows)), ("README.md", page(where, steps, rows))):
        with atomic(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def again(folder: Path) -> None:
    """The page once more from its rehearsal.json."""
    told = read_json(folder / "rehearsal.json")
    write(folder, told["where"], told["steps"])


def listed(steps: dict[str, dict]) -> list[SimpleNamespace]:
    """All rows, tidy, as COLUMNS; ratio = measured / planned, None where one of them is unknown."""
    rows = [SimpleNamespace(**row) for told in steps.values() for row in told["rows"]]
    for row in rows:
        known = row.measured is not None and row.planned
        row.ratio = row.measured / row.planned if known else None
    return rows


def as_csv(rows: list[SimpleNamespace]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        values = (getattr(row, name) for name in COLUMNS)
        writer.writerow(float(value) if isinstance(value, int) else value for value in values)
    return text.getvalue()


def page(where: dict, steps: dict[str, dict], rows: list[SimpleNamespace]) -> str:
    """The page in Markdown."""
    parts = [
        f"# Rehearsal of {'LLaVA-1.5-7B' if where['shapes'] == '7b' else 'a small LLaVA'} on {where['device']}"
    ]
    parts += [
        "**What do the 7B shapes cost on a real GPU, and do the plans of `derm_compress.memory` hold?**"
    ]
    known = [row for row in rows if row.measured is not None]
    parts += ["## Findings", bullets(findings(known))]
    for step, told in steps.items():
        title, about = TOPICS[step]
        parts += [f"## {title}", f"{about.format(**where)} ({told['seconds']:.0f} s.)"]
        parts += [table([row for row in rows if row.step == step])]
    parts += ["## Where plans and measurements part", bullets(gaps(known))]
    parts += ["## Skipped", bullets(skipped(steps)), "## Limits", bullets(limits(where))]
    parts += ["## Provenance", provenance(where, steps)]
    return "\n\n".join(parts) + "\n"


def table(rows: list[SimpleNamespace]) -> str:
    """A line a variant; a cell is "measured of planned (ratio)" where there is a plan."""
    heads = dict.fromkeys(f"{row.quantity}, {row.unit}".strip(", ") for row in rows)
    lines = [f"| variant | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for variant in dict.fromkeys(row.variant for row in rows):
        cells = " | ".join(cell(row) for row in rows if row.variant == variant)
        lines.append(f"| {variant} | {cells} |")
    return "\n".join(lines)


def cell(row) -> str:
    if row.planned is None:
        return number(row.measured)
    ratio = "" if row.ratio is None else f" ({row.ratio:.2f})"
    return f"{number(row.measured)} of {number(row.planned)}{ratio}"


def number(value: float | None) -> str:
    """About three digits; whole above a thousand, a dash where it is unknown."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def bullets(sentences: list[str]) -> str:
    """A list of the sentences that have something to say."""
    return "\n".join(f"- {sentence}" for sentence in sentences if sentence) or "Nothing."


def findings(rows: list[SimpleNamespace]) -> list[str]:
    """What the measured rows say; what was not measured is not spoken of."""
    forms = [quantized(rows, form) for form in ("NF4", "packed W4")]
    return [
        weights(rows),
        peaks(rows),
        fitting(rows),
        decoding(rows),
        *forms,
        training(rows),
        awq(rows),
        drafts(rows),
    ]


def gaps(rows: list[SimpleNamespace]) -> list[str]:
    """Why a ratio is not 1: times above their floors, peaks beside their plans."""
    return [
        launching(rows),
        unpacking(rows),
        workspace(rows),
        FP32_SEARCH * bool(len(pick(rows, "awq", SEARCH))),
    ]


def pick(
    rows: list[SimpleNamespace], step: str, quantity: str, *words: str
) -> dict[str, SimpleNamespace]:
    """Rows of one quantity whose variant has all the words, by variant: unpruned before pruned."""
    found = {row.variant: row for row in rows if (row.step, row.quantity) == (step, quantity)}
    return {
        variant: row for variant, row in found.items() if set(words) <= set(variant.split(", "))
    }


def measured(rows: list[SimpleNamespace], *what: str) -> list[float]:
    """As pick, the numbers alone."""
    return [row.measured for row in pick(rows, *what).values()]


def weights(rows: list[SimpleNamespace]) -> str:
    off = [abs(row.ratio - 1) for row in pick(rows, "weights", "weights").values()]
    return (
        f"The fp16 weights take what is planned, within {max(*off, 1e-4):.2%} at {len(off)} depths."
        if off
        else ""
    )


def peaks(rows: list[SimpleNamespace]) -> str:
    spans = []
    for step, what in (("generate", "answering"), ("training", "training")):
        ratio = [row.ratio for row in pick(rows, step, "peak").values()]
        spans += (
            [f"{min(ratio):.2f} to {max(ratio):.2f} times its plan when {what}"] if ratio else []
        )
    return f"Peak memory is {' and '.join(spans)}." if spans else ""


def fitting(rows: list[SimpleNamespace]) -> str:
    """Which peaks a T4 has no room for."""
    peak = pick(rows, "generate", "peak")
    peak |= {f"training {variant}": row for variant, row in pick(rows, "training", "peak").items()}
    large = "; ".join(variant for variant, row in peak.items() if row.measured > T4_GIB)
    return f"A T4, with room for {T4_GIB} GiB, would hold all but: {large}." if large else ""


def decoding(rows: list[SimpleNamespace]) -> str:
    one, eight = (
        list(pick(rows, "generate", "decode", "fp16", f"batch {n}").values()) for n in (1, 8)
    )
    if len(one) < 2 or len(eight) < 2:
        return ""
    whole, pruned = one[0].measured, one[-1].measured
    saved = f"with six blocks fewer {pruned:.1f} ms ({abs(1 - pruned / whole):.0%} {'less' if pruned < whole else 'more'})"
    return (
        f"A step of decoding in fp16 takes {whole:.1f} ms at batch 1, {one[0].ratio:.1f} times its floor, and "
        f"{eight[0].measured:.1f} ms at batch 8; {saved}."
    )


def quantized(rows: list[SimpleNamespace], form: str) -> str:
    pairs = [
        [measured(rows, "generate", q, f, "batch 1") for f in ("fp16", form)]
        for q in ("peak", "decode")
    ]
    if not all(found for pair in pairs for found in pair):
        return ""
    (wide, narrow), (fast, slow) = [[found[0] for found in pair] for pair in pairs]
    name, taken = form[0].upper() + form[1:], f"a token taking {slow / fast:.1f} times as long"
    return f"{name} answers in {narrow:.1f} GiB instead of {wide:.1f}, {taken}."


def training(rows: list[SimpleNamespace]) -> str:
    peak, step = (pick(rows, "training", quantity, "batch 4") for quantity in ("peak", "step"))
    plain = next((v for v in peak if f"{v}, checkpointing" in peak), None)
    if plain is None:
        return ""
    again = f"{plain}, checkpointing"
    return (
        f"Training ({plain}) peaks at {peak[plain].measured:.1f} GiB; checkpointing takes it to "
        f"{peak[again].measured:.1f} GiB for {step[again].measured / step[plain].measured - 1:.0%} more time a step."
    )


def awq(rows: list[SimpleNamespace]) -> str:
    each = [
        measured(rows, "awq", f"{what} of a block")
        for what in ("calibration", "search", "statistics")
    ]
    whole = [*pick(rows, "weights", "weights")]
    if not (whole and each[0]):
        return ""
    blocks = int(whole[0].split()[1])
    calibration, search = (number(blocks * found[0]) for found in each[:2])
    held = (
        f"; held together, their statistics take {blocks * each[2][0]:.1f} GiB" if each[2] else ""
    )
    return f"At that pace AWQ calibrates {blocks} blocks in {calibration} s and searches them in {search} s{held}."


def drafts(rows: list[SimpleNamespace]) -> str:
    found = measured(rows, "importance", "answering over verifying")
    return (
        f"Verifying a draft answer is {found[0]:.1f} times as fast as answering anew."
        if found
        else ""
    )


def launching(rows: list[SimpleNamespace]) -> str:
    """How little times grow with the batch."""
    decode = [growth(rows, "generate", "decode", form, 8) for form in ("fp16", "NF4", "packed W4")]
    grown = ", ".join(filter(None, [*decode, growth(rows, "training", "step", "NF4", 4)]))
    if not grown:
        return ""
    return (
        f"Compared with one row, {grown}. What does not grow with the rows goes into launching kernels one by one from "
        "Python, into unpacking weights and fp32 adapters, and none of it is in the floors."
    )


def growth(rows: list[SimpleNamespace], step: str, quantity: str, form: str, many: int) -> str:
    one, more = (measured(rows, step, quantity, form, f"batch {batch}") for batch in (1, many))
    what = f"{many} take {more[0] / one[0]:.2f} times as long" if one and more else ""
    return what and f"{what} ({quantity}, {form})"


def unpacking(rows: list[SimpleNamespace]) -> str:
    """What packed weights add to a pass, whatever it computes."""
    told = []
    for quantity, what in (("decode", "a step of decoding"), ("prefill", "the prefill")):
        fp16, packed = (
            measured(rows, "generate", quantity, form, "batch 1") for form in ("fp16", "packed W4")
        )
        told += [f"{what} by {packed[0] - fp16[0]:+.1f} ms"] if fp16 and packed else []
    return f"Packed W4 changes {' and '.join(told)} at batch 1." if told else ""


def workspace(rows: list[SimpleNamespace]) -> str:
    """Peaks of packed weights more than 5 % beside their plan."""
    both = pick(rows, "generate", "peak", "packed W4")
    off = {variant: row for variant, row in both.items() if abs(row.ratio - 1) > 0.05}
    told = "; ".join(
        f"{variant}: {row.measured - row.planned:+.2f} GiB" for variant, row in off.items()
    )
    why = "A kernel holds bfloat16 steps beside the scales; long prompts are multiplied by decoded weights."
    return f"Peaks beside their plans: {told}. {why}" if told else ""


def skipped(steps: dict[str, dict]) -> list[str]:
    """A line for each reason in each step, with the variants that it cost."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in (case for told in steps.values() for case in told["skipped"]):
        reasons.setdefault((case["step"], case["reason"]), []).append(case["variant"])
    return [
        f"{step} ({'; '.join(variants)}): {reason}" for (step, reason), variants in reasons.items()
    ]


def limits(where: dict) -> list[str]:
    """What the numbers do not say."""
    other = f"The device is {where['device']}, not a T4: memory carries over where attention is fused, times do not."
    return [
        "The weights are random: no answer, loss or scale here means anything, only what it costs.",
        other if "T4" not in where["device"] else "",
        "Peaks are counted once the model stands: making NF4 or packed weights here passes through all of fp16.",
        "Allocated memory is counted; a CUDA context and what the allocator holds in reserve come on top.",
        "Times are medians of one to five runs after one that does not count, in one process on one device.",
    ]


def provenance(where: dict, steps: dict[str, dict]) -> str:
    seconds = sum(told["seconds"] for told in steps.values())
    facts = ", ".join(
        f"{name} {value}" for name, value in sorted(where.items()) if value is not None
    )
    return f"`make rehearsal-gpu`, {seconds:.0f} s in all; {facts}. All rows: `rehearsal.csv`."
