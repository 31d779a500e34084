"""DermNet as Kaggle has it: 23 folders, read as eight diseases by file names. No torch.

The rules are data, in dermnet.yaml. A file's key is its folder and name: one name occurs in two
folders, and in train and test. The published split is not kept, since duplicates cross it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path

import yaml

from derm_compress.data.items import Dataset
from derm_compress.data.request import Request
from derm_compress.data.rows import Row, dataset_of
from derm_compress.errors import DermError

IMAGES = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "test")
SHOWN = 3  # examples of each rule in the report


@cache
def rules() -> dict:
    """The contents of dermnet.yaml."""
    return yaml.safe_load((files("derm_compress.data.sources") / "dermnet.yaml").read_text("utf-8"))


def read(request: Request) -> tuple[Dataset, dict]:
    """DermNet's photographs of the eight diseases; the report says what was left out by which rule.

    Pictures of one folder and name, in train and test, share a key and so a split.
    """
    root = find_root(request.root)
    rows, there = [], set()
    kept, left = Counter(), defaultdict(list)
    for folder, path in class_folders(root):
        there.add(folder)
        for file in sorted(path.rglob("*")):
            if not file.is_file():
                continue
            name = file.relative_to(root).as_posix()
            disease, rule = classify(folder, file, request.dermatitis)
            if disease and disease not in request.exclude_labels:
                rows.append(Row(name, file, disease, (f"name={folder}/{file.name.casefold()}",)))
                kept[disease, rule] += 1
            else:
                left[disease or rule].append(name)
    left = dict(sorted(left.items()))
    told = {
        "rules": [{"disease": d, "prefix": p, "pictures": n} for (d, p), n in sorted(kept.items())],
        "excluded": {why: len(names) for why, names in left.items()},
        "examples": {
            why: names[:: max(1, len(names) // SHOWN)][:SHOWN] for why, names in left.items()
        },
        "folders_missing": sorted(set(rules()["folders"]) - there),
    }
    return dataset_of(rows, request, told)


def find_root(root: Path) -> Path:
    """The folder at or below `root` (three levels) that holds train/ and test/ of DermNet."""
    below = chain.from_iterable(sorted(root.glob("/".join("*" * depth))) for depth in (1, 2, 3))
    for folder in chain([root], below):
        split = all((folder / name).is_dir() for name in SPLITS)
        if split and any(name for name, _ in class_folders(folder)):
            return folder
    raise DermError(
        f"{root} has no train/ and test/ with DermNet's 23 folders, as Kaggle's "
        "shubhamgoel27/dermnet has"
    )


def class_folders(root: Path) -> Iterator[tuple[str, Path]]:
    """(name as published, path) of the folders in train/ and test/; "" for a name of no class."""
    known = {name.casefold(): name for name in rules()["folders"]}
    for split in SPLITS:
        for path in sorted((root / split).iterdir()):
            if path.is_dir():
                yield known.get(path.name.casefold(), ""), path


def classify(folder: str, file: Path, dermatitis: str) -> tuple[str, str]:
    """(disease, its prefix) of a file, or ("", why it is left out)."""
    if not folder:
        return "", "unknown folder"
    if file.suffix.casefold() not in IMAGES:
        return "", "no picture"
    return label(file.name, dermatitis)


def label(name: str, dermatitis: str = "wide") -> tuple[str, str]:
    """(disease, its prefix) of a picture's name, or ("", why it is left out)."""
    name, known = name.casefold(), rules()["diseases"]
    if rules()["microscopy"] in name:
        return "", "histology"
    for disease, rule in known.items():
        alike = any(part in name for part in rule.get("not", ()))
        if alike and not prefix_of(name, but=disease):
            return "", f"looks like {disease}"
    found = prefix_of(name)
    if not found:
        return "", "another disease or no name"
    if dermatitis == "narrow" and found[1] in known["dermatitis"]["wide"]:
        return "", "dermatitis in the wide reading only"
    return found


def prefix_of(name: str, but: str = "") -> tuple[str, str] | None:
    """(disease, prefix) of the first disease but one with a prefix that begins the name."""
    for disease, rule in rules()["diseases"].items():
        for prefix in (*rule["prefixes"], *rule.get("wide", ())):
            if disease != but and name.startswith(prefix.casefold()):
                return disease, prefix
    return None
