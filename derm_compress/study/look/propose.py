"""A folder of photographs as a page and as the run file that reads it so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from derm_compress.data import dialogue
from derm_compress.data.load import survey
from derm_compress.data.request import Request
from derm_compress.errors import DermError
from derm_compress.files import shown, write_text
from derm_compress.study import params
from derm_compress.study.look.guess import guess
from derm_compress.study.look.page import page

LARGE = 600  # pictures from which the usual sizes of all splits fit
NOTHING = (
    "no picture has a label that is known; say which disease a label means, by "
    "--set \"label_map=['LABEL = DISEASE']\"; the diseases are {}"
)


def propose(data: Path, sets: Mapping[str, str], out: Path | None, root: Path) -> str:
    """The page of what would be read; writes the run file, over no file that is there."""
    if out and out.exists():
        raise DermError(f"{shown(out)} is there already; choose another --out, or remove it")
    known = params.known_parameters(params.read_notebooks(root))
    asked = params.check_texts(sets, known, "--set")
    folder = data.expanduser().absolute()
    values = guess(asked | {"data_root": str(folder)})
    request = Request.of(values)
    found = survey(request)
    values |= {"run": params.run_name(out.stem, "--out") if out else name_of(values, folder)}
    values |= {"data_root": str(relative(folder, root))}
    file = out or root / "params" / f"{values['run']}.yaml"
    values = sizes(len(found.rows)) | values
    params.check(values, known, shown(file))
    told = page(request, found)
    if not found.rows:
        return f"{told}\n\nnothing is written: {NOTHING.format(', '.join(dialogue.diseases()))}"
    then = f"python -m derm_compress run {shown(file)}"
    text = run_file(order(values), found.told["excluded"], then)
    if not file.exists():
        write_text(file, text)
        return f"{told}\n\nwritten: {shown(file)}; read it, then: {then}"
    same = "reads it so" if file.read_text(encoding="utf-8") == text else "says it otherwise"
    return f"{told}\n\n{shown(file)} is there already, {same} and stays; --out PATH writes another"


def name_of(values: Mapping, folder: Path) -> str:
    """The name of a run: its data set's, or its folder's."""
    name = folder.stem if values["source"] == "folder" else values["source"]
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "data"


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
    listed = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6)
    return listed.strip()[1:-1]


def counted(value: object, counts: Mapping[str, int]) -> str:
    label = str(value).rpartition(" = ")[0] or str(value)
    return f"  # {counts[label]} pictures" if label in counts else ""
