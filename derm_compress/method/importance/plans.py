"""Pruning plans of rankings: ranked once, anew after each removal, or as one run of blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.criteria import PUBLISHED
from derm_compress.method.importance.measure import importance_values, measure_importance, unit_rows
from derm_compress.method.importance.rankings import RUN, Ranking
from derm_compress.method.pruning.plan import Plan, published_plan
from derm_compress.model import anatomy, removal
from derm_compress.model.units import Unit
from derm_compress.progress import track


def pruning_plans(
    names: Iterable[str],
    measured: pd.DataFrame,
    c: Calibration,
    *,
    protected: Sequence[int],
    most: int,
    journal,
) -> dict[str, dict]:
    """Every ranking's pruning plan as JSON-able data; iterative ones go as far as `most` units."""
    blocks, fingerprint = len(anatomy.blocks(c.model)), anatomy.fingerprint(c.model)
    made = {}
    for name in dict.fromkeys(names):
        if name == PUBLISHED.name:
            plan = published_plan()
            plan.check(blocks=blocks, fingerprint=fingerprint)
        else:
            ranking = Ranking.of(name)
            told = measured[measured.ranking == ranking.base]
            spared = () if "unprotected" in ranking.options else tuple(protected)
            how = settings(ranking, c, most)
            plan = Plan(name, (), spared, blocks, fingerprint, settings=how)
            plan = ranked(plan, ranking, told, c, most=most, journal=journal)
        made[name] = plan.to_dict()
    return made


def control_plan(c: Calibration, *, protected: Sequence[int], journal) -> dict:
    """The plan of RUN, which pretrained decoders hardly miss; empty for a model without values."""
    if not anatomy.has_values(c.model):
        return {}
    told = measure_importance([RUN], c, journal)
    return pruning_plans([RUN], told, c, protected=protected, most=0, journal=journal)[RUN]


def settings(ranking: Ranking, c: Calibration, most: int) -> dict:
    """What a plan says of how its scores came about."""
    criterion = ranking.criterion
    told = {
        "source": criterion.source,
        "reads": criterion.reads,
        "cost": criterion.cost,
        "options": sorted(ranking.options),
    }
    if criterion.calibrated:
        told["items"] = [item.id for item in c.items]
        told["text_only"] = ranking.text_only
    if criterion.name == "output_similarity":
        told["max_new_tokens"] = c.max_new_tokens
        told["embedder"] = getattr(c.embed, "name", "")
    if criterion.name == "random":
        told["seed"] = c.seed + ranking.draw
    if "iterative" in ranking.options:
        told["cost"] += ", for every removal"
        told["iterative_blocks"] = most
    return told


def ranked(
    plan: Plan, ranking: Ranking, told: pd.DataFrame, c: Calibration, *, most: int, journal
) -> Plan:
    """The plan with the order, or the starts of runs, that the measured rows `told` give."""
    mean = importance_values(told).groupby("unit").value.mean()
    units = ranking.units(plan.blocks)
    scores = {unit: float(mean[str(unit)]) for unit in units if unit.block not in plan.protected}
    if "contiguous" in ranking.options:
        starts, lost = contiguous(told, {unit.block: score for unit, score in scores.items()})
        return dataclasses.replace(plan, starts=starts, scores=lost)
    if "iterative" in ranking.options:
        if ranking.criterion.asks_alone:
            c = dataclasses.replace(c, original=whole_answers(told))
        scores = iterative(ranking, c, scores, most=most, journal=journal)
    else:
        scores = {unit: scores[unit] for unit in sorted(scores, key=lambda u: (scores[u], u))}
    return dataclasses.replace(plan, order=tuple(scores), scores=tuple(scores.values()))


def whole_answers(told: pd.DataFrame) -> dict[tuple[str, str], str]:
    """The whole model's answers by (item, question), which every answer without a unit names."""
    return {(row.item, row.question): row.original for row in told.itertuples()}


def iterative(
    ranking: Ranking, c: Calibration, scores: dict[Unit, float], *, most: int, journal
) -> dict[Unit, float]:
    """Scores in the order of removal, those left being scored anew, against the whole model."""
    order = {}
    for _ in track(range(min(most, len(scores))), f"{ranking.name}: removals"):
        unit = min(scores, key=lambda unit: (scores[unit], unit))
        order[unit] = scores[unit]
        others = [other for other in scores if other != unit]
        if not others or len(order) == most:
            break
        with removal.without(c.model, order):
            frame = unit_rows(ranking, c, others, journal=journal, removed=list(order))
        mean = frame.groupby("unit").value.mean()
        scores = {other: float(mean[str(other)]) for other in others}
    return order


def contiguous(
    told: pd.DataFrame, scores: dict[int, float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Starts and scores of the least important runs of n blocks, for n = 1, 2, …

    A run's score is the criterion's own, or else the sum of its blocks'.
    """
    own = {}
    if "runs" in told and told.runs.notna().any():
        own = {block: np.mean([*lists], 0) for block, lists in told.groupby("block").runs}

    def lost(start: int, n: int) -> float:
        if own:
            return float(own[start][n - 1])
        return sum(scores[block] for block in range(start, start + n))

    least = []
    for n in range(1, len(scores) + 1):
        free = [start for start in scores if scores.keys() >= {*range(start, start + n)}]
        if free:
            least.append(min((lost(start, n), start) for start in free))
    return tuple(start for _, start in least), tuple(score for score, _ in least)
