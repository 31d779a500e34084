"""Photographs whose file names say the disease, by the rules of a preset: DermNet. No torch.

A file's key is its folder and name: one name occurs in two folders, and in train and test.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from derm_compress.data import identities
from derm_compress.data.labels import absent, plain
from derm_compress.data.pictures import Pictures
from derm_compress.data.preset import FileNames
from derm_compress.data.request import Request
from derm_compress.data.rows import Row, Survey
from derm_compress.errors import DermError

IMAGES = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "test")
SHOWN = 3  # examples of each rule in the report


def survey(request: Request, rules: FileNames) -> Survey:
    """The photographs of the eight diseases; the report says what was left out by which rule."""
    pictures = Pictures(request.root)
    top = find_top(pictures, rules)
    known = {name.casefold(): name for name in rules.folders}
    unwanted = {plain(str(label)) for label in request.exclude_labels}
    rows, there, met = [], set(), set()
    kept, left = defaultdict(Counter), defaultdict(list)
    for path, file in pictures.files.items():
        name = path.removeprefix(top)
        split, *folders = name.split("/")[:-1]
        if not path.startswith(top) or split.casefold() not in SPLITS or not folders:
            continue
        folder = known.get(folders[0].casefold(), "")
        there.add(folder)
        disease, rule = classify(folder, file.name, rules, request.dermatitis)
        met |= {disease or rule, rule}
        if disease and not unwanted & {plain(disease), plain(rule)}:
            key = f"name={folder}/{file.name.casefold()}"
            rows.append(Row(name, file, disease, (key,)))
            kept[disease][rule] += 1
        else:
            left[disease or rule].append(name)
    left = dict(sorted(left.items()))
    told = {
        "labels": {disease: dict(sorted(counts.items())) for disease, counts in kept.items()},
        "excluded": {why: len(names) for why, names in left.items()},
        "examples": {
            why: names[:: max(1, len(names) // SHOWN)][:SHOWN] for why, names in left.items()
        },
        "folders_missing": sorted({*rules.folders} - there),
        "notes": identities.unowned({}),
    }
    lost = absent("exclude_labels", [*map(str, request.exclude_labels)], met, "its files")
    return Survey(tuple(rows), told, tuple(lost))


def find_top(pictures: Pictures, rules: FileNames) -> str:
    """What stands before train/ and test/ in the names of the files: "", or "folder/"."""
    known = {name.casefold() for name in rules.folders}
    found = defaultdict(set)
    for name in pictures.files:
        parts = name.split("/")
        for depth, (split, folder) in enumerate(zip(parts[:-2], parts[1:-1], strict=True)):
            if split.casefold() in SPLITS and folder.casefold() in known:
                found["".join(f"{part}/" for part in parts[:depth])].add(split.casefold())
    whole = [top for top, splits in found.items() if len(splits) == len(SPLITS)]
    if not whole:
        raise DermError(
            f"{pictures.root} has no train/ and test/ with DermNet's {len(known)} folders, as "
            "Kaggle's shubhamgoel27/dermnet has"
        )
    return min(whole, key=lambda top: (top.count("/"), top))


def classify(folder: str, name: str, rules: FileNames, dermatitis: str) -> tuple[str, str]:
    """(disease, its prefix) of a file, or ("", why it is left out)."""
    if not folder:
        return "", "unknown folder"
    if not name.casefold().endswith(IMAGES):
        return "", "no picture"
    return label(name, rules, dermatitis)


def label(name: str, rules: FileNames, dermatitis: str = "wide") -> tuple[str, str]:
    """(disease, its prefix) of a picture's name, or ("", why it is left out)."""
    name = name.casefold()
    if rules.microscopy in name:
        return "", "histology"
    for disease, rule in rules.diseases.items():
        alike = any(part in name for part in rule.unlike)
        if alike and not prefix_of(name, rules, but=disease):
            return "", f"looks like {disease}"
    found = prefix_of(name, rules)
    if not found:
        return "", "another disease or no name"
    if dermatitis == "narrow" and found[1] in rules.diseases["dermatitis"].wide:
        return "", "dermatitis in the wide reading only"
    return found


def prefix_of(name: str, rules: FileNames, but: str = "") -> tuple[str, str] | None:
    """(disease, prefix) of the first disease but one with a prefix that begins the name."""
    for disease, rule in rules.diseases.items():
        for prefix in (*rule.prefixes, *rule.wide):
            if disease != but and name.startswith(prefix.casefold()):
                return disease, prefix
    return None
