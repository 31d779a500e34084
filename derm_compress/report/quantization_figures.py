"""Figures of activations and of quantized models: loud channels, exponents, errors, equal bytes. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, NullFormatter

from derm_compress.report import precision
from derm_compress.report.figures import DENSE, PRUNED, QUANTIZED, SFT, Drawing, canvas, styled
from derm_compress.report.quantization_findings import main_models, plain_awq, quantizer
from derm_compress.report.ranking_figures import LINES
from derm_compress.report.wording import joined

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUPS = {"qkv": "q, k, v", "o": "o", "gate_up": "gate, up", "down": "down"}
MAPS = {"outlier_channels": "outlier channels", "kurtosis": "kurtosis"}


def plain_numbers(axis) -> None:
    """0.01, 0.02, 0.05 on a logarithmic axis: the style draws no powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


@styled
def fig_activation_map(statistics: pd.DataFrame) -> Drawing:
    """Outlier channels and kurtosis of every block and projection, model by model (Figure 4 everywhere at once)."""
    names = list(dict.fromkeys(statistics.variant))
    loud = (statistics.outlier_channels > 0).groupby(statistics.variant, sort=False).mean()
    finding = "share of projections with outlier channels: " + ", ".join(
        f"{n} {loud[n]:.0%}" for n in names
    )
    figure, axes = canvas(
        finding, 0.9 + 1.35 * len(names) * len(MAPS), rows=len(names) * len(MAPS), sharex=True
    )
    blocks = range(statistics.block.max() + 1)
    for row, (column, label) in enumerate(MAPS.items()):
        values = (
            statistics[column].replace(0, np.nan) if column == "kurtosis" else statistics[column]
        )
        log = {"norm": LogNorm(values.min(), values.max())}
        ends = log if column == "kurtosis" else {"vmin": 0, "vmax": max(1, values.max())}
        for i, name in enumerate(names):
            axis, rows = axes[row * len(names) + i], statistics[statistics.variant == name]
            grid = rows.pivot(index="projection", columns="block", values=column)
            grid = grid.reindex(index=[p for p in PROJECTIONS if p in grid.index], columns=blocks)
            image = axis.imshow(
                grid, aspect="auto", cmap="magma_r", interpolation="nearest", **ends
            )
            axis.set_yticks(range(len(grid)), grid.index, fontsize=6.5)
            axis.set_title(f"{name}: {label}", loc="left", fontsize=8.5)
            axis.grid(False)
            bar = figure.colorbar(image, ax=axis)
            if column == "kurtosis":
                plain_numbers(bar.ax.yaxis)
    axes[-1].set_xlabel("block, counted from 0; blank: removed")
    return Drawing(figure, statistics, finding)


@styled
def fig_alpha(search: pd.DataFrame, sources: list[str]) -> Drawing:
    """The exponent that each group got, block by block; lighter: calibrated on text alone."""
    first, text = plain_awq(search)
    search = search[search.form.isin([first, text]) & search.variant.isin(sources)].dropna(
        subset=["alpha"]
    )
    names, plain = list(dict.fromkeys(search.variant)), search[search.form == first]
    told = ", ".join(
        f"{name} {a:.2f}" for name, a in plain.groupby("variant", sort=False).alpha.median().items()
    )
    finding = f"AWQ's median exponent (0 is plain rounding): {told}"
    figure, axes = canvas(
        finding, 1.1 + 1.6 * len(names), rows=len(names), sharex=True, sharey=True, squeeze=False
    )
    for axis, name in zip(axes[:, 0], names, strict=True):
        for (group, label), (colour, marker, _) in zip(GROUPS.items(), LINES, strict=False):
            for form, style in (
                (first, {"linewidth": 1.2}),
                (text, {"linewidth": 0.8, "alpha": 0.45}),
            ):
                rows = search[
                    (search.variant == name) & (search.group == group) & (search.form == form)
                ]
                shown = {"label": label} if form == first and axis is axes[0, 0] else {}
                axis.plot(
                    rows.block, rows.alpha, marker=marker, ms=3, color=colour, **style, **shown
                )
        axis.set_title(name, loc="left", fontsize=8.5)
        axis.set_ylabel("exponent")
    axes[-1, 0].set_xlabel("block")
    figure.legend(ncols=4, loc="outside lower center")
    return Drawing(figure, search, finding)


@styled
def fig_errors(errors: pd.DataFrame, tests: pd.DataFrame, sources: list[str]) -> Drawing:
    """Output errors of each model's blocks by method, and every model's mean error beside the score that it costs."""
    mean = errors.groupby("variant").relative_error.mean()
    shown = tests.assign(error=tests.variant.map(mean), source=tests.variant.str.split("|").str[0])
    shown = shown.dropna(subset=["error"]).sort_values("error")
    width = max(shown.bits[shown.method == "awq"], default=shown.bits.max())
    own = {
        s: rows for s in sources if len(rows := shown[(shown.source == s) & (shown.bits == width)])
    }
    best: dict[str, list[str]] = {}
    for name, rows in own.items():
        best.setdefault(quantizer(rows.method.iloc[0]), []).append(name)
    least = ", ".join(f"{method} on {joined(names)}" for method, names in best.items())
    finding = f"{f'smallest output error: {least}' if own else 'output errors'}; below, beside what they cost"
    figure, axes = canvas(finding, 3.8 + 1.9 * len(own), rows=len(own) + 1, squeeze=False)
    *panels, cost = axes[:, 0]
    for axis, name in zip(panels, own, strict=True):
        axis.set_title(f"{name}, {width} bits", loc="left", fontsize=8.5)
    _by_block(panels, list(own.values()), errors)
    _beside_cost(cost, shown.dropna(subset=["cost"]))
    return Drawing(figure, shown[["variant", "method", "bits", "error", "cost"]], finding)


def _by_block(panels, models: list[pd.DataFrame], errors: pd.DataFrame) -> None:
    methods = list(dict.fromkeys(method for rows in models for method in rows.method))
    looks, named = dict(zip(methods, LINES + [(DENSE, "o", ":")] * len(methods), strict=False)), {}
    for axis, rows in zip(panels, models, strict=True):
        for row in rows.itertuples():
            line, (colour, _, dash) = (
                errors[errors.variant == row.variant].sort_values("block"),
                looks[row.method],
            )
            (named[quantizer(row.method)],) = axis.plot(
                line.block, line.relative_error, dash, color=colour, linewidth=1.1
            )
        axis.set(yscale="log", ylabel="relative error")
        plain_numbers(axis.yaxis)
    for axis in panels[-1:]:
        axis.set_xlabel("block")
        axis.legend(
            named.values(),
            named,
            ncols=3,
            fontsize=6.5,
            loc="upper left",
            bbox_to_anchor=(-0.08, -0.25),
        )


def _beside_cost(axis, scored: pd.DataFrame) -> None:
    for (bits, rows), (colour, marker, _) in zip(scored.groupby("bits"), LINES, strict=False):
        axis.plot(rows.error, rows.cost, marker, color=colour, ms=5, label=f"{bits} bits")
    axis.axhline(0, color=DENSE, linewidth=0.8)
    axis.set(
        xscale="log", xlabel="relative error, mean over blocks", ylabel="points against 16 bits"
    )
    axis.legend(ncols=2, loc="best")
    plain_numbers(axis.xaxis)


def mixed(method: str) -> str:
    return " mixed" * method.endswith("-mixed")


@styled
def fig_equal_bytes(table: pd.DataFrame) -> Drawing:
    """Scores of the ways to spend the same bytes (table extra_equal_bytes), before and after SFT."""
    budgets = list(dict.fromkeys(table.budget))
    best = (
        table.dropna(subset=["score"])
        .sort_values("score")
        .drop_duplicates(["budget", "healed"], keep="last")
    )
    told = [
        f"{r.blocks_removed} gone and {r.mean_bits:.3g} bits{mixed(r.method)} for {r.budget}{' after SFT' * r.healed}"
        for r in best.sort_values(["budget", "healed"], ascending=[False, True]).itertuples()
    ]
    finding = (
        "highest score for all blocks' bytes: " + "; ".join(told)
        if told
        else "ways to spend the same bytes"
    )
    figure, axes = canvas(finding, 1.6 + 2 * len(budgets), rows=len(budgets), squeeze=False)
    for axis, budget in zip(axes[:, 0], budgets, strict=True):
        here = table[table.budget == budget]
        keys = ["blocks_removed", "mean_bits", "method"]
        ways = list(dict.fromkeys(here[keys].itertuples(index=False, name=None)))
        for healed, colour, marker, shift in ((False, PRUNED, "o", 0.1), (True, SFT, "s", -0.1)):
            rows = here[here.healed == healed].dropna(subset=["score"])
            at = [ways.index(way) + shift for way in rows[keys].itertuples(index=False, name=None)]
            ends = [
                (rows.score - rows.score_lo).clip(lower=0),
                (rows.score_hi - rows.score).clip(lower=0),
            ]
            label = "after SFT" if healed else "before SFT"
            axis.errorbar(
                rows.score, at, xerr=ends, fmt=marker, color=colour, capsize=3, label=label
            )
        axis.set_yticks(
            range(len(ways)), [f"{n} removed, {bits:.3g} bits{mixed(how)}" for n, bits, how in ways]
        )
        axis.set_title(
            f"bytes of all blocks at {budget} bits", loc="left", fontsize=9, color=QUANTIZED
        )
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("score, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return Drawing(figure, table, finding)


def drawings(results, built: dict[str, pd.DataFrame]) -> dict[str, Drawing]:
    """{stem: drawing} of what the results suffice for; built: tables.build()'s."""
    drawn, full = {}, main_models(results)
    if results.statistics is not None and len(results.statistics):
        drawn["extra_activations"] = fig_activation_map(results.statistics)
    if results.errors is not None and len(results.errors) and "extra_quantization_tests" in built:
        tests = precision.method_tests(results.answers, results.variants)
        drawn["extra_errors"] = fig_errors(results.errors, tests, full)
    if results.search is not None and plain_awq(results.search):
        drawn["extra_alpha"] = fig_alpha(results.search, full)
    if "extra_equal_bytes" in built:
        drawn["extra_equal_bytes"] = fig_equal_bytes(built["extra_equal_bytes"])
    return drawn
