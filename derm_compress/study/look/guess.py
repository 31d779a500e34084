"""Parameters for a folder that nobody has described: a published data set, or columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from derm_compress.data import dialogue
from derm_compress.data.identity_names import owner, words
from derm_compress.data.labels import UNDECIDED, is_known, is_marked, plain, weightiest
from derm_compress.data.listing import many
from derm_compress.data.load import FOLDER, ignored, survey
from derm_compress.data.pictures import Pictures, is_picture
from derm_compress.data.preset import Preset, preset_names, read_preset
from derm_compress.data.request import Request
from derm_compress.data.sources import folder, names
from derm_compress.data.tables import Table
from derm_compress.errors import DermError

LABELS = ("label", "diagnosis", "diagnostic", "disease", "dx", "class", "condition", "category")
PERSONS = {"age", "ethnicity", "fitspatrick", "fitzpatrick", "gender", "race", "sex", "skin"}


def guess(parameters: Mapping) -> dict:
    """The parameters with those that read data_root, so that nothing about it is left open."""
    pictures = Pictures(Request.of(parameters).root)
    source = parameters.get("source") or recognised(pictures, parameters)
    found = {**parameters, "source": source}
    if source != FOLDER:
        return found
    table = folder.table_of(pictures, folder.layout_of(Request.of(found)))
    if table.form:
        found["table"] = table.name
    if not found.get("image_column"):
        found |= picture_column(table, pictures)
    if not (found.get("label_column") or found.get("onehot_columns")):
        found |= label_columns(table)
    people = [c for c in table.columns if PERSONS & set(words(c)) and not owner(c)]
    found.setdefault("subgroup_columns", people)
    excluded = [*found.get("exclude_labels", [])]
    told = survey(Request.of(found | {"exclude_labels": [*excluded, "*"]})).told
    found.setdefault("group_columns", told["read_as"]["groups"])
    return found | answers_for(told["excluded"], [*found.get("label_map", [])], excluded)


def recognised(pictures: Pictures, given: Mapping) -> str:
    """The published data set whose files these are, and that reads what is given; or folder."""
    for name in preset_names():
        if not set(given) & set(ignored(name)) and is_of(read_preset(name), pictures):
            return name
    return FOLDER


def is_of(preset: Preset, pictures: Pictures) -> bool:
    """Whether a preset's files and columns are there."""
    try:
        if preset.names:
            names.find_top(pictures, preset.names)
            return True
        layout = preset.table
        needed = [layout.label_column, *layout.image_columns, *layout.onehot_columns]
        table = folder.table_of(pictures, layout)
        return all(table.has(column) for column in needed if column)
    except DermError:
        return False


def picture_column(table: Table, pictures: Pictures) -> dict[str, str]:
    """The column called image, or the one of which most cells name a picture."""
    if table.has("image"):
        return {"image_column": table.columns[table.place("image")]}
    share = dict.fromkeys(table.columns, 0)
    for row in table.rows[:200]:
        for column, cell in zip(table.columns, row, strict=True):
            share[column] += bool(cell) and len(pictures.find(cell)) == 1
    best = max(share, key=share.__getitem__, default="")
    if not share.get(best):
        raise DermError(without_pictures(table, pictures))
    return {"image_column": best}


def without_pictures(table: Table, pictures: Pictures) -> str:
    """Why no column of a table names pictures, and what to do."""
    shots = [name for name in pictures.files if is_picture(name)]
    if not shots and pictures.dead:
        link, target = next(iter(pictures.dead.items()))
        said = f"{many(len(pictures.dead), 'link')} to nowhere, such as {link} -> {target}"
        return f"{pictures.root} holds {table.name} and no pictures: {said}"
    if not shots:
        advice = "name a folder that holds both"
        return f"{pictures.root} holds {table.name} and no pictures: {advice}"
    first = zip(table.columns, next(iter(table.rows), table.columns), strict=True)
    cells = ", ".join(f"{column} ({cell[:40]})" for column, cell in first)[:300]
    said = f"{table.name} has no column that names pictures below it, such as {shots[0]}"
    return f"{said}; it has {cells}; name one: --set image_column=NAME"


def label_columns(table: Table) -> dict[str, object]:
    """The column of labels by its name, else columns of 0 and 1 that labels name, else by cells."""
    named = [column for column in LABELS if table.has(column)]
    if named:
        return {"label_column": table.columns[table.place(named[0])]}
    known = every_label()
    marks = {column: marks_of(cells) for column, cells in by_column(table).items()}
    binary = [column for column, marked in marks.items() if marked]
    hot = [column for column in binary if plain(column) in known]
    if len(hot) > 1:
        ones = [sum(row) for row in zip(*map(marks.get, binary), strict=True)]
        return {"onehot_columns": binary if {*ones} == {1} else hot}
    share = {
        column: sum(plain(weightiest(cell)) in known for cell in cells)
        for column, cells in by_column(table).items()
    }
    best = max(share, key=share.__getitem__, default="")
    if not share.get(best):
        names = ", ".join(table.columns)[:200]
        told = f"{table.name} has no column of known labels; it has {names}"
        raise DermError(f"{told}; name one: --set label_column=NAME")
    return {"label_column": best}


def by_column(table: Table) -> dict[str, list[str]]:
    """The cells of each column that has a name."""
    places = {column: place for place, column in enumerate(table.columns) if column}
    return {column: [row[place] for row in table.rows] for column, place in places.items()}


def marks_of(cells: Sequence[str]) -> list[bool]:
    """Which cells of a column of marks are set; empty for another column, or one without cells."""
    try:
        return [is_marked(cell) for cell in cells] if any(cells) else []
    except ValueError:
        return []


def every_label() -> dict[str, str]:
    """{spelling: disease, or "" for none of the study's} in all published data sets."""
    found = {plain(name): disease for name, disease in dialogue.aliases().items()}
    tables = [preset.table for preset in map(read_preset, preset_names()) if preset.table]
    for layout in tables:
        left_out = dict.fromkeys(map(plain, layout.exclude_labels), "")
        found = left_out | found | {plain(n): disease for n, disease in layout.labels.items()}
    return found


def answers_for(left_out: Mapping[str, int], label_map: list, excluded: list) -> dict[str, list]:
    """label_map and exclude_labels for labels that a preset knows; others are left to be asked."""
    known = every_label()
    told = {plain(str(name)) for name in excluded}
    unknown = [name for name in left_out if plain(name) not in told and name not in UNDECIDED]
    mapped = [name for name in unknown if known.get(plain(name))]
    none = [name for name in unknown if known.get(plain(name)) == "" or not is_known(name)]
    return {
        "label_map": label_map + [f"{name} = {known[plain(name)]}" for name in mapped],
        "exclude_labels": excluded + ([] if "*" in excluded else none),
    }
