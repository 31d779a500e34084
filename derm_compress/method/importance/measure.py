"""Values of all units by all rankings, kept as soon as they are there, and frames of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import pandas as pd

from derm_compress.data.items import Item
from derm_compress.errors import DermError
from derm_compress.method.importance import scoring
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.rankings import Ranking, rankings
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
    weigh = [ranking.name for ranking in found if ranking.criterion.weighs]
    if weigh and not anatomy.has_values(c.model):
        raise DermError(
            f"rankings {weigh} need weights, and device meta has none: "
            "take published, last or random-0"
        )
    frames = [pd.DataFrame({"ranking": [], "unit": [], "item": [], "value": []}, dtype=object)]
    for ranking in {ranking.base: ranking for ranking in found}.values():
        frame = unit_rows(ranking, c, ranking.units(blocks), journal=journal)
        frame.insert(0, "ranking", ranking.base)
        frames.append(frame)
    frame = pd.concat(frames[1:] or frames, ignore_index=True).astype({"value": float})
    units = [Unit.of(unit) for unit in frame.unit]
    frame["block"] = [unit.block for unit in units]
    frame["part"] = [unit.part or "block" for unit in units]
    return frame


def unit_rows(
    ranking: Ranking,
    c: Calibration,
    units: Sequence[Unit],
    *,
    journal,
    removed: Sequence[Unit] = (),
) -> pd.DataFrame:
    """The criterion's rows for units, each kept in the journal as soon as it is there.

    `removed` units are out of c.model already; values are then those of the model without them.
    Raises DermError where a value is not a number.
    """
    c = seen_by(ranking, c)
    questions = ranking.criterion.questions
    gone = " ".join(map(str, removed))

    def key(unit: Unit | str, item: str, question: str) -> str:
        return f"{ranking.base} without [{gone}]: {unit}, {item}, {question}"

    def lacking(items: Sequence[Item]) -> list[Unit]:
        """Units that lack a result for one of these items."""
        asked = list(itertools.product([item.id for item in items], questions))
        return [unit for unit in units if any(key(unit, *one) not in journal.done for one in asked)]

    def fill(batch_size: int) -> None:
        sized = dataclasses.replace(c, batch_size=batch_size)
        # batches are the same ones whatever is missing: a neighbour may move a last digit
        todo = [(items, lacking(items)) for items in sized.batches()]
        total = sum(len(items) * len(some) for items, some in todo) * len(questions)
        made = scored(ranking, sized, todo, removed)
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
    wanted = itertools.product(units, [item.id for item in c.items], questions)
    return pd.DataFrame([journal.done[key(*one)] for one in wanted])


def seen_by(ranking: Ranking, c: Calibration) -> Calibration:
    """What a ranking looks at: one item without a name, where it makes no difference which."""
    if ranking.items_alike:
        c = dataclasses.replace(c, items=[dataclasses.replace(c.items[0], id="")])
    return dataclasses.replace(c, text_only=ranking.text_only, seed=c.seed + ranking.draw)


def scored(
    ranking: Ranking,
    c: Calibration,
    todo: Sequence[tuple[Sequence[Item], list[Unit]]],
    removed: Sequence[Unit],
) -> Iterator[dict]:
    """The criterion's rows for units of each batch, units as text by their original names."""
    criterion: Callable = getattr(scoring, ranking.criterion.name)
    for items, units in todo:
        original = dict(zip(positions(units, removed), units, strict=True))
        if units:
            for row in criterion(dataclasses.replace(c, items=items), list(original)):
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


def answers_without_blocks(measured: pd.DataFrame) -> pd.DataFrame:
    """The answers behind output similarity: block, item, question, answer, similarity, drafts."""
    columns = ["block", "item", "question", "answer", "value", "accepted", "tokens", "near_ties"]
    told = measured[measured.ranking == "output_similarity"].reindex(columns=columns)
    told["similarity"] = 1 - told.value
    return told.drop(columns="value").reset_index(drop=True)
