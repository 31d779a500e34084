"""Whether a column's name says whose pictures these are: Patient ID, Patienten-Nr, lesão."""

from __future__ import annotations

import re
import unicodedata
from importlib.resources import files

import yaml

WORDS = yaml.safe_load((files("derm_compress.data") / "identities.yaml").read_text("utf-8"))
KINDS = {  # {patient: person, patients: person, ...}
    word: kind
    for kind, numbers in WORDS["owners"].items()
    for number in numbers
    for word in number.split()
}
PLURALS = {word for _, several in WORDS["owners"].values() for word in several.split()}
NUMBERS, NAMES, COUNTS, SMALL = (
    frozenset(WORDS[name].split()) for name in ("numbers", "names", "counts", "small")
)
FIRST = {"id", "num", "nr"}  # what is written before a noun without a sign between


def words(column: str) -> list[str]:
    """The words of a column's name, without accents: `PatientID` and `patientid` are patient, id.

    A word that joins a noun and a number, in German or by habit, is two.
    """
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).replace("_", " ")
    letters = unicodedata.normalize("NFKD", parted.casefold())
    bare = "".join(c for c in letters if not unicodedata.combining(c))
    found = re.findall(r"[^\W\d]+", bare)
    return [part for word in found for part in parts(word)]


def parts(word: str) -> list[str]:
    """patient, id of patientid; any other word as it is."""
    if word in KINDS:
        return [word]
    for i in range(2, len(word) - 1):
        first, second = word[:i], word[i:]
        if first in KINDS and second in NUMBERS | NAMES:
            return [first, second]
        if first in FIRST and second in KINDS:
            return [first, second]
    return [word]


def owner(column: str) -> str:
    """Whose pictures a name says these are: person, case, lesion, group, or "" for none.

    patient, case_num, numero_paciente; but not age_group, patient_sex, number_of_lesions.
    """
    said = [word for word in words(column) if word not in SMALL]
    if len(said) == 1:
        return KINDS.get(said[0], "")
    found = [noun_of(first, second) for first, second in zip(said[:-1], said[1:], strict=True)]
    kind = KINDS.get(next(filter(None, found), ""), "")
    nouns = [word for word in said if word not in NUMBERS | NAMES]
    return "" if kind == "group" and len(nouns) > 1 else kind


def noun_of(first: str, second: str) -> str:
    """The noun of two words of which the other says that it is numbered or named, or ""."""
    if first in KINDS and second in NUMBERS | NAMES:
        noun, other = first, second
    elif first in NUMBERS | NAMES and second in KINDS:
        noun, other = second, first
        if first in COUNTS and second in PLURALS:
            return ""
    else:
        return ""
    named = other in NAMES and KINDS[noun] in ("lesion", "group")  # of its kind, as a label
    return "" if named else noun
