"""The rows of a csv as pictures with labels and identities, or as what is left out. No torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from derm_compress.data import dialogue, identities, splits
from derm_compress.data.labels import SHOWN, Labels, chosen, folded, is_known, plain, weightiest
from derm_compress.data.pictures import Pictures
from derm_compress.data.preset import Layout
from derm_compress.data.rows import Row, Survey
from derm_compress.data.tables import Table
from derm_compress.errors import DermError


@dataclass
class Listing:
    """A table's rows one by one: as pictures, or as what is left out and why."""

    pictures: Pictures
    table: Table
    layout: Layout
    labels: Labels
    rows: dict[str, Row] = field(default_factory=dict)  # by the file, by the name where none is
    cells: dict[str, Mapping[str, str]] = field(default_factory=dict)  # of these rows
    spelled: dict[str, str] = field(default_factory=dict)  # their labels
    numbers: dict[str, int] = field(default_factory=dict)  # of names and files, by their first row
    met: set[str] = field(default_factory=set)  # labels, and the diseases that they mean
    chains: list[tuple[str, ...]] = field(default_factory=list)  # what all rows share, kept or not
    excluded: Counter = field(default_factory=Counter)
    unknown: Counter = field(default_factory=Counter)

    def add(self, number: int, cells: Mapping[str, str]) -> None:
        """All pictures of one row."""
        names = [cells[column] for column in self.layout.image_columns if cells[column]]
        if not names:
            raise DermError(f"{self.table.name} row {number} names no image")
        label = self.label(number, cells)
        reason = self.unwanted(cells)
        disease = self.labels.disease(label)
        keys = self.keys(number, cells)
        self.chains.append((*keys, *names))
        self.met |= {label, self.labels.known.get(plain(label), label)}
        for name in names:
            self.once(number, name)
            if reason or disease == "":
                self.excluded[reason or label] += 1
            elif disease is None:
                self.unknown[label] += 1
            else:
                self.spelled[self.keep(number, name, disease, keys, cells)] = label

    def label(self, number: int, cells: Mapping[str, str]) -> str:
        columns = self.layout.onehot_columns
        if not columns:
            return weightiest(cells[self.layout.label_column])
        try:
            return chosen(columns, [cells[column] for column in columns])
        except ValueError as error:
            where = f"{self.table.name} row {number}"
            raise DermError(
                f"{where}: columns of labels hold 0 or 1, yes or no; not {error}"
            ) from None

    def unwanted(self, cells: Mapping[str, str]) -> str:
        """Why a row is left out whatever its label, or ""."""
        for column, values in self.layout.without.items():
            if plain(cells[column]) in map(plain, values):
                return f"{column}: {cells[column]}"
        return ""

    def once(self, number: int, key: str) -> None:
        """DermError for a second row of an image, where each row has one."""
        first = self.numbers.setdefault(key, number)
        if first != number and len(self.layout.image_columns) == 1:
            again = f"{self.table.name} row {number} repeats image {key[:80]!r} of row {first}"
            raise DermError(f"{again}; keep one row per image")

    def keys(self, number: int, cells: Mapping[str, str]) -> tuple[str, ...]:
        """What keeps a row's pictures together, and with others."""
        groups = known(cells, self.layout.group_columns)
        keys = tuple(f"{column}={folded(value)}" for column, value in groups.items())
        return (*keys, f"row={number}") if len(self.layout.image_columns) > 1 else keys

    def keep(
        self, number: int, name: str, disease: str, keys: tuple[str, ...], cells: Mapping[str, str]
    ) -> str:
        """A picture, or what else is said of one that is kept already; its key in `rows`."""
        file, why = self.pictures.one(name + self.layout.image_suffix)
        key = file or name
        self.once(number, key)
        before = self.rows.get(key)
        if before is None:
            path = self.pictures.files.get(file)
            subgroups = known(cells, self.layout.subgroup_columns)
            self.rows[key] = Row(name, path, disease, keys, subgroups, why)
            self.cells[key] = cells
        elif before.disease == disease:
            self.rows[key] = replace(before, keys=(*before.keys, *keys))
        else:
            self.rows[key] = replace(before, disease="")
        return key

    def survey(self) -> Survey:
        torn = [key for key, row in self.rows.items() if not row.disease]
        for key in torn:
            del self.rows[key], self.cells[key]
        self.close_chains()
        excluded = self.excluded + Counter({"several labels": len(torn)})
        looks, problems = self.identities()
        if self.unknown:
            problems.insert(0, self.not_understood())
        told = {
            "excluded": dict(sorted(excluded.items())),
            "labels": self.by_disease(),
            "read_as": self.read_as(),
            "subgroups": {c: self.counts(c) for c in self.layout.subgroup_columns},
            "notes": [*self.notes(), *looks],
        }
        unknown = dict(self.unknown.most_common())
        return Survey(tuple(self.rows.values()), told, tuple(problems), unknown)

    def close_chains(self) -> None:
        """Pictures that only a row left out, or one that cannot be read, joins share a key, too."""
        labels = splits.join(self.chains)
        chain = {key: n for keys, n in zip(self.chains, labels, strict=True) for key in keys}
        for place, row in self.rows.items():
            shared = {f"chain={chain[key]}" for key in row.keys}
            self.rows[place] = replace(row, keys=(*row.keys, *sorted(shared)))

    def not_understood(self) -> str:
        """All unknown labels in one line."""
        some = [f"{label[:40]!r} ({n})" for label, n in self.unknown.most_common(SHOWN)]
        more = [f"{len(self.unknown) - SHOWN} more"] if len(self.unknown) > SHOWN else []
        said = f"{self.table.name}: unknown labels: {', '.join(some + more)}"
        names = ", ".join(dialogue.diseases())
        return (
            f"{said}; map them in label_map to {names}, or name them in exclude_labels (* is all)"
        )

    def identities(self) -> tuple[list[str], list[str]]:
        """(notes, problems) of what keeps pictures together, and of what does not but could."""
        groups = splits.join([row.keys for row in self.rows.values()]).tolist()
        used, unused = self.cells_of(self.layout.group_columns), self.cells_of(self.unused())
        notes, problems = identities.overlooked(used, unused, groups)
        more, chains = identities.chained(used, groups)
        if self.table.form:  # a csv
            notes += identities.in_names([row.id for row in self.rows.values()], groups)
        found = [f"{self.table.name}: {problem}" for problem in [*problems, *chains]]
        return [*identities.unowned(used), *more, *notes], found

    def cells_of(self, columns: Sequence[str]) -> dict[str, list[str]]:
        return {column: [cells[column] for cells in self.cells.values()] for column in columns}

    def unused(self) -> list[str]:
        layout = self.layout
        used = {*layout.image_columns, layout.label_column, *layout.onehot_columns}
        used |= {*layout.group_columns, *layout.subgroup_columns, *layout.without, ""}
        return [column for column in self.table.columns if column not in used]

    def notes(self) -> list[str]:
        """What a reader should know of how the table was read."""
        found = []
        if "Windows" in self.table.form:
            found.append(f"{self.table.name} is not in UTF-8 and was read as Windows-1252")
        for column in self.layout.group_columns:
            if unknown := len(self.rows) - sum(self.counts(column).values()):
                found.append(f"{many(unknown, 'picture')} without a known {column}")
        return found

    def by_disease(self) -> dict[str, dict[str, int]]:
        """{disease: {label: pictures}}."""
        found = defaultdict(Counter)
        for key, row in self.rows.items():
            found[row.disease][self.spelled[key]] += 1
        return {disease: dict(sorted(counts.items())) for disease, counts in found.items()}

    def counts(self, column: str) -> dict[str, int]:
        """{value: pictures} without unknown values."""
        values = (cells[column] for cells in self.cells.values())
        return dict(sorted(Counter(value for value in values if is_known(value)).items()))

    def read_as(self) -> dict:
        layout = self.layout
        return {
            "table": self.table.name,
            "form": self.table.form,
            "rows": len(self.table.rows),
            "image": list(layout.image_columns),
            "label": [*filter(None, [layout.label_column]), *layout.onehot_columns],
            "groups": list(layout.group_columns),
            "not_used": self.unused(),
        }


def many(n: int, noun: str) -> str:
    """1 group, 2 groups."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def known(cells: Mapping[str, str], columns: Sequence[str]) -> dict[str, str]:
    """Some of a row's cells, without those that say nothing."""
    return {column: cells[column] for column in columns if is_known(cells[column])}
