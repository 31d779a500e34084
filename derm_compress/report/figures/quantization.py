"""Figure 4, and what quantized models score: by method and width, and at equal bytes. No torch."""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report.figures import style
from derm_compress.report.figures.style import DENSE, PRUNED, QUANTIZED, SFT, Drawing
from derm_compress.report.sentences import SURE, Facts
from derm_compress.report.wording import listed, quantizer

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
    return Drawing(figure, surface, finding)


@style.figure("table3_quantization", "table3_quantization", "answers")
def widths(facts: Facts, table: pd.DataFrame, answers: pd.DataFrame) -> Drawing | None:
    """Scores of every method, a panel a width, before and after pruning and healing."""
    scored = table.dropna(subset=["score"])
    scored = scored[scored.blocks_removed.isin([0, facts.results.operating])]
    if scored.empty:
        return None
    named = scored.assign(way=scored.method.map(quantizer))
    models, main = (
        facts.results.models,
        [*facts.results.main, facts.results.variant(0, healed=True)],
    )
    whole = metrics.score_table(answers[answers.variant.isin(main)], ["variant"], n_boot=500)
    whole = whole.merge(models, on="variant").assign(way="not quantized")
    panels = {16: whole} if len(whole) else {}
    panels |= {bits: named[named.bits == bits] for bits in sorted(set(named.bits), reverse=True)}
    finding = _least_lost(facts, panels)
    rows = [rows.way.nunique() for rows in panels.values()]
    shared = {"sharex": True, "height_ratios": rows}
    figure, axes = style.canvas(
        finding, 1.3 + 0.3 * len(rows) + 0.3 * sum(rows), len(rows), **shared
    )
    for axis, (bits, here) in zip(axes, panels.items(), strict=True):
        _dots(axis, here)
        axis.set_title(f"{bits} bits")
    axes[-1].set_xlabel("score, % (95 % interval)")
    style.legend_below(figure, 3)
    return Drawing(figure, table, finding)


def _least_lost(facts: Facts, panels: dict[int, pd.DataFrame]) -> str:
    """How the method of the paper does at each width on the healed model."""
    healed = facts.results.operating, True
    told = []
    for bits, rows in panels.items():
        awq = rows[(rows.method == "awq") & (rows.blocks_removed == healed[0]) & rows.healed]
        told += [f"{score:.1f} % at {bits} bits" for score in awq.score]
    if not told:
        return "Scores by method and width"
    return f"With {healed[0]} blocks removed and healed, AWQ scores {listed(told)}"


def _dots(axis, table: pd.DataFrame) -> None:
    """A row a `way`, a dot a model: unpruned, pruned, healed; and unpruned with the same SFT."""
    ways = list(dict.fromkeys(table.way))
    models = {  # (pruned, healed): label, colour, marker, place
        (False, False): ("unpruned", DENSE, "o", -0.2),
        (False, True): ("unpruned, healed", DENSE, "s", -0.07),
        (True, False): ("pruned", PRUNED, "o", 0.07),
        (True, True): ("pruned, healed", SFT, "s", 0.2),
    }
    pruned = table.blocks_removed > 0
    for (gone, healed), (label, colour, marker, shift) in models.items():
        rows = table[(pruned == gone) & (table.healed == healed)].dropna(subset=["score"])
        if len(rows):
            at = [ways.index(way) + shift for way in rows.way]
            fill = "none" if healed and not gone else colour
            look = {"fmt": marker, "color": colour, "mfc": fill, "markersize": 4.5}
            ends = style.reach(rows, "score")
            axis.errorbar(rows.score, at, xerr=ends, label=label, elinewidth=0.8, **look)
    axis.set_yticks(range(len(ways)), ways)
    axis.set_ylim(len(ways) - 0.5, -0.5)


@style.figure("extra_equal_bytes", "extra_equal_bytes")
def equal_bytes(facts: Facts, table: pd.DataFrame) -> Drawing:
    """Scores of the ways to spend the same bytes, before and after SFT."""
    named = table.assign(way=[_way(row) for row in table.itertuples()])
    budgets, finding = dict(list(named.groupby("budget", sort=False))), _fewer_blocks(table)
    rows = [here.way.nunique() for here in budgets.values()]
    shared = {"sharex": True, "height_ratios": rows}
    figure, axes = style.canvas(
        finding, 1.5 + 0.3 * len(rows) + 0.3 * sum(rows), len(rows), **shared
    )
    for axis, (budget, here) in zip(axes, budgets.items(), strict=True):
        _dots(axis, here)
        axis.set_title(f"the bytes of all blocks at {budget} bits")
    axes[-1].set_xlabel("score, % (95 % interval)")
    style.legend_below(figure, 2)
    return Drawing(figure, table, finding)


def _way(row) -> str:
    """6 removed, 4 bits."""
    said = f"{row.blocks_removed} removed, {row.mean_bits:.3g} bits"
    return f"{said} mixed" if row.method.endswith("-mixed") else said


def _fewer_blocks(table: pd.DataFrame) -> str:
    """How often fewer blocks score above and below fewer bits of the same bytes."""
    pairs = table[(table.blocks_removed > 0) & table.difference.notna()]
    sure = pairs[pairs.p_holm < SURE].difference
    said = f"above fewer bits in {(sure > 0).sum()} of {len(pairs)} comparisons, below in"
    return f"At equal bytes fewer blocks score clearly {said} {(sure < 0).sum()}"
