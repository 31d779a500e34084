"""Tables as text: fixed digits and ids for csv, words and short numbers for people."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import yaml

from derm_compress.report import wording

FILE = Path(__file__).parents[1] / "templates" / "columns.yaml"
COLUMNS = yaml.safe_load(FILE.read_text("utf-8"))
WHOLE, P = "whole", "p"  # instead of digits: whole numbers beside gaps; p-values
UNKNOWN = {"holds": "not tested"}  # in other columns a gap says enough
NEEDED = ("score", "score_before", "score_after", "holds")  # shown even where there are none
COUNTS = ("n", "batch", "prompt_tokens", "new_tokens", "repeats", "none", "several", "unscored")
RANKINGS = ("criterion", "same_as", "same_as_all", "one", "other")
IN_WORDS = dict.fromkeys(RANKINGS, wording.words)
IN_WORDS |= dict.fromkeys(("method", "quantizer"), wording.quantizer)
MIB = 1024  # in a GiB


@functools.cache
def formats(column: str) -> tuple[str, str]:
    """How a column's numbers are printed in csv, and for people."""
    for csv, shown, patterns in COLUMNS["formats"]:
        if any(fnmatchcase(column, pattern) for pattern in patterns.split()):
            return csv, shown
    raise KeyError(column)


def heading(column: str) -> str:
    """A column's name for people, with its unit."""
    if "paper_" in column:
        return "paper: " + heading(column.replace("paper_", ""))
    if "_7b" in column:
        return "7B: " + heading(column.replace("_7b", ""))
    if "_mib" in column and column not in COLUMNS["headings"]:
        return heading(column.replace("_mib", "_gib")).replace("GiB", "MiB")
    return COLUMNS["headings"].get(column, column.replace("_", " "))


def whole(frame: pd.DataFrame) -> pd.DataFrame:
    """Whole numbers as such, in columns that have gaps, too."""
    names = [name for name in frame if formats(name)[0] == WHOLE]
    return frame.astype(dict.fromkeys(names, "Int64"))


def to_csv(frame: pd.DataFrame) -> str:
    """CSV with fixed digits; what is unknown stays empty."""
    shown = frame.copy()
    for name in frame.select_dtypes("float"):
        digits = formats(name)[0]
        shown[name] = [None if pd.isna(x) else digits % x for x in frame[name]]
    return shown.to_csv(index=False, lineterminator="\n")


def readable(frame: pd.DataFrame, names: Mapping[str, str] = MappingProxyType({})) -> pd.DataFrame:
    """The table as people read it: intervals in one cell, short numbers, words for ids and gaps, no
    columns that are empty or count the same everywhere.

    names: of variants, for people.
    """
    frame = in_mib(in_words(frame.rename(columns=_ends(frame)), names))
    ends = [name for name in frame if name.endswith(("_lo", "_hi"))]
    blank = frame.isna() | frame.eq("")
    empty = [name for name in frame if blank[name].all() and name not in NEEDED]
    known = [name for name in COUNTS if name in frame and len(frame) > 1]
    equal = [name for name in known if frame[name].nunique(dropna=False) == 1]
    shown = frame.drop(columns=[*ends, *empty, *equal], errors="ignore")
    if {"setting", "variant"} <= set(shown):
        shown = shown.drop(columns="variant")
    if "blocks_removed_7b" in shown and shown.blocks_removed_7b.equals(shown.blocks_removed):
        shown = shown.drop(columns="blocks_removed_7b")
    for name in shown:
        known = frame.reindex(columns=[name, f"{name}_lo", f"{name}_hi"])
        shown = shown.assign(**{name: [cell(name, *row) for row in known.to_numpy(object)]})
    return shown.rename(columns=heading)


def in_words(frame: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """The names of rankings, of quantizers and of these variants for people."""
    known = IN_WORDS | dict.fromkeys(
        ("variant", "measure"), lambda text: wording.named(text, names)
    )
    said = {
        name: frame[name].map(say, na_action="ignore")
        for name, say in known.items()
        if name in frame
    }
    return frame.assign(**said)


def in_mib(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of sizes that all lie below a GiB in MiB."""
    sizes = [name for name in frame if name.endswith("_gib")]
    small = [name for name in sizes if frame[name].dropna().between(0, 1, inclusive="left").all()]
    small = {name: name.replace("_gib", "_mib") for name in small}
    return frame.assign(**{name: MIB * frame[name] for name in small}).rename(columns=small)


def _ends(frame: pd.DataFrame) -> dict[str, str]:
    """Names of a plain `lo` and `hi`, which belong to the column before them."""
    names = list(frame)
    owner = names[names.index("lo") - 1] if "lo" in names else ""
    return {end: f"{owner}_{end}" for end in ("lo", "hi")}


def cell(name: str, value, lo, hi) -> str:
    """A value with its interval, if it has one."""
    if pd.isna(value):
        return UNKNOWN.get(name, "no score" if name.startswith("score") else "")
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    digits = formats(name)[1]
    if digits == P:
        return "< 0.001" if value < 0.001 else f"{value:.2g}"
    if pd.isna(lo):
        return digits % value
    if name == "ours" and abs(value) >= 10:  # as scores are, of which most are
        digits = "%.1f"
    return f"{digits % value} ({digits % lo} to {digits % hi})"
