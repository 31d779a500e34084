"""How far apart do trainings lie, and what does that add to an interval over pictures?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report import rule
from derm_compress.report.results import Results, answers_of


def apart(
    results: Results,
    answers: pd.DataFrame | None,
    one: str | None,
    other: str | None,
    *,
    n_permutations: int = 1,
) -> metrics.Difference:
    """One variant minus another in points, paired over pictures; the interval is of pictures and,
    where several SFT seeds say how far trainings lie apart, of trainings, and so is p then."""
    pair = answers_of(answers, one), answers_of(answers, other)
    found = metrics.paired_difference(*pair, n_permutations=n_permutations)
    known = results.variants[results.variants.variant.isin([one, other])]
    trained = known[known.healed.astype(bool)].source.nunique()
    if known.source.nunique() == 1:  # both were made of the same training
        trained = 0
    wide = widened(results, found, trained)
    return wide if wide is found else wide._replace(p=rule.p_value(*wide[:3], at=0))


def score(results: Results, answers: pd.DataFrame | None, variant: str | None) -> metrics.Score:
    """A variant's score; the interval as that of apart()."""
    found = metrics.score_interval(answers_of(answers, variant))
    known = results.variants[results.variants.variant == variant]
    return widened(results, found, int(known.healed.any()))


def widened(results: Results, found, trained: int):
    """A Score or a Difference with the noise of so many trainings in its interval."""
    added = trained * variance(results) if trained else 0
    if not found.n or not added:
        return found
    lo, hi = rule.widened(*found[:3], added)
    return found._replace(lo=lo, hi=hi)


def variance(results: Results) -> float:
    """Of a healed model's score, in points squared: beyond what the pictures drawn explain, mean
    over the models that were trained with several seeds; 0 where none was."""
    every = [variances(marks) for marks in by_seed(results).values()]
    return float(np.mean([max(0.0, between - chance) for between, chance in every] or [0.0]))


def by_seed(results: Results) -> dict[str, pd.DataFrame]:
    """{healed model: its marks, [answers, seeds]}, of those trained with several seeds."""
    if results.answers is None:
        return {}
    known, marks = results.models, {}
    healed = known[known.healed & (known.bits == 16)].sort_values("sft_seed", kind="stable")
    for _, group in healed.groupby(["units_removed", "criterion"]):
        trained = wide(results.answers, list(group.variant))
        if len(group) > 1 and len(trained):
            marks[group.variant.iloc[0]] = trained
    return marks


def wide(answers: pd.DataFrame, names: list[str | None]) -> pd.DataFrame:
    """[answers, names]: marks by (item, question), of those scored under every name."""
    if not set(names) <= set(answers.variant):
        return pd.DataFrame()
    each = [answers_of(answers, name).set_index(["item", "question"]).score for name in names]
    return pd.concat(each, axis=1, keys=range(len(names)), join="inner").astype(float).dropna()


def variances(marks: pd.DataFrame) -> tuple[float, float]:
    """Of the seeds' means: their variance, and the part of it that seeds equally good would have,
    in points squared.

    Such seeds only err on different pictures: the answers' residuals, once answer and seed means
    are taken out, are summed by image (questions about one picture err together); m / (m - 1) and
    1 / (k - 1) for what the means take up.
    """
    (count, k), mean = marks.shape, marks.mean(axis=1)
    residual = marks.sub(mean, axis=0) - marks.mean() + marks.to_numpy().mean()
    sums = metrics.percent(residual.groupby(level=0).sum()).to_numpy()
    images = len(sums)
    chance = (sums**2).sum() / (k - 1) * images / max(images - 1, 1) / count**2
    return metrics.percent(marks.mean()).var(ddof=1), chance
