"""Figures 1 and 2, and scores against blocks removed: own, rivals', by luck. No torch."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from derm_compress.evaluate import metrics
from derm_compress.report import paper
from derm_compress.report.figures import style
from derm_compress.report.figures.style import DENSE, PRUNED, QUANTIZED, SFT, Drawing
from derm_compress.report.results import Results, first_to_go
from derm_compress.report.sentences import Facts
from derm_compress.report.wording import words

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
    figure, (axes,) = style.canvas(finding, 0.4 + 0.5 * len(rows))
    axes.axis("off")
    axes.set(xlim=(0, 2), ylim=(len(rows) - 0.5, -0.5))
    centre = {stage: (2 * i + 1) / len(row) for row in rows for i, stage in enumerate(row)}
    for stage, y in level.items():
        colour = STAGE_COLOURS.get(stage[:2], DENSE)
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": colour}
        look = {"fontweight": "bold", "ha": "center", "va": "center", "bbox": box}
        axes.text(centre[stage], y, stage.replace("_", " "), **look)
        for name in facts.graph[stage]:
            if level.get(name) == y - 1:
                places = (centre[stage], y - 0.3), (centre[name], y - 0.7)
                axes.annotate("", *places, arrowprops={"arrowstyle": "-|>", "color": "#444444"})
    edges = [(stage, name) for stage in level for name in facts.graph[stage]]
    return Drawing(figure, pd.DataFrame(edges, columns=["stage", "reads"]), finding)


@style.figure("fig2_block_removal", "plan")
def block_removal(facts: Facts, plan: dict) -> Drawing:
    """What is left out, one try at a time, and what the study's plan then removes."""
    blocks, protected = plan["blocks"], set(plan["protected"])
    gone = first_to_go(plan, facts.results.operating)
    tries = [(f"without {b}", [b]) for b in sorted(plan["order"])]
    finding = facts.title("fig2_block_removal", plan=plan, gone=len(gone))
    rows = [("full model", []), *tries[:2], ("...", None), *tries[-1:]]
    rows.append((f"{len(gone)} removed", gone))
    turns = {b: i for i, b in enumerate(plan["order"], 1)}
    figure, (axes,) = style.canvas(finding, 2.6)
    for y, (_, out) in enumerate(rows):
        for b in range(blocks) if out is not None else ():
            look = {"facecolor": "#c9c9c9", "edgecolor": "white"}
            if b in protected:
                look = {"facecolor": DENSE, "edgecolor": "white", "hatch": "////"}
            if b in out:
                turn = turns[b] / len(out) if turns and out is gone else 1
                look = {"facecolor": colormaps["Blues"](0.8 * (1 - turn)), "edgecolor": PRUNED}
                look["linestyle"] = ":"
            axes.add_patch(Rectangle((b + 0.06, y - 0.36), 0.88, 0.72, **look))
    axes.set(xlim=(0, blocks), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xticks([b + 0.5 for b in range(0, blocks, 4)], range(0, blocks, 4))
    first = "; darker: earlier" if turns else ""
    axes.set_xlabel(f"decoder block\nhatched: protected; dotted: left out{first}")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    data = pd.DataFrame({"block": range(blocks)})
    data["turn"] = data.block.map(turns).astype("Int64")
    data = data.assign(protected=data.block.isin(protected), removed=data.block.isin(gone))
    return Drawing(figure, data, finding)


@style.figure("score_vs_blocks", "table1_pruning")
def score_vs_blocks(facts: Facts, table1: pd.DataFrame) -> Drawing:
    """Score against blocks removed, before and after SFT, with random orders and the paper's curve.

    The axis counts blocks of 32, so that a smaller model's fractions stand below the paper's.
    """
    results, table2 = facts.results, facts.get("table2_sft")
    finding = facts.title("score_vs_blocks")
    figure, (axes,) = style.canvas(finding, 4.2)
    style.score_axis(axes)
    lowest = "the lowest mark for every answer"
    axes.text(0, metrics.FLOOR - 1, lowest, va="top", color=style.QUIET)
    theirs, look = paper.table(1), {"color": style.PAPER, "label": "paper, LLaVA-1.5-7B"}
    axes.plot(theirs.blocks_removed, theirs.paper_score, ":^", mfc="white", **look)
    if (table := facts.get("extra_criteria")) is not None:
        curves = _curves(table, table1)
        curves.index *= paper.BLOCKS / results.blocks
        _random_orders(axes, curves)
    before = table1.fraction_removed * paper.BLOCKS
    style.scores(axes, before, table1, fmt="-o", color=PRUNED, label="pruned")
    if table2 is not None:
        beside = table2.fraction_removed * paper.BLOCKS + 0.35  # so that both intervals are seen
        label = "healed by SFT (beside)"
        style.scores(axes, beside, table2, "score_after", fmt="s", color=SFT, label=label)
        if results.answers is not None:
            _further_seeds(axes, results)
    axes.set_xlabel(f"blocks removed, of {paper.BLOCKS}")
    style.legend_below(figure, 2)
    return Drawing(figure, table1, finding)


def _further_seeds(axes, results: Results) -> None:
    """The same trainings with other seeds."""
    again = results.models[results.models.sft_seed > 0]
    again = again[(again.bits == 16) & again.variant.isin(results.answers.variant)]
    if len(again):
        marks = results.answers.groupby("variant").score.mean()
        place = again.units_removed * paper.BLOCKS / results.blocks + 0.8
        look = {"color": SFT, "mfc": "none", "ms": 4, "label": "with other seeds"}
        axes.plot(place, metrics.percent(again.variant.map(marks)), "s", **look)


def _random_orders(axes, curves: pd.DataFrame) -> None:
    """The mean of all random orders and what they span."""
    orders = curves[[name for name in curves if name.startswith("random-")]].dropna()
    if orders.shape[1] > 1:
        ends = orders.min(axis=1), orders.max(axis=1)
        axes.fill_between(orders.index, *ends, color=style.BAND)
    if orders.shape[1]:
        label = f"random orders: mean, range of {orders.shape[1]}"
        label = label if orders.shape[1] > 1 else words(orders.columns[0])
        axes.plot(orders.index, orders.mean(axis=1), ":", color=DENSE, label=label)


@style.figure("extra_criteria", "extra_criteria", "table1_pruning")
def criteria(facts: Facts, table: pd.DataFrame, table1: pd.DataFrame) -> Drawing | None:
    """Score against blocks removed: a panel a rival, with the study's own and the random orders."""
    if table[table.criterion == facts.results.criterion].score.isna().all():
        return None
    own, curves = facts.results.criterion, _curves(table, table1)
    behind = {row["criterion"]: row["difference_all"] for row in facts.rows("extra_criteria_tests")}
    rivals = [name for name in curves if name != own and not name.startswith("random-")]
    rivals = sorted(rivals, key=lambda name: behind.get(name, math.inf)) or [own]
    finding = facts.title("extra_criteria")
    columns = min(2, len(rivals))
    rows = math.ceil(len(rivals) / columns)
    shared = {"columns": columns, "sharex": True, "sharey": True}
    figure, panels = style.canvas(finding, 1.5 + 1.2 * rows, rows, **shared)
    mine = table1.dropna(subset=["score"])
    ends = mine.score_lo.astype(float), mine.score_hi.astype(float)
    for axes, name in zip(panels, rivals, strict=False):
        _random_orders(axes, curves)
        axes.fill_between(mine.blocks_removed, *ends, color=PRUNED, alpha=0.18)
        axes.plot(curves[own].dropna(), "-", color=PRUNED, linewidth=2, label=words(own))
        axes.plot(curves[name].dropna(), "--s", color=SFT, markersize=3, label="the rival")
        apart = f": {-behind[name]:+.1f}" if name in behind else ""
        axes.set_title(f"{words(name)}{apart}")
    for axes in panels[len(rivals) :]:
        axes.axis("off")
    panels[0].set_ylim(metrics.FLOOR - 5, 100)
    panels[len(rivals) - columns].tick_params(labelbottom=True)
    figure.supylabel("score, %")
    below = "blocks removed; behind a name: the rival minus the own, points"
    style.legend_below(figure, 2, title=below)
    return Drawing(figure, table, finding)


def _curves(table: pd.DataFrame, table1: pd.DataFrame) -> pd.DataFrame:
    """[blocks removed, criterion] scores; all start at the unpruned model."""
    curves = table.pivot(index="blocks_removed", columns="criterion", values="score").astype(float)
    curves.loc[0] = table1.score[table1.blocks_removed == 0].astype(float).max()
    return curves.sort_index()
