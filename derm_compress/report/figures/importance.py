"""Figure 3, and rankings compared: do they agree, what do they need, which is best. No torch."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd

from derm_compress.report import paper
from derm_compress.report.figures import style
from derm_compress.report.figures.style import CROWD, DENSE, LINES, PRUNED, Drawing
from derm_compress.report.sentences import Facts
from derm_compress.report.tables.criteria import random_name
from derm_compress.report.wording import is_another_criterion, looks_at_blocks, words

PANELS = 6  # criteria that Figure 3 draws
PRINTED = 20  # rankings up to which each correlation fits its cell
VALUES = {
    "output_similarity": "mean cosine\n(Eq. 5)",
    "magnitude": "sum of |w|",
    "perplexity": "log perplexity",
}


@style.figure("fig3_layer_importance", "scores")
def layer_importance(facts: Facts, scores: pd.DataFrame) -> Drawing | None:
    """Each criterion's value of every block; the least important filled, protected ones as crosses.

    Output similarity is drawn as the paper's Figure 3 has it, the mean cosine (high: unimportant),
    its score being 1 minus that. The axis names the rankings that are not drawn.
    """
    removed, groups = facts.results.operating, panels(scores)
    if not groups:
        return None
    gone = {name: set(group.nsmallest(removed, "rank").block) for name, group in groups.items()}
    first = next(iter(groups.values()))
    known = {"least": first.block[first["rank"].idxmin()], "names": list(groups)}
    finding = facts.title("fig3_layer_importance", gone=list(gone.values()), **known)
    height = 1.1 + (1.7 if len(groups) < 4 else 1.25) * len(groups)
    figure, axes = style.canvas(finding, height, len(groups), sharex=True)
    for ax, (name, group) in zip(axes, groups.items(), strict=True):
        _panel(ax, name, group, gone[name])
    handles, labels = axes[0].get_legend_handles_labels()
    labels[0] = f"{removed} least important"
    axes[0].legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    axes[-1].set_xlabel("decoder block")
    if left := [words(name) for name in dict.fromkeys(scores.criterion) if name not in groups]:
        said = textwrap.fill("not drawn: " + ", ".join(left), 84)
        figure.supxlabel(said, fontsize=7.5, color=style.QUIET, x=0.01, ha="left")
    return Drawing(figure, scores, finding)


def panels(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Scores of whole blocks by the first criteria that look at them, with images."""
    whole = scores if "part" not in scores else scores[scores.part == "block"]
    groups = dict(list(whole.groupby("criterion", sort=False)))
    shown = [n for n in groups if looks_at_blocks(n) and not n.endswith("-text")]
    return {name: groups[name] for name in shown[:PANELS]}


def _panel(ax, name: str, group: pd.DataFrame, gone: set) -> None:
    """One criterion; protected blocks stand at the edge, since they would flatten the rest."""
    value = 1 - group.score if name == "output_similarity" else group.score
    out, fixed = group.block.isin(gone), group["rank"].isna()
    room = 0.1 * (value[~fixed].max() - value[~fixed].min() or 1)
    low, high = value[~fixed].min() - room, value[~fixed].max() + room
    value = value.clip(low, high)
    ax.vlines(group.block, low, value, color="#bbbbbb", linewidth=1)
    ax.set(ylim=(low, high), ylabel=VALUES.get(name, words(name)))
    protected = {"label": "protected (at the edge: beyond)", "clip_on": False}
    for rows, mark, look in (
        (out, "o", {"color": PRUNED, "label": "least important"}),
        (~out & ~fixed, "o", {"color": DENSE, "mfc": "white", "label": "stays"}),
        (fixed, "x", {"color": DENSE, **protected}),
    ):
        ax.plot(group.block[rows], value[rows], mark, **look)


@style.figure("extra_agreement", "extra_agreement")
def agreement(facts: Facts, table: pd.DataFrame) -> Drawing:
    """Rank correlations of every two rankings, in the order of agreement with the study's own."""
    grid = correlations(table, facts.results.criterion)
    names, shown = [words(name) for name in grid], grid.to_numpy()[1:, :-1]  # every pair once
    size, finding = len(shown), _most_and_least(grid)
    figure, (axes,) = style.canvas(finding, 2.2 + min(4.4, 0.5 * size))
    below = np.ma.array(shown, mask=np.triu(np.ones(shown.shape, bool), 1))
    image = axes.imshow(below, cmap="Blues", vmin=-1, vmax=1, aspect="auto")
    for i, j in zip(*np.tril_indices(size), strict=True):
        if size < PRINTED and np.isfinite(shown[i, j]):
            text = f"{shown[i, j] + 0:.2f}".replace("0.", ".")
            shade = "white" if shown[i, j] > 0.25 else "black"
            at = {"ha": "center", "va": "center", "fontsize": min(8.5, 96 / size)}
            axes.text(j, i, text, color=shade, **at)
    small = 9 if size < 10 else 7.5
    axes.set_yticks(range(size), names[1:], fontsize=small)
    axes.set_xticks(range(size), names[:-1], rotation=90, fontsize=small)
    style.bare(axes)
    bar = {"ax": axes, "label": "rank correlation"}
    if size > 2:  # in the empty half
        bar = {"cax": axes.inset_axes([0.55, 0.93, 0.42, 0.035]), "orientation": "horizontal"}
        bar["label"] = "Spearman's rank correlation"
    figure.colorbar(image, ticks=[-1, 0, 1], **bar)
    return Drawing(figure, table, finding)


def correlations(table: pd.DataFrame, own: str) -> pd.DataFrame:
    """[ranking, ranking], `own` first, then by correlation with it; 1 on the diagonal."""
    names = list(dict.fromkeys([*table.one, *table.other]))
    both = pd.concat([table, table.rename(columns={"one": "other", "other": "one"})])
    grid = both.pivot(index="one", columns="other", values="rho").astype(float)
    grid = grid.reindex(index=names, columns=names)
    grid = grid.mask(np.eye(len(names), dtype=bool), 1.0)
    own = own if own in names else names[0]
    by_own = grid[own].drop(own).sort_values(ascending=False, kind="stable")
    order = [own, *by_own.index]
    return grid.loc[order, order]


def _most_and_least(grid: pd.DataFrame) -> str:
    """Which rankings are most and least like the study's own, of those that look at blocks."""
    own = grid.columns[0]
    told = [
        f"{words(name)} ({rho:.2f})"
        for name, rho in grid[own].items()
        if is_another_criterion(name, own)
    ]
    if not told:
        return "How far rankings agree on the order of the blocks"
    if len(told) == 1:
        return f"{words(own)} and {told[0]}: the rank correlation of their orders"
    return f"{words(own)} ranks most like {told[0]}, least like {told[-1]}"


@style.figure("extra_calibration_size", "extra_calibration_size")
def calibration_size(facts: Facts, curve: pd.DataFrame) -> Drawing:
    """How far two disjoint draws of pictures agree, by their size; band: 95 % of draws."""
    own = facts.results.criterion
    names = sorted(dict.fromkeys(curve.ranking), key=lambda name: name != own)
    own_curve = curve[curve.ranking == names[0]]
    finding = facts.title("extra_calibration_size", last=own_curve.iloc[-1])
    figure, axes = style.canvas(finding, 5.4, 2, sharex=True)
    for ax, column in zip(axes, ("rho", "overlap"), strict=True):
        for name, look in looks(names, own).items():
            rows = curve[curve.ranking == name]
            ax.plot(rows["items"], rows[column], label=words(name), **look)
        ends = own_curve[f"{column}_lo"], own_curve[f"{column}_hi"]
        ax.fill_between(own_curve["items"], *ends, color=PRUNED, alpha=0.18)
    ticks, chance = sorted(set(curve["items"])), curve.chance.iloc[0]
    axes[1].axhline(chance, color=style.PAPER, linestyle=":", linewidth=1)
    axes[1].text(max(ticks), chance, "chance ", ha="right", va="bottom", fontsize=8)
    lowest = min(0, curve.rho.min()) - 0.02
    axes[0].set(ylabel="rank correlation", ylim=(lowest, 1.02), xscale="log")
    axes[1].set(ylabel="share in common", ylim=(0, 1.05))
    axes[1].set_xlabel("calibration pictures in each of two disjoint draws")
    axes[1].set_xticks(ticks, ticks)
    axes[1].set_xticks([], minor=True)
    style.legend_below(figure, 2 if len(names) > 3 else 3, axes[0])
    return Drawing(figure, curve, finding)


def looks(names: list[str], own: str) -> dict[str, dict]:
    """A line style a name: bold for `own`, distinct for the next ones, one grey for the crowd."""
    found = {}
    if own in names:
        found[own] = {"color": PRUNED, "marker": "o", "linewidth": 2.6, "zorder": 4}
    rest = [name for name in names if name != own]
    for name, (colour, marker, dash) in zip(rest, LINES, strict=False):
        found[name] = {"color": colour, "marker": marker, "linestyle": dash}
        found[name] |= {"linewidth": 1.3, "markersize": 5}
    crowd = {"color": CROWD, "linewidth": 0.9, "zorder": 1}
    return found | dict.fromkeys(rest[len(LINES) :], crowd)


@style.figure("extra_criteria", "extra_criteria", "table1_pruning")
def criteria(facts: Facts, table: pd.DataFrame, table1: pd.DataFrame) -> Drawing | None:
    """Score against blocks removed for every criterion.

    The study's own is bold, with its 95 % band; random orders are a range; the paper's is dotted.
    """
    if table.score.isna().all():
        return None
    tests, own = facts.rows("extra_criteria_tests"), facts.results.criterion
    curves = _curves(table, table1)
    random = [name for name in curves if name.startswith("random-")]
    names = in_order([name for name in curves if name not in random], tests, own)
    finding = facts.title("extra_criteria")
    figure, (axes,) = style.canvas(finding, 5.6)
    style.score_axis(axes)
    if random:
        _random_orders(axes, curves[random].dropna())
    for name, look in looks(names, own).items():
        line = curves[name].dropna()
        axes.plot(line.index, line, label=None if look["color"] == CROWD else words(name), **look)
    band = table1.dropna(subset=["score"])
    ends = band.score_lo.astype(float), band.score_hi.astype(float)
    axes.fill_between(band.fraction_removed * paper.BLOCKS, *ends, color=PRUNED, alpha=0.18)
    theirs, look = paper.table(1), {"color": style.PAPER, "label": "paper, LLaVA-1.5-7B"}
    axes.plot(theirs.blocks_removed, theirs.paper_score, ":", linewidth=1.6, **look)
    if len(names) > len(LINES) + 1:
        axes.plot([], [], color=CROWD, label=f"{len(names) - len(LINES) - 1} others (table)")
    axes.set_xlabel(f"blocks removed, of {paper.BLOCKS}")
    style.legend_below(figure, 2, columnspacing=1.2)
    return Drawing(figure, table, finding)


def _curves(table: pd.DataFrame, table1: pd.DataFrame) -> pd.DataFrame:
    """[blocks removed of 32, criterion] scores; all start at the unpruned model."""
    curves = table.pivot(index="blocks_removed", columns="criterion", values="score").astype(float)
    curves.loc[0] = table1.score[table1.blocks_removed == 0].astype(float).max()
    share = (table1.fraction_removed / table1.blocks_removed).max()
    curves.index = curves.index.astype(float) * paper.BLOCKS * share
    return curves.sort_index()


def _random_orders(axes, scores: pd.DataFrame) -> None:
    """The mean of all random orders, in the range that they span."""
    ends = scores.min(axis=1), scores.max(axis=1)
    axes.fill_between(scores.index, *ends, color=style.BAND, linewidth=0)
    label = random_name(scores.shape[1]).replace("of", "and range of")
    look = {"color": DENSE, "linestyle": (0, (1, 1)), "linewidth": 3, "zorder": 1.5}
    axes.plot(scores.index, scores.mean(axis=1), label=label, **look)


def in_order(names: list[str], tests: list[dict], own: str) -> list[str]:
    """`own`, then criteria as they are, then their variations, each the better before the worse."""
    behind = {row["criterion"]: row["difference_all"] for row in tests}

    def place(name: str) -> tuple:
        return name != own, "-" in name, behind.get(name, np.inf)

    return sorted(names, key=place)
