"""How sure is each comparison, and how much of it is training noise?"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report import rule, trainings
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
    table = table.join(joins.changes(results, results.evaluation, table.variant, others))
    return table.assign(p_holm=metrics.holm(table.p))


def smallest_margin(results: Results) -> float:
    """The smallest difference that the test pictures can exclude with POWER where there is none:
    the median over the full pipeline's rivals, in points; nan without any."""
    if results.evaluation is None or results.full is None:
        return np.nan
    test = results.evaluation[results.evaluation.split == "test"]
    full, margins = answers_of(test, results.full), []
    for variant in family(results).variant:
        points = metrics.by_image_difference(answers_of(test, variant), full)
        margins.append(quantiles() * points.sem())
    return float(np.median(margins)) if margins else np.nan


def quantiles() -> float:
    """z(0.975) + z((1 + POWER) / 2): standard errors that two one-sided tests need."""
    return rule.Z + NormalDist().inv_cdf((1 + POWER) / 2)


def recovery(results: Results) -> metrics.Recovery:
    """What SFT gives back at the operating point, net of what it gives the unpruned model."""
    four = [*results.main, results.variant(0, healed=True)]
    return metrics.recovery(*(answers_of(results.answers, name) for name in four))


def seeds(results: Results) -> pd.DataFrame:
    """Noise of training and of the pictures drawn, told apart, for each healed model with several
    SFT seeds; and of its gain, net of the control's."""
    marks, gains = trainings.by_seed(results), {}
    models = results.models.set_index("variant")
    for base, trained in marks.items():
        same = models.loc[base, ["units_removed", "criterion"]].to_dict()
        before = trainings.wide(
            results.answers, [pick(results.models, **same, bits=16, healed=False)]
        )
        gains[base] = trained.sub(before[0], axis=0) if len(before) else before
    control = gains.pop(results.variant(0, healed=True), pd.DataFrame())
    name = results.names
    rows = [{"measure": f"score of {name[base]}", **spread(found)} for base, found in marks.items()]
    for base, gain in gains.items():
        shared = [seed for seed in gain if seed in control]
        if shared:
            net = (gain[shared] - control[shared]).dropna()
            rows.append({"measure": f"gain of {name[base]}, net of the control's", **spread(net)})
    return pd.DataFrame(rows)


def spread(marks: pd.DataFrame) -> dict[str, float]:
    """Columns of extra_seeds, of marks [answers, seeds] indexed by item and question.

    seed_sd: between the seeds' means on these pictures; chance_sd and training_sd: its parts
    (`variances`); item_sd: standard error over images of the mean over seeds.
    """
    means, mean = metrics.percent(marks.mean()), marks.mean(axis=1)
    between, by_chance = trainings.variances(marks)
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
