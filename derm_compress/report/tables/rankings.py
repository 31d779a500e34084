"""Do rankings of blocks agree, and how many calibration pictures does a ranking need?

A `values` frame has one row per (ranking, unit, item): `ranking`, `block`, `part`, `item` (the
picture; "" where the criterion needs none) and `value`, the lower the less important. Only whole
blocks that may be removed are ranked.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from derm_compress.report.results import Results
from derm_compress.report.tables import joins

SIZES = (1, 2, 5)  # of a calibration set, times powers of ten
TAILS = (0.025, 0.975)


def agreements(results: Results) -> pd.DataFrame:
    """Rank correlation of every two rankings of whole blocks."""
    return agreement(results.values, results.protected)


def calibration_sizes(results: Results) -> pd.DataFrame:
    """How well two disjoint draws of calibration pictures agree, by their size."""
    return calibration_curve(results.values, results.protected, removed=results.operating)


def agreement(
    values: pd.DataFrame, protected: Iterable[int], *, draws: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Spearman's rank correlation of every two rankings, with a 95 % bootstrap over items: one,
    other, rho, rho_lo, rho_hi; a pair once, in the rankings' order.

    A draw of items is the same for all rankings; those that need no data stay as they are, and two
    of them have no interval.
    """
    known = by_block(values, protected)
    items = sorted({item for table in known.values() for item in table} - {""})
    drawn = np.random.default_rng(seed).integers(0, max(len(items), 1), (draws, len(items)))
    counts = (drawn[:, :, None] == np.arange(len(items))).sum(1)  # [draws, items]
    every_once = np.ones(len(items))
    weights = pd.DataFrame(np.vstack([every_once, counts]), columns=items)
    ranks = {name: standardised(weighted_means(table, weights)) for name, table in known.items()}
    rows = []
    for one, other in combinations(known, 2):
        whole, *resampled = (ranks[one] * ranks[other]).sum(1)
        lo, hi = np.nan, np.nan
        if needs_data(known[one]) or needs_data(known[other]):
            lo, hi = np.nanquantile(resampled, TAILS)
        rows.append({"one": one, "other": other, **joins.interval("rho", (whole, lo, hi))})
    return pd.DataFrame(rows)


def calibration_curve(
    values: pd.DataFrame, protected: Iterable[int], *, removed: int, draws: int = 200, seed: int = 0
) -> pd.DataFrame:
    """What a second study with other pictures would find: two disjoint draws of k items each, k up
    to half of them.

    rho: correlation of the two rankings; overlap: share of the `removed` least important blocks
    that both name, `chance` its expectation for random orders. Means over draws with 2.5 and 97.5
    percentiles (_lo, _hi).
    """
    rows = []
    for name, table in by_block(values, protected).items():
        of_item = table.to_numpy()  # [blocks, items]
        gone = min(removed, len(of_item))
        for size in sizes(table.shape[1] // 2) if needs_data(table) else ():
            parts = disjoint(table.shape[1], size, draws=draws, seed=seed)
            one, other = (of_item[:, part].mean(-1).T for part in parts)  # [draws, blocks]
            rho = (standardised(one) * standardised(other)).sum(1)
            overlap = (first(one, gone) & first(other, gone)).sum(1) / gone
            row = {"ranking": name, "items": size}
            for measure, each in (("rho", rho), ("overlap", overlap)):
                row |= joins.interval(measure, (each.mean(), *np.quantile(each, TAILS)))
            rows.append(row | {"chance": gone / len(of_item)})
    return pd.DataFrame(rows)


def draws_apart(results: Results) -> list[float]:
    """Rank correlations of every two draws of calibration pictures, the study's own among them;
    none where it has no other."""
    if results.draws is None or results.draws.empty:
        return []
    own = by_block(results.values, results.protected)[results.criterion].mean(axis=1)
    others = results.draws.pivot(index="draw", columns="block", values="score")[own.index]
    ranks = standardised(np.vstack([own.to_numpy(), others.to_numpy()]))
    return [float(one @ other) for one, other in combinations(ranks, 2)]


def by_block(values: pd.DataFrame, protected: Iterable[int]) -> dict[str, pd.DataFrame]:
    """{ranking: its values, [blocks, items]} of the whole blocks that are not protected."""
    free = values[(values.part == "block") & ~values.block.isin(list(protected))]
    blocks = sorted(free.block.unique())
    groups = free.groupby("ranking", sort=False)
    return {
        name: group.pivot_table(index="block", columns="item", values="value").reindex(blocks)
        for name, group in groups
    }


def needs_data(table: pd.DataFrame) -> bool:
    return list(table) != [""]


def weighted_means(table: pd.DataFrame, weights: pd.DataFrame) -> np.ndarray:
    """Each block's mean value under every row of item weights, [rows, blocks]; without data always
    the same."""
    if not needs_data(table):
        return np.repeat(table.to_numpy().T, len(weights), 0)
    own = weights[list(table)].to_numpy()
    with np.errstate(invalid="ignore"):  # a draw may hold none of a ranking's items
        return own @ table.to_numpy().T / own.sum(1, keepdims=True)


def standardised(scores: np.ndarray) -> np.ndarray:
    """Ranks within each row of [rows, blocks], centred, of length 1; a row without order is 0."""
    ranks = rankdata(scores, axis=1)
    ranks = ranks - ranks.mean(1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    return np.divide(ranks, length, out=np.zeros_like(ranks), where=length != 0)


def first(scores: np.ndarray, count: int) -> np.ndarray:
    """Which blocks of [draws, blocks] are among the `count` lowest of their row; of equals the
    earlier is."""
    order = np.argsort(scores, axis=1, kind="stable")[:, :count]
    among = np.zeros(scores.shape, bool)
    np.put_along_axis(among, order, True, axis=1)
    return among


def disjoint(items: int, size: int, *, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of `size` item positions that share none, [draws, size] each; smaller sets lie
    within larger ones."""
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(items), (draws, 1)), axis=1)
    return order[:, :size], order[:, items - size :]


def sizes(most: int) -> list[int]:
    """1, 2, 5, 10, … below `most`, and `most` itself."""
    steps = [step * 10**power for power in range(len(str(most))) for step in SIZES]
    return [*(step for step in steps if step < most), most] if most else []
