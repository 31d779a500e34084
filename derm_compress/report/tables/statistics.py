"""How sure is each comparison, and how much of it is training noise?"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report import rule
from derm_compress.report.results import Results, answers_of, pick
from derm_compress.report.tables import joins

POWER = 0.80
ALONE = ("Quantization Only", "Pruning Only")


def family(results: Results) -> pd.DataFrame:
    """against, setting, variant: the full pipeline's rivals in Table 5, and "either alone" of
    Table 4, as far as stage 08 asked them."""
    rivals = joins.of_paper(results, 5).iloc[1:].assign(against="Table 5")
    alone = joins.of_paper(results, 4).query("setting in @ALONE").assign(against="Table 4")
    table = pd.concat([rivals, alone])[["against", "setting", "variant"]]
    known = set() if results.evaluation is None else set(results.evaluation.variant)
    return table[table.variant.isin(known)].reset_index(drop=True)


def comparisons(results: Results) -> pd.DataFrame:
    """Each setting minus the full pipeline, paired over images; p corrected over the family."""
    table = family(results)
    if answers_of(results.evaluation, results.full).empty:
        return pd.DataFrame()
    others = [results.full] * len(table)
    table = table.join(joins.changes(results.evaluation, table.variant, others))
    return table.assign(p_holm=metrics.holm(table.p))


def apart(results: Results, answers, one: str | None, other: str | None) -> metrics.Difference:
    """One variant minus another in points, paired over pictures; the interval is of pictures and,
    where several SFT seeds say how far trainings lie apart, of trainings."""
    pair = answers_of(answers, one), answers_of(answers, other)
    found = metrics.paired_difference(*pair, n_permutations=1)
    known = results.variants[results.variants.variant.isin([one, other])]
    trained = known[known.healed.astype(bool)].source.nunique()
    if not found.n or known.source.nunique() == 1:  # both were made of the same training
        return found
    lo, hi = rule.widened(*found[:3], trained * training_variance(results))
    return found._replace(lo=lo, hi=hi)


def score(results: Results, answers, variant: str | None) -> metrics.Score:
    """A variant's score; the interval as that of apart()."""
    found = metrics.score_interval(answers_of(answers, variant))
    known = results.variants[results.variants.variant == variant]
    if not found.n or not known.healed.any():
        return found
    lo, hi = rule.widened(*found[:3], training_variance(results))
    return found._replace(lo=lo, hi=hi)


def training_variance(results: Results) -> float:
    """Of a healed model's score, in points squared: beyond what the pictures drawn explain, mean
    over the models that were trained with several seeds; 0 where none was."""
    every = [variances(marks) for marks in by_seed(results).values()]
    return float(np.mean([max(0.0, between - chance) for between, chance in every] or [0.0]))


def smallest_margin(results: Results) -> float:
    """The smallest difference that the test pictures can exclude with POWER where there is none:
    the median over the full pipeline's rivals, in points; nan without any."""
    test = results.evaluation[results.evaluation.split == "test"]
    full, margins = answers_of(test, results.full), []
    for variant in family(results).variant:
        points = metrics.by_image_difference(answers_of(test, variant), full)
        margins.append(quantiles() * points.sem())
    return float(np.median(margins)) if margins else np.nan


def quantiles() -> float:
    """z(0.975) + z((1 + POWER) / 2): standard errors that two one-sided tests need."""
    return rule.Z + NormalDist().inv_cdf((1 + POWER) / 2)


def by_seed(results: Results) -> dict[str, pd.DataFrame]:
    """{healed model: its marks, [answers, seeds]}, of those trained with several seeds."""
    known, marks = results.models, {}
    healed = known[known.healed & (known.bits == 16)].sort_values("sft_seed", kind="stable")
    for _, group in healed.groupby(["units_removed", "criterion"]):
        trained = wide(results.answers, list(group.variant))
        if len(group) > 1 and len(trained):
            marks[group.variant.iloc[0]] = trained
    return marks


def seeds(results: Results) -> pd.DataFrame:
    """Noise of training and of the pictures drawn, told apart, for each healed model with several
    SFT seeds; and of its gain, net of the control's."""
    marks, gains = by_seed(results), {}
    models = results.models.set_index("variant")
    for base, trained in marks.items():
        same = models.loc[base, ["units_removed", "criterion"]].to_dict()
        before = wide(results.answers, [pick(results.models, **same, bits=16, healed=False)])
        gains[base] = trained.sub(before[0], axis=0) if len(before) else before
    control = gains.pop(results.variant(0, healed=True), pd.DataFrame())
    rows = [{"measure": f"score of {base}", **spread(frame)} for base, frame in marks.items()]
    for base, gain in gains.items():
        shared = [seed for seed in gain if seed in control]
        if shared:
            net = (gain[shared] - control[shared]).dropna()
            rows.append({"measure": f"gain of {base}, net of the control's", **spread(net)})
    return pd.DataFrame(rows)


def wide(answers: pd.DataFrame, names: list[str | None]) -> pd.DataFrame:
    """[answers, names]: marks by (item, question), of those scored under every name."""
    if not set(names) <= set(answers.variant):
        return pd.DataFrame()
    each = [answers_of(answers, name).set_index(["item", "question"]).score for name in names]
    return pd.concat(each, axis=1, keys=range(len(names)), join="inner").astype(float).dropna()


def spread(marks: pd.DataFrame) -> dict[str, float]:
    """Columns of extra_seeds, of marks [answers, seeds] indexed by item and question.

    seed_sd: between the seeds' means on these pictures; chance_sd and training_sd: its parts
    (`variances`); item_sd: standard error over images of the mean over seeds.
    """
    means, mean = metrics.percent(marks.mean()), marks.mean(axis=1)
    between, by_chance = variances(marks)
    by_image = metrics.percent(mean.groupby(level=0).mean())
    return {
        "seeds": marks.shape[1],
        **joins.interval("score_points", metrics.mean_intervals(mean.to_frame()).iloc[0]),
        "lowest": means.min(),
        "highest": means.max(),
        "seed_sd": np.sqrt(between),
        "chance_sd": np.sqrt(by_chance),
        "training_sd": np.sqrt(max(0.0, between - by_chance)),
        "item_sd": by_image.sem(),
        "n": len(marks),
    }


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
