"""Runs that one file sweeps: scores over seeds, against what is swept, paired. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from scipy.special import stdtrit

from derm_compress.evaluate import metrics
from derm_compress.report.figures import style
from derm_compress.report.figures.style import Drawing
from derm_compress.report.results import table_of

SEED = "seed"
SCORES = "table4_efficiency"  # the study's ways to compress, a row each
COLOURS = {"Quant": style.QUANTIZED, "SFT": style.SFT, "Prun": style.PRUNED, "": style.DENSE}


@dataclass(frozen=True)
class Sweep:
    """A file's runs: `scores` has a row for each run and setting, with what is swept (`axes`)."""

    file: str
    axes: tuple[str, ...]
    scores: pd.DataFrame

    @property
    def shown(self) -> list[str]:
        """What scores are shown against: not the seeds, which are averaged over."""
        return [axis for axis in self.axes if axis != SEED]


def sweeps(infos: dict[Path, dict]) -> list[Sweep]:
    """The sweeps among reports, given by folder with the run_info of each."""
    found: dict[tuple, list] = {}
    for folder, info in infos.items():
        swept, scores = info.get("sweep", {}), table_of(folder, SCORES)
        if swept and len(scores):
            values = {name: as_value(value) for name, value in swept.items()}
            others = {k: v for k, v in info.get("overrides", {}).items() if k not in swept}
            key = info.get("params_file", ""), repr(others), tuple(swept)
            found.setdefault(key, []).append(scores.assign(**values))
    made = []
    for (file, _, axes), rows in found.items():
        scores = pd.concat(rows).sort_values([*axes], kind="stable", ignore_index=True)
        made.append(Sweep(file, axes, scores))
    return made


def as_value(value):
    """What is swept as a number or a text."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def over_runs(rows: pd.DataFrame, by: list[str], name: str) -> pd.DataFrame:
    """The mean of a column over each group's `runs` and its 95 % interval by Student's t, which one
    run has not; in order of appearance."""
    found = rows.groupby(by, sort=False)[name].agg(["mean", "sem", "count"]).reset_index()
    reach = stdtrit(found["count"] - 1, metrics.TAILS[1]) * found["sem"]
    ends = {f"{name}_lo": found["mean"] - reach, f"{name}_hi": found["mean"] + reach}
    found = found.rename(columns={"mean": name, "count": "runs"}).assign(**ends)
    return found[[*by, name, *ends, "runs"]]


def over_seeds(sweep: Sweep) -> pd.DataFrame:
    """A row for each point and setting: the mean score, its interval over seeds."""
    return over_runs(sweep.scores, [*sweep.shown, "setting"], "score")


def differences(sweep: Sweep, axis: str) -> pd.DataFrame:
    """Each value of an axis less the first, by setting; runs alike in all else are pairs."""
    alike = [*(name for name in sweep.axes if name != axis), "setting"]
    first, *others = sweep.scores[axis].unique()
    scores = sweep.scores.set_index(alike)
    base = scores.score[scores[axis] == first]
    found = []
    for value in others:
        pairs = (scores.score[scores[axis] == value] - base).rename("difference").reset_index()
        found.append(pairs.assign(**{axis: f"{value} instead of {first}"}))
    if not found:
        return pd.DataFrame()
    return over_runs(pd.concat(found), [axis, "setting"], "difference")


@matplotlib.rc_context(style.STYLE)
def against(sweep: Sweep, axis: str) -> Drawing:
    """The mean score of each setting at each value of an axis, over all else that is swept."""
    table = over_runs(sweep.scores, ["setting", axis], "score")
    values = list(sweep.scores[axis].unique())
    numbers = pd.api.types.is_numeric_dtype(sweep.scores[axis]) and True not in values
    finding = f"score by {axis}, mean of {int(table.runs.min())} runs or more a point"
    figure, (axes,) = style.canvas(finding, 3.4)
    for marker, (setting, rows) in zip(
        "osD^v*X", table.groupby("setting", sort=False), strict=False
    ):
        colour = next(one for word, one in COLOURS.items() if word in setting)
        x = rows[axis] if numbers else rows[axis].map(values.index)
        look = {"marker": marker, "color": colour, "label": setting, "linewidth": 1}
        style.scores(axes, x, rows, **look)
    if not numbers:
        axes.set_xticks(range(len(values)), map(str, values))
    axes.set_xlabel(axis)
    style.score_axis(axes, "score, % (95 % interval over runs)")
    style.legend_below(figure, 2)
    return Drawing(figure, table, finding)
