"""Notebooks as data: their parameter cells are the schema of every parameter file (no torch)."""

import ast
import contextlib
import difflib
import importlib
import io
import json
import re
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from derm_compress.errors import DermError
from derm_compress.study.optional import OPTIONAL

SCALARS = {"int": int, "float": FiniteFloat, "str": str, "bool": bool}
WRITE = "write `name: type = value  # help [low..high]`"
DOTTED = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
RULE = re.compile(rf"\[([^\[\]]*(?:\.\.|\|)[^\[\]]*|{DOTTED.pattern})\]\s*$")
NEXT = re.compile(r"\s+(?=\w+=)(?![^\[]*\])")  # before a name, but not inside of a list
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: kind = default  # help [low..high]` or `[a|b|c]`.

    `[module.function]` of this package raises DermError for a value that it does not allow.
    A list's limits hold for each element. Two notebooks may share it.
    """

    name: str
    kind: str  # int, float, str, bool or list
    default: object
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    rule: str = ""

    @property
    def element(self) -> str:
        """The kind of one value; a list's is that of its default's first element, "" for any."""
        if self.kind != "list":
            return self.kind
        return type(self.default[0]).__name__ if self.default else ""

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        kind = f"list of {self.element or 'values'}" if self.kind == "list" else self.kind
        if self.choices:
            return f"{kind} out of {', '.join(map(str, self.choices))}"
        limits = ["" if limit is None else f"{limit:g}" for limit in (self.low, self.high)]
        return f"{kind} {'..'.join(limits)}" if any(limits) else kind

    @cached_property
    def type(self) -> TypeAdapter:
        if self.choices:
            one = Literal[self.choices]
        elif self.element:
            one = Annotated[SCALARS[self.element], Field(ge=self.low, le=self.high)]
        else:
            one = int | FiniteFloat | str | bool
        return TypeAdapter(list[one] if self.kind == "list" else one)

    def check(self, value, where: str):
        """The value in its declared type, an int for a float too; DermError if not allowed."""
        if self.kind == "list" and isinstance(value, str | int | float):
            value = [value]
        try:
            value = self.type.validate_python(value, strict=True)
        except ValidationError as error:
            raise DermError(f"{where}: {self.name} is {self.told(error)}") from None
        if self.rule and value != self.default:  # its module is imported where it is asked
            self.ask_rule(value, where)
        return value

    def ask_rule(self, value, where: str) -> None:
        module, _, function = self.rule.rpartition(".")
        try:
            getattr(importlib.import_module(f"derm_compress.{module}"), function)(value)
        except DermError as error:
            said = str(error).removeprefix(f"{self.name}: ")
            raise DermError(f"{where}: {self.name}: {said}") from error

    def told(self, error: ValidationError) -> str:
        value, hint = error.errors()[0]["input"], ""
        number = isinstance(value, str) and not isinstance(as_number(value), str)
        if number and self.element in ("int", "float"):
            hint = " (text to YAML: a number with an exponent needs a dot, as in 1.0e-4)"
        return f"{value!r}{hint}; allowed: {self.allowed}"

    def from_text(self, text: str):
        """A value from the command line, yet unchecked: `1e-4` is a number and `2,4` a list."""
        if self.kind == "str":
            return text
        value = text
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(f"[{text}]" if self.kind == "list" and text[:1] != "[" else text)
        if self.element != "float":
            return value
        return [as_number(item) for item in value] if isinstance(value, list) else as_number(value)


def as_number(value):
    """A text that is a number as a float, and anything else as it is."""
    with contextlib.suppress(TypeError, ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def read_schema(source: str, where: str) -> dict[str, Parameter]:
    """The parameters that a parameters cell declares, by name."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    nodes = ast.parse(source).body
    found = {}
    for node in nodes:
        parameter = read_line(node, comments.get(node.end_lineno, ""), where)
        if parameter.name in found:
            raise DermError(f"{where}: {parameter.name} is given twice")
        found[parameter.name] = parameter
    return found


def read_line(node: ast.stmt, comment: str, where: str) -> Parameter:
    try:
        name, kind, default = node.target.id, node.annotation.id, ast.literal_eval(node.value)
        parameter = Parameter(name, kind, default)
        if kind not in {*SCALARS, "list"} or parameter.element not in {*SCALARS, ""}:
            raise TypeError(kind)
        if rule := RULE.search(comment):
            parameter = replace(parameter, **read_rule(rule[1], parameter.element))
    except (AttributeError, TypeError, ValueError) as error:
        line = ast.unparse(node).splitlines()[0]
        raise DermError(f"{where}: {WRITE}, not `{line}`") from error
    parameter.check(default, f"{where}, default")
    return parameter


def read_rule(text: str, element: str) -> dict:
    """Fields of a Parameter from what its brackets hold: a function's name, choices, or limits."""
    if DOTTED.fullmatch(text):
        return {"rule": text}
    number = float if element == "float" else int
    if "|" in text:
        choices = [choice.strip() for choice in text.split("|")]
        return {"choices": tuple(choices if element == "str" else map(number, choices))}
    ends = zip(("low", "high"), text.split(".."), strict=True)
    return {name: number(end) for name, end in ends if end}


@dataclass(frozen=True)
class Notebook:
    """One stage: its parameters, and its cells as (source, tags, whether it is code)."""

    name: str
    cells: tuple[tuple[str, frozenset, bool], ...]
    schema: dict[str, Parameter]

    def code(self, *, figures: bool = False) -> tuple[str, ...]:
        """Code that results depend on, with `figures` what only shows them too."""
        skip = {"setup", "parameters"} if figures else {"setup", "parameters", "figure"}
        return tuple(text for text, tags, is_code in self.cells if is_code and not tags & skip)

    def reads(self, earlier: Sequence[str]) -> tuple[str, ...]:
        """The earlier stages that its code reads: stage.input("NN_name"), or stage.inputs()."""
        named = set()
        for node in ast.walk(ast.parse("\n".join(self.code(figures=True)))):
            match node:
                case ast.Call(ast.Attribute(ast.Name("stage"), "inputs")):
                    named.update(earlier)
                case ast.Call(ast.Attribute(ast.Name("stage"), "input"), [ast.Constant(name)]):
                    named.add(name)
        return tuple(name for name in earlier if name in named)


def read_notebook(path: Path) -> Notebook:
    """A notebook of plain Python (no magics) with one cell tagged `parameters`."""
    try:
        cells = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            tags = frozenset(cell["metadata"].get("tags", ()))
            cells.append(("".join(cell["source"]), tags, cell["cell_type"] == "code"))
        code = [(text, tags) for text, tags, is_code in cells if is_code]
        ast.parse("\n".join(text for text, _ in code))
        (parameters,) = [text for text, tags in code if "parameters" in tags]
    except (KeyError, SyntaxError, ValueError) as error:
        wanted = "a notebook of plain Python with one cell tagged `parameters`"
        raise DermError(f"notebooks/{path.name} is not {wanted}: {error}") from error
    return Notebook(path.stem, tuple(cells), read_schema(parameters, f"notebooks/{path.name}"))


def read_notebooks(root: Path) -> dict[str, Notebook]:
    """The stages in order: every notebooks/NN_name.ipynb; parameters they share must agree."""
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        advice = "set DERM_COMPRESS_ROOT to the project's folder"
        raise DermError(f"no notebooks/NN_name.ipynb in {root}: {advice}")
    notebooks, first = {path.stem: read_notebook(path) for path in paths}, {}
    for stage, notebook in notebooks.items():
        for name, parameter in notebook.schema.items():
            owner, declared = first.setdefault(name, (stage, parameter))
            if declared != parameter:
                other = "with another type, default or range"
                raise DermError(f"notebooks {owner} and {stage} declare {name} {other}")
    return notebooks


def wanted(notebooks: dict[str, Notebook], values: dict) -> dict[str, Notebook]:
    """The notebooks without those that nothing asks for."""
    off = {stage for stage, name in OPTIONAL.items() if not values.get(name)}
    return {stage: notebook for stage, notebook in notebooks.items() if stage not in off}


def left_out(stage: str) -> DermError:
    """What to say of a stage that these parameters do not ask for."""
    name = OPTIONAL[stage]
    return DermError(f"{stage} runs only where it is asked for: set {name}, as --set {name}=3.4")


def graph(notebooks: dict[str, Notebook]) -> dict[str, tuple[str, ...]]:
    """Stage -> the earlier stages that its code reads."""
    names = list(notebooks)
    return {name: notebooks[name].reads(names[:place]) for place, name in enumerate(names)}


def known_parameters(notebooks: dict[str, Notebook]) -> dict[str, Parameter]:
    """All parameters of all notebooks, by name."""
    known = {}
    for notebook in notebooks.values():
        known |= notebook.schema
    return known


def nearest(name: str, known) -> str:
    """The known name most like a wrong one, or all of them, for an error line."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"nearest: {close[0]}" if close else f"known: {', '.join(known)}"


def select(wanted: str | None, notebooks) -> list[str]:
    """The stages that a name or a number like 04 means; all of them for None."""
    if not wanted:
        return list(notebooks)
    number = f"{wanted.zfill(2)}_"
    found = [name for name in notebooks if name == wanted or name.startswith(number)]
    if not found:
        raise DermError(f"no stage {wanted}; {nearest(wanted, notebooks)}")
    return found


def run_name(run: str, where: str) -> str:
    """The name of a run, which is a folder's; DermError for what would lead elsewhere."""
    if not RUN_NAME.fullmatch(run):
        allowed = "letters, digits, dot, dash, underscore"
        raise DermError(f"{where}: run is {run!r}; allowed: {allowed}")
    return run


def check(values: dict, known: dict[str, Parameter], where: str) -> dict:
    """The values in their declared types; one clear line for the first that cannot be."""
    for name in values:
        if name not in known:
            hint = nearest(str(name), known)
            raise DermError(f"{where}: {name} is no parameter of any notebook; {hint}")
    checked = {name: known[name].check(value, where) for name, value in values.items()}
    run_name(checked.get("run", "default"), where)
    return checked


def assignments(texts: list[str]) -> dict[str, str]:
    """{"a": "1", "b": "two words"} from ["a=1 b=two words"]: values end before the next `name=`."""
    found = {}
    for text in filter(None, re.split(NEXT, " ".join(texts).strip())):
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise DermError(f"--set {text}: write name=value")
        if name in found:
            raise DermError(f"--set: {name} is given twice")
        found[name] = value
    return found


def read_yaml(text: str):
    """YAML in which no name is given twice: of two values the last would win without a word."""
    node = yaml.compose(text, yaml.SafeLoader)
    names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    return yaml.safe_load(text)


def check_texts(texts: dict[str, str], known: dict[str, Parameter], where: str) -> dict:
    """Values from the command line in their declared types."""
    read = {name: known[name].from_text(text) for name, text in texts.items() if name in known}
    return check(texts | read, known, where)


def read_params(path: Path, known: dict[str, Parameter]) -> dict:
    """A checked parameter file (YAML, flat)."""
    return check(read_mapping(path), known, str(path))


def read_mapping(path: Path) -> dict:
    """A YAML file of names and values, yet unchecked."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = sorted(other.name for other in path.parent.glob("*.yaml"))
        there = ", ".join(names) or "no .yaml file"
        raise DermError(f"no parameter file {path}; its folder has {there}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DermError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise DermError(f"{path}: expected lines of `name: value`")
    return values
