"""Published data sets as data: how each is read, in presets/NAME.yaml, which one schema checks."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from derm_compress.data import dialogue
from derm_compress.errors import DermError

FOLDER = files("derm_compress.data.presets")  # of these files that of a run's source counts alone
Names = tuple[str, ...]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layout(Strict):
    """Which columns of which csv say what; columns are named as the csv names them."""

    tables: Names  # the list of pictures: the first of these files that is there
    joins: dict[str, str] = {}  # further csv files, and the column that they share with it
    image_columns: Names
    image_suffix: str = ""  # what its names lack; where empty, any picture of that name
    label_column: str = ""  # a label, or a dict of labels and weights as text
    onehot_columns: Names = ()  # instead: columns named by a label, of which one is 1
    labels: dict[str, str]  # {spelling: disease}
    exclude_labels: Names = ()  # known and left out; *: every other label is
    without: dict[str, Names] = {}  # {column: values} of rows to leave out
    group_columns: Names = ()  # pictures that share a value stay in one split
    subgroup_columns: Names = ()  # kept with the items


class Rule(Strict):
    """Beginnings of file names that mean a disease, and parts of names that mean another."""

    prefixes: Names
    wide: Names = ()
    unlike: Names = Field((), alias="not")


class FileNames(Strict):
    """Labels in file names, in folders of train/ and test/."""

    folders: Names
    microscopy: str
    diseases: dict[str, Rule]


class Preset(Strict):
    """A published data set: where it comes from, how it is read, what nobody has checked."""

    title: str
    url: str
    citation: str
    licence: str
    contents: str  # what lies in data_root
    remarks: Names = ()
    unchecked: Names = ()
    table: Layout | None = None
    names: FileNames | None = None

    @model_validator(mode="after")
    def is_of_one_kind(self) -> Preset:
        if bool(self.table) == bool(self.names):
            raise ValueError("either `table` or `names` says how it is read")
        targets = self.names.diseases if self.names else self.table.labels.values()
        if unknown := set(targets) - set(dialogue.diseases()):
            raise ValueError(f"no disease of the study: {', '.join(sorted(unknown))}")
        return self


def preset_names() -> tuple[str, ...]:
    inside = (path.name for path in FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in inside if name.endswith(".yaml")))


@cache
def read_preset(name: str) -> Preset:
    """The preset of a name; DermError says what in its file is wrong."""
    text = (FOLDER / f"{name}.yaml").read_text("utf-8")
    try:
        return Preset.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DermError(f"preset {name}: {where}: {first['msg']}") from None
