"""Photographs with a csv of their labels: as a run's parameters say, or a preset. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from derm_compress.data import dialogue, identities
from derm_compress.data.identity_names import owner
from derm_compress.data.labels import Labels, absent, read_map
from derm_compress.data.listing import Listing, many
from derm_compress.data.pictures import SUFFIXES, Pictures, is_picture
from derm_compress.data.preset import Layout, Preset
from derm_compress.data.request import Request
from derm_compress.data.rows import Survey
from derm_compress.data.tables import Table, is_table, join, read_table
from derm_compress.errors import DermError

WORKBOOKS = (".xlsx", ".xls", ".ods")


def survey(request: Request, preset: Preset | None = None) -> Survey:
    """What the csv lists: an unknown label, or an identity that is not used, is a problem."""
    pictures = Pictures(request.root)
    layout = layout_of(request) if preset is None else adapted(preset.table, request)
    table = table_of(pictures, layout)
    layout = settled(layout, table, request)
    asked = request.label_map, request.exclude_labels
    labels = Labels.of(layout.labels, layout.exclude_labels, *asked)
    listing = Listing(pictures, table, layout, labels)
    for number, row in zip(table.numbers, table.rows, strict=True):
        listing.add(number, dict(zip(table.columns, row, strict=True)))
    found = listing.survey()
    return replace(found, problems=(*unmet(request, listing), *found.problems))


def unmet(request: Request, listing: Listing) -> list[str]:
    """A line for each label that a run names and no row has."""
    there = {*listing.met, *listing.layout.onehot_columns}
    excluded = [str(label) for label in request.exclude_labels]
    lines = absent("label_map", list(read_map(request.label_map)), there, listing.table.name)
    return lines + absent("exclude_labels", excluded, there, listing.table.name)


def layout_of(request: Request) -> Layout:
    """The layout that a run's parameters describe."""
    if not request.image_column:
        raise DermError("image_column: name the column of the pictures' files")
    if not request.label_column and not request.onehot_columns:
        raise DermError("label_column: name the column of the labels, or several in onehot_columns")
    return Layout(
        tables=tuple(filter(None, [request.table])),
        image_columns=(request.image_column,),
        image_suffix=request.image_suffix,
        label_column="" if request.onehot_columns else request.label_column,
        onehot_columns=tuple(map(str, request.onehot_columns)),
        labels=dialogue.aliases(),
    )


def adapted(layout: Layout, request: Request) -> Layout:
    """A preset's layout with what a run asks beside it."""
    return layout.model_copy(update={"tables": (request.table,)} if request.table else {})


def table_of(pictures: Pictures, layout: Layout) -> Table:
    """The list of pictures, with what is joined to it; without a csv, the folders' names."""
    name = table_name(pictures, layout.tables)
    if not name:
        return folder_names(pictures)
    table = read_table(pictures.files[name], name)
    for other, column in layout.joins.items():
        found = table_name(pictures, (other,))
        table = join(table, read_table(pictures.files[found], found), column)
    return table


def table_name(pictures: Pictures, wanted: Sequence[str]) -> str:
    """The first of some files that is there, or the only csv; "" where there is none at all."""
    there = [name for name in pictures.files if is_table(name)]
    top = [name for name in there if "/" not in name] or there
    found = [pictures.find(name) for name in wanted] or [top]
    for names in found:
        if len(names) == 1:
            return names[0]
    if not there and not wanted and any("/" in name for name in pictures.files):
        return ""
    raise DermError(without_table(pictures, there, wanted))


def without_table(pictures: Pictures, there: Sequence[str], wanted: Sequence[str]) -> str:
    """Why a folder has no list of its pictures, and what to do."""
    root, dead = pictures.root, pictures.dead
    listed = f"csv there: {', '.join(there[:5]) or 'none'}"
    books = [name for name in pictures.files if name.casefold().endswith(WORKBOOKS)]
    shots = [name for name in pictures.files if is_picture(name)]
    if wanted:
        return f"{root} needs {' or '.join(wanted)} as the list of its images ({listed})"
    if there:
        advice = f"choose the one that lists the images: --set table={shlex.quote(there[0])}"
        return f"{root} needs exactly one csv as the list of its images ({listed}); {advice}"
    if books:
        return f"{root} lists its images in {books[0]}; save it as csv beside it"
    if dead and not shots:
        link, target = next(iter(dead.items()))
        return f"{root} holds {many(len(dead), 'link')} to nowhere, such as {link} -> {target}"
    if not shots:
        return f"{root} holds no images ({', '.join(SUFFIXES)}) and no csv that lists any"
    said = f"{root} holds {many(len(shots), 'image')}, and nothing says what they show"
    return f"{said}: add a csv with the columns image and label, or a folder for each label"


def folder_names(pictures: Pictures) -> Table:
    """Every picture, labelled by the folder that it lies in; `folder` is what that lies in."""
    if lost := [name for name in pictures.dead if not is_picture(name)]:
        target = pictures.dead[lost[0]]
        raise DermError(f"{pictures.root}: the link {lost[0]} leads nowhere ({target}); mend it")
    names = [name for name in (*pictures.files, *pictures.dead) if is_picture(name) and "/" in name]
    rows, columns = [(name, name.split("/")[-2]) for name in names], ("image", "label")
    if any(name.count("/") > 1 for name in names):
        rows = [(name, label, "/".join(name.split("/")[:-2])) for name, label in rows]
        columns += ("folder",)
    return Table("its folders", columns, tuple(rows), tuple(range(1, len(rows) + 1)))


def settled(layout: Layout, table: Table, request: Request) -> Layout:
    """The layout with its columns as the table names them, and with the identities in use."""
    kept = [column for column in layout.subgroup_columns if table.has(column)]
    subgroups = tuple(map(str, [*kept, *request.subgroup_columns]))
    groups = tuple(map(str, [*layout.group_columns, *request.group_columns]))
    update = {
        "image_columns": named(table, layout.image_columns),
        "label_column": "".join(named(table, [layout.label_column])),
        "onehot_columns": named(table, layout.onehot_columns),
        "subgroup_columns": named(table, subgroups),
        "without": {
            table.columns[table.place(column)]: values
            for column, values in layout.without.items()
            if table.has(column)
        },
    }
    taken = {*update["image_columns"], *update["subgroup_columns"], update["label_column"]}
    if not request.group_columns:
        used = {column: table.values(column) for column in named(table, groups)}
        free = [column for column in table.columns if owner(column) and column not in taken]
        groups += identities.chosen({column: table.values(column) for column in free}, used)
    return layout.model_copy(update=update | {"group_columns": named(table, groups)})


def named(table: Table, columns: Sequence[str]) -> tuple[str, ...]:
    """Columns as a table names them, each once; DermError for one that it lacks."""
    found = [table.columns[table.place(column)] for column in columns if column]
    return tuple(dict.fromkeys(found))
