"""What a result depends on, as a key: code without comments, parameters, upstream keys, versions.

Of the package, the modules in RESULTS count as far as a notebook's imports reach them; what runs
the stages (study, kaggle) and what shows results (report) moves no number. No torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from derm_compress.files import PACKAGE, digest, file_digest, walk

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
    """Code without docstrings: its digest, the modules it imports, its strings cut at slashes."""

    digest: str
    imports: frozenset[str]
    strings: frozenset[str]


@functools.cache  # the runs of a grid share most
def code_parts(
    cells: tuple[str, ...],
    *,
    package: Path = PACKAGE,
    words: frozenset[str] = frozenset(),
    folders: tuple[str, ...] = RESULTS,
) -> dict:
    """What results of the cells depend on: their code, the modules it uses, their data files.

    A data file counts where a string of that code (or one of `words`) names it or its folder.
    """
    code = describe(drop_unused_imports(ast.parse("\n".join(cells))), package)
    modules = reached(code.imports, package, folders)
    strings = code.strings.union(words, *(module.strings for module in modules.values()))
    digests = {name: module.digest for name, module in modules.items()}
    return {"code": code.digest, "modules": digests, "data": data_files(package, strings)}


def reached(names: Iterable[str], package: Path, folders: Collection[str]) -> dict[str, Module]:
    """These modules with all that they import, directly or not, as far as it lies in `folders`."""
    found, todo = {}, set(names)
    while todo:
        name = todo.pop()
        if name not in found and name.partition(".")[0] in folders:
            found[name] = read_module(name, package)
            todo |= found[name].imports
    return found


@functools.cache  # an imported module does not change when its file does
def read_module(dotted: str, package: Path) -> Module:
    file = package.joinpath(*dotted.split(".")).with_suffix(".py")
    return describe(ast.parse(file.read_text("utf-8")), package)


def describe(tree: ast.Module, package: Path) -> Module:
    drop_docstrings(tree)
    nodes = [*ast.walk(tree)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    strings = [part for text in texts if isinstance(text, str) for part in text.split("/")]
    return Module(digest(ast.dump(tree)), frozenset(imported(nodes, package)), frozenset(strings))


def drop_docstrings(tree: ast.Module) -> None:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]


def drop_unused_imports(tree: ast.Module) -> ast.Module:
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {"*"}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [a for a in node.names if (a.asname or a.name.split(".")[0]) in used]
    tree.body = [node for node in tree.body if getattr(node, "names", True)]
    return tree


def imported(nodes: list[ast.AST], package: Path) -> set[str]:
    """The package's modules that a syntax tree imports, by dotted names below the package."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                head, _, inner = alias.name.partition(".")
                if head == package.name:
                    found |= modules_of(inner, package)
        elif isinstance(node, ast.ImportFrom) and node.module:
            head, _, inner = node.module.partition(".")
            for alias in node.names if head == package.name else ():
                found |= behind(inner, alias, nodes, package)
    return found


def behind(inner: str, alias: ast.alias, nodes: list[ast.AST], package: Path) -> set[str]:
    """The modules behind `from package.inner import name`: a module, a folder, what a face offers.

    Of a folder with a face only what the tree takes from it counts, as in `method.tap`.
    """
    dotted = f"{inner}.{alias.name}".strip(".")
    if offers := face_of(dotted, package):
        taken = attributes(alias.asname or alias.name, nodes)
        return {
            m for name in taken for m in modules_of(offers.get(name, f"{dotted}.{name}"), package)
        }
    offered = face_of(inner, package).get(alias.name, inner)
    return modules_of(dotted, package) or modules_of(offered, package)


def attributes(name: str, nodes: list[ast.AST]) -> set[str]:
    """What a syntax tree takes from a name: `tap` of `method.tap`."""
    taken = [node for node in nodes if isinstance(node, ast.Attribute)]
    return {n.attr for n in taken if isinstance(n.value, ast.Name) and n.value.id == name}


def modules_of(dotted: str, package: Path) -> set[str]:
    """A module itself, or every module in a folder; empty where there is neither."""
    path = package.joinpath(*dotted.split("."))
    if not dotted or path.with_suffix(".py").is_file():
        return {dotted} - {""}
    files = [file.relative_to(package).with_suffix("") for file in path.rglob("*.py")]
    return {".".join(file.parts) for file in files if file.name != "__init__"}


@functools.cache
def face_of(dotted: str, package: Path) -> dict[str, str]:
    """{name: dotted module} that the FACE in a folder's __init__ offers."""
    file = package.joinpath(*dotted.split("."), "__init__.py")
    for node in ast.parse(file.read_text("utf-8")).body if dotted and file.is_file() else ():
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FACE":
            offers = ast.literal_eval(node.value).items()
            return {name: f"{dotted}.{module}" for module, names in offers for name in names}
    return {}


def data_files(package: Path, words: Collection[str]) -> dict[str, str]:
    """sha256 of each data file of which `words` hold the name, or that of an inner folder."""
    kept = {}
    for path in sorted(package.rglob("*")):
        inner = path.relative_to(package)
        named = words & {inner.name, *inner.parent.parts[1:]}
        if named and path.is_file() and path.suffix not in {".py", ".pyc", ".md"}:
            kept[inner.as_posix()] = file_digest(path)
    return kept


@functools.cache
def versions() -> dict[str, str | None]:
    """Installed versions of the libraries that results depend on; None where one is missing."""
    return {name: installed(name) for name in VERSIONS}


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def fingerprint(path: Path) -> str:
    """Digest of a file, or of all files in a folder, by name, size and time: what changed is new.

    Links are followed. Of Kaggle's read-only inputs names and sizes alone: their times may differ
    in every session.
    """
    inputs = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"), "input").resolve()
    on_kaggle, listing = inputs.is_dir(), {}

    @functools.cache  # a mount answers slowly, and DermNet has 19,559 files
    def mounted(folder: Path) -> bool:
        return on_kaggle and folder.resolve().is_relative_to(inputs)

    for name, file in walk(path) if path.is_dir() else [("", path)]:
        stat = file.stat()
        real = file.resolve() if file.is_symlink() else file
        times = [] if mounted(real.parent) else [stat.st_mtime_ns]
        listing[name] = [stat.st_size, *times]
    return digest(listing)
