"""What a result depends on, as a key: code without comments, parameters, upstream keys, versions (no torch).

Of the package, the modules in RESULTS count, as far as a notebook reaches them by its imports; what runs the stages
(study, kaggle) and what shows results (report) moves no number.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from derm_compress.files import digest, file_digest

PACKAGE = Path(__file__).resolve().parents[1]
RESULTS = ("data", "model", "method", "evaluate")
SHOWN = (*RESULTS, "report")
VERSIONS = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "sentence-transformers",
    "numpy",
    "pandas",
    "pillow",
    "scipy",
)


class Module(NamedTuple):
    """One module: digest of its code without docstrings, the modules it imports, its strings cut at slashes."""

    digest: str
    imports: frozenset[str]
    strings: frozenset[str]


def without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        documented = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
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


def imported(tree: ast.AST, package: Path) -> set[str]:
    """Dotted names, below the package, of its modules that a syntax tree imports; absolute imports alone."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head, _, inner = alias.name.partition(".")
                if head == package.name and inner:
                    found |= modules_of(inner, package)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            head, _, inner = (node.module or "").partition(".")
            if head == package.name:
                for alias in node.names:
                    found |= behind(inner, alias, tree, package)
    return found


def behind(inner: str, alias: ast.alias, tree: ast.AST, package: Path) -> set[str]:
    """The modules behind `from package.inner import name`: a module, what a face offers, or a folder.

    Of a folder with a face only what the tree takes from it counts, as in `method.Plan`.
    """
    dotted = f"{inner}.{alias.name}" if inner else alias.name
    folder = package.joinpath(*dotted.split("."))
    if offers := face_of(folder):
        taken = attributes(alias.asname or alias.name, tree)
        return set().union(
            *(modules_of(f"{dotted}.{offers.get(name, name)}", package) for name in taken)
        )
    if below := modules_of(dotted, package):
        return below
    offers = face_of(package.joinpath(*inner.split("."))) if inner else {}
    return modules_of(f"{inner}.{offers[alias.name]}" if alias.name in offers else inner, package)


def attributes(name: str, tree: ast.AST) -> set[str]:
    """What a syntax tree takes from a name: `Plan` of `method.Plan`."""
    taken = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {
        node.attr for node in taken if isinstance(node.value, ast.Name) and node.value.id == name
    }


def modules_of(dotted: str, package: Path) -> set[str]:
    """A module itself, or every module in a folder; empty where there is neither."""
    if not dotted:
        return set()
    path = package.joinpath(*dotted.split("."))
    if path.with_suffix(".py").is_file():
        return {dotted}
    files = path.rglob("*.py") if path.is_dir() else ()
    return {
        ".".join(file.relative_to(package).with_suffix("").parts)
        for file in files
        if file.stem != "__init__"
    }


@functools.cache
def face_of(folder: Path) -> dict[str, str]:
    """{name: module below the folder} that the FACE of its __init__ offers."""
    file = folder / "__init__.py"
    for node in ast.parse(file.read_text("utf-8")).body if file.is_file() else ():
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FACE":
            return {
                name: module
                for module, names in ast.literal_eval(node.value).items()
                for name in names
            }
    return {}


def describe(tree: ast.AST, package: Path) -> Module:
    texts = [
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    strings = frozenset(part for text in texts for part in text.split("/"))
    return Module(digest(ast.dump(tree)), frozenset(imported(tree, package)), strings)


@functools.cache  # for the life of the process: an imported module does not change when its file does
def read_module(dotted: str, package: Path) -> Module:
    file = package.joinpath(*dotted.split(".")).with_suffix(".py")
    return describe(without_docstrings(ast.parse(file.read_text("utf-8"))), package)


def reached(names: Iterable[str], package: Path, folders: Collection[str]) -> dict[str, Module]:
    """The modules behind `names` with all that they import, directly or not, as far as they lie in `folders`."""
    found, todo = {}, set(names)
    while todo:
        name = todo.pop()
        if name not in found and name.partition(".")[0] in folders:
            found[name] = read_module(name, package)
            todo |= found[name].imports
    return found


def data_files(package: Path, words: Collection[str]) -> dict[str, str]:
    """sha256 of each data file of the package of which `words` hold the name or the name of its folder."""
    files = {path.relative_to(package): path for path in package.rglob("*") if path.is_file()}
    named = {
        inner: path
        for inner, path in files.items()
        if words & {inner.name, *inner.parent.parts[1:]}
    }
    kept = {
        inner: path for inner, path in named.items() if path.suffix not in {".py", ".pyc", ".md"}
    }
    return {inner.name: file_digest(path) for inner, path in kept.items()}


def code_parts(
    cells: Iterable[str],
    *,
    package: Path = PACKAGE,
    words: Collection[str] = (),
    folders: Collection[str] = RESULTS,
) -> dict:
    """What the result of the cells depends on: their code, the package modules it uses, those modules' data files.

    A data file counts where a string of that code (or of `words`) names it or its folder, as "prompts/judge.txt" does.
    """
    code = describe(without_unused_imports(ast.parse("\n".join(cells))), package)
    modules = reached(code.imports, package, folders)
    strings = code.strings.union(words, *(module.strings for module in modules.values()))
    digests = {name: module.digest for name, module in modules.items()}
    return {"code": code.digest, "modules": digests, "data": data_files(package, strings)}


@functools.cache
def versions() -> dict[str, str | None]:
    """Installed versions of the libraries that results depend on; None where one is missing."""
    found = dict.fromkeys(VERSIONS)
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
