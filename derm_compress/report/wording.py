"""Words for what is computed: scores with intervals, verdicts, names. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import pandas as pd

from derm_compress.method.importance.criteria import CRITERIA, PUBLISHED
from derm_compress.method.importance.rankings import OPTIONS
from derm_compress.method.quantization.methods import METHODS
from derm_compress.model.variants import DISTILLED, MENDED
from derm_compress.report import rule

ORDERS = {one.name: one for one in (*CRITERIA.values(), PUBLISHED)}
NAMES = {name: method.words for name, method in METHODS.items()}
NAMES |= {name: one.title for name, one in ORDERS.items() if one.title}
NAMES |= {"random-0": "a random order"}
SHOWN = {  # what is no variant: the base, and what the original was shown
    "base": "before fine-tuning",
    "blank": "unpruned, shown no picture",
    "shuffled": "unpruned, shown another disease's picture",
}
ANEW = {"shuffled": "blocks in random order", "reinitialized": "blocks of random weights"}
MADE = ANEW | {MENDED: "ReplaceMe, untrained", DISTILLED: "SFT with distillation"}
NAMES |= MADE  # what stands for a criterion; ANEW can only learn anew
EXCHANGED = {  # the paper's names of what Table 5 exchanges
    "Bitsandbytes quantization": "bitsandbytes instead of AWQ",
    "Pruning Based on Magnitude Baseline": "blocks chosen by magnitude",
    "Round to neighbour Quantization": "rounding instead of AWQ",
    "Round to neighbour, symmetric grid (Eq. 1)": "symmetric rounding (Eq. 1) instead of AWQ",
}
CUT = {  # parameters that make a run smaller
    "n_heldout": "held-out pictures",
    "importance_items": "pictures a ranking",
    "importance_draws": "draws",
    "finetune_steps": "steps of fine-tuning",
    "sft_steps": "steps of SFT",
    "sft_seeds": "seeds of SFT",
}
FILTERS = ("f", "g", "p", "percent", "points", "spread", "words", "model", "quantizer", "listed")
FILTERS += ("criteria_explained", "exchanged", "named")


def f(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def g(value: float) -> str:
    return f"{value:g}"


def ends(row, name: str) -> tuple[float, float, float]:
    """A value and its interval, from a table's row or from one of metrics' tuples."""
    if hasattr(row, "_asdict"):
        return getattr(row, name), row.lo, row.hi
    return row[name], row[f"{name}_lo"], row[f"{name}_hi"]


def percent(row, name: str = "score") -> str:
    """62.5 % (58.1 to 66.9)."""
    value, lo, hi = ends(row, name)
    return f"{value:.1f} % ({lo:.1f} to {hi:.1f})"


def points(row, name: str = "difference") -> str:
    """+3.1 points (1.2 to 5.0)."""
    value, lo, hi = ends(row, name)
    return f"{value:+.1f} points ({lo:.1f} to {hi:.1f})"


def spread(row, name: str) -> str:
    """0.71 (0.55 to 0.80)."""
    value, lo, hi = ends(row, name)
    return f"{value:.2f}" if pd.isna(lo) else f"{value:.2f} ({lo:.2f} to {hi:.2f})"


def verdict(row, first: str, second: str, name: str = "difference") -> str:
    """How one score lies to another: above or below, alike within the margin, or open."""
    value, lo, hi = ends(row, name)
    if lo > 0 or hi < 0:
        low, high = sorted((abs(lo), abs(hi)))
        side = "above" if lo > 0 else "below"
        said = f"{first} scores {abs(value):.1f} points ({low:.1f} to {high:.1f}) {side} {second}"
        return said + (f", less than the {rule.POINTS} that matter" if high < rule.POINTS else "")
    interval = f"{value:+.1f} points, {lo:.1f} to {hi:.1f}"
    if rule.alike(lo, hi):
        return f"{first} scores like {second} ({interval})"
    return f"{first} may score above or below {second} ({interval})"


def p(value: float) -> str:
    """p = 0.03, or p < 0.001."""
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def model(row) -> str:
    """A row's model for people, quantized or not: the model without 6 blocks after SFT."""
    removed = row["blocks_removed"]
    name = f"the model without {removed} blocks" if removed else "the unpruned model"
    return f"{name} after SFT" if row["healed"] else name


def label(row, own: str) -> str:
    """A variant in a figure: 16 blocks removed, healed, AWQ, 4 bits; `own`: the study's ranking."""
    parts = {"block": row.blocks_removed, "attention": row.attentions_removed}
    parts["MLP"] = row.mlps_removed
    gone = [f"{n} {part}{'s' if n > 1 else ''}" for part, n in parts.items() if n]
    said = [f"{listed(gone)} removed" if gone else "unpruned"]
    if row.criterion in MADE:
        said.append(MADE[row.criterion])
    elif row.criterion not in ("", own):
        said[0] += f" by {words(row.criterion)}"
    if row.healed:
        said.append(f"healed (seed {row.sft_seed})" if row.sft_seed else "healed")
    if row.quantizer:
        said += [quantizer(row.quantizer), f"{row.bits:.2g} bits"]
    return ", ".join(said)


def size(gib: float) -> str:
    """13.2 GiB; 4.9 MiB below one."""
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB"


def words(name: str) -> str:
    """A method's or a ranking's name for people: output similarity (text only)."""
    base, *ways = name.split("-")
    if ways and set(ways) <= set(OPTIONS):
        return f"{words(base)} ({', '.join(OPTIONS[way].title for way in ways)})"
    if base == "random" and ways[:1] not in ([], ["0"]):
        return f"random order {int(ways[0]) + 1}"
    return NAMES.get(name, name.replace("_", " "))


def quantizer(name: str) -> str:
    """AWQ (clip) of awq-clip."""
    method, *options = name.split("-")
    return words(method) + (f" ({', '.join(options)})" if options else "")


def exchanged(setting: str) -> str:
    """What a row of the paper's Table 5 exchanges, as people say it."""
    return EXCHANGED.get(setting, setting)


def named(text: str, names: Mapping[str, str]) -> str:
    """A text with what variants are called in place of their ids."""
    return re.sub(r"[^\s,]+", lambda word: names.get(word.group(), word.group()), text)


def criteria_explained(names: Iterable[str]) -> str:
    """By what the blocks of these rankings go, and what their endings say."""
    names = list(names)
    bases = {name.split("-")[0] for name in names}
    options = {way for name in names for way in name.split("-")[1:]}
    said = [f"{words(name)}, {one.explained}" for name, one in ORDERS.items() if name in bases]
    said += [f"{one.title}, {one.explained}" for way, one in OPTIONS.items() if way in options]
    return "; ".join(said)


def looks_at_blocks(name: str) -> bool:
    """Whether a ranking weighs blocks; random ones and orders by place do not."""
    known = ORDERS.get(name.split("-")[0].split(" ")[0])
    return known is None or known.weighs


def is_another_criterion(name: str, own: str) -> bool:
    """Whether a ranking weighs blocks, and by another criterion than one's own."""
    return looks_at_blocks(name) and name.split("-")[0] != own.split("-")[0]


def listed(items: Iterable) -> str:
    """a, b and c."""
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last


def made_on(environment: Mapping | None, info: Mapping) -> str:
    """The machine, the stages' time together, and what the command line set over the run file, by
    run_info.json; empty before a run's end."""
    if not environment or "params_file" not in info:
        return ""
    gpu, seconds, told = environment.get("gpu"), info.get("seconds"), info.get("overrides", {})
    machine = f"one {gpu}" if gpu else f"{environment.get('cores')} CPU cores, without a GPU"
    parts = info.get("seconds_are", "").startswith("sum")  # a stage that was cut off tells its end
    took = "Its stages, from where each last went on, took" if parts else "This run took"
    said = f"{took} {spoken(seconds)} on {machine}" if seconds else f"It ran on {machine}"
    fewer = [counted(told[name], words) for name, words in CUT.items() if name in told]
    if fewer:
        said += f". It was cut down from {info['params_file']}: {', '.join(fewer)}"
    return said + "."


def counted(number: str, words: str) -> str:
    """39 held-out pictures, or 1 seed of SFT."""
    return f"{number} {words if number != '1' else words.replace('s ', ' ', 1)}"


def spoken(seconds: float) -> str:
    """8 minutes, or 3.5 hours."""
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
