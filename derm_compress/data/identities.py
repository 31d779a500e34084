"""Columns that say which pictures belong together, and such as were overlooked."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from derm_compress.data.labels import is_known

OWNERS = {"case", "group", "individual", "lesion", "participant", "patient", "person", "subject"}
NUMBERS = {"code", "id", "identifier", "key", "no", "nr", "num", "number", "uid", "uuid"}
FEW = 20  # pictures that share a value of an identity, at most on average
CODE = re.compile(r"(?=.*\d)(?!\d{1,3}$|\d+[.,]\d+$|\d+([-./])\d+\1\d+$)\S{3,}")  # no number, date


def words(column: str) -> list[str]:
    """The words of a column's name: `PatientID` and `patient_id` are patient, id."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).casefold()
    parted = re.sub(rf"\b({'|'.join(OWNERS)})id\b", r"\1 id", parted.replace("_", " "))
    return re.findall(r"[^\W\d]+", parted)


def names_owner(column: str) -> bool:
    """Whether a name says whose pictures these are: patient, case_num, but not age_group."""
    said = words(column)
    nouns = [word for word in said if word not in NUMBERS]
    return nouns[-1:] != [] and nouns[-1] in OWNERS and (len(nouns) == 1 or len(said) > len(nouns))


def looks_like_identity(column: str, values: Sequence[str]) -> bool:
    """Whether most values are codes, of which many are shared by a few pictures."""
    known = [value for value in values if is_known(value)]
    times = Counter(known)
    shared = sum(n for n in times.values() if n > 1)
    if len(times) < 3 or shared < 0.3 * len(known) or len(known) > FEW * len(times):
        return False
    codes = sum(bool(CODE.fullmatch(value)) for value in known)
    return codes >= 0.9 * len(known) or bool(set(words(column)) & NUMBERS)


def crossing(values: Sequence[str], groups: Sequence[int]) -> int:
    """How many values are shared by pictures of several groups."""
    homes = defaultdict(set)
    for value, group in zip(values, groups, strict=True):
        if is_known(value):
            homes[value].add(group)
    return sum(len(home) > 1 for home in homes.values())
