"""A data set from any source by its name, and a report of what was kept and left out. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from derm_compress.data.items import SPLITS, Dataset, save_dataset
from derm_compress.data.request import Request
from derm_compress.data.sources import dermnet, drawn, folder
from derm_compress.errors import DermError
from derm_compress.files import read_json, write_json

SOURCES: dict[str, Callable[[Request], tuple[Dataset, dict]]] = {
    "synthetic": drawn.read,
    "dermnet": dermnet.read,
    "pad-ufes-20": folder.preset("pad-ufes-20.yaml"),
    "folder": folder.read,
}


def load_source(request: Request) -> tuple[Dataset, dict]:
    """A data set and a JSON-able report; the same request and files give the same bytes."""
    if request.source not in SOURCES:
        raise DermError(f"unknown source {request.source!r}; allowed: {', '.join(SOURCES)}")
    dataset, found = SOURCES[request.source](request)
    return dataset, report(dataset, request.sizes) | found


def write_source(path: Path, request: Request) -> None:
    """load_source, kept in a folder: the data set and report.json."""
    dataset, told = load_source(request)
    save_dataset(path, dataset)
    write_json(Path(path) / "report.json", told)


def read_report(path: Path) -> dict:
    return read_json(Path(path) / "report.json")


def report(dataset: Dataset, sizes: Mapping[str, int]) -> dict:
    """Counts by split and disease, groups, and notes on whatever is less than was asked for."""
    frame = dataset.frame()
    counts = {name: Counter(part.disease) for name, part in frame.groupby("split")}
    got = {name: counts.get(name, Counter()).total() for name in SPLITS}
    got["train"] += got["dev"]
    if sizes["test"] and not got["test"]:
        why = "too few images, or all of a class in one group"
        raise DermError(f"no image left for the test set: {why}; add images")
    notes = [
        f"asked for {n} {name} images, got {got[name]}"
        for name, n in sizes.items()
        if got[name] < n
    ]
    untested = sorted(set(frame.disease) - set(counts.get("test", ())))
    notes += [f"no test image of {disease}" for disease in untested]
    return {
        "source": frame.source[0],
        "size": dataset.images.shape[1],
        "asked": dict(sizes),
        "counts": {name: dict(sorted(counts[name].items())) for name in SPLITS if name in counts},
        "groups": frame.group.nunique(),
        "largest_group": int(frame.group.value_counts().max()),
        "notes": notes,
    }
