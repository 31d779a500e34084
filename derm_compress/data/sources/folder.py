"""A folder of photographs with a csv of their labels, or one of a published layout. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pandas as pd
import yaml

from derm_compress.data import dialogue
from derm_compress.data.items import Dataset
from derm_compress.data.request import Request
from derm_compress.data.rows import Row, dataset_of
from derm_compress.errors import DermError

USUAL_GROUPS = ("patient", "lesion", "group")


def read(request: Request) -> tuple[Dataset, dict]:
    """A csv's rows as a data set; excluded labels are counted, an unknown one is an error."""
    rows, excluded = list_rows(request)
    return dataset_of(rows, request, {"excluded": dict(sorted(excluded.items()))})


def preset(name: str) -> Callable[[Request], tuple[Dataset, dict]]:
    """The reader of a published layout: columns and labels of a yaml here, whatever is asked."""

    def read_preset(request: Request) -> tuple[Dataset, dict]:
        layout = yaml.safe_load((files("derm_compress.data.sources") / name).read_text("utf-8"))
        layout["exclude_labels"] = [*request.exclude_labels, *layout["exclude_labels"]]
        return read(replace(request, **layout))

    return read_preset


def list_rows(request: Request) -> tuple[list[Row], Counter[str]]:
    """The csv's rows with a wanted label, and counts of the excluded labels."""
    path, table, groups = read_table(request)
    labels = dialogue.aliases() if request.labels is None else request.labels
    known = {plain(spelling): disease for spelling, disease in labels.items()}
    unwanted = {plain(label) for label in request.exclude_labels}
    find = finder(request.root)
    rows, seen, excluded = [], set(), Counter()
    for number, record in enumerate(table.to_dict("records"), start=2):  # the header is row 1
        name, label = record[request.image_column].strip(), record[request.label_column].strip()
        if name in seen:
            again = f"{path} row {number} repeats image {name[:80]!r}"
            raise DermError(f"{again}; keep one row per image")
        seen.add(name)
        disease = known.get(plain(label))
        if unwanted & {plain(label), disease}:
            excluded[label] += 1
        elif disease is None:
            allowed = ", ".join(sorted(set(labels.values())))
            unknown = f"{path} row {number}: unknown label {label[:60]!r}"
            raise DermError(f"{unknown}; allowed: {allowed}; or name it in exclude_labels")
        else:
            values = {column: record[column].strip() for column in groups}
            keys = tuple(f"{column}={value}" for column, value in values.items() if value)
            rows.append(Row(name, find(name), disease, keys))
    return rows, excluded


def plain(label: str) -> str:
    """A spelling without case, hyphens and underscores."""
    return " ".join(re.sub(r"[_-]", " ", label).casefold().split())


def read_table(request: Request) -> tuple[Path, pd.DataFrame, tuple[str, ...]]:
    """The csv's path, its cells as text, and its columns that hold groups."""
    there = sorted(path.name for path in request.root.glob("*.csv"))
    name = request.table or (there[0] if len(there) == 1 else "")
    path = request.root / name
    if not path.is_file():
        listed = f"csv there: {', '.join(there[:5]) or 'none'}"
        wanted = name or "exactly one csv"
        raise DermError(f"{request.root} needs {wanted} as the list of its images ({listed})")
    how = {"dtype": str, "keep_default_na": False, "index_col": False}
    try:
        table = pd.read_csv(path, encoding="utf-8-sig", **how)
    except ValueError as error:
        why = " ".join(str(error).split())[:150]
        raise DermError(f"{path} is no csv in UTF-8: {why}") from None
    groups = request.group_columns
    if groups is None:
        groups = [column for column in USUAL_GROUPS if column in table]
    for column in (request.image_column, request.label_column, *groups):
        if column not in table:
            columns = ", ".join(table.columns)[:200]
            raise DermError(f"{path} has no column {column!r}; its columns: {columns}")
    return path, table.fillna(""), tuple(groups)


def finder(root: Path) -> Callable[[str], Path | None]:
    """Finds files below `root` only: by path, in images/, or by a name that is there just once."""
    inside = (path for path in sorted(root.rglob("*")) if path.is_file())
    paths = {path.relative_to(root).as_posix(): path for path in inside}
    times = Counter(path.name for path in paths.values())
    single = {path.name: path for path in paths.values() if times[path.name] == 1}

    def find(name: str) -> Path | None:
        return paths.get(name) or paths.get(f"images/{name}") or single.get(name)

    return find
