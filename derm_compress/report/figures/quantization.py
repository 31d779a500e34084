"""Figure 4, and what quantized models score: by method and width, and at equal bytes. No torch."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from derm_compress.evaluate import metrics
from derm_compress.report.figures import style
from derm_compress.report.figures.style import DENSE, PRUNED, QUANTIZED, SFT, Drawing
from derm_compress.report.sentences import Facts
from derm_compress.report.wording import quantizer

MODELS = {  # (pruned, healed): label, place in its row, look
    (False, False): ("unpruned", -0.2, {"fmt": "o", "color": DENSE, "ms": 4.5}),
    (False, True): ("unpruned, healed", -0.07, {"fmt": "s", "color": DENSE, "ms": 4.5}),
    (True, False): ("pruned", 0.07, {"fmt": "X", "color": PRUNED, "ms": 4.5}),
    (True, True): ("pruned, healed", 0.2, {"fmt": "D", "color": SFT, "ms": 4.5}),
}
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
    heat = {"aspect": "auto", "cmap": "magma_r", "interpolation": "nearest"}
    figure.colorbar(map_.imshow(grid, extent=extent, **heat), ax=map_, label="|value|")
    map_.set_ylabel("token")
    map_.grid(False)
    top.plot(peak.index, peak, color=DENSE, linewidth=1)
    label = f"over {OUTLIER:g} x the median channel's peak"
    top.plot(far.index, far, "D", color=QUANTIZED, ms=5, label=label)
    top.set(xlabel="output channel", ylabel="peak |value|", ylim=(0, 1.35 * peak.max()))
    if len(far):
        top.legend(loc="upper right")
    return Drawing(figure, surface[["token", "channel", "value"]], finding)


@style.figure("table3_quantization", "table3_quantization", "answers")
def widths(facts: Facts, table: pd.DataFrame, answers: pd.DataFrame) -> Drawing | None:
    """Scores of every method, a panel a width, before and after pruning and healing."""
    results = facts.results
    scored = table.dropna(subset=["score"])
    scored = scored[scored.blocks_removed.isin([0, results.operating])]
    if scored.empty:
        return None
    whole = answers[answers.variant.isin([*results.main, results.variant(0, healed=True)])]
    whole = metrics.score_table(whole, ["variant"], n_boot=500).merge(results.models, on="variant")
    named = scored.assign(way=scored.method.map(quantizer))
    panels = {"16 bits": whole.assign(way="not quantized")} if len(whole) else {}
    for bits in sorted(set(named.bits), reverse=True):
        panels[f"{bits} bits"] = named[named.bits == bits]
    finding = facts.title("table3_quantization")
    return Drawing(_dots(finding, panels), table, finding)


@style.figure("extra_equal_bytes", "extra_equal_bytes")
def equal_bytes(facts: Facts, table: pd.DataFrame) -> Drawing:
    """Scores of the ways to spend the same bytes, before and after SFT."""
    named = table.assign(way=[_way(row) for row in table.itertuples()])
    groups = named.groupby("budget", sort=False)
    panels = {f"the bytes of all blocks at {bits} bits": rows for bits, rows in groups}
    finding = facts.title("extra_equal_bytes")
    return Drawing(_dots(finding, panels), table, finding)


def _way(row) -> str:
    """6 removed, 4 bits."""
    said = f"{row.blocks_removed} removed, {row.mean_bits:.3g} bits"
    return f"{said} mixed" if row.mixed else said


def _dots(finding: str, panels: dict[str, pd.DataFrame]) -> Figure:
    """A row a `way`, a dot a model."""
    rows = [table.way.nunique() for table in panels.values()]
    height = 1.5 + 0.3 * len(rows) + 0.3 * sum(rows)
    shared = {"sharex": True, "height_ratios": rows}
    figure, axes = style.canvas(finding, height, len(rows), **shared)
    for axis, (title, table) in zip(axes, panels.items(), strict=True):
        ways = list(dict.fromkeys(table.way))
        for (gone, healed), (label, shift, look) in MODELS.items():
            here = (table.blocks_removed > 0).eq(gone) & table.healed.eq(healed)
            shown = table[here].dropna(subset=["score"])
            if len(shown):
                at = [ways.index(way) + shift for way in shown.way]
                ends = style.reach(shown, "score")
                axis.errorbar(shown.score, at, xerr=ends, label=label, elinewidth=0.8, **look)
        axis.set_yticks(range(len(ways)), ways)
        axis.set(ylim=(len(ways) - 0.5, -0.5))
        axis.set_title(title)
    axes[-1].set_xlabel("score, % (95 % interval)")
    style.legend_below(figure, 2)
    return figure
