"""Parameters for a folder that nobody has described: a published data set, or columns."""

from __future__ import annotations

from collections.abc import Mapping

from derm_compress.data import dialogue
from derm_compress.data.identities import words
from derm_compress.data.labels import UNDECIDED, plain, weightiest
from derm_compress.data.load import FOLDER, survey
from derm_compress.data.pictures import Pictures
from derm_compress.data.preset import Preset, preset_names, read_preset
from derm_compress.data.request import Request
from derm_compress.data.sources import folder, names
from derm_compress.data.tables import Table
from derm_compress.errors import DermError

LABELS = ("label", "diagnosis", "diagnostic", "disease", "dx", "class", "condition", "category")
PERSONS = {"age", "ethnicity", "fitspatrick", "fitzpatrick", "gender", "race", "sex", "skin"}
MOST = 30  # labels to leave out that are named one by one


def guess(parameters: Mapping) -> dict:
    """The parameters with those that read data_root, so that nothing about it is left open."""
    pictures = Pictures(Request.of(parameters).root)
    source = parameters.get("source") or recognised(pictures)
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
    people = [column for column in table.columns if PERSONS & set(words(column))]
    found.setdefault("subgroup_columns", people)
    excluded = [*found.get("exclude_labels", [])]
    told = survey(Request.of(found | {"exclude_labels": [*excluded, "*"]})).told
    found.setdefault("group_columns", told["read_as"]["groups"])
    return found | answers_for(told["excluded"], [*found.get("label_map", [])], excluded)


def recognised(pictures: Pictures) -> str:
    """The published data set whose files these are, or folder."""
    for name in preset_names():
        if is_of(read_preset(name), pictures):
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
        return all(column in table.columns for column in [*filter(None, needed)])
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
    best = max(share, key=share.__getitem__)
    if not share[best]:
        names = ", ".join(table.columns)[:200]
        raise DermError(f"{table.name} has no column that names pictures below it; it has {names}")
    return {"image_column": best}


def label_columns(table: Table) -> dict[str, object]:
    """The column of labels by its name, else columns of 0 and 1 that labels name, else by cells."""
    named = [column for column in LABELS if table.has(column)]
    if named:
        return {"label_column": table.columns[table.place(named[0])]}
    known = every_label()
    binary = [c for c in table.columns if {*table.values(c)} <= {"0", "1", "0.0", "1.0"}]
    hot = [column for column in binary if plain(column) in known]
    if len(hot) > 1:
        ones = [sum(map(float, row)) for row in zip(*map(table.values, binary), strict=True)]
        return {"onehot_columns": binary if {*ones} == {1.0} else hot}
    cells = {column: map(weightiest, table.values(column)) for column in table.columns}
    share = {column: sum(plain(c) in known for c in values) for column, values in cells.items()}
    best = max(share, key=share.__getitem__)
    if not share[best]:
        names = ", ".join(table.columns)[:200]
        told = f"{table.name} has no column of known labels; it has {names}"
        raise DermError(f"{told}; name one: --set label_column=NAME")
    return {"label_column": best}


def every_label() -> dict[str, str]:
    """{spelling: disease, or "" for none of the study's} in all published data sets."""
    found = {plain(name): disease for name, disease in dialogue.aliases().items()}
    tables = [preset.table for preset in map(read_preset, preset_names()) if preset.table]
    for layout in tables:
        left_out = dict.fromkeys(map(plain, layout.exclude_labels), "")
        found = left_out | found | {plain(n): disease for n, disease in layout.labels.items()}
    return found


def answers_for(left_out: Mapping[str, int], label_map: list, excluded: list) -> dict[str, list]:
    """label_map and exclude_labels for labels that are not known, as far as a preset knows them."""
    known = every_label()
    told = {plain(str(name)) for name in excluded}
    unknown = [name for name in left_out if plain(name) not in told and name not in UNDECIDED]
    mapped = [name for name in unknown if known.get(plain(name))]
    rest = [name for name in unknown if name not in mapped]
    return {
        "label_map": label_map + [f"{name} = {known[plain(name)]}" for name in mapped],
        "exclude_labels": excluded + (rest if len(rest) <= MOST else ["*"]),
    }
