"""What a row says of a picture -> a disease of the study, or why it is left out."""

from __future__ import annotations

import ast
import contextlib
import difflib
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from derm_compress.data import dialogue
from derm_compress.errors import DermError

LEAST_WEIGHT = 0.5  # of a label in a dict of them; also what counts as 1 in a column of its own
UNDECIDED = ("no label", "several labels", "no label of half the weight")
UNKNOWN = {"", "-", "--", "-1", "?", "missing", "n/a", "na", "nan", "none", "none identified"}
UNKNOWN |= {"none selected", "not available", "null", "unk", "unknown", "unspecified"}
UNKNOWN |= {"anonymous", "desconhecido", "desconocido", "inconnu", "sconosciuto", "unbekannt"}
YES, NO = {"ja", "t", "true", "wahr", "x", "y", "yes"}, {"f", "falsch", "false", "n", "nein", "no"}
SHOWN = 8  # labels that an error names


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
    def of(
        cls,
        known: Mapping[str, str],
        left_out: Sequence[str],
        label_map: Sequence[object],
        exclude_labels: Sequence[object],
    ) -> Labels:
        """A source's spellings and labels to leave out, and over them a run's own lines."""
        mapped = {plain(name): disease for name, disease in read_map(label_map).items()}
        asked = {plain(str(label)) for label in exclude_labels}
        if both := sorted(asked & set(mapped)):
            raise DermError(f"{both[0]!r} is in label_map and in exclude_labels: choose one")
        spelled = {plain(name): disease for name, disease in known.items()} | mapped
        return cls(spelled, frozenset(asked | ({*map(plain, left_out)} - set(mapped))))

    def disease(self, label: str) -> str | None:
        """The disease of a label, "" for one to leave out, None for one that nobody knows."""
        found = self.known.get(plain(label))
        if label in UNDECIDED or {plain(label), found} & self.unwanted:
            return ""
        return "" if found is None and "*" in self.unwanted else found


def read_map(lines: Sequence[object]) -> dict[str, str]:
    """The lines of label_map, {spelling: disease}; DermError where two lines disagree."""
    pairs, said = [read_mapping(line) for line in lines], {}
    for spelling, disease in pairs:
        first = said.setdefault(plain(spelling), disease)
        if first != disease:
            raise DermError(f"label_map: {spelling!r} cannot mean both {first} and {disease}")
    return dict(pairs)


def absent(parameter: str, asked: Sequence[str], there: Collection[str], where: str) -> list[str]:
    """A line for each label that a run names and no row has, with those most like it."""
    names = {plain(name): name for name in sorted(there, key=plain)}
    lines = []
    for label in asked:
        if plain(label) in {*names, "*"}:
            continue
        near = difflib.get_close_matches(plain(label), names, n=3, cutoff=0.6)
        told = ", ".join(repr(names[name][:40]) for name in near or [*names][:SHOWN])
        like = "nearest" if near else "there are"
        said = f"{parameter}: {label[:60]!r} is in no row of {where}"
        lines.append(f"{said}; {like}: {told or 'none'}")
    return lines


def read_mapping(line: object) -> tuple[str, str]:
    """(spelling, disease) of "spelling = disease"."""
    spelling, sign, disease = (part.strip() for part in str(line).rpartition("="))
    known = {plain(name): name for name in dialogue.diseases()}
    if not sign or plain(disease) not in known:
        allowed = ", ".join(known)
        raise DermError(f"label_map: write `spelling = disease`, not {line!r}; diseases: {allowed}")
    return spelling, known[plain(disease)]


def chosen(columns: Sequence[str], cells: Sequence[str]) -> str:
    """The column whose cell is marked; ValueError for a cell that says neither yes nor no."""
    ones = [column for column, cell in zip(columns, cells, strict=True) if is_marked(cell)]
    if len(ones) == 1:
        return ones[0]
    return "several labels" if ones else "no label"


def is_marked(cell: str) -> bool:
    """Whether a cell below a label's name says yes: 1, true, x; ValueError for what says neither.

    Weights from 0 to 1 count from a half; a cell that is empty or unknown says no.
    """
    said = plain(cell)
    if not is_known(cell) or said in NO:
        return False
    if said in YES:
        return True
    with contextlib.suppress(ValueError):
        weight = float(cell.replace(",", "."))
        if 0 <= weight <= 1:
            return weight >= LEAST_WEIGHT
    raise ValueError(repr(cell[:40]))


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
