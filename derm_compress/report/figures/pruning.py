"""Figures 1 and 2, and the score against blocks removed. No torch."""

from __future__ import annotations

import pandas as pd
from matplotlib.patches import FancyBboxPatch, Rectangle

from derm_compress.evaluate import metrics
from derm_compress.report import paper
from derm_compress.report.figures.style import (
    DENSE,
    PAPER,
    PRUNED,
    QUANTIZED,
    SFT,
    Drawing,
    Source,
    bare,
    canvas,
    score_axis,
    scores,
    styled,
)
from derm_compress.report.results import first_to_go

STAGE_COLOURS = {"03": PRUNED, "04": PRUNED, "05": SFT, "06": QUANTIZED, "07": QUANTIZED}


@styled
def pipeline(source: Source) -> Drawing | None:
    """The stages and what feeds what."""
    if not source.graph:
        return None
    level: dict[str, int] = {}
    for stage in sorted(source.graph):
        before = [level[name] for name in source.graph[stage] if name in level]
        level[stage] = 1 + max(before, default=-1)
    rows = [[stage for stage in level if level[stage] == y] for y in sorted(set(level.values()))]
    finding = f"The study's {len(level)} stages: what one leaves, the next ones read"
    figure, axes = canvas(finding, 0.4 + 0.7 * len(rows))
    axes.axis("off")
    axes.set(xlim=(0, 2), ylim=(len(rows) - 0.5, -0.5))
    centre = {stage: (2 * i + 1) / len(row) for row in rows for i, stage in enumerate(row)}
    for stage, y in level.items():
        _box(axes, stage, centre[stage], y, width=1.8 / len(rows[y]))
        for name in source.graph[stage]:
            if level.get(name) == y - 1:
                x = centre[name] if len(rows[y]) < len(rows[y - 1]) else centre[stage]
                arrow = {"arrowstyle": "-|>", "color": "#444444"}
                axes.annotate("", (x, y - 0.3), (x, y - 0.7), arrowprops=arrow)
    edges = [(stage, name) for stage in level for name in source.graph[stage]]
    return Drawing(figure, pd.DataFrame(edges, columns=["stage", "reads"]), finding)


def _box(axes, stage: str, x: float, y: float, *, width: float) -> None:
    colour = STAGE_COLOURS.get(stage[:2], DENSE)
    look = {"facecolor": colour + "28", "edgecolor": colour, "linewidth": 1.4}
    corner = (x - width / 2, y - 0.3)
    axes.add_patch(
        FancyBboxPatch(corner, width, 0.6, boxstyle="round,pad=0,rounding_size=0.06", **look)
    )
    axes.text(x, y, stage.replace("_", " "), fontweight="bold", ha="center", va="center")


@styled
def block_removal(source: Source) -> Drawing | None:
    """What is left out, one try at a time, and what the study's plan then removes."""
    plan = (source.results.plans or {}).get(source.results.criterion)
    if plan is None:
        return None
    blocks, protected = plan["blocks"], set(plan["protected"])
    gone = first_to_go(plan, source.results.operating)
    tries, finding = _tries(plan, gone)
    rows = [("full model", []), *tries[:2], ("...", None), *tries[-1:]]
    rows.append((f"{len(gone)} removed", gone))
    figure, axes = canvas(finding, 2.6)
    for y, (_, out) in enumerate(rows):
        if out is not None:
            _blocks(axes, y, blocks, out, protected)
    turns = {} if plan.get("starts") else {b: i for i, b in enumerate(plan["order"], 1)}
    for b in gone if turns else []:
        size = 5.5 if turns[b] > 9 else 7
        at = {"ha": "center", "va": "center", "fontsize": size, "color": PRUNED}
        axes.text(b + 0.5, len(rows) - 1, turns[b], **at)
    axes.set(xlim=(0, blocks), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xticks([b + 0.5 for b in range(0, blocks, 4)], range(0, blocks, 4))
    number = "; number: its turn" if turns else ""
    axes.set_xlabel(f"decoder block (hatched: protected; dotted: left out{number})")
    bare(axes)
    data = pd.DataFrame({"block": range(blocks)})
    data["turn"] = data.block.map(turns).astype("Int64")
    data = data.assign(protected=data.block.isin(protected), removed=data.block.isin(gone))
    return Drawing(figure, data, finding)


def _blocks(axes, y: int, blocks: int, out: list, protected: set) -> None:
    """A row of blocks: left out, protected, or there."""
    for b in range(blocks):
        look = {"facecolor": "#c9c9c9", "edgecolor": "white"}
        if b in protected:
            look = {"facecolor": DENSE, "edgecolor": "white", "hatch": "////"}
        if b in out:
            look = {"facecolor": "white", "edgecolor": PRUNED, "linestyle": ":"}
        axes.add_patch(Rectangle((b + 0.06, y - 0.36), 0.88, 0.72, **look))


def _tries(plan: dict, gone: list) -> tuple[list, str]:
    """What is left out in each try, named, and what Figure 2 says of such a plan."""
    if not plan.get("starts"):
        said = f"Each of {len(plan['order'])} blocks is left out once; "
        said += f"the {len(gone)} that matter least go, in this order"
        return [(f"without {b}", [b]) for b in sorted(plan["order"])], said
    free = set(range(plan["blocks"])) - set(plan["protected"])
    runs = [list(range(b, b + len(gone))) for b in sorted(free)]
    runs = [run for run in runs if free.issuperset(run)]
    said = f"Each of {len(runs)} runs of {len(gone)} neighbouring blocks may go; "
    said += "the one that matters least does"
    return [(f"without {run[0]} to {run[-1]}", run) for run in runs], said


@styled
def score_vs_blocks(source: Source) -> Drawing | None:
    """Score against blocks removed, before and after SFT, with the paper's curve."""
    table1, table2 = source.table("table1_pruning"), source.table("table2_sft")
    if table1 is None:
        return None
    finding = _cost(table1, table2)
    figure, axes = canvas(finding, 3.7)
    score_axis(axes)
    floor = "floor: every answer gets the lowest grade"
    axes.text(0, metrics.FLOOR - 1, floor, va="top", fontsize=8, color="#555555")
    theirs, label = paper.table(1), "paper, LLaVA-1.5-7B"
    look = {"color": PAPER, "mfc": "white", "label": label}
    axes.plot(theirs.blocks_removed, theirs.paper_score, ":^", **look)
    # The axis counts blocks of 32, so that a smaller model's fractions stand below the paper's.
    before = table1.fraction_removed * paper.BLOCKS
    scores(axes, before, table1, fmt="-o", color=PRUNED, label="pruned")
    if table2 is not None:
        beside = table2.fraction_removed * paper.BLOCKS + 0.35  # so that both intervals are seen
        label = "after SFT (beside; 0 blocks: the control)"
        scores(axes, beside, table2, "score_after", fmt="s", color=SFT, label=label)
    axes.set_xlabel(f"blocks removed, of {paper.BLOCKS}")
    figure.legend(loc="outside lower center", ncols=3)
    return Drawing(figure, table1, finding)


def _cost(table1: pd.DataFrame, table2: pd.DataFrame | None) -> str:
    scored = table1.dropna(subset=["score"])
    if scored.empty:
        return "No depth has a score: only the paper's curve is drawn"
    first, worst = scored.iloc[0], scored.loc[scored.score.idxmin()]
    said = f"No depth scores below the unpruned {first.score:.1f} %"
    if worst.score < first.score:
        said = f"Removing {worst.blocks_removed:.0f} blocks takes the score from {first.score:.1f} "
        said += f"to {worst.score:.1f} %"
    if table2 is not None and len(healed := table2.query("blocks_removed > 0 and gain == gain")):
        row = healed.iloc[0]
        said += f"; with {row.blocks_removed:.0f} removed, SFT changes it by {row.gain:+.1f} points"
    return f"{said} ({first.n:.0f} answers)"
