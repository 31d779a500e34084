"""What every table joins: scores, planned sizes, and the paper's values beside a run's models."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report import trainings
from derm_compress.report.paper import numbers
from derm_compress.report.results import Results

SCORE = ["score", "score_lo", "score_hi", "n"]
CHANGE = ["difference", "difference_lo", "difference_hi", "p"]
SIZE = [
    *("params_b", "vram_gib", "peak_gib"),
    *("blocks_removed_7b", "params_b_7b", "vram_gib_7b", "peak_gib_7b"),
]
FORM = ["blocks_removed", "healed", "method", "bits"]
SYMMETRIC = "Round to neighbour, symmetric grid (Eq. 1)"


def join(table: pd.DataFrame, other: pd.DataFrame | None, columns: list[str]) -> pd.DataFrame:
    """These columns of another frame beside each variant, empty where it has none."""
    if other is None or other.empty:
        return table.assign(**dict.fromkeys(columns, np.nan))
    other = other.drop_duplicates("variant").reindex(columns=["variant", *columns])
    return table.merge(other, on="variant", how="left")


def values(frame: pd.DataFrame | None, variant: str | None, columns: list[str]) -> list:
    """A variant's last values in these columns, None where there are none."""
    if frame is None or not (frame.variant == variant).any():
        return [None] * len(columns)
    return frame[frame.variant == variant].reindex(columns=columns).iloc[-1].tolist()


def sized(table: pd.DataFrame, results: Results) -> pd.DataFrame:
    """Planned sizes beside each variant, and the share of blocks removed."""
    table = join(table, results.memory, SIZE)
    if "blocks_removed" in table:
        table["fraction_removed"] = table.blocks_removed / results.blocks
    return table


def scored(table: pd.DataFrame, results: Results, answers: pd.DataFrame | None) -> pd.DataFrame:
    """Scores with intervals over `answers`, and planned sizes, beside each variant."""
    found = [trainings.score(results, answers, name) for name in table.variant]
    found = pd.DataFrame(found, columns=metrics.Score._fields)
    table = table.assign(**dict(zip(SCORE, found.where(found.n > 0).T.to_numpy(), strict=True)))
    return sized(table, results)


def changes(
    results: Results,
    answers: pd.DataFrame | None,
    ones: Iterable[str],
    others: Iterable[str | None],
) -> pd.DataFrame:
    """CHANGE, n and images of each variant minus the other in its place, paired over images; empty
    for a variant beside itself, and where not both have answers."""
    rows = []
    for one, other in zip(ones, others, strict=True):
        beside = other if other != one else None
        flips = metrics.PERMUTATIONS
        rows.append(trainings.apart(results, answers, one, beside, n_permutations=flips))
    return pd.DataFrame(rows, columns=[*CHANGE, "n", "images"])


def interval(name: str, estimate) -> dict[str, float]:
    """A value and its interval as a row's columns: name, name_lo, name_hi."""
    value, lo, hi, *_ = estimate
    return {name: value, f"{name}_lo": lo, f"{name}_hi": hi}


def of_paper(results: Results, number: int) -> pd.DataFrame:
    """The paper's Table 2 to 5 with `variant`, the run's model in each row's place, and what its
    Table 5 lacks: rounding on the symmetric grid, where the run has it."""
    table = numbers.table(number)
    table["variant"] = [
        results.variant(
            results.depth(row["role"]),
            criterion=row.get("criterion", ""),
            healed=row["healed"],
            quantizer=row["quantizer"],
        )
        for row in table.to_dict("records")
    ]
    table = table.drop(columns=[*numbers.MODEL, "criterion"], errors="ignore")
    symmetric = results.variant(results.operating, healed=True, quantizer="rtn_symmetric")
    if number == 5 and symmetric:
        table.loc[len(table), ["setting", "variant"]] = SYMMETRIC, symmetric
    return table


def beside_paper(table: pd.DataFrame, results: Results, number: int) -> pd.DataFrame:
    """The paper's values beside each variant, in one row: where two of the paper's models are one
    of the run's, those of the first."""
    theirs = of_paper(results, number).drop_duplicates("variant")
    return table.merge(theirs, on="variant", how="left")
