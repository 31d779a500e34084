"""Figure 4, and quantized models: loud channels, exponents, errors, equal bytes. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from derm_compress.report.figures import style
from derm_compress.report.figures.style import DENSE, LINES, PRUNED, QUANTIZED, SFT, Drawing
from derm_compress.report.sentences import Facts
from derm_compress.report.tables.quantizers import ERROR, plain_awq
from derm_compress.report.wording import listed, model, quantizer

ATTENTION = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"]
PROJECTIONS = [*ATTENTION, "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
GROUPS = {"qkv": "q, k, v", "o": "o", "gate_up": "gate, up", "down": "down"}
KEYS = ["blocks_removed", "healed", "method", "bits"]
OUTLIER = 6.0  # as notebook 06 counts them: a peak over so many times the median channel's


@style.figure("fig4_activations", "figure4")
def activations(facts: Facts, surface: pd.DataFrame) -> Drawing:
    """|value| over tokens and channels of the first variant's output (Figure 4)."""
    surface = surface[surface.variant == surface.variant.iloc[0]]
    size = surface.assign(value=surface.value.abs())
    grid = size.pivot_table(index="token", columns="channel", values="value", aggfunc="max")
    peak, one = grid.max(), surface.iloc[0]
    far = peak[peak > OUTLIER * peak.median()]
    finding = facts.title("fig4_activations", peak=peak, far=far, one=one)
    figure, (map_, top) = style.canvas(finding, 4.2, 2, sharex=True, height_ratios=(1.6, 1))
    left, right = peak.index.min() - 0.5, peak.index.max() + 0.5
    extent = (left, right, grid.index.max() + 0.5, grid.index.min() - 0.5)
    figure.colorbar(map_.imshow(grid, extent=extent, **style.HEAT), ax=map_, label="|value|")
    map_.set_ylabel("token")
    map_.grid(False)
    top.plot(peak.index, peak, color=DENSE, linewidth=1)
    label = f"over {OUTLIER:g} x the median channel's peak"
    top.plot(far.index, far, "D", color=QUANTIZED, ms=5, label=label)
    top.set(xlabel="output channel", ylabel="peak |value|", ylim=(0, 1.35 * peak.max()))
    top.legend(loc="upper right")
    return Drawing(figure, surface, finding)


@style.figure("extra_activations", "statistics")
def activation_map(facts: Facts, statistics: pd.DataFrame) -> Drawing:
    """Outlier channels and kurtosis of every block and projection, model by model."""
    names = list(dict.fromkeys(statistics.variant))
    loud = (statistics.outlier_channels > 0).groupby(statistics.variant, sort=False).mean()
    told = ", ".join(f"{name} {share:.0%}" for name, share in loud.items())
    finding = f"share of projections with outlier channels: {told}"
    kurtosis = statistics["kurtosis"].replace(0, np.nan)
    maps = [("outlier_channels", {"vmin": 0, "vmax": max(1, statistics.outlier_channels.max())})]
    maps.append(("kurtosis", {"norm": LogNorm(kurtosis.min(), kurtosis.max())}))
    wanted = [(column, scale, name) for column, scale in maps for name in names]
    figure, axes = style.canvas(finding, 0.9 + 1.35 * len(wanted), len(wanted), sharex=True)
    for axis, (column, scale, name) in zip(axes, wanted, strict=True):
        shown = statistics[statistics.variant == name]
        grid = shown.pivot(index="projection", columns="block", values=column)
        known = [projection for projection in PROJECTIONS if projection in grid.index]
        grid = grid.reindex(index=known, columns=range(statistics.block.max() + 1))
        bar = figure.colorbar(axis.imshow(grid, **style.HEAT, **scale), ax=axis)
        axis.set_yticks(range(len(grid)), grid.index, fontsize=6.5)
        axis.set_title(f"{name}: {column.replace('_', ' ')}", loc="left", fontsize=8.5)
        axis.grid(False)
        if "norm" in scale:
            style.plain_numbers(bar.ax.yaxis)
    axes[-1].set_xlabel("block, counted from 0; blank: removed")
    return Drawing(figure, statistics, finding)


@style.figure("extra_alpha", "search")
def exponents(facts: Facts, search: pd.DataFrame) -> Drawing | None:
    """The exponent that each group got, block by block; lighter: calibrated on text alone."""
    first = plain_awq(search)
    if first is None:
        return None
    text = f"{first}-text"
    search = search[search.form.isin([first, text]) & search.variant.isin(facts.results.main)]
    search = search.dropna(subset=["alpha"])
    median = search[search.form == first].groupby("variant", sort=False).alpha.median()
    told = ", ".join(f"{name} {alpha:.2f}" for name, alpha in median.items())
    finding = f"AWQ's median exponent (0 is plain rounding): {told}"
    shared = {"sharex": True, "sharey": True}
    figure, axes = style.canvas(finding, 1.1 + 1.6 * len(median), len(median), **shared)
    for axis, name in zip(axes, median.index, strict=True):
        for (group, label), (colour, marker, _) in zip(GROUPS.items(), LINES, strict=False):
            shown = search[(search.variant == name) & (search.group == group)]
            look = {"marker": marker, "ms": 3, "color": colour}
            plain, alone = shown[shown.form == first], shown[shown.form == text]
            axis.plot(plain.block, plain.alpha, linewidth=1.2, label=label, **look)
            axis.plot(alone.block, alone.alpha, linewidth=0.8, alpha=0.45, **look)
        axis.set_title(name, loc="left", fontsize=8.5)
        axis.set_ylabel("exponent")
    axes[-1].set_xlabel("block")
    style.legend_below(figure, 4, axes[0])
    return Drawing(figure, search, finding)


@style.figure("extra_errors", "extra_errors", "table3_quantization", "extra_quantization_tests")
def errors(facts: Facts, blocks: pd.DataFrame, means: pd.DataFrame, tests) -> Drawing:
    """Output errors of each main model's blocks by method; below, mean errors beside costs."""
    shown = tests.merge(means[[*KEYS, "relative_error"]], on=KEYS)
    shown = shown.rename(columns={"relative_error": "error"}).dropna(subset=["error"])
    shown = shown.sort_values("error")
    width = max(shown.bits[shown.method == "awq"], default=shown.bits.max())
    n, panels, best = facts.results.operating, {}, {}
    for removed, healed in ((0, False), (n, False), (n, True)):
        rows = _matching(shown, blocks_removed=removed, healed=healed, bits=width)
        if len(rows):
            name = model({"blocks_removed": removed, "healed": healed})
            best.setdefault(quantizer(rows.method.iloc[0]), []).append(name)
            panels[name] = _matching(blocks, blocks_removed=removed, healed=healed, bits=width)
    least = "; ".join(f"{method} on {listed(names)}" for method, names in best.items())
    finding = f"smallest output error: {least}" if best else "output errors"
    figure, axes = style.canvas(finding, 3.8 + 1.9 * len(panels), len(panels) + 1)
    for axis, (name, rows) in zip(axes, panels.items(), strict=False):
        axis.set_title(f"{name}, {width} bits", loc="left", fontsize=8.5)
        _by_block(axis, rows)
    if panels:
        at = {"loc": "upper left", "bbox_to_anchor": (-0.08, -0.25)}
        axes[-2].set_xlabel("block")
        axes[-2].legend(ncols=3, fontsize=6.5, **at)
    _beside_cost(axes[-1], shown.dropna(subset=["cost"]))
    return Drawing(figure, shown[[*KEYS, "error", "cost"]], finding)


def _matching(table: pd.DataFrame, **wanted) -> pd.DataFrame:
    """The rows that have these values."""
    return table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)]


def _by_block(axis, rows: pd.DataFrame) -> None:
    """A line a method over one model's blocks, from the table of block errors."""
    methods = [name for name in rows if name.startswith(ERROR)]
    looks = LINES + [(DENSE, "o", ":")] * len(methods)
    for name, (colour, _, dash) in zip(methods, looks, strict=False):
        line = rows.dropna(subset=[name])
        label = quantizer(name.removeprefix(ERROR))
        axis.plot(line.block, line[name], dash, color=colour, linewidth=1.1, label=label)
    axis.set(yscale="log", ylabel="relative error")
    style.plain_numbers(axis.yaxis)


def _beside_cost(axis, scored: pd.DataFrame) -> None:
    for (bits, rows), (colour, marker, _) in zip(scored.groupby("bits"), LINES, strict=False):
        axis.plot(rows.error, rows.cost, marker, color=colour, ms=5, label=f"{bits} bits")
    axis.axhline(0, color=DENSE, linewidth=0.8)
    axis.set(xscale="log", xlabel="relative error, mean over blocks")
    axis.set_ylabel("points against 16 bits")
    axis.legend(ncols=2, loc="best")
    style.plain_numbers(axis.xaxis)


@style.figure("extra_equal_bytes", "extra_equal_bytes")
def equal_bytes(facts: Facts, table: pd.DataFrame) -> Drawing:
    """Scores of the ways to spend the same bytes, before and after SFT."""
    named = table.assign(way=[_way(row) for row in table.itertuples()])
    budgets, finding = dict(list(named.groupby("budget", sort=False))), _best_ways(named)
    figure, axes = style.canvas(finding, 1.6 + 2 * len(budgets), len(budgets))
    for axis, (budget, here) in zip(axes, budgets.items(), strict=True):
        ways = list(dict.fromkeys(here.way))
        for healed, colour, marker, shift in ((False, PRUNED, "o", 0.1), (True, SFT, "s", -0.1)):
            rows = here[here.healed == healed].dropna(subset=["score"])
            look = {"fmt": marker, "color": colour, "capsize": 3}
            label = "after SFT" if healed else "before SFT"
            at = [ways.index(way) + shift for way in rows.way]
            ends = style.reach(rows, "score")
            axis.errorbar(rows.score, at, xerr=ends, label=label, **look)
        axis.set_yticks(range(len(ways)), ways)
        title = f"bytes of all blocks at {budget} bits"
        axis.set_title(title, loc="left", fontsize=9, color=QUANTIZED)
        axis.invert_yaxis()
    axes[-1].set_xlabel("score, %")
    style.legend_below(figure, 2, axes[0])
    return Drawing(figure, table, finding)


def _way(row) -> str:
    """6 removed, 4 bits."""
    said = f"{row.blocks_removed} removed, {row.mean_bits:.3g} bits"
    return f"{said} mixed" if row.method.endswith("-mixed") else said


def _best_ways(table: pd.DataFrame) -> str:
    """What scores highest for each budget, before and after SFT."""
    best = table.dropna(subset=["score"]).sort_values("score")
    best = best.drop_duplicates(["budget", "healed"], keep="last")
    if best.empty:
        return "ways to spend the same bytes"
    told = []
    for row in best.sort_values(["budget", "healed"], ascending=[False, True]).itertuples():
        when = " after SFT" if row.healed else ""
        told.append(f"{row.way} for {row.budget}{when}")
    return "highest score for the bytes of all blocks: " + "; ".join(told)
