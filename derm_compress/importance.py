"""Which units go first: rankings by any criterion, once or anew after each removal, and the plans that they give.

A ranking's name is its criterion and options: `output_similarity-iterative`, `angular-contiguous`, `perplexity-text`,
`taylor-unprotected`, `output_similarity-mlp`, `random-3`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import pandas as pd

from derm_compress import models, prune
from derm_compress.criteria import CRITERIA, Calibration, Criterion, original_answers
from derm_compress.errors import DermError
from derm_compress.progress import track

PUBLISHED = "published"  # the plan that comes with the paper's code
OPTIONS = {
    "iterative": "re-scored after each removal",
    "contiguous": "one run of blocks goes",
    "text": "calibrated without pictures",
    "unprotected": "no block is spared",
    "attention": "attentions go, blocks stay",
    "mlp": "MLPs go, blocks stay",
    "sublayers": "attentions and MLPs go, each by itself",
}


@dataclass(frozen=True)
class Ranking:
    """One way to rank units: a criterion and its options; `draw` tells random orders apart."""

    name: str
    criterion: str
    options: frozenset[str] = frozenset()
    draw: int = 0

    @staticmethod
    def of(name: str) -> Ranking:
        """From its name; DermError says what is known."""
        criterion, *options = name.split("-")
        draw = [int(word) for word in options if word.isdecimal()]
        words = frozenset(word for word in options if not word.isdecimal())
        if criterion not in CRITERIA or words - OPTIONS.keys() or len(draw) > (criterion == "random"):
            near = get_close_matches(criterion, CRITERIA, 1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != criterion else ""
            raise DermError(
                f"ranking {name!r}: a criterion ({', '.join(CRITERIA)}) and options ({', '.join(OPTIONS)}; a number "
                f"after random), joined by -, or {PUBLISHED}{hint}"
            )
        if {"iterative", "contiguous"} <= words or ("contiguous" in words and words & {*prune.SUBLAYERS, "sublayers"}):
            raise DermError(f"ranking {name!r}: runs are of blocks, ranked once; leave contiguous out")
        if "iterative" in words and not CRITERIA[criterion].calibrated:
            raise DermError(f"ranking {name!r}: {criterion} does not change when others go; leave iterative out")
        return Ranking(name, criterion, words, draw[0] if draw else 0)

    @property
    def how(self) -> Criterion:
        return CRITERIA[self.criterion]

    def units(self, blocks: int) -> list[prune.Unit]:
        """All units that it ranks, protected ones too."""
        parts = [part for part in prune.SUBLAYERS if {part, "sublayers"} & self.options]
        return [f"{b}.{part}" for b in range(blocks) for part in parts] if parts else list(range(blocks))

    def base(self) -> str:
        """The name under which values are kept: what happens after scoring does not matter to them."""
        after = {"iterative", "contiguous", "unprotected"}
        options = [word for word in self.name.split("-")[1:] if word not in after]
        return "-".join([self.criterion, *options])


def rankings(names: Iterable[str]) -> list[Ranking]:
    """Rankings of these names, each once, the published plan aside."""
    return [Ranking.of(name) for name in dict.fromkeys(names) if name != PUBLISHED]


def protected_blocks(model, names: Sequence[int]) -> tuple[int, ...]:
    """Block indices from a parameter; negative ones count from the end. The paper protects 0, 1 and -1."""
    total = len(models.blocks(model))
    if bad := [n for n in names if not -total <= n < total]:
        raise DermError(f"protected blocks {bad}: the model has blocks 0 to {total - 1} (or -1 to -{total})")
    return tuple(sorted({n % total for n in names}))


def rows(ranking: Ranking, c: Calibration, units: Sequence[prune.Unit], *, journal, removed=()) -> pd.DataFrame:
    """The criterion's rows for units by their original names, each kept in the journal as soon as it is there.

    `removed` units are out of c.model already; values are then those of the model without them.
    """
    c = dataclasses.replace(c, text_only="text" in ranking.options, seed=c.seed + ranking.draw)
    items = {item.id: item for item in c.items} if ranking.how.calibrated else {"": None}
    wanted = list(itertools.product(units, items, ranking.how.questions))
    state = f"{ranking.base()} without {list(removed)}:"
    missing = [key for key in wanted if f"{state} {key}" not in journal.done]
    if missing:
        todo = [unit for unit in units if unit in {unit for unit, *_ in missing}]
        asked = {item for _, item, _ in missing}
        c = dataclasses.replace(c, items=[item for item in c.items if item.id in asked])
        now = dict(zip(positions(todo, removed), todo, strict=True))
        total = len(todo) * len(asked) * len(ranking.how.questions)
        for row in track(ranking.how.rows(c, list(now)), f"{ranking.base()}: units x pictures", total):
            row |= {"unit": now[row["unit"]]}
            key = f"{state} {(row['unit'], row['item'], row.get('question', ''))}"
            if key not in journal.done:
                journal.add(key, row)
    return pd.DataFrame([journal.done[f"{state} {key}"] for key in wanted])


def positions(units: Sequence[prune.Unit], removed: Sequence[prune.Unit]) -> list[prune.Unit]:
    """What units are called in a model that lacks whole blocks: blocks count anew, sublayers follow their block."""
    gone = {s for unit in removed for s in range(*prune.span(unit))}
    shift = {u: sum({2 * b, 2 * b + 1} <= gone for b in range(prune.span(u)[0] // 2)) for u in units}
    return [
        unit - n if isinstance(unit, int) else prune.name_of(prune.span(unit)[0] - 2 * n) for unit, n in shift.items()
    ]


def measure(names: Iterable[str], c: Calibration, journal) -> pd.DataFrame:
    """Rows of all rankings, scored once on the whole model: ranking, unit, block, part and the criterion's columns."""
    frames, blocks = [], len(models.blocks(c.model))
    for ranking in {r.base(): r for r in rankings(names)}.values():
        frame = rows(ranking, c, ranking.units(blocks), journal=journal)
        frame.insert(0, "ranking", ranking.base())
        frames.append(frame)
    frame = pd.concat(frames, ignore_index=True)
    spans = [prune.span(unit) for unit in frame.unit]
    frame["block"] = [first // 2 for first, _ in spans]
    frame["part"] = ["block" if after - first == 2 else prune.SUBLAYERS[first % 2] for first, after in spans]
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
    names: Iterable[str], measured: pd.DataFrame, c: Calibration, *, protected, most: int, fingerprint: str, journal
) -> dict[str, dict]:
    """Every ranking's pruning plan as JSON-able data; iterative ones go as far as `most` units."""
    made, told = [], values(measured)
    for ranking in rankings(names):
        spared = () if "unprotected" in ranking.options else tuple(protected)
        mean = told[told.ranking == ranking.base()].groupby("unit").value.mean()
        units = [u for u in ranking.units(len(models.blocks(c.model))) if prune.span(u)[0] // 2 not in spared]
        first = {unit: float(mean[str(unit)]) for unit in units}
        if "iterative" in ranking.options:
            order, scored = iterative(ranking, c, first, most=most, journal=journal)
        else:
            order = sorted(units, key=lambda unit: (first[unit], prune.span(unit)))
            scored = [first[unit] for unit in order]
        starts = ()
        if "contiguous" in ranking.options:
            starts, scored = contiguous(run_scores(measured, ranking, first), units)
            order = []
        seen = len(c.items) if ranking.how.calibrated else 0
        settings = {"source": ranking.how.source, "items": seen, "seed": c.seed + ranking.draw}
        settings |= {"options": sorted(ranking.options), "cost": ranking.how.cost}
        plan = prune.Plan(
            ranking.name, tuple(order), spared, len(models.blocks(c.model)), fingerprint,
            tuple(starts), tuple(scored), settings,
        )  # fmt: skip
        made.append(plan)
    if PUBLISHED in names and len(models.blocks(c.model)) == prune.published().blocks:
        made.append(prune.published())
    return {plan.criterion: plan.to_dict() for plan in made}


def iterative(ranking: Ranking, c: Calibration, first: dict, *, most: int, journal) -> tuple[list, list]:
    """Order and scores where the least important unit goes and the others are scored anew, compared with the whole."""
    order, scored, now = [], [], first
    if ranking.criterion == "output_similarity":
        c = dataclasses.replace(
            c, original=original_answers(dataclasses.replace(c, text_only="text" in ranking.options))
        )
    while now and len(order) < most:
        unit = min(now, key=lambda unit: (now[unit], prune.span(unit)))
        order.append(unit)
        scored.append(now[unit])
        others = [other for other in now if other != unit]
        if others and len(order) < most:
            with prune.without(c.model, order):
                frame = rows(ranking, c, others, journal=journal, removed=order)
            mean = frame.groupby("unit").value.mean()
            now = {other: float(mean[other]) for other in others}
        else:
            break
    return order, scored


def run_scores(measured: pd.DataFrame, ranking: Ranking, first: dict) -> dict[tuple[int, int], float]:
    """Score of every run of blocks (start, length): the criterion's own, or else the sum of its blocks'."""
    told = measured[measured.ranking == ranking.base()]
    if "runs" in told and told.runs.notna().any():
        means = {block: np.mean(np.stack(runs.to_list()), 0) for block, runs in told.groupby("block").runs}
        return {(block, n): float(mean[n - 1]) for block, mean in means.items() for n in range(1, len(mean) + 1)}
    runs = {}
    for start in first:
        for n, block in enumerate(itertools.takewhile(first.__contains__, itertools.count(start)), 1):
            runs[start, n] = runs.get((start, n - 1), 0.0) + first[block]
    return runs


def contiguous(runs: dict[tuple[int, int], float], free: Sequence[int]) -> tuple[list[int], list[float]]:
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
