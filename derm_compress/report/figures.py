"""The paper's figures from stored frames: each function gives a `Drawing` (figure, data, finding). No torch.

One style: dense grey, pruned blue, SFT orange, quantized green, the paper's own values black and dotted; markers and
hatches differ too, so that a grey print reads. What a model said is drawn as plain text, never parsed as mathtext.
"""

from __future__ import annotations

import base64
import functools
import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from derm_compress.evaluate import metrics
from derm_compress.report import paper
from derm_compress.report.results import first_to_go
from derm_compress.report.wording import words

DENSE, PRUNED, SFT, QUANTIZED, PAPER = "#6b6b6b", "#1f6fb4", "#d96f00", "#2a8c4a", "#111111"
STAGE_COLOURS = {"03": PRUNED, "04": PRUNED, "05": SFT, "06": QUANTIZED, "07": QUANTIZED}
TARGET = 4.0  # GiB: the memory the paper aims at
STYLE = {
    "figure.dpi": 140, "savefig.dpi": 140,  # equal, so that the layout is made for what is saved
    "font.family": "DejaVu Sans", "font.size": 9.5, "figure.constrained_layout.use": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e2e2e2",
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5, "text.parse_math": False,
    "svg.hashsalt": "derm_compress",
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A figure, the tidy data behind it (None where there are none) and its finding, which is its text alternative."""

    figure: Figure
    data: pd.DataFrame | None
    finding: str

    def save(self, path: Path) -> None:
        """Write path.png, path.svg and, where there are data, path.csv; the bytes depend on the content alone."""
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(f"{path}.svg", metadata={"Date": None, "Creator": None})
        Path(f"{path}.png").write_bytes(self.png())
        if self.data is not None:
            self.data.to_csv(f"{path}.csv", index=False, float_format="%.6g", lineterminator="\n")

    @functools.cached_property
    def _png(self) -> bytes:
        with matplotlib.rc_context(STYLE), io.BytesIO() as buffer:
            self.figure.savefig(buffer, format="png", metadata={"Software": None})
            return few_colours(buffer)

    def png(self) -> bytes:
        return self._png

    def _repr_mimebundle_(self, include=None, exclude=None):
        """Shown by Jupyter as the last value of a cell; nbconvert turns `alt` into the text alternative."""
        return {"image/png": base64.b64encode(self.png()).decode()}, {
            "image/png": {"alt": self.finding}
        }


def few_colours(png: io.BytesIO) -> bytes:
    """The picture with a palette of 256: a third of the size, and charts have no more."""
    small = io.BytesIO()
    with Image.open(png) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            small, format="png", optimize=True
        )
    return small.getvalue()


def styled(draw):
    """Run a drawing function under the one style, whatever the caller's settings are."""

    @functools.wraps(draw)
    def inner(*args, **kwargs) -> Drawing:
        with matplotlib.rc_context(STYLE):
            drawing = draw(*args, **kwargs)
            drawing.figure.draw_without_rendering()  # the layout is solved once, so that no format depends on another
            drawing.figure.set_layout_engine("none")
            return drawing

    return inner


def canvas(finding: str, height: float, rows: int = 1, **options):
    """A figure 5.8 inches wide whose title is its finding; returns figure and axes."""
    figure = Figure(figsize=(5.8, height))
    FigureCanvasAgg(figure)
    figure.suptitle(
        textwrap.fill(finding[:1].upper() + finding[1:], 66),
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=10,
    )
    return figure, figure.subplots(rows, 1, **options)


def _points(axes, rows, x, name, **options):
    """Scores with their 95 % interval; rows without a score are left out."""
    rows = rows.dropna(subset=[name])
    if len(rows):
        spread = [
            (rows[name] - rows[f"{name}_lo"]).clip(lower=0),
            (rows[f"{name}_hi"] - rows[name]).clip(lower=0),
        ]
        axes.errorbar(x[rows.index], rows[name], yerr=spread, capsize=3, markersize=6, **options)


def score_axis(axes):
    axes.axhline(metrics.FLOOR, color="#999999", linewidth=1)
    axes.set(ylabel="score, % (95 % interval)", ylim=(metrics.FLOOR - 9, 100))


@styled
def score_vs_blocks(table1: pd.DataFrame, table2: pd.DataFrame) -> Drawing:
    """Score against blocks removed, before and after SFT, the paper's curve in it (Tables 1 and 2)."""
    scored = table1.dropna(subset=["score"])
    finding = "Scores need weights: only the paper's curve is drawn"
    if len(scored):
        first, worst = scored.iloc[0], scored.loc[scored.score.idxmin()]
        finding = f"No depth scores below the unpruned {first.score:.1f} %"
        if worst.score < first.score:
            blocks = int(worst.blocks_removed)
            finding = f"Removing {blocks} blocks takes the score from {first.score:.1f} to {worst.score:.1f} %"
        for row in table2[table2.blocks_removed > 0].dropna(subset=["gain"]).head(1).itertuples():
            finding += (
                f"; with {row.blocks_removed} removed, SFT changes it by {row.gain:+.1f} points"
            )
        finding += f" ({first.n:.0f} answers)"
    figure, axes = canvas(finding, 3.7)
    # The axis counts blocks of 32, so that a smaller model's fractions stand below the paper's.
    before, after = table1.fraction_removed * paper.BLOCKS, table2.fraction_removed * paper.BLOCKS
    score_axis(axes)
    axes.text(
        0,
        metrics.FLOOR - 1,
        "floor: every answer gets the lowest grade",
        va="top",
        fontsize=8,
        color="#555555",
    )
    theirs = paper.table(1)
    axes.plot(
        theirs.blocks_removed,
        theirs.paper_score,
        ":^",
        color=PAPER,
        mfc="white",
        label="paper, LLaVA-1.5-7B",
    )
    _points(axes, table1, before, "score", fmt="-o", color=PRUNED, label="pruned")
    beside = after + 0.35  # so that both intervals are seen
    _points(
        axes,
        table2,
        beside,
        "score_after",
        fmt="s",
        color=SFT,
        label="after SFT (beside; 0 blocks: the control)",
    )
    axes.set_xlabel(f"blocks removed, of {paper.BLOCKS}")
    figure.legend(loc="outside lower center", ncols=3)
    return Drawing(figure, table1, finding)


@styled
def fig1_pipeline(graph: dict[str, list[str]]) -> Drawing:
    """The stages and what feeds what; `graph` {stage: its inputs}."""
    level = {}
    for stage in sorted(graph):
        level[stage] = 1 + max(
            (level[source] for source in graph[stage] if source in level), default=-1
        )
    rows = [sorted(s for s in level if level[s] == y) for y in sorted(set(level.values()))]
    finding = f"The study's {len(graph)} stages: what one leaves, the next ones read"
    figure, axes = canvas(finding, 0.4 + 0.7 * len(rows))
    axes.axis("off")
    axes.set(xlim=(0, 2), ylim=(len(rows) - 0.5, -0.5))
    centre = {
        stage: ((2 * i + 1) / len(row), y)
        for y, row in enumerate(rows)
        for i, stage in enumerate(row)
    }
    for stage, (x, y) in centre.items():
        colour, width = STAGE_COLOURS.get(stage[:2], DENSE), 1.8 / len(rows[y])
        shape = {
            "boxstyle": "round,pad=0,rounding_size=0.06",
            "linewidth": 1.4,
            "edgecolor": colour,
        }
        axes.add_patch(
            FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, facecolor=colour + "28", **shape)
        )
        axes.text(x, y, stage.replace("_", " "), fontweight="bold", ha="center", va="center")
        for source in graph[stage]:
            if level.get(source) == y - 1:
                start = (centre[source][0] if len(rows[y]) < len(rows[y - 1]) else x, y - 0.7)
                end = (start[0], y - 0.3)
                axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444"})
    edges = [(stage, source) for stage in sorted(graph) for source in graph[stage]]
    return Drawing(figure, pd.DataFrame(edges, columns=["stage", "reads"]), finding)


@styled
def fig2_block_removal(plan: dict, removed: int) -> Drawing:
    """What is left out, one try at a time, and the plan that follows: as stage 03 stores it, `removed` blocks go."""
    blocks, protected, gone = plan["blocks"], set(plan["protected"]), first_to_go(plan, removed)
    tries, tried, finding = tried_out(plan, gone)
    rows = [
        ("full model", []),
        *((f"without {name}", out) for name, out in tries[:2]),
        ("...", None),
    ]
    rows += [
        *((f"without {name}", out) for name, out in tries[-1:]),
        (f"{len(gone)} removed", gone),
    ]
    figure, axes = canvas(finding, 2.6)
    for y, (_, out) in enumerate(rows):
        for b in range(blocks) if out is not None else []:
            look = (
                {"facecolor": DENSE, "hatch": "////"}
                if b in protected
                else {"facecolor": "#c9c9c9"}
            )
            look = {"facecolor": "white", "linestyle": ":"} if b in out else look
            edge = PRUNED if b in out else "white"
            axes.add_patch(Rectangle((b + 0.06, y - 0.36), 0.88, 0.72, edgecolor=edge, **look))
    turns = {} if plan.get("starts") else {b: i for i, b in enumerate(plan["order"], 1)}
    for turn, b in enumerate(gone if turns else [], 1):
        axes.text(
            b + 0.5,
            len(rows) - 1,
            turn,
            ha="center",
            va="center",
            fontsize=5.5 if turn > 9 else 7,
            color=PRUNED,
        )
    axes.set(xlim=(0, blocks), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xticks([b + 0.5 for b in range(0, blocks, 4)], range(0, blocks, 4))
    axes.set_xlabel(
        "decoder block (hatched: protected; dotted: left out"
        + ("; number: its turn)" if turns else ")")
    )
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    data = pd.DataFrame(
        {"block": range(blocks), "turn": pd.Series(turns, dtype=float).reindex(range(blocks))}
    )
    data = data.astype({"turn": "Int64"})
    return Drawing(
        figure,
        data.assign(protected=data.block.isin(protected), removed=data.block.isin(gone)),
        finding,
    )


def tried_out(plan: dict, gone: list) -> tuple[list, list, str]:
    """(name, blocks) of each try, the blocks that may go, and what Figure 2 says of a plan."""
    free = sorted(set(range(plan["blocks"])) - set(plan["protected"]))
    if not plan.get("starts"):
        tried = sorted(plan["order"])
        said = f"Each of {len(tried)} blocks is left out once; the {len(gone)} that matter least go, in this order"
        return [(b, [b]) for b in tried], tried, said
    runs = [
        list(range(b, b + len(gone))) for b in free if set(range(b, b + len(gone))) <= set(free)
    ]
    said = f"Each of {len(runs)} runs of {len(gone)} neighbouring blocks may go; the one that matters least does"
    return [(f"{run[0]} to {run[-1]}", run) for run in runs], free, said


def drawn_in_figure_3(
    scores: pd.DataFrame, most: int = 6
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Scores of whole blocks by criteria that look at them, with images; and the names of all that are left out."""
    names = list(dict.fromkeys(scores.criterion))
    whole = scores if "part" not in scores else scores[scores.part == "block"]
    groups = dict(list(whole.groupby("criterion", sort=False)))
    left = re.compile(r"random-\d+|last|.*-text")
    shown = [name for name in names if name in groups and not left.fullmatch(name)][:most]
    return {name: groups[name] for name in shown}, [name for name in names if name not in shown]


@styled
def fig3_layer_importance(scores: pd.DataFrame, removed: int) -> Drawing:
    """Each criterion's value of every block; the `removed` least important filled, protected blocks as crosses.

    Output similarity is drawn as the paper's Figure 3 has it, the mean cosine (high: unimportant), its score being
    1 minus that. Up to six criteria are drawn; the axis names those that are not.
    """
    groups, left = drawn_in_figure_3(scores)
    gone = {name: set(group.nsmallest(removed, "rank").block) for name, group in groups.items()}
    (name, group), *others = groups.items()
    finding = f"Block {group.block[group['rank'].idxmin()]} matters least by {words(name)}"
    for other, _ in others[:1]:
        finding += f"; by {words(other)}, {len(gone[name] & gone[other])} of the {removed} blocks to go are the same"
    tall = 1.7 if len(groups) < 4 else 1.25
    figure, axes = canvas(
        finding, 1.1 + tall * len(groups), rows=len(groups), sharex=True, squeeze=False
    )
    for ax, (name, group) in zip(axes[:, 0], groups.items(), strict=True):
        _importance(ax, name, group, gone[name])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].legend(
        handles,
        [f"{removed} least important", *labels[1:]],
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=3,
    )
    said = textwrap.fill("not drawn: " + ", ".join(map(words, left)), 84) if left else ""
    axes[-1, 0].set_xlabel("decoder block")
    figure.supxlabel(said, fontsize=7.5, color="#555555", x=0.01, ha="left")
    return Drawing(figure, scores, finding)


def _importance(ax, name, group, gone):
    """One criterion's panel of Figure 3; protected blocks stand at the edge, since they would flatten the rest."""
    value = 1 - group.score if name == "output_similarity" else group.score
    out, fixed = group.block.isin(gone), group["rank"].isna()
    free = value[~fixed]
    room = 0.1 * (free.max() - free.min() or 1)
    low, high = free.min() - room, free.max() + room
    value = value.clip(low, high)
    ax.vlines(group.block, low, value, color="#bbbbbb", linewidth=1)
    ax.set_ylim(low, high)
    ax.plot(group.block[out], value[out], "o", color=PRUNED, label="least important")
    ax.plot(
        group.block[~out & ~fixed],
        value[~out & ~fixed],
        "o",
        color=DENSE,
        mfc="white",
        label="stays",
    )
    label = "protected (at the edge: beyond)"
    ax.plot(group.block[fixed], value[fixed], "x", color=DENSE, label=label, clip_on=False)
    known = {
        "output_similarity": "mean cosine\n(Eq. 5)",
        "magnitude": "sum of |w|",
        "perplexity": "log perplexity",
    }
    ax.set_ylabel(known.get(name, words(name)))


@styled
def fig4_activations(surface: pd.DataFrame, factor: float = 6.0) -> Drawing:
    """|value| over tokens and channels of the first variant's output; outliers: a peak over `factor` x the median."""
    surface = surface[surface.variant == surface.variant.iloc[0]]
    size = surface.assign(value=surface.value.abs())
    grid = size.pivot_table(index="token", columns="channel", values="value", aggfunc="max")
    peak = grid.max()
    far = (peak > factor * peak.median()).to_numpy()
    finding = (
        f"{surface.variant.iloc[0]}, block {surface.block.iloc[0]}, {surface.projection.iloc[0]}: "
        f"{far.sum()} of {len(peak)} channels stand out; "
        f"the largest value is {peak.max():.1f}, the median channel's peak {peak.median():.1f}"
    )
    figure, (map_, top) = canvas(finding, 4.2, rows=2, sharex=True, height_ratios=(1.6, 1))
    left, right = peak.index.min() - 0.5, peak.index.max() + 0.5
    extent = (left, right, grid.index.max() + 0.5, grid.index.min() - 0.5)
    image = map_.imshow(grid, aspect="auto", cmap="magma_r", extent=extent, interpolation="nearest")
    figure.colorbar(image, ax=map_, label="|value|")
    map_.set_ylabel("token")
    map_.grid(False)
    top.plot(peak.index, peak, color=DENSE, linewidth=1)
    label = f"over {factor:g} x the median channel's peak"
    top.plot(peak.index[far], peak[far], "D", color=QUANTIZED, ms=5, label=label)
    top.set(xlabel="output channel", ylabel="peak |value|", ylim=(0, 1.35 * peak.max()))
    top.legend(loc="upper right")
    return Drawing(figure, surface, finding)
