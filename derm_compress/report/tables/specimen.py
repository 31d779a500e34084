"""Can this model show what the paper claims? What is known to hold where a claim has a meaning.

A control fails where its interval does not exclude "no effect", and what rests on it is then
untestable in this run. One that a run's parameters leave out says nothing either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges.controls import COPIED
from derm_compress.method.pruning import controls as removed
from derm_compress.model.variants import ORIGINAL
from derm_compress.report.results import Results, answers_of
from derm_compress.report.tables import rankings

LOUD = 25  # % of the projections; outliers in fewer layers are none (Dettmers et al. 2022)
OFF = 95  # %; weights on one of our grids would lose nothing
FATAL = 50  # % of the score above the floor


class Found(NamedTuple):
    """What a control measures with its 95 % interval, if it has one, and whether it holds."""

    value: float
    lo: float | None
    hi: float | None
    holds: bool


Measure = Callable[[Results], Found | None]


@dataclass(frozen=True)
class Control:
    """What a claim can rest on; `stage`: whose notebook shows it first."""

    name: str
    stage: str
    question: str
    expected: str
    measure: Measure


def beyond(estimate: Iterable[float], least: float = 0.0) -> Found | None:
    """A value with its interval, which must lie above `least`; None where nothing was measured."""
    value, lo, hi, *_ = estimate
    if pd.isna(value):
        return None
    return Found(float(value), float(lo), float(hi), bool(lo > least))


def outliers(results: Results) -> Found | None:
    """A count over all projections, which has no interval."""
    if results.inputs is None or results.inputs.empty:
        return None
    own = results.inputs[results.inputs.variant == ORIGINAL]
    share = 100 * float((own.outlier_channels > 0).mean())
    return Found(share, None, None, share >= LOUD)


def draws_agree(results: Results) -> Found | None:
    """By the study's own criterion: every two of several draws, from the lowest to the highest
    correlation; of a single one its halves, with 95 % of the ways to halve it."""
    if results.values is None or results.values.empty:
        return None
    if apart := rankings.draws_apart(results):
        return beyond((np.mean(apart), min(apart), max(apart)))
    table = rankings.calibration_sizes(results)
    if table.empty or results.criterion not in set(table.ranking):
        return None
    row = table[table.ranking == results.criterion].iloc[-1]
    return beyond((row.rho, row.rho_lo, row.rho_hi))


def protected_fatal(results: Results) -> Found | None:
    """The mean over the protected blocks, each removed alone."""
    marks = removals(results)
    if marks is None or removed.PROTECTED not in marks:
        return None
    kept = marks[removed.PROTECTED].mean(axis=1) - metrics.FLOOR
    whole = marks[removed.WHOLE].mean(axis=1) - metrics.FLOOR
    if whole.mean() <= 0:
        return None
    return beyond(metrics.ratio_interval(whole - kept, whole), FATAL)


def against_chance(control: str) -> Measure:
    """Points above the mean of the random orders, over these and pictures."""

    def measure(results: Results) -> Found | None:
        marks = removals(results)
        if marks is None or control not in marks:
            return None
        apart = marks[control].to_numpy() - marks[removed.RANDOM].to_numpy()  # [pictures, orders]
        return beyond((apart.mean(), *metrics.crossed_interval(apart)))

    return measure


def removals(results: Results) -> pd.DataFrame | None:
    """Scores in percent of stage 04's controls, [pictures, (control, variant)]."""
    table, answers = results.removals, results.removal_answers
    if table is None or answers is None or answers.empty:
        return None
    marks = answers.merge(table[["variant", "control"]], on="variant")
    marks = marks.pivot_table(index="item", columns=["control", "variant"], values="score")
    return metrics.percent(marks.dropna())


def off_the_grid(results: Results) -> Found | None:
    """The least over widths; it has no interval."""
    if results.rounded is None or results.rounded.empty:
        return None
    errors = results.rounded.pivot(index="bits", columns="weights", values="relative_error")
    share = 100 * float((errors["as they are"] / errors["with noise"]).min())
    return Found(share, None, None, share >= OFF)


def awq_beats_rounding(results: Results) -> Found | None:
    """By how many percent rounding's perplexity of the reference answers is above AWQ's."""
    if results.losses is None or results.losses.empty:
        return None
    losses = results.losses.pivot_table(index="item", columns="method", values="loss")
    ratios = np.exp(metrics.mean_interval(losses.rtn - losses.awq))
    return beyond(100 * (ratios - 1))


def seeing(name: str) -> Measure:
    """What the original loses without the right picture."""

    def measure(results: Results) -> Found | None:
        pair = (answers_of(results.together, one) for one in (ORIGINAL, name))
        return beyond(metrics.paired_difference(*pair, n_permutations=1))

    return measure


def healing(results: Results) -> Found | None:
    """What SFT gives the pruned model beyond what it gives the unpruned one."""
    if results.variants is None or results.answers is None:
        return None
    n = results.operating
    names = [*results.main, results.variant(0, healed=True)]
    marks = [answers_of(results.answers, name) for name in names]
    original, pruned, healed, control = (
        one.set_index(["item", "question"]).score.astype(float) for one in marks
    )
    net = ((healed - pruned) - (control - original)).dropna()
    if net.empty or not n:
        return None
    row = metrics.mean_intervals(net.to_frame()).iloc[0]
    return beyond((row["mean"], row.lo, row.hi))


def copied_is_worse(results: Results) -> Found | None:
    """What the judge takes from another picture's answer, against the right one."""
    if results.judge_controls is None:
        return None
    first = results.judge_controls[results.judge_controls["round"] == 0]
    first = first[first.judge == first.judge.iloc[-1]]
    pair = (first[first.control == control] for control in ("reference", COPIED))
    return beyond(metrics.paired_difference(*pair, n_permutations=1))


JUDGE, BLANK, OTHER = "copied answer", "blank pictures", "other pictures"
PROTECTED, RUN, CHANCE = "protected blocks", "run of blocks", "criterion against chance"
DRAWS, OUTLIERS, THREE_BITS = "two draws", "outlier channels", "AWQ at 3 bits"
OWN_GRID = "weights off the grid"
TRAINING = "training without pruning"
CONTROLS = (
    Control(
        DRAWS,
        "03_layer_importance",
        "Do two draws of calibration pictures rank the blocks alike?",
        "a rank correlation above 0",
        draws_agree,
    ),
    Control(
        PROTECTED,
        "04_pruning",
        "Is it fatal to remove a protected block?",
        f"on average more than {FATAL} % of the score above the floor is lost",
        protected_fatal,
    ),
    Control(
        RUN,
        "04_pruning",
        "Is a run of alike blocks (angular distance) missed less than blocks drawn by chance?",
        "with a quarter of the blocks removed, more than 0 points above random orders",
        against_chance(removed.RUN),
    ),
    Control(
        CHANCE,
        "04_pruning",
        "Does the study's criterion beat a random order?",
        "with a quarter of the blocks removed, more than 0 points above random orders",
        against_chance(removed.CHOSEN),
    ),
    Control(
        TRAINING,
        "05_sft",
        "Does SFT give the pruned model more than it gives the unpruned one?",
        "more than 0 points",
        healing,
    ),
    Control(
        OUTLIERS,
        "06_activation_analysis",
        "Do some input channels stand out?",
        f"{LOUD} % of the projections or more read one that peaks above 6 times the median channel",
        outliers,
    ),
    Control(
        OWN_GRID,
        "07_quantization",
        "Has the base no 4-bit grid that ours coincide with?",
        f"rounding errs at least {OFF} % as much as on weights with noise, at every width",
        off_the_grid,
    ),
    Control(
        THREE_BITS,
        "07_quantization",
        "Does AWQ beat rounding at 3 bits on the unpruned model?",
        "rounding's perplexity is more than 0 % above AWQ's",
        awq_beats_rounding,
    ),
    Control(
        BLANK,
        "08_evaluation",
        "Does the score fall without a picture?",
        "by more than 0 points",
        seeing("blank"),
    ),
    Control(
        OTHER,
        "08_evaluation",
        "Does the score fall with a picture of another disease?",
        "by more than 0 points",
        seeing("shuffled"),
    ),
    Control(
        JUDGE,
        "08_evaluation",
        "Does the judge mark an answer copied from another picture lower?",
        "by more than 0 points",
        copied_is_worse,
    ),
)


def controls(results: Results, stage: str = "") -> pd.DataFrame:
    """One row a control, of one stage or of all; empty cells where a run did not test it."""
    rows = []
    for control in CONTROLS:
        if stage in ("", control.stage):
            found = control.measure(results) or Found(*[None] * 4)
            told = {"control": control.name, "question": control.question}
            rows.append(told | {"expected": control.expected} | found._asdict())
    frame = pd.DataFrame(rows)
    return frame.astype(dict.fromkeys(("value", "lo", "hi"), float) | {"holds": object})


def failed(results: Results) -> list[str]:
    """Names of the controls that were tested and do not hold."""
    table = controls(results)
    return list(table.control[table.holds.eq(False)])
