"""A grid as data: a run file's `sweep: {seed: [0, 1]}` as named runs, one a point. No torch."""

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.study.params import Parameter, check, read_mapping

SWEEP = "sweep"
PINNED = ("run", "artifact_root")  # by these the runs of a grid find each other
UNNAMED = re.compile(r"[^A-Za-z0-9._-]+")  # what the name of a run cannot have


@dataclass(frozen=True)
class Point:
    """One run of a file: its values by the file, `run` among them, and which of these it sweeps."""

    values: dict
    swept: dict = field(default_factory=dict)


def read_points(path: Path, known: dict[str, Parameter], fixed: dict | None = None) -> list[Point]:
    """The runs of a checked parameter file: one, or each combination of what it sweeps.

    fixed: values over the file's; of a swept parameter one leaves that value alone.
    """
    told, fixed = read_mapping(path), fixed or {}
    swept = told.pop(SWEEP, None)
    values = check(told, known, str(path))
    if values.get("run") != path.stem:
        advice = f"a file's run is its name, so write `run: {path.stem}`"
        raise DermError(f"{path}: run is {values.get('run')!r}; {advice}")
    values |= fixed
    if swept is None:
        return [Point(values)]
    axes = read_sweep(swept, known, f"{path}: sweep")
    if both := sorted(axes.keys() & told.keys()):
        raise DermError(f"{path}: {both[0]} is given twice: swept, and as one value")
    axes |= {name: [fixed[name]] for name in axes if name in fixed}
    every = itertools.product(*axes.values())  # the last axis changes first
    points = [point_of(values, dict(zip(axes, one, strict=True))) for one in every]
    names = [point.values["run"] for point in points]
    for name in names:
        if names.count(name) > 1:
            raise DermError(f"{path}: sweep: two runs would be named {name}")
    return points


def read_sweep(told, known: dict[str, Parameter], where: str) -> dict[str, list]:
    """{parameter: its values}, checked."""
    if not isinstance(told, dict) or not told:
        raise DermError(f"{where} is {told!r}; write lists by name: {{seed: [0, 1, 2]}}")
    for name, values in told.items():
        if name in PINNED:
            raise DermError(f"{where}: {name} is one for the whole grid")
        if not isinstance(values, list) or not values:
            raise DermError(f"{where}: {name} is {values!r}; write a list of values")
    return {
        name: [check({name: value}, known, where)[name] for value in values]
        for name, values in told.items()
    }


def point_of(values: dict, swept: dict) -> Point:
    """A point, named by what it sweeps: smoke-seed0-depths4.8."""
    ends = [f"{name}{UNNAMED.sub('_', in_name(value))}" for name, value in swept.items()]
    name = "-".join([values["run"], *ends])
    return Point(values | swept | {"run": name}, swept)


def in_name(value) -> str:
    return ".".join(map(str, value)) if isinstance(value, list) else str(value)


def as_text(value) -> str:
    """A value as --set takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def find_point(folder: Path, run: str, known: dict[str, Parameter]) -> Point:
    """A run of the files in a folder by its name, its own file's or a grid's; else no values."""
    files = [folder / f"{run}.yaml"]
    if not files[0].exists():
        files = [file for file in sorted(folder.glob("*.yaml")) if run.startswith(f"{file.stem}-")]
    points = [point for file in files for point in read_points(file, known)]
    for point in points:
        if point.values["run"] == run:
            return point
    if points and files[0].stem == run:
        names = ", ".join(point.values["run"] for point in points)
        raise DermError(f"{run} is a grid; its runs are {names}")
    return Point({})
