"""A folder of photographs as a page and as the run file that reads it so."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from derm_compress.data.identities import listed
from derm_compress.data.listing import many
from derm_compress.data.load import FOLDER, report, survey
from derm_compress.data.request import Request
from derm_compress.data.rows import Survey, check_survey, dataset_of
from derm_compress.data.tables import is_table
from derm_compress.errors import DermError
from derm_compress.files import located, shown, write_text
from derm_compress.study import params
from derm_compress.study.look.guess import guess
from derm_compress.study.look.page import page

LARGE = 600  # pictures from which the usual sizes of all splits fit
RUN = "python -m derm_compress run"


def propose(
    data: Path, sets: Mapping[str, str], out: Path | None, root: Path, *, quick: bool = False
) -> tuple[str, bool]:
    """(the page of what would be read, whether a run would read it); then the run file is written.

    Pictures are opened as stage 01 does, which is left out if `quick`; no file is written over.
    """
    if out and out.exists():
        raise DermError(f"{shown(out)} is there already; choose another --out, or remove it")
    known = params.known_parameters(params.read_notebooks(root))
    folder = located(str(data), Path.cwd())
    folder = folder.resolve() if ".." in folder.parts else folder
    asked = params.check_texts(sets, known, "--set")
    if folder.is_file() and is_table(folder.name):
        asked, folder = {"table": folder.name} | asked, folder.parent
    values = guess(asked | {"data_root": str(folder)})
    values["run"] = name_of(values, folder, out)
    file = out or root / "params" / f"{values['run']}.yaml"
    there = published_file(file, values["source"], known)
    over = there | {name: values[name] for name in [*asked, "data_root"]}
    defaults = {name: parameter.default for name, parameter in known.items()}
    found = survey(Request.of(values | over))
    values = sizes(len(found.rows)) | values
    request = Request.of(defaults | values | over)
    told, stops = foretold(found, request, quick=quick)
    said = page(request, found, told, stops)
    if stops:
        return f"{said}\n\nno run file is written before that is settled{answers(found)}", False
    if there:
        return f"{said}\n\n{named(file, dict(sets) | {'data_root': str(folder)})}", True
    values["data_root"] = str(relative(folder, root))
    params.check(values, known, shown(file))
    return f"{said}\n\n{kept(file, values, found)}", True


def published_file(file: Path, source: str, known: Mapping) -> dict:
    """What the run file of a published data set says, which is there already; else nothing."""
    if source == FOLDER or not file.exists():
        return {}
    values = params.read_params(file, known)
    return values if values.get("source") == source else {}


def named(file: Path, over: Mapping[str, str]) -> str:
    """A run file that is there already, and the command by which it reads this folder."""
    words = [f"--set {shlex.quote(f'{name}={text}')}" for name, text in over.items()]
    command = " ".join([RUN, shlex.quote(shown(file)), *words])
    stays = f"{shown(file)} is there already and stays (--out PATH writes another)"
    return f"{stays}; it reads this folder by\n  {command}"


def foretold(found: Survey, request: Request, *, quick: bool) -> tuple[dict, tuple[str, ...]]:
    """(the report that stage 01 would write, empty if `quick`; what would stop it)."""
    if found.problems:
        return {}, tuple(str(DermError(problem)) for problem in found.problems)
    try:
        if quick:
            check_survey(found, request)
            return {}, ()
        dataset, told = dataset_of(found, request)
        return report(dataset, request.sizes, told), ()
    except DermError as error:
        return {}, (str(error),)


def answers(found: Survey) -> str:
    """How labels that nobody knows are answered, if there are any."""
    if not found.unknown:
        return ""
    label = quoted(f"{next(iter(found.unknown))} = DISEASE")
    return (
        f"; say what the unknown labels mean:\n"
        f"  --set {shlex.quote(f'label_map=[{label}]')}  where it is one of the eight diseases\n"
        f'  --set "exclude_labels=*"  leaves out all that are still unknown'
    )


def kept(file: Path, values: Mapping, found: Survey) -> str:
    """Writes the run file where there is none, and says how to run it."""
    command = f"{RUN} {shlex.quote(shown(file))}"
    text = run_file(order(values), found.told["excluded"], command)
    if not file.exists():
        write_text(file, text)
        return f"written: {shown(file)}; read it, then: {command}"
    if file.read_text(encoding="utf-8") == text:
        return f"{shown(file)} is there already and reads it so: {command}"
    return f"{shown(file)} is there already, says it otherwise and stays; --out PATH writes another"


def name_of(values: Mapping, folder: Path, out: Path | None) -> str:
    """The name of a run: as asked, else its file's, its data set's, or its folder's."""
    asked = values.get("run")
    if out:
        if asked not in (None, out.stem):
            told = f"run is {asked}, but --out names another"
            raise DermError(f"{told}: a file's run is its name, so leave one out")
        return params.run_name(out.stem, "--out")
    name = folder.stem if folder.is_file() else folder.name
    return asked or slug(name if values["source"] == FOLDER else values["source"])


def slug(name: str) -> str:
    """A name in ASCII, without case and marks: `Büro Fotos` is buro-fotos."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return re.sub(r"[^a-z0-9]+", "-", letters).strip("-") or "data"


def relative(folder: Path, root: Path) -> Path:
    return folder.relative_to(root) if folder.is_relative_to(root) else folder


def sizes(pictures: int) -> dict[str, int]:
    """Sizes of the splits that so many pictures allow; training takes the rest."""
    if pictures >= LARGE:
        return {"n_train": 0}
    few = max(1, pictures // 8)
    return {"n_train": 0, "n_dev": min(64, few), "n_test": min(39, 2 * few), "n_heldout": 0}


def order(values: Mapping) -> dict:
    """The run and its data first."""
    first = ("run", "source", "data_root")
    return {name: values[name] for name in first} | dict(values)


def run_file(parameters: Mapping, counts: Mapping[str, int], command: str) -> str:
    """A parameter file; counts: pictures by label, which stand beside them."""
    lines = [f"# {command}"]
    lines.append("# Written by `look`: what it proposes is to be read, and corrected, by a person.")
    for name, value in parameters.items():
        if not isinstance(value, list | tuple):
            lines.append(f"{name}: {quoted(value)}")
        elif value:
            lines.append(f"{name}:")
            lines += [f"  - {quoted(one)}{counted(one, counts)}" for one in value]
    return "\n".join(lines) + "\n"


def quoted(value: object) -> str:
    """A value as YAML reads it back, on one line."""
    return listed([value])[1:-1]


def counted(value: object, counts: Mapping[str, int]) -> str:
    label = str(value).rpartition(" = ")[0] or str(value)
    return f"  # {many(counts[label], 'picture')}" if label in counts else ""
