"""DermNet as Kaggle has it: 23 folders of photographs, read as eight diseases by the prefixes of file names. No torch.

The rules are data, in dermnet.yaml. A file's key is its folder and name: one name occurs in two folders, and in train
and test. The published split is not kept; groups.split makes one that no duplicate crosses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path

import yaml

from derm_compress.data.folders import Row
from derm_compress.errors import DermError

IMAGES = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "test")
SHOWN = 3  # examples of each rule in the report


@cache
def rules() -> dict:
    """The contents of dermnet.yaml."""
    return yaml.safe_load((files("derm_compress.data") / "dermnet.yaml").read_text("utf-8"))


def label(name: str, dermatitis: str = "wide") -> tuple[str, str]:
    """(disease, its prefix) of a file name, or ("", why it is left out)."""
    plain, known = name.casefold(), rules()["diseases"]
    if rules()["microscopy"] in plain:
        return "", "histology"
    for disease, rule in known.items():
        if any(part in plain for part in rule.get("not", ())) and not _starts(
            plain, known, but=disease
        ):
            return "", f"looks like {disease}"
    disease, prefix = _starts(plain, known) or ("", "")
    if dermatitis == "narrow" and prefix in known["dermatitis"]["wide"]:
        return "", "dermatitis in the wide reading only"
    return (disease, prefix) if disease else ("", "another disease or no name")


def _starts(plain: str, known: dict, but: str = "") -> tuple[str, str] | None:
    """The disease, other than `but`, one of whose prefixes begins the name, and the prefix."""
    for disease, rule in known.items():
        for prefix in (*rule["prefixes"], *rule.get("wide", ())):
            if disease != but and plain.startswith(prefix.casefold()):
                return disease, prefix
    return None


def find_root(root: Path) -> Path:
    """The folder at or below `root` (three levels) that holds train/ and test/ with DermNet's folders in them."""
    for folder in chain([root], *(sorted(root.glob("/".join("*" * depth))) for depth in (1, 2, 3))):
        if all((folder / split).is_dir() for split in SPLITS) and any(
            name for name, _ in _folders(folder)
        ):
            return folder
    raise DermError(
        f"{root} has no train/ and test/ with DermNet's 23 folders, as Kaggle's shubhamgoel27/dermnet has"
    )


def _folders(root: Path):
    """(name as published, path) of the folders in train/ and test/; "" for one of none of DermNet's names."""
    known = {name.casefold(): name for name in rules()["folders"]}
    for path in chain(*(sorted((root / split).iterdir()) for split in SPLITS)):
        if path.is_dir():
            yield known.get(path.name.casefold(), ""), path


def _judge(folder: str, file: Path, dermatitis: str) -> tuple[str, str]:
    picture = file.suffix.casefold() in IMAGES
    why = "unknown folder" if not folder else "" if picture else "no picture"
    return ("", why) if why else label(file.name, dermatitis)


def read_dermnet(root: Path, columns, labels, exclude, *, dermatitis: str = "wide"):
    """Rows of DermNet and what was kept and left out, by rule, with examples; `columns` and `labels` have no meaning.

    Pictures of one folder and name, in train and test, share a key and so a split.
    """
    root, unwanted, rows = find_root(root), set(exclude), []
    kept, left, there = Counter(), defaultdict(list), set()
    for folder, path in _folders(root):
        there.add(folder)
        for file in sorted(path.rglob("*")):
            name = file.relative_to(root).as_posix()
            disease, rule = _judge(folder, file, dermatitis)
            if disease and disease not in unwanted:
                rows.append(Row(name, file, disease, (f"name={folder}/{file.name.casefold()}",)))
                kept[disease, rule] += 1
            elif file.is_file():
                left[disease or rule].append(name)
    told = {
        "rules": [{"disease": d, "prefix": p, "pictures": n} for (d, p), n in sorted(kept.items())],
        "excluded": {why: len(names) for why, names in sorted(left.items())},
        "examples": {
            why: names[:: max(1, len(names) // SHOWN)][:SHOWN]
            for why, names in sorted(left.items())
        },
        "folders_missing": sorted(set(rules()["folders"]) - there),
    }
    return rows, told
