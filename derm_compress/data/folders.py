"""Sources of labelled photographs: a data folder -> rows. No torch.

A source is a function (root, columns, labels, exclude) -> (rows, what its report adds: at least "excluded", counts by
reason), named in `data.SOURCES`; reading, duplicates and splits are the same for all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from derm_compress.errors import DermError


@dataclass(frozen=True)
class Row:
    """A labelled photograph; path None: not in the folder. Rows that share a key are never separated."""

    id: str
    path: Path | None
    disease: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Where a csv keeps things; table "": the folder's only csv; groups None: the usual ones that exist."""

    table: str = ""
    image: str = "image"
    label: str = "label"
    groups: tuple[str, ...] | None = None


USUAL_GROUPS = ("patient", "lesion", "group")
PAD_COLUMNS = Columns("metadata.csv", "img_id", "diagnostic", ("patient_id", "lesion_id"))
PAD_LABELS = {
    "ack": "actinic keratosis",
    "bcc": "basal cell carcinoma",
    "mel": "melanoma",
    "sek": "seborrheic keratosis",
}
PAD_EXCLUDED = ("nev", "scc")  # nevus, squamous cell carcinoma: none of the paper's eight


def read_folder(root: Path, columns: Columns, labels: Mapping[str, str], exclude: Iterable[str]):
    """Rows of a csv beside its images, and counts of excluded labels; an unknown label is an error."""
    path, table, groups = _read_table(root, columns)
    known = {_plain(spelling): disease for spelling, disease in labels.items()}
    unwanted, find = {_plain(label) for label in exclude}, _finder(root)
    rows: dict[str, Row | None] = {}
    excluded: Counter[str] = Counter()
    for number, record in enumerate(table.to_dict("records"), start=2):  # the header is row 1
        name, label = record[columns.image].strip(), record[columns.label].strip()
        disease = known.get(_plain(label))
        if name in rows:
            raise DermError(
                f"{path} row {number} repeats image {name[:80]!r}; keep one row per image"
            )
        if unwanted & {_plain(label), disease}:
            excluded[label] += 1
            rows[name] = None
        elif disease is None:
            allowed = ", ".join(sorted(set(labels.values())))
            unknown = f"{path} row {number}: unknown label {label[:60]!r}"
            raise DermError(f"{unknown}; allowed: {allowed}; or name it in exclude_labels")
        else:
            keys = tuple(
                f"{column}={record[column].strip()}" for column in groups if record[column].strip()
            )
            rows[name] = Row(name, find(name), disease, keys)
    return [row for row in rows.values() if row], {"excluded": dict(sorted(excluded.items()))}


def read_pad_ufes_20(
    root: Path, columns: Columns, labels: Mapping[str, str], exclude: Iterable[str]
):
    """The layout of PAD-UFES-20 (DOI 10.17632/zr7vgbcyr2.1): its columns and labels, whatever is passed."""
    return read_folder(root, PAD_COLUMNS, PAD_LABELS, (*exclude, *PAD_EXCLUDED))


def _plain(label: str) -> str:
    return " ".join(re.sub(r"[_-]", " ", label).casefold().split())


def _read_table(root: Path, columns: Columns) -> tuple[Path, pd.DataFrame, tuple[str, ...]]:
    there = sorted(path.name for path in root.glob("*.csv"))
    name = columns.table or (there[0] if len(there) == 1 else "")
    path = root / name
    if not path.is_file():
        listed = f"csv there: {', '.join(there[:5]) or 'none'}"
        raise DermError(
            f"{root} needs {name or 'exactly one csv'} as the list of its images ({listed})"
        )
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
        )
    except ValueError as error:
        raise DermError(
            f"{path} is no csv in UTF-8: {' '.join(str(error).split())[:150]}"
        ) from None
    groups = (
        tuple(c for c in USUAL_GROUPS if c in table) if columns.groups is None else columns.groups
    )
    for column in (columns.image, columns.label, *groups):
        if column not in table:
            raise DermError(
                f"{path} has no column {column!r}; its columns: {', '.join(table.columns)[:200]}"
            )
    return path, table.fillna(""), groups


def _finder(root: Path) -> Callable[[str], Path | None]:
    """Finds files below `root` only: by relative path, in images/, or by a name that is there just once."""
    paths = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    times = Counter(path.name for path in paths.values())
    single = {path.name: path for path in paths.values() if times[path.name] == 1}
    return lambda name: paths.get(name) or paths.get(f"images/{name}") or single.get(name)
