"""What a row says of a picture -> a disease of the study, or why it is left out."""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from derm_compress.data import dialogue
from derm_compress.errors import DermError

LEAST_WEIGHT = 0.5  # of a label in a dict of them; also what counts as 1 in a column of its own
UNDECIDED = ("no label", "several labels", "no label of half the weight")
UNKNOWN = {"", "-", "--", "-1", "?", "missing", "n/a", "na", "nan", "none", "none identified"}
UNKNOWN |= {"none selected", "not available", "null", "unk", "unknown", "unspecified"}


def folded(text: str) -> str:
    """A text whose case, and how its characters are composed, do not count."""
    return unicodedata.normalize("NFC", text).casefold()


def plain(text: str) -> str:
    """A spelling without case, hyphens and underscores."""
    return " ".join(re.sub(r"[_-]", " ", folded(text)).split())


def is_known(text: str) -> bool:
    """Whether a cell says anything: "unknown", "n/a" and -1 do not."""
    return text.casefold() not in UNKNOWN and plain(text) not in UNKNOWN


@dataclass(frozen=True)
class Labels:
    """Spellings of diseases, and of labels to leave out; `*` leaves out all that are unknown."""

    known: Mapping[str, str]
    unwanted: frozenset[str]

    @classmethod
    def of(cls, known: Mapping[str, str], more: Sequence[str], exclude: Sequence[object]) -> Labels:
        """`more`: lines of label_map, which go before what is known and what is excluded."""
        mapped = read_map(more)
        unwanted = {plain(str(label)) for label in exclude} - {plain(name) for name in mapped}
        spelled = {plain(name): disease for name, disease in {**known, **mapped}.items()}
        return cls(spelled, frozenset(unwanted))

    def disease(self, label: str) -> str | None:
        """The disease of a label, "" for one to leave out, None for one that nobody knows."""
        found = self.known.get(plain(label))
        if label in UNDECIDED or {plain(label), found} & self.unwanted:
            return ""
        return "" if found is None and "*" in self.unwanted else found


def read_map(lines: Sequence[object]) -> dict[str, str]:
    """The lines of label_map, {spelling: disease}."""
    return dict(map(read_mapping, lines))


def read_mapping(line: object) -> tuple[str, str]:
    """(spelling, disease) of "spelling = disease"."""
    spelling, sign, disease = (part.strip() for part in str(line).rpartition("="))
    known = {plain(name): name for name in dialogue.diseases()}
    if not sign or plain(disease) not in known:
        allowed = ", ".join(known)
        raise DermError(f"label_map: write `spelling = disease`, not {line!r}; diseases: {allowed}")
    return spelling, known[plain(disease)]


def chosen(columns: Sequence[str], cells: Sequence[str]) -> str:
    """The column whose cell is 1; ValueError for what is no number."""
    ones = [c for c, cell in zip(columns, cells, strict=True) if float(cell) >= LEAST_WEIGHT]
    if len(ones) == 1:
        return ones[0]
    return "several labels" if ones else "no label"


def weightiest(text: str) -> str:
    """The label of half the weight or more in a dict as text; any other text as it is."""
    if not text.startswith("{"):
        return text
    try:
        weights = {str(name): float(weight) for name, weight in ast.literal_eval(text).items()}
    except (ValueError, SyntaxError, TypeError, AttributeError, RecursionError, MemoryError):
        return text
    if not weights:
        return "no label"
    heavy = [name for name, weight in weights.items() if weight >= LEAST_WEIGHT]
    return heavy[0] if len(heavy) == 1 else "no label of half the weight"
