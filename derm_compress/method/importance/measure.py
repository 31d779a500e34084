"""Which units go first: rankings by any criterion, once or anew after each removal, and the plans that they give."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.errors import DermError
from derm_compress.method.importance.criteria import CRITERIA, Calibration
from derm_compress.method.importance.rankings import PUBLISHED, Ranking, rankings
from derm_compress.method.pruning.plan import Plan, published_plan
from derm_compress.model import anatomy, oom, removal
from derm_compress.progress import track


def protected_blocks(model, names: Sequence[int]) -> tuple[int, ...]:
    """Block indices from a parameter; negative ones count from the end. The paper protects 0, 1 and -1."""
    total = len(anatomy.blocks(model))
    if bad := [n for n in names if not -total <= n < total]:
        raise DermError(
            f"protected blocks {bad}: the model has blocks 0 to {total - 1} (or -1 to -{total})"
        )
    return tuple(sorted({n % total for n in names}))


def units_of(ranking: Ranking, blocks: int) -> list[removal.Unit]:
    """All units that a ranking ranks, those of protected blocks too."""
    return [f"{b}.{part}" for b in range(blocks) for part in ranking.parts] or list(range(blocks))


def rows(
    ranking: Ranking, c: Calibration, units: Sequence[removal.Unit], *, journal, removed=()
) -> pd.DataFrame:
    """The criterion's rows for units by their original names, each kept in the journal as soon as it is there.

    `removed` units are out of c.model already; values are then those of the model without them. Raises DermError where
    a value is not a number.
    """
    how = CRITERIA[ranking.criterion]
    c = dataclasses.replace(c, text_only=ranking.text_only, seed=c.seed + ranking.draw)
    alike = not how.calibrated or (
        how.asks_alone and c.text_only
    )  # no picture, no answer: all items are one
    c = dataclasses.replace(c, items=c.items[:1] if alike else c.items)
    wanted = list(
        itertools.product(units, [""] if alike else [item.id for item in c.items], how.questions)
    )
    state = f"{ranking.base()} without {list(removed)}:"

    def fill(batch_size: int) -> None:
        missing = [key for key in wanted if f"{state} {key}" not in journal.done]
        if missing:
            _fill(
                ranking,
                dataclasses.replace(c, batch_size=batch_size),
                missing,
                state,
                journal,
                units,
                removed,
            )

    oom.halved(fill, c.batch_size, f"ranking {ranking.name}")
    return pd.DataFrame([journal.done[f"{state} {key}"] for key in wanted])


def _fill(
    ranking: Ranking, c: Calibration, missing: list[tuple], state: str, journal, units, removed
) -> None:
    """Puts the rows of units that lack a result for an item of a batch into the journal, batch by batch."""
    how, alike = CRITERIA[ranking.criterion], not missing[0][1]
    parts = (
        c.batches()
    )  # the same ones whatever is missing: what stands beside an item may move a last digit
    lack = [
        _lacking(missing, units, [""] if alike else [item.id for item in part]) for part in parts
    ]
    total = sum(len(todo) * len(part) for part, todo in zip(parts, lack, strict=True)) * len(
        how.questions
    )
    each = zip(parts, lack, strict=True)
    made = (
        _rows(how, dataclasses.replace(c, items=part), todo, removed) for part, todo in each if todo
    )
    for row in track(
        itertools.chain.from_iterable(made), f"{ranking.base()}: results by unit and picture", total
    ):
        row |= {"item": ""} if alike else {}
        if not math.isfinite(row["value"]):
            raise DermError(
                f"ranking {ranking.name}: unit {row['unit']} gives {row['value']}; check the model's weights"
            )
        key = f"{state} {(row['unit'], row['item'], row.get('question', ''))}"
        if key not in journal.done:
            journal.add(key, row)


def _lacking(
    missing: Sequence[tuple], units: Sequence[removal.Unit], items: Sequence[str]
) -> list[removal.Unit]:
    """The units that lack a result for one of the items."""
    short = {unit for unit, item, _ in missing if item in items}
    return [unit for unit in units if unit in short]


def _rows(
    how, c: Calibration, units: Sequence[removal.Unit], removed: Sequence[removal.Unit]
) -> Iterator[dict]:
    """The criterion's rows, with units by their original names."""
    now = dict(zip(positions(units, removed), units, strict=True))
    for row in how.rows(c, list(now)):
        yield row | {"unit": now[row["unit"]]}


def positions(units: Sequence[removal.Unit], removed: Sequence[removal.Unit]) -> list[removal.Unit]:
    """What units are called in a model that lacks whole blocks: blocks count anew, sublayers follow their block."""
    gone = {s for unit in removed for s in range(*removal.span(unit))}
    shift = {
        u: sum({2 * b, 2 * b + 1} <= gone for b in range(removal.span(u)[0] // 2)) for u in units
    }
    return [
        unit - n if isinstance(unit, int) else removal.name_of(removal.span(unit)[0] - 2 * n)
        for unit, n in shift.items()
    ]


def measure(names: Iterable[str], c: Calibration, journal) -> pd.DataFrame:
    """Rows of all rankings, scored once on the whole model: ranking, unit, block, part and the criterion's columns."""
    frames, blocks, found = [], len(anatomy.blocks(c.model)), rankings(names)
    if not anatomy.has_values(c.model) and (
        weigh := [r.name for r in found if CRITERIA[r.criterion].weighs]
    ):
        raise DermError(
            f"rankings {weigh} need weights, and device meta has none: take published, last or random-0"
        )
    for ranking in {r.base(): r for r in found}.values():
        frame = rows(ranking, c, units_of(ranking, blocks), journal=journal)
        frame.insert(0, "ranking", ranking.base())
        frames.append(frame)
    nothing = pd.DataFrame(columns=["ranking", "unit", "item", "value"]).astype({"value": float})
    frame = pd.concat(frames or [nothing], ignore_index=True)
    spans = [removal.span(unit) for unit in frame.unit]
    frame["block"] = [first // 2 for first, _ in spans]
    frame["part"] = [
        "block" if after - first == 2 else removal.SUBLAYERS[first % 2] for first, after in spans
    ]
    return frame.assign(unit=frame.unit.astype(str))


def values(measured: pd.DataFrame) -> pd.DataFrame:
    """One value a ranking, unit and picture, the mean over its questions."""
    keys = ["ranking", "unit", "block", "part", "item"]
    return measured.groupby(keys, sort=False, as_index=False).value.mean()


def similarity(measured: pd.DataFrame) -> pd.DataFrame:
    """The answers behind output similarity: block, item, question, answer, cosine, what of the draft stood."""
    told = measured[measured.ranking == "output_similarity"].reindex(
        columns=["block", "item", "question", "answer", "value", "accepted", "tokens", "near_ties"]
    )
    return told.assign(similarity=1 - told.value).drop(columns="value").reset_index(drop=True)


def scores(values: pd.DataFrame, protected: Sequence[int]) -> pd.DataFrame:
    """Mean value of each unit: criterion, block, part, score, rank (0 goes first; protected units have none)."""
    keys = ["ranking", "unit", "block", "part"]
    frame = values.groupby(keys, sort=False, as_index=False).value.mean()
    free = ~frame.block.isin(protected)
    frame["rank"] = frame[free].groupby("ranking").value.rank(method="first") - 1
    named = frame.rename(columns={"ranking": "criterion", "value": "score"})
    return named[["criterion", "block", "part", "score", "rank"]]


def plans(
    names: Iterable[str],
    measured: pd.DataFrame,
    c: Calibration,
    *,
    protected,
    most: int,
    fingerprint: str,
    journal,
) -> dict[str, dict]:
    """Every ranking's pruning plan as JSON-able data; iterative ones go as far as `most` units."""
    found, blocks, told = (
        {ranking.name: ranking for ranking in rankings(names)},
        len(anatomy.blocks(c.model)),
        values(measured),
    )
    made = []
    for name in dict.fromkeys(names):
        if name == PUBLISHED:
            made.append(published_plan())
            made[-1].check(blocks=blocks, fingerprint=fingerprint)
            continue
        ranking = found[name]
        spared = () if "unprotected" in ranking.options else tuple(protected)
        mean = told[told.ranking == ranking.base()].groupby("unit").value.mean()
        first = {
            u: float(mean[str(u)])
            for u in units_of(ranking, blocks)
            if removal.span(u)[0] // 2 not in spared
        }
        order, starts = sorted(first, key=lambda unit: (first[unit], removal.span(unit))), ()
        scored = [first[unit] for unit in order]
        if "iterative" in ranking.options:
            order, scored = iterative(ranking, c, first, most=most, journal=journal)
        if "contiguous" in ranking.options:
            order, (starts, scored) = (
                (),
                contiguous(run_scores(measured, ranking, first), list(first)),
            )
        about = (
            tuple(order),
            spared,
            blocks,
            fingerprint,
            tuple(starts),
            tuple(scored),
            settings(ranking, c),
        )
        made.append(Plan(name, *about))
        if "iterative" in ranking.options:
            made[-1].settings["iterative_blocks"] = most
    return {plan.criterion: plan.to_dict() for plan in made}


def settings(ranking: Ranking, c: Calibration) -> dict:
    """What a plan says of how its scores came about."""
    how = CRITERIA[ranking.criterion]
    told = {
        "source": how.source,
        "reads": how.reads,
        "cost": how.cost,
        "options": sorted(ranking.options),
    }
    told["cost"] += ", for every removal" if "iterative" in ranking.options else ""
    if how.calibrated:
        told |= {"items": [item.id for item in c.items], "text_only": ranking.text_only}
    if ranking.criterion == "output_similarity":
        told |= {"max_new_tokens": c.max_new_tokens, "embedder": getattr(c.embed, "name", "")}
    return told | ({"seed": c.seed + ranking.draw} if ranking.criterion == "random" else {})


def iterative(
    ranking: Ranking, c: Calibration, first: dict, *, most: int, journal
) -> tuple[list, list]:
    """Order and scores where the least important unit goes and the others are scored anew, compared with the whole."""
    order, scored, now = [], [], first
    if CRITERIA[ranking.criterion].asks_alone:
        c = dataclasses.replace(c, original=whole_answers(ranking, c, journal))
    for _ in track(range(min(most, len(first))), f"{ranking.name}: removals"):
        unit = min(now, key=lambda unit: (now[unit], removal.span(unit)))
        order.append(unit)
        scored.append(now[unit])
        others = [other for other in now if other != unit]
        if not others or len(order) == most:
            break
        with removal.without(c.model, order):
            frame = rows(ranking, c, others, journal=journal, removed=order)
        mean = frame.groupby("unit").value.mean()
        now = {other: float(mean[other]) for other in others}
    return order, scored


def whole_answers(ranking: Ranking, c: Calibration, journal) -> dict[tuple[str, str], str]:
    """The whole model's answers by (item, question), each kept in the journal as soon as it is there."""
    items = (
        c.items[:1] if ranking.text_only else c.items
    )  # without pictures all are one, as in rows()
    c = dataclasses.replace(c, text_only=ranking.text_only, items=items)
    state = f"{ranking.base()}: the whole model's answer to"

    def fill(size: int) -> None:
        parts = dataclasses.replace(
            c, batch_size=size
        ).batches()  # the same ones whatever is missing, as in _fill
        lack = [
            part
            for part in parts
            if any(f"{state} {key}" not in journal.done for key in _asked(part))
        ]
        for part in track(lack, f"{ranking.name}: pictures the whole model answers"):
            for row in dataclasses.replace(c, items=part, batch_size=size).written(()):
                if (key := f"{state} {row.key[1:]}") not in journal.done:
                    journal.add(key, c.text(row))

    oom.halved(fill, c.batch_size, f"ranking {ranking.name}")
    return {key: journal.done[f"{state} {key}"] for key in _asked(c.items)}


def _asked(items: Sequence[Item]) -> list[tuple[str, str]]:
    return [(item.id, kind) for item in items for kind in dialogue.QUESTIONS]


def run_scores(
    measured: pd.DataFrame, ranking: Ranking, first: dict
) -> dict[tuple[int, int], float]:
    """Score of every run of blocks (start, length): the criterion's own, or else the sum of its blocks'."""
    told = measured[measured.ranking == ranking.base()]
    if "runs" in told and told.runs.notna().any():
        means = {
            block: np.mean(np.stack(runs.to_list()), 0)
            for block, runs in told.groupby("block").runs
        }
        return {
            (block, n): float(mean[n - 1])
            for block, mean in means.items()
            for n in range(1, len(mean) + 1)
        }
    runs = {}
    for start in first:
        for n, block in enumerate(
            itertools.takewhile(first.__contains__, itertools.count(start)), 1
        ):
            runs[start, n] = runs.get((start, n - 1), 0.0) + first[block]
    return runs


def contiguous(
    runs: dict[tuple[int, int], float], free: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Start and score of the least important run of n free blocks, for n = 1, 2, …"""
    allowed, starts, scored = set(free), [], []
    for n in itertools.count(1):
        known = {s: v for (s, m), v in runs.items() if m == n and set(range(s, s + n)) <= allowed}
        if not known:
            return starts, scored
        best = min(known, key=lambda start: (known[start], start))
        starts.append(best)
        scored.append(known[best])
    raise AssertionError("runs are finite")
