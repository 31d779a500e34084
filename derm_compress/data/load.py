"""A data set from any source by its name, and a report of what was kept and left out. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from derm_compress.data import photographs, synthetic
from derm_compress.data.items import SPLITS, Dataset, save_dataset
from derm_compress.data.preset import preset_names, read_preset
from derm_compress.data.request import Request
from derm_compress.data.rows import Survey, dataset_of, repeats
from derm_compress.data.sources import folder, names
from derm_compress.errors import DermError
from derm_compress.files import read_json, write_json

DRAWN, FOLDER = "synthetic", "folder"
SOURCES = (DRAWN, FOLDER, *preset_names())
COLUMNS = ("image_column", "image_suffix", "label_column", "onehot_columns")
OF_TABLES = ("table", "label_map", "group_columns", "subgroup_columns")
OF_FILES = ("exclude_labels", "max_unreadable", "phash_distance", "embedding_distance")


def check_request(request: Request) -> None:
    """DermError for a source that nobody knows, or for parameters that it would ignore."""
    if request.source not in SOURCES:
        raise DermError(f"unknown source {request.source!r}; allowed: {', '.join(SOURCES)}")
    given = [name for name in ignored(request.source) if request.asks(name)]
    if given:
        instead = ", or set source: folder" if {*given} - {*ignored(FOLDER)} else ""
        told = f"{', '.join(given)}: not read by source {request.source}"
        raise DermError(f"{told}; leave it out{instead}")


def ignored(source: str) -> tuple[str, ...]:
    """The parameters of other sources, of which this one reads none."""
    if source == DRAWN:
        return (*COLUMNS, *OF_TABLES, *OF_FILES, "dermatitis")
    if source == FOLDER:
        return ("dermatitis",)
    return (*COLUMNS, *OF_TABLES) if read_preset(source).names else (*COLUMNS, "dermatitis")


def survey(request: Request) -> Survey:
    """What a source of photographs would read, before one is opened."""
    check_request(request)
    if request.source == DRAWN:
        raise DermError(f"source {DRAWN} draws its pictures: there is no folder to look at")
    if request.source == FOLDER:
        return folder.survey(request)
    preset = read_preset(request.source)
    return names.survey(request, preset.names) if preset.names else folder.survey(request, preset)


def load_source(request: Request) -> tuple[Dataset, dict]:
    """A data set and a JSON-able report; the same request and files give the same bytes."""
    if request.source == DRAWN:
        check_request(request)
        dataset, found = drawn(request)
    else:
        dataset, found = dataset_of(survey(request), request)
    return dataset, report(dataset, request.sizes, found)


def drawn(request: Request) -> tuple[Dataset, dict]:
    """Synthetic pictures with known facts: nothing to download, no patients."""
    sizes = {f"n_{name}": size for name, size in request.sizes.items()}
    dataset = synthetic.make(**sizes, size=request.image_size, seed=request.seed)
    frame = dataset.frame()
    frame["pixels"] = [photographs.pixel_hash(dataset.images[row]) for row in frame.row]
    return dataset, {"exact_duplicates": repeats(frame, "pixels")}


def write_source(path: Path, request: Request) -> None:
    """load_source, kept in a folder: the data set and report.json."""
    dataset, told = load_source(request)
    save_dataset(path, dataset)
    write_json(Path(path) / "report.json", told)


def read_report(path: Path) -> dict:
    return read_json(Path(path) / "report.json")


def report(dataset: Dataset, sizes: Mapping[str, int], found: Mapping) -> dict:
    """Counts by split and disease, groups, and notes on whatever is less than was asked for."""
    frame = dataset.frame()
    counts = {name: Counter(part.disease) for name, part in frame.groupby("split")}
    got = {name: counts.get(name, Counter()).total() for name in SPLITS}
    got["train"] += got["dev"]
    untested = sorted({*frame.disease, *found.get("untested", ())} - {*counts.get("test", ())})
    reasons = dict.fromkeys(untested, f"n_test is {sizes['test']}") | dict(
        found.get("untested", {})
    )
    missing = [f"no test image of {disease}: {reasons[disease]}" for disease in untested]
    if sizes["test"] and not got["test"]:
        advice = "add images, or name a column that is no identity in subgroup_columns"
        raise DermError(f"no image left for the test set: {'; '.join(missing)[:350]}; {advice}")
    notes = [
        f"asked for {n} {name} images, got {got[name]}"
        for name, n in sizes.items()
        if got[name] < n
    ]
    return {
        "source": frame.source[0],
        "size": dataset.images.shape[1],
        "asked": dict(sizes),
        "counts": {name: dict(sorted(counts[name].items())) for name in SPLITS if name in counts},
        "groups": frame.group.nunique(),
        "largest_group": int(frame.group.value_counts().max()),
        **{name: value for name, value in found.items() if name != "untested"},
        "notes": [*notes, *missing, *found.get("notes", ())],
    }
