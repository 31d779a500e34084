"""Figures 1 and 2, and the score against blocks removed. No torch."""

from __future__ import annotations

import pandas as pd
from matplotlib.patches import FancyBboxPatch, Rectangle

from derm_compress.evaluate import metrics
from derm_compress.report import paper
from derm_compress.report.figures import style
from derm_compress.report.figures.style import DENSE, PRUNED, QUANTIZED, SFT, Drawing
from derm_compress.report.results import first_to_go
from derm_compress.report.sentences import Facts

STAGE_COLOURS = {"03": PRUNED, "04": PRUNED, "05": SFT, "06": QUANTIZED, "07": QUANTIZED}


@style.figure("fig1_pipeline")
def pipeline(facts: Facts) -> Drawing | None:
    """The stages and what feeds what."""
    if not facts.graph:
        return None
    level: dict[str, int] = {}
    for stage in sorted(facts.graph):
        before = [level[name] for name in facts.graph[stage] if name in level]
        level[stage] = 1 + max(before, default=-1)
    rows = [[stage for stage in level if level[stage] == y] for y in range(1 + max(level.values()))]
    finding = f"The study's {len(level)} stages: what one leaves, the next ones read"
    figure, (axes,) = style.canvas(finding, 0.4 + 0.7 * len(rows))
    axes.axis("off")
    axes.set(xlim=(0, 2), ylim=(len(rows) - 0.5, -0.5))
    centre = {stage: (2 * i + 1) / len(row) for row in rows for i, stage in enumerate(row)}
    for stage, y in level.items():
        _box(axes, stage, centre[stage], y, width=1.8 / len(rows[y]))
        for name in facts.graph[stage]:
            if level.get(name) == y - 1:
                x = centre[name] if len(rows[y]) < len(rows[y - 1]) else centre[stage]
                arrow = {"arrowstyle": "-|>", "color": "#444444"}
                axes.annotate("", (x, y - 0.3), (x, y - 0.7), arrowprops=arrow)
    edges = [(stage, name) for stage in level for name in facts.graph[stage]]
    return Drawing(figure, pd.DataFrame(edges, columns=["stage", "reads"]), finding)


def _box(axes, stage: str, x: float, y: float, *, width: float) -> None:
    colour = STAGE_COLOURS.get(stage[:2], DENSE)
    look = {"facecolor": colour + "28", "edgecolor": colour, "linewidth": 1.4}
    round_ = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, boxstyle=round_, **look))
    axes.text(x, y, stage.replace("_", " "), fontweight="bold", ha="center", va="center")


@style.figure("fig2_block_removal", "plan")
def block_removal(facts: Facts, plan: dict) -> Drawing:
    """What is left out, one try at a time, and what the study's plan then removes."""
    blocks, protected = plan["blocks"], set(plan["protected"])
    gone = first_to_go(plan, facts.results.operating)
    tries = _tries(plan, gone)
    finding = facts.title("fig2_block_removal", plan=plan, tries=len(tries), gone=len(gone))
    rows = [("full model", []), *tries[:2], ("...", None), *tries[-1:]]
    rows.append((f"{len(gone)} removed", gone))
    figure, (axes,) = style.canvas(finding, 2.6)
    for y, (_, out) in enumerate(rows):
        for b in range(blocks) if out is not None else ():
            look = {"facecolor": "#c9c9c9", "edgecolor": "white"}
            if b in protected:
                look = {"facecolor": DENSE, "edgecolor": "white", "hatch": "////"}
            if b in out:
                look = {"facecolor": "white", "edgecolor": PRUNED, "linestyle": ":"}
            axes.add_patch(Rectangle((b + 0.06, y - 0.36), 0.88, 0.72, **look))
    turns = {} if plan.get("starts") else {b: i for i, b in enumerate(plan["order"], 1)}
    for b in gone if turns else []:
        at = {"ha": "center", "va": "center", "fontsize": 5.5 if turns[b] > 9 else 7}
        axes.text(b + 0.5, len(rows) - 1, turns[b], color=PRUNED, **at)
    axes.set(xlim=(0, blocks), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xticks([b + 0.5 for b in range(0, blocks, 4)], range(0, blocks, 4))
    number = "; number: its turn" if turns else ""
    axes.set_xlabel(f"decoder block (hatched: protected; dotted: left out{number})")
    style.bare(axes)
    data = pd.DataFrame({"block": range(blocks)})
    data["turn"] = data.block.map(turns).astype("Int64")
    data = data.assign(protected=data.block.isin(protected), removed=data.block.isin(gone))
    return Drawing(figure, data, finding)


def _tries(plan: dict, gone: list) -> list[tuple[str, list]]:
    """What is left out in each try, named."""
    if not plan.get("starts"):
        return [(f"without {b}", [b]) for b in sorted(plan["order"])]
    free = set(range(plan["blocks"])) - set(plan["protected"])
    runs = [list(range(b, b + len(gone))) for b in sorted(free)]
    return [(f"without {r[0]} to {r[-1]}", r) for r in runs if free.issuperset(r)]


@style.figure("score_vs_blocks", "table1_pruning")
def score_vs_blocks(facts: Facts, table1: pd.DataFrame) -> Drawing:
    """Score against blocks removed, before and after SFT, with the paper's curve."""
    table2 = facts.get("table2_sft")
    finding = facts.title("score_vs_blocks")
    figure, (axes,) = style.canvas(finding, 3.7)
    style.score_axis(axes)
    floor = "floor: every answer gets the lowest grade"
    axes.text(0, metrics.FLOOR - 1, floor, va="top", fontsize=8, color=style.QUIET)
    theirs, look = paper.table(1), {"color": style.PAPER, "label": "paper, LLaVA-1.5-7B"}
    axes.plot(theirs.blocks_removed, theirs.paper_score, ":^", mfc="white", **look)
    # The axis counts blocks of 32, so that a smaller model's fractions stand below the paper's.
    before = table1.fraction_removed * paper.BLOCKS
    style.scores(axes, before, table1, fmt="-o", color=PRUNED, label="pruned")
    if table2 is not None:
        beside = table2.fraction_removed * paper.BLOCKS + 0.35  # so that both intervals are seen
        label = "after SFT (beside; 0 blocks: the control)"
        style.scores(axes, beside, table2, "score_after", fmt="s", color=SFT, label=label)
    axes.set_xlabel(f"blocks removed, of {paper.BLOCKS}")
    style.legend_below(figure, 3)
    return Drawing(figure, table1, finding)
