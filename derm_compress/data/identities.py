"""Columns that keep pictures together, by their values, and such as were overlooked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import yaml

from derm_compress.data.identity_names import COUNTS, NUMBERS, WORDS, owner, words
from derm_compress.data.labels import folded, is_known, plain

Values = Mapping[str, Sequence[str]]  # {column: cells}
FEW = 20  # pictures that share a value of an identity, at most on average
SPARSE = 6  # of one that neither its name nor its form tells
VARIED = 8  # values that such a one has at least
NEARLY_ALL = 0.9  # share of pictures in one group that leaves nothing to split
MEASURE = re.compile(r"-?\d+[.,]\d+|\d+([-./])\d+\1\d+")  # 1.5, or a date
CODE = re.compile(r"(?=.*\d)(?!\d{1,3}$)\S{3,}")
LAST = re.compile(r"[ _./-]+[^ _./-]*(\.\w+)?$")  # of a file's name
NUMBERED = re.compile(r".*\d.*")
DESCRIBING, FLAGS = (frozenset(WORDS[name].split()) for name in ("describing", "flags"))


def chosen(named: Values, used: Values) -> tuple[str, ...]:
    """Columns that keep pictures together unless a run names some: all that may, by their name.

    Such as are numbered within another one, or one in use, are left: they would chain all.
    """
    able = {column: values for column, values in named.items() if repeats(column, values)}
    return tuple(column for column in able if not outer_of(column, {**used, **able}))


def repeats(column: str, values: Sequence[str]) -> bool:
    """Whether values may be those of an identity that the column's name says it is.

    Yes and no are not, nor are two words, or words of very many pictures: kinds of lesions.
    """
    kind = owner(column)
    if not kind:
        return False
    times = Counter(known(values))
    if times and {plain(value) for value in times} <= FLAGS:
        return False
    if kind == "person" or not times or share(times, NUMBERED) > 0.5:
        return True
    return len(times) > 2 and times.total() <= FEW * len(times)


def may_be_identity(column: str, values: Sequence[str]) -> bool:
    """Whether many values are shared by a few pictures each, and are no measures or descriptions.

    Codes, and what is called a number, may be shared by more pictures than any other text.
    """
    if len(set(values)) > 0.85 * len(values):  # too few are shared, known or not
        return False
    said, times = words(column), Counter(known(values))
    total = times.total()
    shared = sum(n for n in times.values() if n > 1)
    if len(times) < 3 or shared < 0.3 * total or total > FEW * len(times):
        return False
    if NUMBERS.intersection(said) and said[0] not in COUNTS:
        return True
    if DESCRIBING.intersection(said) or share(times, MEASURE) > 0.1:
        return False
    sparse = len(times) >= VARIED and total <= SPARSE * len(times)
    return sparse or share(times, CODE) >= 0.9


def share(times: Counter, form: re.Pattern) -> float:
    """The share of values that have a form, each as often as it stands there."""
    return sum(n for value, n in times.items() if form.fullmatch(value)) / (times.total() or 1)


def known(values: Sequence[str]) -> list[str]:
    """The values that say anything, by one spelling each."""
    spelled = spellings(values)
    return [spelled[value] for value in values if value in spelled]


def spellings(values: Iterable[str]) -> dict[str, str]:
    return {value: folded(value) for value in set(values) if is_known(value)}


def crossing(values: Sequence[str], groups: Sequence[int]) -> int:
    """How many values are shared by pictures of several groups."""
    homes = Counter(value for value, _ in pairs_of(values, groups))
    return sum(n > 1 for n in homes.values())


def pairs_of(values: Sequence[str], others: Sequence) -> set[tuple]:
    """Known values with what stands beside them."""
    spelled = spellings(values)
    pairs = set(zip(values, others, strict=True))
    return {(spelled[value], other) for value, other in pairs if value in spelled}


def outer_of(column: str, columns: Values) -> str:
    """The one of some columns in each value of which this column's numbers begin anew, or ""."""
    others = (other for other in columns if other != column)
    return next((other for other in others if is_within(column, other, columns)), "")


def is_within(inner: str, outer: str, columns: Values) -> bool:
    """Whether values of one column are no identities, but numbers within the other: lesion 1, 2.

    Then a value stands in two or more of the outer column's, on average; fewer than four tell
    nothing.
    """
    one_way = pairs_of(columns[inner], columns[outer])
    pairs = pairs_of([o for _, o in one_way], [i for i, _ in one_way])
    inners, outers = Counter(i for _, i in pairs), Counter(o for o, _ in pairs)
    if len(pairs) < max(4, 2 * len(inners)):
        return False
    ranks = [owner(column) == "person" for column in (inner, outer)]
    coded = share(inners, CODE) >= 0.9
    if ranks == [False, True] and owner(inner) in ("case", "lesion") and not coded:
        return True
    several = max(outers.values()) > 1  # else each lies in one of these: a family, a hospital
    return several and (ranks[1], len(outers)) > (ranks[0], len(inners))


def overlooked(used: Values, unused: Values, groups: Sequence[int]) -> tuple[list, list]:
    """(notes, problems) of columns that look like identities and keep nothing together.

    groups: [N] the group of each picture by the columns in use.
    """
    notes, problems = [], []
    for column, values in unused.items():
        named = repeats(column, values)
        if not (named or may_be_identity(column, values)):
            continue
        crossed = crossing(values, groups)
        if not crossed:
            continue
        some = f"{crossed} of its values could lie in two splits"
        columns = {column: values, **used}
        if named:
            if outer := outer_of(column, columns):
                notes.append(f"{anew(column, outer)}; it is not used")
                continue
            kept = [other for other in used if not is_within(other, column, columns)]
            problems.append(
                f"column {column!r} looks like an identity of several pictures, and {some}; set "
                f"`group_columns: {listed([*kept, column])}`, or `subgroup_columns: "
                f"{listed([column])}` if it is none"
            )
        else:
            notes.append(
                f"column {column!r} may be an identity of several pictures, is not used, and {some}"
                f"; `group_columns: {listed([*used, column])}` would keep them together"
            )
    return notes, problems


def in_names(names: Sequence[str], groups: Sequence[int]) -> list[str]:
    """What is to be said where names of pictures begin with codes of several: PAT_7_1, PAT_7_2."""
    starts = [LAST.sub("", name) for name in names]
    crossed, coded = crossing(starts, groups), share(Counter(starts), CODE) >= 0.9
    if not (crossed and coded and may_be_identity("", starts)):
        return []
    first = next(start for start, n in Counter(starts).items() if n > 1)
    return [
        f"names of pictures begin alike, as {first[:60]!r}, and {crossed} of these beginnings "
        "could lie in two splits; if they are identities, add a column of them and name it in "
        "group_columns"
    ]


def chained(used: Values, groups: Sequence[int]) -> tuple[list, list]:
    """(notes, problems) of columns in use that join pictures of several people, or nearly all."""
    inner = {column: outer for column in used if (outer := outer_of(column, used))}
    left = [column for column in used if column not in inner]
    said = [f"{anew(c, outer)}; set `group_columns: {listed(left)}`" for c, outer in inner.items()]
    largest = max(Counter(groups).values(), default=0)
    if largest < max(2, NEARLY_ALL * len(groups)):
        return said, []
    told = f"{largest} of {len(groups)} pictures are one group, which leaves nothing to split"
    which = f"`subgroup_columns: {listed(used)}` if they are no identities"
    return [], [f"{told}: {said[0] if said else which}"]


def anew(inner: str, outer: str) -> str:
    return f"column {inner!r} is numbered anew in each {outer!r}, and would join pictures of many"


def unowned(used: Values) -> list[str]:
    """What is to be said where no column in use tells which pictures are of one patient."""
    told = "no column says which pictures are of one patient"
    there = [column for column, values in used.items() if known(values)]
    if not there:
        return [f"{told}: nothing but likeness keeps these together, so they may lie in two splits"]
    if all(owner(column) in ("case", "lesion") for column in there):
        kept = f"pictures of one {' or '.join(there)} are kept together"
        return [f"{told}: {kept}, others of the patient may lie in another split"]
    return []


def listed(values: Iterable[object]) -> str:
    """Values as a run's file takes them: [patient_id, lesion_id]."""
    text = yaml.safe_dump([*values], default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip()
