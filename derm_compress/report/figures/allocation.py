"""Score against budget, and the allocation itself: which blocks, how many bits. No torch."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from matplotlib.colors import BoundaryNorm, ListedColormap

from derm_compress.method.allocation import allocation as ways
from derm_compress.method.allocation.allocation import JOINT, WIDTHS
from derm_compress.report.figures import style
from derm_compress.report.figures.style import DENSE, PAPER, PRUNED, QUANTIZED, SFT, Drawing
from derm_compress.report.sentences import Facts

LOOKS = {  # way: colour, marker
    JOINT: (SFT, "D"),
    ways.BITS: (QUANTIZED, "^"),
    ways.DROPS: (PRUNED, "v"),
    ways.UNIFORM: (DENSE, "o"),
    ways.LAST: (DENSE, "s"),
    ways.PAPER: (PAPER, "*"),
}
SHADES = ("#d8ecdd", "#a5d3b2", "#66b07c", "#2a8c4a", "#124d26")


@style.figure("extra_allocation", "extra_allocation")
def score_by_budget(facts: Facts, table: pd.DataFrame) -> Drawing | None:
    """Scores of every way, over the budget of LLaVA-1.5-7B; hollow after healing."""
    if table.score_before.notna().sum() == 0:
        return None
    finding = facts.title("extra_allocation")
    figure, (axis,) = style.canvas(finding, 3.8)
    step = 0.012 * max(1.0, np.ptp(table.budget_gib))
    for i, (way, (colour, marker)) in enumerate(LOOKS.items()):
        rows = table[table.method == way]
        at = rows.budget_gib + (i - len(LOOKS) / 2) * step
        line = "-" if way == JOINT else ""
        look = {"color": colour, "marker": marker, "ls": line, "ms": 5, "elinewidth": 0.8}
        style.scores(axis, at, rows, "score_before", label=way, **look)
        style.scores(axis, at, rows, "score_after", **look | {"mfc": "white", "ls": ""})
    style.score_axis(axis)
    axis.set_xlabel("budget, GiB of LLaVA-1.5-7B (weights and running)")
    style.legend_below(figure, 2)
    return Drawing(figure, table, finding)


@style.figure("allocation_map", "allocations")
def chosen(facts: Facts, allocations: pd.DataFrame) -> Drawing:
    """Bits by block and projection, of the joint allocation within the smallest budget."""
    first = allocations[allocations.way == JOINT].sort_values("budget_gib").iloc[0]
    told = json.loads(first.allocation)
    rows = []
    for name, bits in told["bits"].items():
        block, _, linear = name.partition(".")
        rows.append({"block": int(block), "linear": linear.rpartition(".")[2], "bits": bits})
    data = pd.DataFrame(rows)
    grid = data.pivot(index="block", columns="linear", values="bits")
    grid = grid.reindex(index=range(told["blocks"]), columns=data.linear.unique())
    place = grid.replace(dict(zip(WIDTHS, range(len(WIDTHS)), strict=True)))
    finding = facts.title("allocation_map", first=first, data=data)
    figure, (axis,) = style.canvas(finding, 2.2 + 0.11 * told["blocks"])
    colours = ListedColormap(SHADES, "bits").with_extremes(bad="white")
    edges = BoundaryNorm(np.arange(len(WIDTHS) + 1) - 0.5, len(WIDTHS))
    image = axis.imshow(place, aspect="auto", cmap=colours, norm=edges)
    bar = figure.colorbar(image, ax=axis, ticks=range(len(WIDTHS)), label="bits; white: removed")
    bar.ax.set_yticklabels(map(str, WIDTHS))
    axis.set_xticks(range(grid.shape[1]), grid.columns, rotation=45)
    axis.set_ylabel("block")
    axis.grid(False)
    return Drawing(figure, data, finding)
