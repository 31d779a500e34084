"""Score against memory and against time, every variant of a run in it. No torch."""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report.figures import (
    DENSE,
    PAPER,
    PRUNED,
    QUANTIZED,
    SFT,
    TARGET,
    Drawing,
    canvas,
    score_axis,
    styled,
)
from derm_compress.report.results import Results

KINDS = {  # label: colour, marker
    "unpruned": (DENSE, "o"), "pruned": (PRUNED, "s"), "after SFT": (SFT, "P"), "quantized": (QUANTIZED, "^"),
    "pruned and quantized": (QUANTIZED, "v"), "pruned, SFT and quantized": (QUANTIZED, "D"),
}  # fmt: skip
NAMES = [
    "variant",
    "kind",
    "score",
    "score_lo",
    "score_hi",
    "n",
    "vram_gib_7b",
    "total_ms_per_token",
]
NAMES += ["best", "fastest"]  # of what costs no more in memory, in time


def points(results: Results) -> pd.DataFrame:
    """Every variant on the same test questions, its memory at 7B, its time, and whether none cheaper is better."""
    table = results.variants.assign(kind=[kind(row) for row in results.variants.itertuples()])[
        ["variant", "kind"]
    ]
    empty = pd.DataFrame(columns=["variant"])
    scored = (
        empty
        if results.answers is None
        else metrics.score_table(results.answers, ["variant"], n_boot=500)
    )
    for frame in (scored, results.memory, results.one_prompt):
        table = table.merge(
            (empty if frame is None else frame.drop_duplicates("variant")), on="variant", how="left"
        )
    table = table.reindex(columns=NAMES)
    fastest = front(table.total_ms_per_token, table.score)
    return table.assign(best=front(table.vram_gib_7b, table.score), fastest=fastest)


def kind(row) -> str:
    """What was done to a variant, as KINDS names it."""
    pruned = row.blocks_removed or row.attentions_removed or row.mlps_removed
    if row.bits < 16:
        return (
            "pruned, SFT and quantized"
            if pruned and row.healed
            else "pruned and quantized"
            if pruned
            else "quantized"
        )
    return "after SFT" if row.healed else "pruned" if pruned else "unpruned"


def front(cost: pd.Series, score: pd.Series) -> pd.Series:
    """Whether a point scores more than every one that costs no more."""
    known = (
        pd.DataFrame({"cost": cost, "score": score})
        .dropna()
        .sort_values(["cost", "score"], ascending=[True, False])
    )
    before = known.score.cummax().shift(fill_value=float("-inf"))
    return pd.Series(known.score > before, dtype=bool).reindex(cost.index, fill_value=False)


@styled
def fig_pareto(frame: pd.DataFrame, table4: pd.DataFrame) -> Drawing:
    """All points against planned memory at 7B, and those that were timed against a token's time."""
    scored, timed = (
        frame.dropna(subset=["score", name]) for name in ("vram_gib_7b", "total_ms_per_token")
    )
    share = f"{len(timed)} of {frame.score.notna().sum()} timed"
    finding = _finding(scored) + (f"; {share}" if len(timed) else "")
    figure, axes = canvas(
        finding, 6.6 if len(timed) else 4.2, rows=2 if len(timed) else 1, squeeze=False
    )
    first = axes[0, 0]
    first.axvline(TARGET, color="#999999", linewidth=1)
    first.text(TARGET, 92, f" {TARGET:.0f} GiB", color="#555555")
    first.plot(
        table4.paper_vram,
        table4.paper_score,
        "*",
        color=PAPER,
        mfc="white",
        label="paper, GB as printed",
    )
    first.set(xlim=(0, 15), xlabel="planned weights of a 7B model, GiB")
    _scatter(first, scored, "vram_gib_7b")
    _front(first, scored[scored.best], "vram_gib_7b")
    if len(timed):
        most = 1.1 * timed.total_ms_per_token.max()
        axes[1, 0].set(xlabel=f"total time a token, ms, this machine ({share})", xlim=(0, most))
        _scatter(axes[1, 0], timed, "total_ms_per_token", spread=True)
        _front(axes[1, 0], timed[timed.fastest], "total_ms_per_token")
    for ax in axes[:, 0]:
        score_axis(ax)
    first.set_ylabel("score, %")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return Drawing(figure, frame, finding)


def _finding(scored: pd.DataFrame) -> str:
    """Which of the variants that are small enough scores best."""
    if scored.empty:
        return "Scores need weights: only the paper's points are drawn"
    small = scored[scored.vram_gib_7b < TARGET]
    if small.empty:
        return f"No variant stays below {TARGET:.0f} GiB at 7B"
    best, among = (
        small.loc[small.score.idxmax()],
        f"Of {len(small)} variants below {TARGET:.0f} GiB at 7B",
    )
    return f"{among}, {best.variant} scores best on the test pictures: {best.score:.1f} %"


def _front(ax, rows, cost):
    """The step along the best scores for their cost."""
    if len(rows):
        rows = rows.sort_values(cost)
        ax.step(
            rows[cost],
            rows.score,
            where="post",
            color=PAPER,
            linewidth=0.8,
            label="best for the memory or time",
        )


def _scatter(ax, frame, cost, *, spread=False):
    for label, (colour, marker) in KINDS.items():
        rows = frame[frame.kind == label]
        look = {
            "color": colour,
            "marker": marker,
            "linestyle": "none",
            "markersize": 5,
            "alpha": 0.8,
        }
        if len(rows) and spread:
            ends = [rows.score - rows.score_lo, rows.score_hi - rows.score]
            ax.errorbar(
                rows[cost], rows.score, yerr=ends, capsize=2, elinewidth=0.8, label=label, **look
            )
        elif len(rows):
            ax.plot(rows[cost], rows.score, label=label, **look)
