"""A csv of any usual separator and encoding, its columns found by names as people write them."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from derm_compress.data.labels import folded
from derm_compress.errors import DermError

SUFFIXES = (".csv", ".tsv")
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
MARKS = {  # by which a file says its encoding; UTF-32's little one begins like UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NAMES = {"utf-8-sig": "UTF-8", "cp1252": "Windows-1252"}
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # xlsx and xls


@dataclass(frozen=True)
class Table:
    """A csv's cells as text without outer spaces; numbers: its rows as a spreadsheet counts."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...]
    form: str = ""  # comma, UTF-8

    def place(self, column: str) -> int:
        """Where a column is, its name compared first as it is, then by `bare`.

        DermError where there is none, or more than one.
        """
        for same in (folded, bare):
            found = [i for i, name in enumerate(self.columns) if same(name) == same(column.strip())]
            if len(found) > 1:
                names = ", ".join(repr(self.columns[i]) for i in found)
                raise DermError(f"{self.name} has column {column!r} more than once: {names}")
            if found:
                return found[0]
        columns = ", ".join(self.columns)[:200]
        told = f"{self.name} has no column {column!r}; its columns: {columns}"
        raise DermError(f"{told}; `python -m derm_compress look` proposes which to name")

    def has(self, column: str) -> bool:
        return any(bare(name) == bare(column) for name in self.columns)

    def values(self, column: str) -> list[str]:
        place = self.place(column)
        return [row[place] for row in self.rows]


def is_table(name: str) -> bool:
    return name.casefold().endswith(SUFFIXES)


def bare(column: str) -> str:
    """A column's name without case, signs, and `id` at its end: `Lesion ID` is `lesion`."""
    name = re.sub(r"[\W_]+", "", folded(column))
    return name.removesuffix("id") or name


def read_table(file: Path, name: str) -> Table:
    """The table in a file; DermError says what else it is, or in which row it breaks."""
    text, encoding = decode(file.read_bytes(), name)
    text, separator = separated(text)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    rows, numbers = [], []
    try:
        for number, row in enumerate(reader, start=1):
            cells = tuple(cell.strip() for cell in row)
            if any(cells):
                rows.append(cells)
                numbers.append(number)
    except csv.Error as error:
        raise DermError(f"{name} breaks at line {reader.line_num}: {error}") from None
    if not rows:
        raise DermError(f"{name} is empty; it needs a row of column names and a row per image")
    columns = tuple(" ".join(name.split()) for name in rows[0])  # Excel's may be of two lines
    width = len(columns)
    for number, row in zip(numbers, rows, strict=True):
        if any(row[width:]):
            told = f"{name} row {number} has {len(row)} cells, the first row {width}"
            raise DermError(
                f"{told}; put quotes around a cell that holds a {SEPARATORS[separator]}"
            )
    full = tuple((row + ("",) * width)[:width] for row in rows[1:])
    return Table(name, columns, full, tuple(numbers[1:]), f"{SEPARATORS[separator]}, {encoding}")


def decode(content: bytes, name: str) -> tuple[str, str]:
    """(text, encoding): what its first bytes say, else UTF-8, else Windows-1252."""
    if content.startswith(WORKBOOKS):
        raise DermError(f"{name} is an Excel workbook; save it as csv")
    encodings = [code for mark, code in MARKS.items() if content.startswith(mark)][:1]
    if not encodings and b"\0" in content[:2]:
        encodings = ["utf-16-le" if content[1:2] == b"\0" else "utf-16-be"]
    for encoding in encodings or ["utf-8", "cp1252"]:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text, NAMES.get(encoding, encoding.upper())
    raise DermError(f"{name} is no text in UTF-8, UTF-16 or Windows-1252; save it as csv in UTF-8")


def separated(text: str) -> tuple[str, str]:
    """(text, separator): what Excel's first line `sep=;` says, else what its header holds most."""
    first, *rest = re.split(r"\r\n|\r|\n", text, maxsplit=1)
    told = re.fullmatch(r"sep=(.)", first)
    if told and told[1] in SEPARATORS:
        return "".join(rest), told[1]
    header = Counter(re.sub(r'"[^"]*"', "", first))
    return text, max(SEPARATORS, key=lambda separator: header[separator])


def join(left: Table, right: Table, column: str) -> Table:
    """Rows of `left` with what `right` has of the same value in a column; others stay empty."""
    place = right.place(column)
    new = [i for i, name in enumerate(right.columns) if i != place and not left.has(name)]
    found: dict[str, tuple[str, ...]] = {}
    for number, row in zip(right.numbers, right.rows, strict=True):
        if row[place] in found:
            raise DermError(f"{right.name} row {number} repeats {column} {row[place][:60]!r}")
        found[row[place]] = row
    nothing = ("",) * len(right.columns)
    partners = [found.get(key, nothing) for key in left.values(column)]
    pairs = zip(left.rows, partners, strict=True)
    return replace(
        left,
        name=f"{left.name} with {right.name}",
        columns=left.columns + tuple(right.columns[i] for i in new),
        rows=tuple(row + tuple(partner[i] for i in new) for row, partner in pairs),
    )
