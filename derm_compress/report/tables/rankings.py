"""Do rankings of blocks agree, by criterion and by calibration pictures?

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

from derm_compress.report import rule
from derm_compress.report.results import Results
from derm_compress.report.tables import joins

TAILS = (0.025, 0.975)
DRAWS, SEED = 200, 0
ALMOST = 1 - 1e-9  # a correlation whose arctanh is finite


def agreements(results: Results) -> pd.DataFrame:
    """Rank correlation of every two rankings of whole blocks."""
    return agreement(results.values, results.protected)


def agreement(values: pd.DataFrame, protected: Iterable[int]) -> pd.DataFrame:
    """Spearman's rank correlation of every two rankings, with a 95 % bootstrap over items: one,
    other, rho, rho_lo, rho_hi; a pair once, in the rankings' order.

    A draw of items is the same for all rankings; those that need no data stay as they are, and two
    of them have no interval.
    """
    known = by_block(values, protected)
    items = sorted({item for table in known.values() for item in table} - {""})
    drawn = np.random.default_rng(SEED).integers(0, max(len(items), 1), (DRAWS, len(items)))
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


def halves_agree(
    values: pd.DataFrame, protected: Iterable[int], ranking: str, *, draws: int = DRAWS
) -> tuple[float, float, float] | None:
    """Rank correlation of two halves of the calibration pictures: mean over ways to halve them, and
    its 2.5 and 97.5 percentiles; None for a ranking that reads no pictures.

    What a second study with other pictures would find, each study having half as many.
    """
    table = by_block(values, protected).get(ranking)
    if table is None or not needs_data(table) or table.shape[1] < 2:
        return None
    of_item, items = table.to_numpy(), table.shape[1]  # [blocks, items]
    order = np.random.default_rng(SEED).permuted(np.tile(np.arange(items), (draws, 1)), axis=1)
    half = items // 2
    parts = order[:, :half], order[:, items - half :]
    one, other = (standardised(of_item[:, part].mean(-1).T) for part in parts)  # [draws, blocks]
    rho = (one * other).sum(1)
    return rho.mean(), *np.quantile(rho, TAILS)


def draws_agree(results: Results) -> tuple[float, float, float] | None:
    """Mean rank correlation of every two draws of calibration pictures, the study's own among them,
    and its 95 % interval as if it were one correlation over so many blocks (Fieller, Hartley and
    Pearson 1957); None where there is no other draw."""
    if results.draws is None or results.draws.empty:
        return None
    own = by_block(results.values, results.protected)[results.criterion].mean(axis=1)
    others = results.draws.pivot(index="draw", columns="block", values="score")[own.index]
    ranks = standardised(np.vstack([own.to_numpy(), others.to_numpy()]))
    rho = float(np.mean([one @ other for one, other in combinations(ranks, 2)]))
    reach = rule.Z * np.sqrt(1.06 / (len(own) - 3)) if len(own) > 3 else np.inf
    lo, hi = np.tanh(np.arctanh(np.clip(rho, -ALMOST, ALMOST)) + (-reach, reach))
    return rho, float(lo), float(hi)


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
