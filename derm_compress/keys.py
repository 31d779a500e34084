"""What a result depends on, as a key: code without comments, parameters, upstream keys, versions (no torch)."""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
VERSIONS = (
    "torch", "transformers", "tokenizers", "peft", "bitsandbytes", "sentence-transformers", "numpy", "pandas",
    "pillow", "scipy",
)  # fmt: skip
# neither moves a number: what runs the stages, what shows their results
MACHINERY = frozenset({"study", "plan", "runner", "execution", "artifacts", "keys", "params", "progress", "errors"})
PRESENTATION = frozenset(
    {"figures", "tables", "findings", "quotes", "report", "notebook_html", "paper", "preflight", "results", "wording"}
    | {"agreement", "rivals", "ranking_figures", "ranking_findings"}
    | {"parts", "page", "comparison", "answers_html", "pareto", "cards"}
    | {"verdicts", "side_by_side", "contradictions", "paper_model"}
    | {"planner", "stage_costs", "power", "statistics_tables", "statistics_figures", "statistics_findings"}
    | {"precision", "quantization_figures", "quantization_findings"}
)


class Module(NamedTuple):
    """One module: digest of its code without docstrings, the package modules it imports, its strings cut at slashes."""

    digest: str
    imports: frozenset[str]
    strings: frozenset[str]


def digest(value) -> str:
    """sha256 (hex) of a JSON value; the order of an object's keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree


def without_unused_imports(tree: ast.AST) -> ast.AST:
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {"*"}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [a for a in node.names if (a.asname or a.name.split(".")[0]) in used]
    tree.body = [node for node in tree.body if getattr(node, "names", True)]
    return tree


def package_imports(tree: ast.AST, package: Path) -> set[str]:
    """Names of the package's own modules that a syntax tree imports, absolutely or relatively."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith(package.name + ".")}
        elif isinstance(node, ast.ImportFrom):
            head, _, inner = (node.module or "").partition(".")
            inner = node.module if node.level else inner
            if node.level or head == package.name:
                found |= {inner} if inner else {a.name for a in node.names}
    return {name.split(".")[0] for name in found}


def describe(trees, package: Path) -> Module:
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    strings = frozenset(part for node in nodes if isinstance(node.value, str) for part in node.value.split("/"))
    imports = frozenset(name for tree in trees for name in package_imports(tree, package))
    return Module(digest([ast.dump(tree) for tree in trees]), imports, strings)


@functools.cache  # for the life of the process: an imported module does not change when its file does
def read_module(name: str, package: Path) -> Module | None:
    """A module of the package, or all files of a subpackage as one; None if there is none."""
    file = package / f"{name}.py"
    paths = [file] if file.is_file() else sorted((package / name).rglob("*.py"))
    trees = [without_docstrings(ast.parse(path.read_text("utf-8"))) for path in paths]
    return describe(trees, package) if trees else None


def module_closure(names, package: Path, skip) -> dict[str, Module]:
    """The modules behind `names` with all they import from the package, directly or not, but those of `skip`."""
    closure, todo = {}, set(names)
    while todo:
        name = todo.pop()
        if name not in closure and name not in skip and (module := read_module(name, package)):
            closure[name] = module
            todo |= module.imports
    return closure


def data_files(package: Path, words) -> dict[str, str]:
    """sha256 of each data file of the package of which `words` hold the name or the name of its folder."""
    files = {path.relative_to(package): path for path in package.rglob("*") if path.is_file()}
    named = {inner: path for inner, path in files.items() if words & set(inner.parts)}
    kept = {inner: path for inner, path in named.items() if path.suffix not in {".py", ".pyc", ".md"}}
    return {inner.as_posix(): file_digest(path) for inner, path in kept.items()}


def code_parts(cells, *, package=PACKAGE, words=frozenset(), skip=MACHINERY | PRESENTATION) -> dict:
    """What the result of the cells depends on: their code, the package modules it uses, those modules' data files.

    A data file counts where a string of that code (or of `words`) names it or its folder, as "prompts/judge.txt" does.
    """
    code = describe([without_unused_imports(ast.parse("\n".join(cells)))], package)
    modules = module_closure(code.imports, package, skip)
    strings = code.strings.union(words, *(module.strings for module in modules.values()))
    digests = {name: module.digest for name, module in modules.items()}
    return {"code": code.digest, "modules": digests, "data": data_files(package, strings)}


def folder_fingerprint(folder: Path) -> str:
    """Digest of a folder's listing (names, sizes, times of change): a changed photograph is new input.

    Of Kaggle's read-only inputs names and sizes alone: they may be mounted with other times in every session.
    """
    mounted = folder.resolve().is_relative_to(Path(os.environ.get("KAGGLE_ROOT", "/kaggle"), "input").resolve())
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return digest({name: [stat.st_size, *([] if mounted else [stat.st_mtime_ns])] for name, stat in stats.items()})


@functools.cache
def versions() -> dict[str, str | None]:
    """Installed versions of the libraries that results depend on; None where one is missing."""
    found = dict.fromkeys(VERSIONS)
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
