"""Tables beside the paper's: how sure is each comparison, what could be seen at all, what else an answer is worth.

Each maker takes Results and returns a frame, empty where the results do not suffice. No torch.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.model import shapes
from derm_compress.report import paper, planner, power
from derm_compress.report.results import Results, answers_of, variant_id

CHANGE = ["difference", "difference_lo", "difference_hi", "p"]
TIMES = [f"{name}{end}" for name in ("prefill_ms", "decode_ms_per_token", "total_ms_per_token")
         for end in ("", "_lo", "_hi")]  # fmt: skip
COLUMNS = {
    "extra_planner": planner.TABLE,
    "extra_latency": [
        "variant", "batch", "prompt_tokens", "new_tokens", *TIMES, "tokens_per_second", "read_mib", "bandwidth_gb_s",
        "floor_ms", "times_floor",
    ],
    "extra_comparisons": ["against", "setting", "variant", *CHANGE, "p_holm", "n", "images"],
    "extra_power": [
        "pictures", "setting", "variant", "images", "n", "sd", "detectable", "difference", "power", "images_needed",
    ],
    "extra_seeds": [
        "measure", "seeds", "score_points", "score_points_lo", "score_points_hi", "lowest", "highest",
        "seed_sd", "chance_sd", "training_sd", "item_sd", "n",
    ],
    "extra_diagnosis": [
        "variant", "accuracy", "accuracy_lo", "accuracy_hi", "balanced", "none", "several", "most_confused", "n",
    ],
    "extra_secondary": [
        "variant", "score", "name_exact", "name_exact_lo", "name_exact_hi", "fact_f1", "fact_f1_lo", "fact_f1_hi",
        "similarity", "similarity_lo", "similarity_hi", "runaway", "n",
    ],
}  # fmt: skip
COUNTS = (
    "table", "batch", "images", "images_needed", "seeds", "none", "several", "runaway", "prompt_tokens", "new_tokens",
)  # fmt: skip
UNITS = {
    "plan_gib": "plan, GiB", "plan_gb": "plan, GB", "apart_gib": "paper minus plan, GiB",
    "apart_percent": "paper minus plan, %", "within": "within the bound", "tokens_per_second": "tokens/s, all rows",
    "read_mib": "read a step, MiB", "bandwidth_gb_s": "bandwidth, GB/s", "floor_ms": "floor, ms/token",
    "times_floor": "decode / floor", "sd": "SD over images, points", "detectable": "detectable, points",
    "power": "power for this difference", "score_points": "score in %, or points",
    "seed_sd": "SD between seeds, points", "chance_sd": "of it by the items drawn, points",
    "training_sd": "of it by training, points", "item_sd": "SD by items, points",
    "accuracy": "accuracy, %", "balanced": "mean over diseases, %", "name_exact": "name exact, %",
    "fact_f1": "fact F1, %", "similarity": "similarity, %",
}  # fmt: skip
SEEDED = re.compile(r"(.+\+sft)(?:~(\d+))?")


def the_planner(results: Results) -> pd.DataFrame:
    """The memory plan beside every VRAM figure of the paper."""
    known = results.architecture_7b
    return planner.table(shapes.Architecture(**known)) if known else pd.DataFrame()


def latencies(results: Results) -> pd.DataFrame:
    """Every batch of every measured variant, beside the floor of its decoding."""
    taken = results.latency
    if taken is None or not {"batch", "floor_ms"} <= set(taken):
        return pd.DataFrame()
    return taken.assign(tokens_per_second=1000 * taken.batch / taken.decode_ms_per_token)


def family(results: Results) -> list[tuple[str, str, str]]:
    """(against, setting, variant): the full pipeline's rivals in Table 5, and "either alone" of Table 4."""
    at = {"operating": results.operating, "deeper": results.deeper}
    five, four = (paper.table(number, **at) for number in (5, 4))
    rows = [("Table 5", row.setting, row.variant) for row in five.iloc[1:].itertuples()]
    symmetric = variant_id(results.operating, healed=True, method="rtn_symmetric")
    rows.append(("Table 5", "Round to neighbour, symmetric grid (Eq. 1)", symmetric))
    alone = four[four.variant.isin([variant_id(0, method="awq"), variant_id(results.operating)])]
    rows += [("Table 4", row.setting, row.variant) for row in alone.itertuples()]
    known = set() if results.evaluation is None else set(results.evaluation.variant)
    return [row for row in rows if row[2] in known]


def comparisons(results: Results) -> pd.DataFrame:
    """Each setting minus the full pipeline, paired over images; p corrected over the whole family (Holm)."""
    full = answers_of(results.evaluation, variant_id(results.operating, healed=True, method="awq"))
    rows = [
        (*row, *metrics.paired_difference(answers_of(results.evaluation, row[2]), full))
        for row in (family(results) if len(full) else [])
    ]
    table = pd.DataFrame(rows, columns=["against", "setting", "variant", *CHANGE, "n", "images"])
    return table.assign(p_holm=metrics.holm(table.p))


def powers(results: Results) -> pd.DataFrame:
    """What the paper's 39 pictures, and all of stage 08's, can tell of the family's differences."""
    name, rows = variant_id(results.operating, healed=True, method="awq"), []
    for pictures, frame in picture_sets(results).items():
        for _, setting, variant in family(results):
            one, full = (answers_of(frame, v) for v in (variant, name))
            apart = metrics.by_image_difference(one, full)
            sd, images = apart.std(ddof=1), len(apart)
            if images > 1:
                found = apart.mean()
                told = power.detectable(sd, images), found, power.chance(sd, images, found)
                count = min(one.score.notna().sum(), full.score.notna().sum())
                rows.append(
                    (
                        pictures,
                        setting,
                        variant,
                        images,
                        count,
                        sd,
                        *told,
                        power.images_needed(sd, found),
                    )
                )
    return pd.DataFrame(rows, columns=COLUMNS["extra_power"])


def picture_sets(results: Results) -> dict[str, pd.DataFrame]:
    """Stage 08's answers about the test pictures, and about all, if there are others."""
    every = results.evaluation
    if every is None:
        return {}
    test = every[every.split == "test"]
    return {"test": test} | ({"test and held-out": every} if len(test) < len(every) else {})


def seeded(names) -> dict[str, list[str]]:
    """{healed variant: its names by SFT seed} of those that were trained more than once."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if match := SEEDED.fullmatch(name):
            found.setdefault(match[1], {})[int(match[2] or 0)] = name
    return {base: [by[seed] for seed in sorted(by)] for base, by in found.items() if len(by) > 1}


def seeds(results: Results) -> pd.DataFrame:
    """Noise of training and of the pictures drawn, told apart, for each healed model with several SFT seeds."""
    groups = seeded([] if results.variants is None else results.variants.variant)
    marks = {base: _marks(results.answers, names) for base, names in groups.items()}
    marks = {base: frame for base, frame in marks.items() if len(frame)}
    rows = [(f"score of {base}", *spread(frame)) for base, frame in marks.items()]
    control = variant_id(0, healed=True)
    for base in (name for name in marks if name != control and control in marks):
        plain = [
            _marks(results.answers, [name]) for name in (base.removesuffix("+sft"), variant_id(0))
        ]
        if all(map(len, plain)):
            shared = range(min(marks[base].shape[1], marks[control].shape[1]))
            net = {
                i: marks[base][i] - plain[0][0] - marks[control][i] + plain[1][0] for i in shared
            }
            rows.append(
                (f"gain of {base}, net of the control's", *spread(pd.DataFrame(net).dropna()))
            )
    return pd.DataFrame(rows, columns=COLUMNS["extra_seeds"])


def _marks(answers: pd.DataFrame | None, names: list[str]) -> pd.DataFrame:
    """[answers, seeds]: marks by (item, question), of those scored under every name."""
    if answers is None or not set(names) <= set(answers.variant):
        return pd.DataFrame()
    columns = [
        answers_of(answers, name).set_index(["item", "question"]).score.astype(float)
        for name in names
    ]
    return pd.concat(columns, axis=1, keys=range(len(names)), join="inner").dropna()


def spread(marks: pd.DataFrame) -> tuple:
    """COLUMNS["extra_seeds"] from `seeds` on, of marks [answers, seeds] indexed by item and question.

    seed_sd: between the seeds' means on these pictures; chance_sd and training_sd: its parts (`variances`); item_sd:
    standard error over images of the mean over seeds.
    """
    means, mean = metrics.percent(marks.mean()), marks.mean(axis=1)
    between, by_chance = variances(marks)
    by_image = metrics.percent(mean.groupby(level=0).mean())
    parts = np.sqrt(
        [between, by_chance, max(0.0, between - by_chance), by_image.var(ddof=1) / len(by_image)]
    )
    interval = metrics.mean_intervals(mean.to_frame()).iloc[0]
    return (marks.shape[1], *interval, means.min(), means.max(), *parts, len(marks))


def variances(marks: pd.DataFrame) -> tuple[float, float]:
    """Of the seeds' means: their variance, and the part of it that seeds equally good would have, in points squared.

    Such seeds only err on different pictures: the answers' residuals, once answer and seed means are taken out, are
    summed by image (questions about one picture err together); m / (m - 1) and 1 / (k - 1) for what the means take up.
    """
    (count, k), mean = marks.shape, marks.mean(axis=1)
    residual = marks.sub(mean, axis=0) - marks.mean() + marks.to_numpy().mean()
    sums = metrics.percent(residual.groupby(level=0).sum()).to_numpy()
    images = len(sums)
    chance = (sums**2).sum() / (k - 1) * images / max(images - 1, 1) / count**2
    return metrics.percent(marks.mean()).var(ddof=1), chance


def diagnoses(results: Results) -> pd.DataFrame:
    """Which disease the answer to the name question names: accuracy, what is left open, the commonest confusion."""
    rows = []
    for variant, part in _named(results).groupby("variant", sort=False):
        right = (part.diagnosis == part.disease).astype(float)
        share = metrics.share_interval(part["item"], right)
        balanced = 100 * right.groupby(part.disease).mean().mean()
        none, several = ((part.diagnosis == name).sum() for name in ("none", "several"))
        rows.append((variant, *share[:3], balanced, none, several, _most_confused(part), share.n))
    return pd.DataFrame(rows, columns=COLUMNS["extra_diagnosis"])


def _named(results: Results) -> pd.DataFrame:
    """Stage 08's answers to the name question."""
    every = results.predictions
    if every is None:
        return pd.DataFrame({"variant": [], "disease": [], "diagnosis": []})
    return every[(every.stage == "08_evaluation") & every.diagnosis.notna()]


def _most_confused(part: pd.DataFrame) -> str:
    wrong = part[(part.diagnosis != part.disease) & ~part.diagnosis.isin(["none", "several"])]
    counts = wrong.groupby(["disease", "diagnosis"]).size()
    return (
        "" if counts.empty else f"{counts.idxmax()[0]} called {counts.idxmax()[1]} ({counts.max()})"
    )


def confusion(results: Results, variant: str) -> pd.DataFrame:
    """Counts [disease, named] of one variant; the last columns are `several` and `none`, where there are any."""
    part = _named(results)
    part = part[part.variant == variant]
    counts = part.groupby(["disease", "diagnosis"]).size().unstack(fill_value=0)
    names = sorted(counts.index)
    extra = [name for name in sorted(counts.columns) if name not in names]
    return counts.reindex(index=names, columns=[*names, *extra], fill_value=0)


def secondary_scores(results: Results) -> pd.DataFrame:
    """Scores that no judge gives, and runaway answers, of every variant on the test pictures."""
    every, rows = results.predictions, []
    if every is None:
        return pd.DataFrame()
    for variant, part in every[every.split == "test"].groupby("variant", sort=False):
        right = (part.diagnosis == part.disease).astype(float).where(part.diagnosis.notna())
        shares = [
            metrics.share_interval(part["item"], v) for v in (right, part.fact_f1, part.similarity)
        ]
        score, runaway = (
            metrics.percent(part.score.astype(float).mean()),
            (~part.stopped.astype(bool)).sum(),
        )
        rows.append(
            (variant, score, *(x for share in shares for x in share[:3]), runaway, len(part))
        )
    known = [] if results.variants is None else list(dict.fromkeys(results.variants.variant))
    place = {name: i for i, name in enumerate(known)}
    rows.sort(key=lambda row: place.get(row[0], len(known)))
    return pd.DataFrame(rows, columns=COLUMNS["extra_secondary"])


MAKERS = (the_planner, latencies, comparisons, powers, seeds, diagnoses, secondary_scores)
