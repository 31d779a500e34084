"""Can this model show what the paper claims? What is known to hold where a claim has a meaning.

A control fails where its interval does not exclude "no effect", and what rests on it is then
untestable in this run. One that a run's parameters leave out says nothing either way.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml

from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges.controls import COPIED
from derm_compress.method.pruning import controls as removed
from derm_compress.model.variants import ORIGINAL, SHUFFLED
from derm_compress.report import trainings
from derm_compress.report.results import Results, answers_of
from derm_compress.report.tables import rankings

FILE = Path(__file__).parents[1] / "paper" / "controls.yaml"
CONTROLS = yaml.safe_load(FILE.read_text("utf-8"))
LOUD = 25  # % of the projections; outliers in fewer layers are none (Dettmers et al. 2022)
OFF = 95  # %; weights on one of our grids would lose nothing
FATAL = 50  # % of the score above the lowest mark


class Found(NamedTuple):
    """What a control measures with its 95 % interval, if it has one, and whether it holds."""

    value: float
    lo: float | None
    hi: float | None
    holds: bool


def beyond(estimate: Iterable[float], least: float = 0.0) -> Found | None:
    """A value with its interval, which must lie above `least`; None where nothing was measured."""
    value, lo, hi, *_ = estimate
    if pd.isna(value):
        return None
    return Found(float(value), float(lo), float(hi), bool(lo > least))


def outliers(results: Results) -> Found | None:
    """A count over all projections, which has no interval."""
    own = results.inputs[results.inputs.variant == ORIGINAL]
    share = 100 * float((own.outlier_channels > 0).mean())
    return Found(share, None, None, share >= LOUD)


def draws_agree(results: Results) -> Found | None:
    """By the study's own criterion: every two of several draws; of a single one its halves, with
    95 % of the ways to halve it."""
    if apart := rankings.draws_agree(results):
        return beyond(apart)
    known = results.values, results.protected, results.criterion
    return beyond(rankings.halves_agree(*known) or (np.nan,) * 3)


def protected_fatal(results: Results) -> Found | None:
    """The mean over the protected blocks, each removed alone."""
    marks = metrics.percent(of_controls(results, results.removal_answers, "score"))
    if removed.PROTECTED not in marks:
        return None
    kept = marks[removed.PROTECTED].mean(axis=1) - metrics.FLOOR
    whole = marks[removed.WHOLE].mean(axis=1) - metrics.FLOOR
    if whole.mean() <= 0:
        return None
    return beyond(metrics.ratio_interval(whole - kept, whole), FATAL)


def against_chance(results: Results, control: str) -> Found | None:
    """Nats a token below the random orders' loss, over these and pictures; a loss tells models
    apart that all get the lowest mark."""
    losses = of_controls(results, results.removal_losses, "loss")
    if control not in losses:
        return None
    apart = losses[removed.RANDOM].to_numpy() - losses[control].to_numpy()  # [pictures, orders]
    return beyond((apart.mean(), *metrics.crossed_interval(apart)))


def of_controls(results: Results, measured: pd.DataFrame, values: str) -> pd.DataFrame:
    """What was measured of stage 04's controls, [pictures, (control, variant)]."""
    known = measured.merge(results.removals[["variant", "control"]], on="variant")
    return known.pivot_table(index="item", columns=["control", "variant"], values=values).dropna()


def off_the_grid(results: Results) -> Found | None:
    """The least over widths; it has no interval."""
    errors = results.rounded.pivot(index="bits", columns="weights", values="relative_error")
    share = 100 * float((errors["as they are"] / errors["with noise"]).min())
    return Found(share, None, None, share >= OFF)


def awq_beats_rounding(results: Results) -> Found | None:
    """By how many percent rounding's perplexity of the reference answers is above AWQ's."""
    losses = results.losses.pivot_table(index="item", columns="method", values="loss")
    ratios = np.exp(metrics.mean_interval(losses.rtn - losses.awq))
    return beyond(100 * (ratios - 1))


def seeing(results: Results, name: str) -> Found | None:
    """What the original loses without the right picture."""
    pair = (answers_of(results.together, one) for one in (ORIGINAL, name))
    return beyond(metrics.paired_difference(*pair, n_permutations=1))


def healing(results: Results) -> Found | None:
    """What SFT gives the pruned model beyond what it gives the unpruned one."""
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


def healed_in_order(results: Results) -> Found | None:
    """The healed model above one as deep and trained alike, whose blocks stand in random order."""
    known = results.models[results.models.criterion.eq(SHUFFLED) & results.models.healed]
    if known.empty:
        return None
    pair = results.main[2], known.variant.iloc[0]
    return beyond(trainings.apart(results, results.answers, *pair))


def copied_is_worse(results: Results) -> Found | None:
    """What the judge takes from another picture's answer, against the right one."""
    first = results.judge_controls[results.judge_controls["round"] == 0]
    first = first[first.judge == first.judge.iloc[-1]]
    pair = (first[first.control == control] for control in ("reference", COPIED))
    return beyond(metrics.paired_difference(*pair, n_permutations=1))


NEEDS = {  # what measures a control: the results without which it is not tested
    draws_agree: "values",
    protected_fatal: "removals removal_answers",
    against_chance: "removals removal_losses",
    healing: "variants answers",
    healed_in_order: "variants answers",
    outliers: "inputs",
    off_the_grid: "rounded",
    awq_beats_rounding: "losses",
    seeing: "",
    copied_is_worse: "judge_controls",
}
MEASURES = {function.__name__: function for function in NEEDS}


def measure(name: str, results: Results) -> Found | None:
    """What a run finds for a control; None where it does not test it."""
    function, *told = CONTROLS[name]["measure"]
    needed = [getattr(results, field) for field in NEEDS[MEASURES[function]].split()]
    if any(frame is None or frame.empty for frame in needed):
        return None
    return MEASURES[function](results, *told)


def controls(results: Results, stage: str = "") -> pd.DataFrame:
    """One row a control, of one stage or of all; empty cells where a run did not test it."""
    rows = []
    for name, told in CONTROLS.items():
        if stage in ("", told["stage"]):
            found = measure(name, results) or Found(*[None] * 4)
            said = {"control": name, "question": told["question"], "expected": told["expected"]}
            rows.append(said | found._asdict())
    frame = pd.DataFrame(rows)
    return frame.astype(dict.fromkeys(("value", "lo", "hi"), float) | {"holds": object})


def failed(results: Results) -> list[str]:
    """Names of the controls that were tested and do not hold."""
    table = controls(results)
    return list(table.control[table.holds.eq(False)])
