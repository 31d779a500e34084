"""Notebooks as data: their parameter cells are the schema that every parameter file is checked against (no torch)."""

import ast
import contextlib
import difflib
import importlib
import io
import json
import math
import re
import tokenize
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from derm_compress.errors import DermError

SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
RULE = re.compile(r"\[([^\[\]]*(?:\.\.|\|)[^\[\]]*|[a-z_]+(?:\.[a-z_]+)+)\]\s*$")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: kind = default  # help [low..high]`, or `[a|b|c]` for choices.

    `[module.function]` of this package raises DermError for a value that it does not allow. A list's limits hold for
    each of its elements. Equal but for their help: two notebooks may share it.
    """

    name: str
    kind: str  # int, float, str, bool or list
    default: object
    help: str = field(default="", compare=False)
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = ()
    rule: str = ""

    @property
    def element(self) -> str:
        """The kind of one value; a list's is that of its default's first element (empty default: any)."""
        return (
            self.kind
            if self.kind != "list"
            else type(self.default[0]).__name__
            if self.default
            else ""
        )

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        kind = f"list of {self.element or 'values'}" if self.kind == "list" else self.kind
        limits = (
            ""
            if self.low == -math.inf and self.high == math.inf
            else f" {self.low:g}..{self.high:g}"
        )
        return (
            f"{kind} out of {', '.join(map(str, self.choices))}" if self.choices else kind + limits
        )

    def check(self, value, where: str):
        """The value in its declared type (an int will do for a float); DermError if it is not allowed."""
        if (self.kind == "list") != isinstance(value, list):
            raise self._error(value, where)
        value = (
            [self._one(item, where) for item in value]
            if isinstance(value, list)
            else self._one(value, where)
        )
        if self.rule:
            module, _, function = self.rule.rpartition(".")
            try:
                getattr(importlib.import_module(f"derm_compress.{module}"), function)(value)
            except DermError as error:
                raise DermError(f"{where}: {self.name}: {error}") from error
        return value

    def _one(self, value, where):
        kind = self.element or type(value).__name__
        value = float(value) if kind == "float" and type(value) is int else value
        fits = type(value) is SCALARS.get(kind) and (not self.choices or value in self.choices)
        if not fits or (
            kind in ("int", "float")
            and not (math.isfinite(value) and self.low <= value <= self.high)
        ):
            raise self._error(value, where)
        return value

    def _error(self, value, where):
        trap = (
            self.element in ("int", "float")
            and isinstance(value, str)
            and not isinstance(as_number(value), str)
        )
        hint = (
            " (text to YAML: a number with an exponent needs a dot, as in 1.0e-4)" if trap else ""
        )
        return DermError(f"{where}: {self.name} is {value!r}{hint}; allowed: {self.allowed}")

    def from_text(self, text: str):
        """A value from the command line, not yet checked: there `1e-4` is a number and `2,4` a list."""
        value = text
        if self.kind != "str":
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.safe_load(
                    f"[{text}]" if self.kind == "list" and text[:1] != "[" else text
                )
        if self.element == "float":
            value = (
                [as_number(item) for item in value] if isinstance(value, list) else as_number(value)
            )
        return value


def as_number(value):
    """A text that is a number as a float, and anything else as it is."""
    with contextlib.suppress(TypeError, ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def read_schema(source: str, where: str) -> dict[str, Parameter]:
    """The parameters that a parameters cell declares, by name."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    found = [
        read_line(node, comments.get(node.end_lineno, ""), where) for node in ast.parse(source).body
    ]
    return {parameter.name: parameter for parameter in found}


def read_line(node: ast.stmt, comment: str, where: str) -> Parameter:
    rule = RULE.search(comment)
    text, help_text = (rule[1], comment[: rule.start()].strip()) if rule else ("", comment)
    try:
        name, kind, default = node.target.id, node.annotation.id, ast.literal_eval(node.value)
        element = SCALARS[Parameter(name, kind, default).element or "str"]
        if re.fullmatch(r"[a-z_]+(?:\.[a-z_]+)+", text):
            limits = {"rule": text}
        elif "|" in text:
            limits = {"choices": tuple(element(choice.strip()) for choice in text.split("|"))}
        else:
            limits = {
                "low": float(text.partition("..")[0] or "-inf"),
                "high": float(text.partition("..")[2] or "inf"),
            }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        line = ast.unparse(node).splitlines()[0]
        raise DermError(
            f"{where}: write `name: type = value  # help [low..high]`, not `{line}`"
        ) from error
    parameter = Parameter(name, kind, default, help_text, **limits)
    parameter.check(default, f"{where}, default")
    return parameter


@dataclass(frozen=True)
class Notebook:
    """One stage: the source of its cells, each with its tags and whether it is code, and its parameters."""

    name: str
    cells: tuple[tuple[str, frozenset, bool], ...]
    schema: dict[str, Parameter]

    def code(self, *, figures: bool = False) -> list[str]:
        """Code cells that results depend on (`figures`: with those that only show), without setup and parameters."""
        skip = {"setup", "parameters"} if figures else {"setup", "parameters", "figure"}
        return [text for text, tags, is_code in self.cells if is_code and not tags & skip]

    @cached_property
    def strings(self) -> frozenset[str]:
        """Every string constant of its code: the names of the stages it reads are among them."""
        nodes = ast.walk(ast.parse("\n".join(self.code(figures=True))))
        return frozenset(
            n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
        )


def read_notebook(path: Path) -> Notebook:
    """A notebook of plain Python (no magics) with one cell tagged `parameters`."""
    try:
        source = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = [
            ("".join(c["source"]), frozenset(c["metadata"].get("tags", ())), c["cell_type"])
            for c in source
        ]
        cells = tuple((text, tags, kind == "code") for text, tags, kind in tagged)
        ast.parse("\n".join(text for text, _, is_code in cells if is_code))
        (parameters,) = [text for text, tags, is_code in cells if is_code and "parameters" in tags]
    except (KeyError, SyntaxError, ValueError) as error:
        wanted = "a notebook of plain Python with one cell tagged `parameters`"
        raise DermError(f"notebooks/{path.name} is not {wanted}: {error}") from error
    return Notebook(path.stem, cells, read_schema(parameters, f"notebooks/{path.name}"))


def read_notebooks(root: Path) -> dict[str, Notebook]:
    """The stages in order, by name: every notebooks/NN_name.ipynb; parameters they share must agree."""
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise DermError(
            f"no notebooks/NN_name.ipynb in {root}: set DERM_COMPRESS_ROOT to the project's folder"
        )
    notebooks, owner = {path.stem: read_notebook(path) for path in paths}, {}
    for stage, notebook in notebooks.items():
        for name, parameter in notebook.schema.items():
            first = owner.setdefault(name, stage)
            if notebooks[first].schema[name] != parameter:
                raise DermError(
                    f"notebooks {first} and {stage} declare {name} with another type, default or range"
                )
    return notebooks


def graph(notebooks: dict[str, Notebook]) -> dict[str, tuple[str, ...]]:
    """Stage -> the earlier stages it reads: those whose names stand as strings in its code."""
    return {
        name: tuple(
            earlier for earlier in notebooks if earlier < name and earlier in notebook.strings
        )
        for name, notebook in notebooks.items()
    }


def known_parameters(notebooks: dict[str, Notebook]) -> dict[str, Parameter]:
    """All parameters of all notebooks, by name."""
    return {
        name: parameter
        for notebook in notebooks.values()
        for name, parameter in notebook.schema.items()
    }


def nearest(name: str, known) -> str:
    """The known name most like a wrong one, or all of them, for an error line."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"nearest: {close[0]}" if close else f"known: {', '.join(known)}"


def select(wanted: str | None, notebooks) -> list[str]:
    """The stages that a name or a number like 04 means; all of them for None."""
    number = wanted and wanted.zfill(2)
    found = [
        name for name in notebooks if not wanted or name == wanted or name.startswith(f"{number}_")
    ]
    if not found:
        raise DermError(f"no stage {wanted}; {nearest(wanted, notebooks)}")
    return found


def check(values: dict, known: dict[str, Parameter], where: str) -> dict:
    """The values in their declared types; one clear line for the first that is unknown or not allowed."""
    for name in values:
        if name not in known:
            raise DermError(
                f"{where}: {name} is no parameter of any notebook; {nearest(str(name), known)}"
            )
    checked = {name: known[name].check(value, where) for name, value in values.items()}
    if not RUN_NAME.fullmatch(checked.get("run", "default")):
        raise DermError(
            f"{where}: run is {checked['run']!r}; allowed: letters, digits, dot, dash, underscore"
        )
    return checked


def read_params(path: Path, known: dict[str, Parameter]) -> dict:
    """A checked parameter file (YAML, flat)."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = (
            ", ".join(sorted(other.name for other in path.parent.glob("*.yaml"))) or "no .yaml file"
        )
        raise DermError(f"no parameter file {path}; its folder has {there}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DermError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise DermError(f"{path}: expected lines of `name: value`")
    return check(values, known, str(path))
