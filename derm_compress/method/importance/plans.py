"""Pruning plans of rankings: ranked once, anew after each removal, or as one run of blocks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.criteria import PUBLISHED
from derm_compress.method.importance.measure import importance_values, seen_by, unit_rows
from derm_compress.method.importance.rankings import Ranking
from derm_compress.method.pruning.plan import Plan, published_plan
from derm_compress.model import anatomy, oom, removal
from derm_compress.model.units import Unit
from derm_compress.progress import track


def pruning_plans(
    names: Iterable[str],
    measured: pd.DataFrame,
    c: Calibration,
    *,
    protected: Sequence[int],
    most: int,
    fingerprint: str,
    journal,
) -> dict[str, dict]:
    """Every ranking's pruning plan as JSON-able data; iterative ones go as far as `most` units."""
    blocks, made = len(anatomy.blocks(c.model)), {}
    for name in dict.fromkeys(names):
        if name == PUBLISHED.name:
            plan = published_plan()
            plan.check(blocks=blocks, fingerprint=fingerprint)
        else:
            ranking = Ranking.of(name)
            spared = () if "unprotected" in ranking.options else tuple(protected)
            known = Plan(name, (), spared, blocks, fingerprint, settings=settings(ranking, c, most))
            plan = dataclasses.replace(
                known, **chosen(ranking, measured, c, spared=spared, most=most, journal=journal)
            )
        made[name] = plan.to_dict()
    return made


def chosen(
    ranking: Ranking, measured: pd.DataFrame, c: Calibration, *, spared, most: int, journal
) -> dict:
    """A plan's order or starts, and scores."""
    values = importance_values(measured[measured.ranking == ranking.base])
    mean = values.groupby("unit").value.mean()
    units = ranking.units(len(anatomy.blocks(c.model)))
    first = {unit: float(mean[str(unit)]) for unit in units if unit.block not in spared}
    if "iterative" in ranking.options:
        return iterative(ranking, c, first, most=most, journal=journal)
    if "contiguous" in ranking.options:
        by_block = {unit.block: score for unit, score in first.items()}
        return contiguous(run_scores(measured, ranking, by_block), by_block)
    order = sorted(first, key=lambda unit: (first[unit], unit))
    return {"order": tuple(order), "scores": tuple(first[unit] for unit in order)}


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


def iterative(
    ranking: Ranking, c: Calibration, first: dict[Unit, float], *, most: int, journal
) -> dict:
    """Order and scores where the least goes and the others are scored anew, against the whole."""
    order, scores, now = [], [], first
    if ranking.criterion.asks_alone:
        c = dataclasses.replace(c, original=whole_answers(ranking, c))
    for _ in track(range(min(most, len(first))), f"{ranking.name}: removals"):
        unit = min(now, key=lambda unit: (now[unit], unit))
        order.append(unit)
        scores.append(now[unit])
        others = [other for other in now if other != unit]
        if not others or len(order) == most:
            break
        with removal.without(c.model, order):
            frame = unit_rows(ranking, c, others, journal=journal, removed=order)
        mean = frame.groupby("unit").value.mean()
        now = {other: float(mean[str(other)]) for other in others}
    return {"order": tuple(order), "scores": tuple(scores)}


def whole_answers(ranking: Ranking, c: Calibration) -> dict[tuple[str, str], str]:
    """The whole model's answers by (item, question)."""

    def answers(batch_size: int) -> dict:
        asked = dataclasses.replace(seen_by(ranking, c), batch_size=batch_size).answers(())
        return {(answer.item, answer.question): text for answer, text in asked}

    return oom.halved(answers, c.batch_size, f"ranking {ranking.name}")


def run_scores(
    measured: pd.DataFrame, ranking: Ranking, first: dict[int, float]
) -> dict[tuple[int, int], float]:
    """Score of every run of blocks (start, length): the criterion's own, or its blocks' sum."""
    told = measured[measured.ranking == ranking.base]
    runs = {}
    if "runs" in told and told.runs.notna().any():
        for block, lists in told.groupby("block").runs:
            mean = np.mean(np.stack(lists.to_list()), 0)
            runs |= {(block, n): float(score) for n, score in enumerate(mean, 1)}
        return runs
    for start in first:
        for n, block in enumerate(itertools.count(start), 1):
            if block not in first:
                break
            runs[start, n] = runs.get((start, n - 1), 0.0) + first[block]
    return runs


def contiguous(runs: dict[tuple[int, int], float], free: Iterable[int]) -> dict:
    """Start and score of the least important run of n free blocks, for n = 1, 2, …"""
    free, starts, scores = set(free), [], []
    for n in itertools.count(1):
        allowed = {
            start: score
            for (start, length), score in runs.items()
            if length == n and free.issuperset(range(start, start + n))
        }
        if not allowed:
            return {"order": (), "starts": tuple(starts), "scores": tuple(scores)}
        best = min(allowed, key=lambda start: (allowed[start], start))
        starts.append(best)
        scores.append(allowed[best])
    raise AssertionError("runs are finite")
