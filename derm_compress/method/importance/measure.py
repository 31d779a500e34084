"""Values of all units by all rankings, kept as soon as they are there, and frames of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from derm_compress.data.items import Item
from derm_compress.errors import DermError
from derm_compress.method.importance import scoring
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.rankings import Ranking, check_weights, rankings
from derm_compress.model import anatomy, oom
from derm_compress.model.units import Unit
from derm_compress.progress import track


def protected_blocks(model, names: Sequence[int]) -> tuple[int, ...]:
    """Block indices; negative ones count from the end. The paper protects 0, 1 and -1."""
    total = len(anatomy.blocks(model))
    if bad := [n for n in names if not -total <= n < total]:
        raise DermError(
            f"protected blocks {bad}: the model has blocks 0 to {total - 1} (or -1 to -{total})"
        )
    return tuple(sorted({n % total for n in names}))


def measure_importance(names: Iterable[str], c: Calibration, journal) -> pd.DataFrame:
    """Rows of all rankings: ranking, unit, block, part and the criterion's columns."""
    found, blocks = rankings(names), len(anatomy.blocks(c.model))
    if not anatomy.has_values(c.model):
        check_weights(found)
    frames = []
    for ranking in {ranking.base: ranking for ranking in found}.values():
        frames.append(unit_rows(ranking, c, ranking.units(blocks), journal=journal))
        frames[-1].insert(0, "ranking", ranking.base)
    none = pd.DataFrame(columns=["ranking", "unit", "item", "value"])
    frame = pd.concat(frames or [none], ignore_index=True).astype({"value": float})
    units = [Unit.of(unit) for unit in frame.unit]
    frame["block"] = [unit.block for unit in units]
    frame["part"] = [unit.part or "block" for unit in units]
    return frame


def unit_rows(
    ranking: Ranking, c: Calibration, units: Sequence[Unit], *, journal, removed=()
) -> pd.DataFrame:
    """The criterion's rows for units, each kept in the journal as soon as it is there.

    `removed` units are out of c.model already. DermError where a value is not a number.
    """
    c = seen_by(ranking, c)
    state = f"{ranking.base} without [{' '.join(map(str, removed))}]"

    def key(unit: Unit | str, item: str, question: str) -> str:
        return f"{state}: {unit}, {item}, {question}"

    def keys(unit: Unit, items: Sequence[Item]) -> list[str]:
        """Of all results of a unit, as many for each of its items."""
        asked = itertools.product(items, ranking.criterion.questions)
        return [key(unit, item.id, question) for item, question in asked]

    def fill(batch_size: int) -> None:
        todo = []
        # batches are the same ones whatever is missing: a neighbour may move a last digit
        for batch in c.batches(batch_size):
            lacking = [u for u in units if not journal.done.keys() >= set(keys(u, batch.items))]
            todo.append((batch, lacking))
        total = sum(len(keys(unit, batch.items)) for batch, lacking in todo for unit in lacking)
        made = scored(ranking, todo, removed)
        for row in track(made, f"{ranking.base}: results by unit and picture", total):
            if not math.isfinite(row["value"]):
                raise DermError(
                    f"ranking {ranking.name}: unit {row['unit']} gives {row['value']}; "
                    "check the model's weights"
                )
            place = key(row["unit"], row["item"], row.get("question", ""))
            if place not in journal.done:
                journal.add(place, row)

    oom.halved(fill, c.batch_size, f"ranking {ranking.name}")
    return pd.DataFrame([journal.done[place] for unit in units for place in keys(unit, c.items)])


def seen_by(ranking: Ranking, c: Calibration) -> Calibration:
    """What a ranking looks at: one item without a name, where it makes no difference which."""
    if ranking.items_alike:
        c = dataclasses.replace(c, items=[dataclasses.replace(c.items[0], id="")])
    return dataclasses.replace(c, text_only=ranking.text_only, seed=c.seed + ranking.draw)


def scored(
    ranking: Ranking, todo: Sequence[tuple[Calibration, list[Unit]]], removed: Sequence[Unit]
) -> Iterator[dict]:
    """The criterion's rows for units of each batch, units as text by their original names."""
    criterion = getattr(scoring, ranking.criterion.name)
    for batch, units in todo:
        original = dict(zip(positions(units, removed), units, strict=True))
        for row in criterion(batch, list(original)) if units else ():
            yield row | {"unit": str(original[row["unit"]])}


def positions(units: Sequence[Unit], removed: Sequence[Unit]) -> list[Unit]:
    """Units as they are called in a model that lacks whole blocks."""
    gone = {s for unit in removed for s in unit.sublayers}
    whole = [s // 2 for s in gone if s % 2 and s - 1 in gone]
    return [unit.at(unit.block - sum(block < unit.block for block in whole)) for unit in units]


def importance_values(measured: pd.DataFrame) -> pd.DataFrame:
    """One value a ranking, unit and picture, the mean over its questions."""
    keys = ["ranking", "unit", "block", "part", "item"]
    return measured.groupby(keys, sort=False, as_index=False).value.mean()


def importance_scores(values: pd.DataFrame, protected: Sequence[int]) -> pd.DataFrame:
    """Mean value of each unit: criterion, block, part, score, rank (0 goes first).

    For output similarity Eq. 5, as 1 - the mean cosine.
    """
    keys = ["ranking", "unit", "block", "part"]
    frame = values.groupby(keys, sort=False, as_index=False).value.mean()
    free = ~frame.block.isin(protected)
    frame["rank"] = frame[free].groupby("ranking").value.rank(method="first") - 1
    named = frame.rename(columns={"ranking": "criterion", "value": "score"})
    return named[["criterion", "block", "part", "score", "rank"]]


def importance_draws(
    names: Sequence[str],
    c: Calibration,
    items: Sequence[Item],
    *,
    importance_draws: int,
    seed: int,
    journal,
) -> pd.DataFrame:
    """The first ranking's scores by further draws of as many pictures, which share none.

    Columns: draw (from 1 on; the study's own is 0 and not repeated), block, score. Draws end where
    the pictures do.
    """
    known, size = {item.id for item in c.items}, len(c.items)
    others = [item for item in items if item.id not in known]
    order = np.random.default_rng([seed, 17]).permutation(len(others))
    frames = [pd.DataFrame({"draw": [], "block": [], "score": []})]
    for draw in range(1, min(importance_draws, 1 + len(others) // size)):
        part = [others[i] for i in order[(draw - 1) * size : draw * size]]
        measured = measure_importance(names[:1], dataclasses.replace(c, items=part), journal)
        scores = importance_scores(importance_values(measured), ())
        frames.append(scores[["block", "score"]].assign(draw=draw))
    every = pd.concat(frames, ignore_index=True)
    return every.astype({"draw": int, "block": int, "score": float})
