"""Figures of criteria side by side: do they agree, how many pictures do they need, which is best. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd

from derm_compress.report import paper
from derm_compress.report.figures import DENSE, PAPER, PRUNED, Drawing, canvas, score_axis, styled
from derm_compress.report.ranking_findings import SIGNIFICANT, criteria_beside
from derm_compress.report.rivals import RANDOM, random_name
from derm_compress.report.wording import words

LINES = [  # colours that differ in lightness too, markers and dashes for a grey print
    ("#d96f00", "s", "-"), ("#2a8c4a", "^", "-"), ("#8a2f7a", "D", "-"), ("#7a5c00", "v", "--"), ("#c23b3b", "P", "--"),
    ("#1c9aa8", "X", "--"), ("#5a5ac8", "<", "-."), ("#3f3f3f", ">", "-."), ("#a8842c", "h", "-."),
]  # fmt: skip
CROWD = "#b5b5b5"
PRINTED = 20  # rankings up to which each correlation fits its cell


@styled
def fig_agreement(agreement: pd.DataFrame, own: str) -> Drawing:
    """Rank correlations of every two rankings (table extra_agreement), in the order of agreement with `own`."""
    names = ordered(agreement, own)
    grid = square(agreement, names)[1:, :-1]  # every pair once, without the diagonal
    size, finding = len(grid), agreement_in_words(agreement, own)
    figure, axes = canvas(finding, 2.2 + min(4.4, 0.5 * size))
    below = np.ma.array(grid, mask=np.triu(np.ones(grid.shape, bool), 1))
    image = axes.imshow(below, cmap="Blues", vmin=-1, vmax=1, aspect="auto")
    for i, j in zip(*np.tril_indices(size), strict=True):
        if size <= PRINTED and np.isfinite(grid[i, j]):
            text, shade = (
                f"{round(grid[i, j], 2) + 0:.2f}".replace("0.", "."),
                "white" if grid[i, j] > 0.25 else "black",
            )
            axes.text(
                j, i, text, ha="center", va="center", color=shade, fontsize=min(8.5, 96 / size)
            )
    small = 9 if size < 10 else 7.5
    axes.set_yticks(range(size), [words(name) for name in names[1:]], fontsize=small)
    axes.set_xticks(range(size), [words(name) for name in names[:-1]], rotation=90, fontsize=small)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = axes.inset_axes([0.55, 0.93, 0.42, 0.035]) if size > 2 else None  # in the empty half
    figure.colorbar(image, cax=bar, ax=axes, orientation="horizontal" if bar else "vertical", ticks=[-1, 0, 1],
                    label="Spearman's rank correlation" if bar else "rank correlation")  # fmt: skip
    return Drawing(figure, agreement, finding)


def ordered(agreement: pd.DataFrame, own: str) -> list[str]:
    """All rankings, `own` first, then by their correlation with it."""
    names = list(dict.fromkeys([*agreement.one, *agreement.other]))
    own = own if own in names else names[0]
    grid = pd.DataFrame(square(agreement, names), names, names)
    return list(
        grid[own].sort_values(ascending=False, kind="stable").drop(own).index.insert(0, own)
    )


def square(agreement: pd.DataFrame, names: list[str]) -> np.ndarray:
    """[names, names] correlations from the tidy pairs; 1 on the diagonal."""
    both = pd.concat([agreement, agreement.rename(columns={"one": "other", "other": "one"})])
    grid = both.pivot(index="one", columns="other", values="rho").reindex(
        index=names, columns=names
    )
    return np.where(np.eye(len(names), dtype=bool), 1.0, grid.to_numpy(float))


def agreement_in_words(agreement: pd.DataFrame, own: str) -> str:
    """Which criteria rank most and least as `own` does; orders that look at no block aside."""
    table = criteria_beside(agreement, own)
    if table.empty:
        return "How far rankings agree on the order of the blocks"
    last, first = table.iloc[-1], table.iloc[0]
    if len(table) == 1:
        return f"{words(own)} and {words(last.other)} rank the blocks with a correlation of {last.rho:.2f}"
    most, least = (f"{words(row.other)} ({row.rho:.2f})" for row in (last, first))
    return f"{words(own)} ranks most like {most}, least like {least}"


@styled
def fig_calibration_size(curve: pd.DataFrame, own: str) -> Drawing:
    """How far two disjoint draws of pictures agree, by their size (table extra_calibration_size); band: 95 %."""
    names = sorted(dict.fromkeys(curve.ranking), key=lambda name: name != own)
    first = curve[curve.ranking == names[0]].iloc[-1]
    finding = (
        f"Two rankings by {words(names[0])}, each from {first['items']} pictures of its own, correlate at "
        f"{first.rho:.2f}; {first.overlap:.2f} of the blocks to go are the same"
    )
    figure, axes = canvas(finding, 5.4, rows=2, sharex=True)
    for ax, column in zip(axes, ("rho", "overlap"), strict=True):
        for name, look in looks(names, own).items():
            rows = curve[curve.ranking == name]
            ax.plot(rows["items"], rows[column], label=words(name), **look)
            if name == names[0]:
                ax.fill_between(
                    rows["items"],
                    rows[f"{column}_lo"],
                    rows[f"{column}_hi"],
                    color=PRUNED,
                    alpha=0.18,
                )
    ticks = sorted(set(curve["items"]))
    axes[1].axhline(curve.chance.iloc[0], color=PAPER, linestyle=":", linewidth=1)
    axes[1].text(max(ticks), curve.chance.iloc[0], "chance ", ha="right", va="bottom", fontsize=8)
    axes[0].set(
        ylabel="rank correlation", ylim=(min(0, curve.rho.min()) - 0.02, 1.02), xscale="log"
    )
    axes[1].set(
        ylabel="share in common",
        ylim=(0, 1.05),
        xlabel="calibration pictures in each of two disjoint draws",
    )
    axes[1].set_xticks(ticks, ticks, minor=False)
    axes[1].set_xticks([], minor=True)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2 if len(names) > 3 else 3,
    )
    return Drawing(figure, curve, finding)


def looks(names: list[str], own: str, most: int = len(LINES)) -> dict[str, dict]:
    """A line style for each name: bold for `own`, distinct for the next `most`, one grey for the crowd behind them."""
    rest = [name for name in names if name != own]
    found = (
        {own: {"color": PRUNED, "marker": "o", "linewidth": 2.6, "zorder": 4}}
        if own in names
        else {}
    )
    for name, (colour, marker, dash) in zip(rest[:most], LINES, strict=False):
        found[name] = {
            "color": colour,
            "marker": marker,
            "linestyle": dash,
            "linewidth": 1.3,
            "markersize": 5,
        }
    return found | {name: {"color": CROWD, "linewidth": 0.9, "zorder": 1} for name in rest[most:]}


@styled
def fig_criteria(
    criteria: pd.DataFrame, table1: pd.DataFrame, tests: pd.DataFrame | None, own: str
) -> Drawing:
    """Score against blocks removed for every criterion (tables extra_criteria, table1_pruning, extra_criteria_tests).

    The study's own criterion is bold, with its 95 % band; random orders are a range; the paper's curve is dotted.
    """
    finding, of_32 = (
        rivals_in_words(tests, own),
        paper.BLOCKS * (table1.fraction_removed / table1.blocks_removed).max(),
    )
    scores = criteria.pivot(index="blocks_removed", columns="criterion", values="score").astype(
        float
    )
    scores.loc[0] = (
        table1.score[table1.blocks_removed == 0].astype(float).max()
    )  # where they all start
    scores = scores.sort_index().set_axis(scores.index.sort_values().astype(float) * of_32)
    random = [name for name in scores if RANDOM.fullmatch(name)]
    names = in_order([name for name in scores if name not in random], tests, own)
    figure, axes = canvas(finding, 5.6)
    score_axis(axes)
    if random:
        _random_orders(axes, scores[random].dropna())
    for name, look in looks(names, own).items():
        line = scores[name].dropna()
        axes.plot(line.index, line, label=words(name) if look["color"] != CROWD else None, **look)
    band = table1.dropna(subset=["score"]).astype(
        {"blocks_removed": float, "score_lo": float, "score_hi": float}
    )
    axes.fill_between(
        band.blocks_removed * of_32, band.score_lo, band.score_hi, color=PRUNED, alpha=0.18
    )
    theirs = paper.table(1)
    axes.plot(
        theirs.blocks_removed,
        theirs.paper_score,
        ":",
        color=PAPER,
        linewidth=1.6,
        label="paper, LLaVA-1.5-7B",
    )
    if len(names) > len(LINES) + 1:
        axes.plot([], [], color=CROWD, label=f"{len(names) - len(LINES) - 1} others (table)")
    axes.set_xlabel(f"blocks removed, of {paper.BLOCKS}")
    figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2)
    return Drawing(figure, criteria, finding)


def _random_orders(axes, scores: pd.DataFrame):
    """The mean of all random orders, in the range that they span."""
    look = {"color": DENSE, "linestyle": (0, (1, 1)), "linewidth": 3, "zorder": 1.5}
    axes.fill_between(
        scores.index, scores.min(axis=1), scores.max(axis=1), color="#d9d9d9", linewidth=0
    )
    axes.plot(
        scores.index,
        scores.mean(axis=1),
        label=random_name(scores.shape[1]).replace("of", "and range of"),
        **look,
    )


def in_order(names: list[str], tests: pd.DataFrame | None, own: str) -> list[str]:
    """`own`, then criteria as they are, then their variations, each the better before the worse."""
    behind = {} if tests is None else dict(zip(tests.criterion, tests.difference_all, strict=True))
    rest = [name for name in names if name != own]
    return [own] * (own in names) + sorted(
        rest, key=lambda name: ("-" in name, behind.get(name, np.inf))
    )


def rivals_in_words(tests: pd.DataFrame | None, own: str) -> str:
    """How many rivals `own` beats over all depths, after Holm; a single one by name."""
    tests = pd.DataFrame({"p_all": []}) if tests is None else tests
    tests = tests.dropna(subset=["p_all"])
    if tests.empty:
        return f"{words(own)} has no scored rival here"
    sure = tests[tests.p_all_holm < SIGNIFICANT]
    won, lost = ((sign * sure.difference_all > 0).sum() for sign in (1, -1))
    if len(tests) == 1:
        how = "beats" if won else "loses to" if lost else "cannot be told apart from"
        return f"Over all depths {words(own)} {how} {words(tests.criterion.iloc[0])}"
    said = f"Over all depths {words(own)} beats {won} of {len(tests)} rivals and loses to {lost}"
    return f"{said}; the others cannot be told apart" if won + lost < len(tests) else said
