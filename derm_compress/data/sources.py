"""One typed data set from any source: pictures, diseases, groups, splits, and a report on them. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from derm_compress.data import dialogue, photographs, splits
from derm_compress.data.dermnet import read_dermnet
from derm_compress.data.folders import Columns, Row, read_folder, read_pad_ufes_20
from derm_compress.data.items import SPLITS, Dataset, Item, save_dataset
from derm_compress.errors import DermError
from derm_compress.progress import track

SOURCES = {"dermnet": read_dermnet, "pad-ufes-20": read_pad_ufes_20, "folder": read_folder}


def load_source(
    source: str,
    *,
    data_root: Path | str | None = None,
    size: int = 72,
    seed: int = 0,
    n_train: int = 1737,
    n_test: int = 39,
    n_heldout: int = 0,
    n_dev: int = 0,
    max_unreadable: float = 0.05,
    min_side: int = 32,
    phash_distance: int = 4,
    embedding_distance: float = 0,
    min_train_share: float = 0.5,
    columns: Columns | None = None,
    labels: Mapping[str, str] | None = None,
    exclude_labels: Iterable[str] = (),
    dermatitis: str = "wide",
) -> tuple[Dataset, dict]:
    """A source's data set and a JSON-able report; the same arguments and files give the same bytes.

    `n_dev` images are taken out of train; `labels` maps spellings to diseases (None: those of diseases.yaml).
    Photographs: n_train 0 takes the rest; too few images give smaller sets, as the report's notes then say. Duplicates
    differ by at most `phash_distance` bits or, if it is not 0, have thumbnails within the cosine `embedding_distance`.
    """
    sizes = {"train": n_train, "test": n_test, "heldout": n_heldout, "dev": n_dev}
    share = {"seed": seed, "min_train_share": min_train_share}
    if source == "synthetic":
        dataset, found = _draw(sizes, size=size, **share)
    elif source in SOURCES:
        root = _check_root(source, data_root)
        known = dialogue.aliases() if labels is None else labels
        options = {"dermatitis": dermatitis} if source == "dermnet" else {}
        rows, told = SOURCES[source](root, columns or Columns(), known, exclude_labels, **options)
        if not rows:
            gone = sum(told["excluded"].values())
            raise DermError(
                f"no image left: {root} lists none with a wanted label ({gone} excluded)"
            )
        frame, images, unreadable = read(
            rows, size=size, min_side=min_side, max_unreadable=max_unreadable
        )
        frame["twin"] = twins(frame, images, phash_distance, embedding_distance)
        dataset, found = _arrange(frame, images, source, sizes, **share)
        found |= told | {"unreadable": unreadable}
    else:
        raise DermError(f"unknown source {source!r}; allowed: {', '.join(['synthetic', *SOURCES])}")
    return dataset, report(dataset, sizes) | found


def write_source(folder: Path, source: str, **how) -> None:
    """load_source, kept in a folder: the data set and report.json."""
    dataset, told = load_source(source, **how)
    save_dataset(folder, dataset)
    text = json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False)
    (Path(folder) / "report.json").write_text(text + "\n", encoding="utf-8")


def read_report(folder: Path) -> dict:
    return json.loads((Path(folder) / "report.json").read_text("utf-8"))


def _check_root(source: str, data_root: Path | str | None) -> Path:
    root = Path(data_root or "")
    if not data_root:
        raise DermError(f"source {source!r} needs data_root, the folder that holds its images")
    if not root.is_dir() or not any(root.iterdir()):
        state = "is empty" if root.is_dir() else "does not exist"
        raise DermError(f"data folder {root} {state}; put its images there, or correct data_root")
    return root


def _draw(sizes: Mapping[str, int], *, size: int, **share) -> tuple[Dataset, dict]:
    from derm_compress.data import synthetic  # here, since it needs the types above

    numbers = {f"n_{name}": sizes[name] for name in ("train", "test", "heldout")}
    drawn = synthetic.make(**numbers, size=size, seed=share["seed"])
    train = {item.group: Counter([item.disease]) for item in drawn.of("train")}
    home = splits.split(train, sizes={"dev": sizes["dev"]}, **share)
    items = tuple(replace(item, split=home.get(item.group, item.split)) for item in drawn.items)
    frame = pd.DataFrame({"id": [item.id for item in items]})
    frame["pixels"] = [photographs.pixel_hash(drawn.images[item.row]) for item in items]
    return Dataset(items, drawn.images), {"exact_duplicates": _repeats(frame, "pixels")}


def read(rows: Sequence[Row], *, size: int, min_side: int, max_unreadable: float):
    """Read photographs in the order of their ids; DermError if too many fail, or all of one disease.

    Returns a frame (id, disease, keys, pixels: sha256, perceptual: 64 bits), images [n, size, size, 3], and
    the unreadable files with their reasons.
    """
    images = np.empty((len(rows), size, size, 3), np.uint8)
    done, unreadable = [], []
    for row in track(sorted(rows, key=lambda row: row.id), "reading photographs", total=len(rows)):
        try:
            if row.path is None:
                raise FileNotFoundError("not in the data folder")
            image = photographs.read_rgb(row.path, size=size, min_side=min_side)
        except Exception as error:  # decoders raise nearly anything on damaged files
            reason = photographs.reason(error, row.path or Path(row.id))
            unreadable.append({"image": row.id, "disease": row.disease, "reason": reason})
            continue
        images[len(done)] = photographs.fit(image, size)
        hashes = photographs.pixel_hash(np.asarray(image)), photographs.perceptual_hash(image)
        done.append((row.id, row.disease, row.keys, *hashes))
    _check_unreadable(
        unreadable,
        {row.disease for row in rows} - {row[1] for row in done},
        len(rows),
        max_unreadable,
    )
    frame = pd.DataFrame(done, columns=["id", "disease", "keys", "pixels", "perceptual"])
    return frame.astype({"perceptual": np.uint64}), images[: len(done)], unreadable


def _check_unreadable(unreadable: list[dict], emptied: set[str], n: int, allowed: float) -> None:
    some = "; ".join(f"{bad['image'][:80]} ({bad['reason']})" for bad in unreadable[:3])
    if len(unreadable) > allowed * n:
        share = f"{len(unreadable)} of {n} images cannot be read, more than max_unreadable = {allowed:g}"
        raise DermError(f"{share}: {some}; repair or unlist them, or raise max_unreadable")
    if emptied:
        names = ", ".join(sorted(emptied))
        raise DermError(
            f"no image left of {names}: {some}; repair them or put the class in exclude_labels"
        )


def twins(
    frame: pd.DataFrame, images: np.ndarray, distance: int, embedding_distance: float
) -> np.ndarray:
    """Label [N] of pictures that are alike by perceptual hash or, if asked, by thumbnail."""
    alike = splits.near(frame.perceptual.to_numpy(), distance)
    if not embedding_distance:
        return alike
    near = splits.near_vectors(photographs.thumbnails(images), embedding_distance)
    return splits.join(
        [(f"hash={one}", f"thumbnail={other}") for one, other in zip(alike, near, strict=True)]
    )


def _arrange(
    frame: pd.DataFrame, images: np.ndarray, source: str, sizes: Mapping[str, int], **share
):
    """Photographs as a data set: duplicates (`twin`) joined with patients and lesions, then split by group."""
    joined = splits.join(
        [(f"twin={twin}", *keys) for twin, keys in zip(frame.twin, frame["keys"], strict=True)]
    )
    frame["group"] = frame.groupby(joined)["id"].transform("min")
    contested = frame[frame.groupby("twin").disease.transform("nunique") > 1]
    counts = {group: Counter(diseases) for group, diseases in frame.groupby("group").disease}
    # pictures that are alike and labelled differently are no ground to be tested on
    home = splits.split(counts, sizes=sizes, train_only=set(contested.group), **share)
    kept = frame.assign(split=frame.group.map(home)).dropna(subset="split")
    columns = zip(kept.id, kept.split, kept.disease, kept.group, strict=True)
    items = tuple(Item(*values, row, {}, source) for row, values in enumerate(columns))
    exact, alike = _repeats(frame, "pixels"), _repeats(frame, "twin")
    found = {
        "exact_duplicates": exact,
        "perceptual_duplicates": [group for group in alike if group not in exact],
        "label_conflicts": _repeats(contested, "twin"),
        "unused": len(frame) - len(kept),
        "test_images": kept[kept.split == "test"]
        .set_index("id")
        .pixels.to_dict(),  # which pictures, without them
    }
    return Dataset(items, images[kept.index]), found


def _repeats(frame: pd.DataFrame, column: str) -> list[list[str]]:
    """The ids that share a value of `column`, where there are two or more."""
    return sorted(sorted(ids) for _, ids in frame.groupby(column)["id"] if len(ids) > 1)


def report(dataset: Dataset, sizes: Mapping[str, int]) -> dict:
    """Counts by split and disease, groups, and notes: sentences on whatever is less than was asked for."""
    frame = dataset.frame()
    counts = {name: Counter(part.disease) for name, part in frame.groupby("split")}
    got = {name: counts.get(name, Counter()).total() for name in SPLITS}
    got["train"] += got["dev"]
    if sizes["test"] and not got["test"]:
        raise DermError(
            "no image left for the test set: too few images, or all of a class in one group; add images"
        )
    notes = [
        f"asked for {n} {name} images, got {got[name]}"
        for name, n in sizes.items()
        if got[name] < n
    ]
    notes += [
        f"no test image of {d}" for d in sorted(set(frame.disease) - set(counts.get("test", ())))
    ]
    return {
        "source": frame.source[0],
        "size": dataset.images.shape[1],
        "asked": dict(sizes),
        "counts": {name: dict(sorted(counts[name].items())) for name in SPLITS if name in counts},
        "groups": frame.group.nunique(),
        "largest_group": int(frame.group.value_counts().max()),
        "notes": notes,
    }
