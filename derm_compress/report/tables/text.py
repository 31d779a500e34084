"""Tables as text: fixed digits for csv, words and short numbers for people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import yaml

COUNTS = (  # whole numbers beside empty cells
    *("n", "bits", "blocks_removed", "blocks_removed_7b", "attentions_removed", "mlps_removed"),
    *("items", "depths", "ahead", "fall_from", "fall_to", "level_until", "budget", "table"),
    *("batch", "images", "images_needed", "seeds", "none", "several", "runaway"),
    *("prompt_tokens", "new_tokens"),
)
HEADINGS = yaml.safe_load(Path(__file__).with_name("headings.yaml").read_text("utf-8"))
DIGITS = {
    "params_b": 9,
    "nearest_params_b": 9,
    "params_b_7b": 6,
    "fraction_removed": 6,
    "seconds": 1,
}
POINTS = ("score", "gain", "diff", "fall", "nearest_s", "cost", "as_exp")  # to a tenth, for people
SHARES = ("rho", "over", "chance")  # to a hundredth


def digits(column: str) -> str:
    """How csv prints a column's numbers: fixed, so that equal results give equal bytes."""
    words = set(column.split("_"))
    if column.startswith("paper"):
        return "%g"
    if column in DIGITS:
        return f"%.{DIGITS[column]}f"
    if "gib" in column:
        return "%.6f"
    if "ms" in words:
        return "%.3f"
    if {"p", "rho", "overlap", "chance", "error"} & words:
        return "%.4f"
    return "%.2f"


def to_csv(frame: pd.DataFrame) -> str:
    """CSV with fixed digits; what is unknown stays empty."""
    shown = frame.copy()
    for name in frame.select_dtypes("float"):
        shown[name] = [None if pd.isna(x) else digits(name) % x for x in frame[name]]
    return shown.to_csv(index=False, lineterminator="\n")


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: intervals in one cell, short numbers, words for gaps, no empty
    columns."""
    ends = [name for name in frame if name.endswith(("_lo", "_hi"))]
    kept = {"score", "score_before", "score_after"}  # even where they need weights
    empty = [name for name in frame if frame[name].isna().all() and name not in kept]
    shown = frame.drop(columns=[*ends, *empty])
    if {"setting", "variant"} <= set(shown):
        shown = shown.drop(columns="variant")
    if "blocks_removed_7b" in shown and shown.blocks_removed_7b.equals(shown.blocks_removed):
        shown = shown.drop(columns="blocks_removed_7b")
    for name in shown:
        intervals = frame.reindex(columns=[f"{name}_lo", f"{name}_hi"]).to_numpy()
        pairs = zip(frame[name], intervals, strict=True)
        cells = [_cell(name, value, *interval) for value, interval in pairs]
        shown = shown.assign(**{name: cells})
    return shown.rename(columns=heading)


def heading(column: str) -> str:
    """A column's name for people, with its unit."""
    if "paper_" in column:
        return "paper: " + heading(column.replace("paper_", ""))
    if "_7b" in column:
        return "7B: " + heading(column.replace("_7b", ""))
    return HEADINGS.get(column, column.replace("_", " "))


def _cell(name, value, lo, hi) -> str:
    if pd.isna(value):
        return "needs weights" if name.startswith("score") else ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if name in COUNTS:
        return str(int(value))
    if name.split("_")[0] == "p":
        return "< 0.001" if value < 0.001 else f"{value:.2g}"
    style = _style(name, with_interval=not pd.isna(lo))
    return style % value if pd.isna(lo) else f"{style % value} ({style % lo} to {style % hi})"


def _style(name: str, *, with_interval: bool) -> str:
    if name.startswith("paper"):
        return digits(name)
    if name.startswith(POINTS) or (name == "ours" and with_interval):
        return "%.1f"
    if name.startswith(SHARES):
        return "%.2f"
    return "%.4g"
