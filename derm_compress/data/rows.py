"""Labelled photographs -> a data set: read, duplicates joined, split by group. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from derm_compress.data import photographs, splits
from derm_compress.data.items import Dataset, Item
from derm_compress.data.request import Request
from derm_compress.errors import DermError
from derm_compress.progress import track


@dataclass(frozen=True)
class Row:
    """A labelled photograph; path None: not there, and why. Rows that share a key stay together."""

    id: str
    path: Path | None
    disease: str
    keys: tuple[str, ...] = ()
    subgroups: dict[str, str] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Survey:
    """What a source would read, before a picture is opened."""

    rows: tuple[Row, ...]
    told: dict  # what the report adds: "excluded" (counts by reason) at least, "notes"
    problems: tuple[str, ...] = ()  # each stops a run
    unknown: dict[str, int] = field(default_factory=dict)  # labels nobody knows, and how often


def check_survey(survey: Survey, request: Request) -> None:
    """DermError where nothing can be read, or not as it was meant."""
    for problem in survey.problems:
        raise DermError(problem)
    if not survey.rows:
        none = f"no image left: {request.root} lists none with a wanted label"
        raise DermError(f"{none} ({sum(survey.told['excluded'].values())} excluded)")
    missing = [unread(row, FileNotFoundError(row.why)) for row in survey.rows if row.path is None]
    check_readable(survey.rows, missing, request)


def check_readable(rows: Sequence[Row], unreadable: Sequence[dict], request: Request) -> None:
    """DermError if too many photographs cannot be read, or all of a disease."""
    some = "; ".join(f"{bad['image'][:80]} ({bad['reason']})" for bad in unreadable[:3])
    if len(unreadable) > request.max_unreadable * len(rows):
        share = f"{len(unreadable)} of {len(rows)} images cannot be read"
        limit = f"more than max_unreadable = {request.max_unreadable:g}"
        raise DermError(f"{share}, {limit}: {some}; repair or unlist them, or raise max_unreadable")
    left = Counter(row.disease for row in rows) - Counter(bad["disease"] for bad in unreadable)
    if emptied := sorted({row.disease for row in rows} - set(left)):
        advice = "repair them or put the class in exclude_labels"
        raise DermError(f"no image left of {', '.join(emptied)}: {some}; {advice}")


def unread(row: Row, error: Exception) -> dict:
    """A photograph that cannot be read, as the report names it."""
    reason = photographs.reason(error, row.path or Path(row.id))
    return {"image": row.id, "disease": row.disease, "reason": reason}


def dataset_of(survey: Survey, request: Request) -> tuple[Dataset, dict]:
    """The data set of a source's photographs, and what was found in reading them."""
    check_survey(survey, request)
    rows, told = survey.rows, survey.told
    frame, images, unreadable = read(rows, request)
    frame["twin"] = twins(frame, images, request.phash_distance, request.embedding_distance)
    dataset, found = arrange(frame, images, request)
    return dataset, found | told | {"unreadable": unreadable}


def read(rows: Sequence[Row], request: Request) -> tuple[pd.DataFrame, np.ndarray, list[dict]]:
    """Read photographs in the order of their ids; DermError if too many fail, or all of a disease.

    Returns a frame (id, disease, keys, subgroups, pixels: sha256, perceptual: 64 bits), images
    [n, size, size, 3] and the unreadable files with their reasons.
    """
    size = request.image_size
    images = np.empty((len(rows), size, size, 3), np.uint8)
    done, unreadable = [], []
    for row in track(sorted(rows, key=lambda row: row.id), "reading photographs", total=len(rows)):
        try:
            if row.path is None:
                raise FileNotFoundError(row.why)
            image = photographs.read_rgb(row.path, size=size)
        except Exception as error:  # decoders raise nearly anything on damaged files
            unreadable.append(unread(row, error))
            continue
        images[len(done)] = photographs.fit(image, size)
        pixels = photographs.pixel_hash(np.asarray(image))
        perceptual = photographs.perceptual_hash(image)
        done.append((row.id, row.disease, row.keys, row.subgroups, pixels, perceptual))
    columns = ["id", "disease", "keys", "subgroups", "pixels", "perceptual"]
    frame = pd.DataFrame(done, columns=columns)
    check_readable(rows, unreadable, request)
    return frame.astype({"perceptual": np.uint64}), images[: len(done)], unreadable


def twins(
    frame: pd.DataFrame, images: np.ndarray, distance: int, embedding_distance: float
) -> np.ndarray:
    """Label [N] of pictures that are alike by perceptual hash or, if asked, by thumbnail."""
    alike = splits.near(frame.perceptual.to_numpy(), distance)
    if not embedding_distance:
        return alike
    near = splits.near_vectors(photographs.thumbnails(images), embedding_distance)
    pairs = zip(alike, near, strict=True)
    return splits.join([(f"hash={one}", f"thumbnail={other}") for one, other in pairs])


def arrange(frame: pd.DataFrame, images: np.ndarray, request: Request) -> tuple[Dataset, dict]:
    """Duplicates (`twin`) are joined with patients and lesions, then split by group."""
    pairs = zip(frame.twin, frame["keys"], strict=True)
    joined = splits.join([(f"twin={twin}", *keys) for twin, keys in pairs])
    frame["group"] = frame.groupby(joined)["id"].transform("min")
    contested = frame[frame.groupby("twin").disease.transform("nunique") > 1]
    groups = {group: Counter(diseases) for group, diseases in frame.groupby("group").disease}
    apart = set(contested.group)  # alike and labelled differently: no ground for a test
    home = splits.split(groups, sizes=request.sizes, seed=request.seed, train_only=apart)
    kept = frame.assign(split=frame.group.map(home)).dropna(subset="split")
    columns = zip(kept.id, kept.split, kept.disease, kept.group, kept.subgroups, strict=True)
    items = [
        Item(*values, row, {}, request.source, subgroups)
        for row, (*values, subgroups) in enumerate(columns)
    ]
    exact = repeats(frame, "pixels")
    tested = kept[kept.split == "test"].set_index("id")
    untested = sorted({*frame.disease} - {*tested.disease})
    found = {
        "untested": {
            disease: splits.why_untested(disease, groups, request.n_test, apart)
            for disease in untested
        },
        "exact_duplicates": exact,
        "perceptual_duplicates": [ids for ids in repeats(frame, "twin") if ids not in exact],
        "label_conflicts": repeats(contested, "twin"),
        "unused": len(frame) - len(kept),
        "test_images": tested.pixels.to_dict(),  # which pictures, without them
    }
    return Dataset(tuple(items), images[kept.index]), found


def repeats(frame: pd.DataFrame, column: str) -> list[list[str]]:
    """The ids that share a value of `column`, where there are two or more."""
    return sorted(sorted(ids) for _, ids in frame.groupby(column)["id"] if len(ids) > 1)
