"""Photographs with a csv of their labels: as a run's parameters say, or a preset. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from derm_compress.data import dialogue, identities
from derm_compress.data.labels import Labels
from derm_compress.data.listing import Listing
from derm_compress.data.pictures import Pictures, is_picture
from derm_compress.data.preset import Layout, Preset
from derm_compress.data.request import Request
from derm_compress.data.rows import Survey
from derm_compress.data.tables import Table, join, read_table
from derm_compress.errors import DermError

TABLES = (".csv", ".tsv")


def survey(request: Request, preset: Preset | None = None) -> Survey:
    """What the csv lists: an unknown label, or an identity that is not used, is a problem."""
    pictures = Pictures(request.root)
    layout = layout_of(request) if preset is None else adapted(preset.table, request)
    table = table_of(pictures, layout)
    layout = settled(layout, table, request)
    labels = Labels.of(layout.labels, request.label_map, layout.exclude_labels)
    listing = Listing(pictures, table, layout, labels)
    for number, row in zip(table.numbers, table.rows, strict=True):
        listing.add(number, dict(zip(table.columns, row, strict=True)))
    return listing.survey()


def layout_of(request: Request) -> Layout:
    """The layout that a run's parameters describe."""
    return Layout(
        tables=tuple(filter(None, [request.table])),
        image_columns=(request.image_column,),
        image_suffix=request.image_suffix,
        label_column="" if request.onehot_columns else request.label_column,
        onehot_columns=tuple(map(str, request.onehot_columns)),
        labels=dialogue.aliases(),
        exclude_labels=tuple(map(str, request.exclude_labels)),
    )


def adapted(layout: Layout, request: Request) -> Layout:
    """A preset's layout with what a run asks beside it."""
    update = {"exclude_labels": (*layout.exclude_labels, *map(str, request.exclude_labels))}
    if request.table:
        update["tables"] = (request.table,)
    return layout.model_copy(update=update)


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
    there = [name for name in pictures.files if name.casefold().endswith(TABLES)]
    top = [name for name in there if "/" not in name] or there
    found = [pictures.find(name) for name in wanted] or [top]
    for names in found:
        if len(names) == 1:
            return names[0]
    if not there and not wanted and any("/" in name for name in pictures.files):
        return ""
    listed = f"csv there: {', '.join(there[:5]) or 'none'}"
    needs = " or ".join(wanted) or "exactly one csv"
    raise DermError(f"{pictures.root} needs {needs} as the list of its images ({listed})")


def folder_names(pictures: Pictures) -> Table:
    """Every picture, labelled by the folder that it lies in."""
    names = [name for name in pictures.files if is_picture(name) and "/" in name]
    rows = tuple((name, name.split("/")[-2]) for name in names)
    return Table("its folders", ("image", "label"), rows, tuple(range(1, len(rows) + 1)))


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
        "without": {c: values for c, values in layout.without.items() if c in table.columns},
    }
    taken = {*update["image_columns"], *update["subgroup_columns"], update["label_column"]}
    if not request.group_columns:
        owners = filter(identities.names_owner, table.columns)
        groups += tuple(column for column in owners if column not in taken)
    return layout.model_copy(update=update | {"group_columns": named(table, groups)})


def named(table: Table, columns: Sequence[str]) -> tuple[str, ...]:
    """Columns as a table names them, each once; DermError for one that it lacks."""
    found = [table.columns[table.place(column)] for column in columns if column]
    return tuple(dict.fromkeys(found))
