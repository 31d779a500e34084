"""How sure is each comparison, what could be seen at all, and how much is training noise?"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report.results import Results, answers_of, pick
from derm_compress.report.tables import joins

ALPHA, POWER = 0.05, 0.80
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


def powers(results: Results) -> pd.DataFrame:
    """What the paper's 39 pictures, and all of stage 08's, can tell of the family's differences."""
    every, rows = results.evaluation, []
    sets = {"test": every[every.split == "test"], "test and held-out": every}
    if len(sets["test"]) == len(every):
        del sets["test and held-out"]
    for pictures, frame in sets.items():
        full = answers_of(frame, results.full)
        for row in family(results).itertuples():
            one = answers_of(frame, row.variant)
            apart = metrics.by_image_difference(one, full)
            if len(apart) < 2:
                continue
            sd, images, found = apart.std(ddof=1), len(apart), apart.mean()
            rows.append(
                {
                    "pictures": pictures,
                    "setting": row.setting,
                    "variant": row.variant,
                    "images": images,
                    "n": min(one.score.count(), full.score.count()),
                    "sd": sd,
                    "detectable": detectable(sd, images),
                    "difference": found,
                    "power": power(sd, images, found),
                    "images_needed": images_needed(sd, found),
                }
            )
    return pd.DataFrame(rows)


# The normal approximation for a paired mean over m images: with s the differences' standard
# deviation, a two-sided test at ALPHA finds a true difference D with the chance `power` where
# D = (z(1 - ALPHA/2) + z(power)) s / sqrt(m).


def quantiles() -> float:
    """z(1 - ALPHA/2) + z(POWER): 2.802."""
    return NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(POWER)


def detectable(sd: float, images: int) -> float:
    """The smallest true difference found with POWER, in sd's unit; nan without images or spread."""
    return quantiles() * sd / np.sqrt(images) if images and sd else np.nan


def images_needed(sd: float, difference: float) -> float:
    """Images from which on such a true difference is found with POWER; nan for none."""
    return np.ceil((quantiles() * sd / difference) ** 2) if difference else np.nan


def power(sd: float, images: int, difference: float) -> float:
    """How often a true difference is found; nan without spread."""
    if not sd:
        return np.nan
    line = NormalDist().inv_cdf(1 - ALPHA / 2)
    shift = abs(difference) * np.sqrt(images) / sd
    return NormalDist().cdf(shift - line) + NormalDist().cdf(-shift - line)


def seeds(results: Results) -> pd.DataFrame:
    """Noise of training and of the pictures drawn, told apart, for each healed model with several
    SFT seeds; and of its gain, net of the control's."""
    known, marks, gains = results.models, {}, {}
    healed = known[known.healed & (known.bits == 16)].sort_values("sft_seed", kind="stable")
    for (removed, criterion), group in healed.groupby(["units_removed", "criterion"]):
        trained = wide(results.answers, list(group.variant))
        if len(group) < 2 or trained.empty:
            continue
        same = {"units_removed": removed, "criterion": criterion, "bits": 16, "healed": False}
        before = wide(results.answers, [pick(known, **same)])
        base = group.variant.iloc[0]
        marks[base] = trained
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
