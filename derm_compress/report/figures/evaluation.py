"""Score against memory and against time, and which disease is taken for which. No torch."""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report.figures import style
from derm_compress.report.figures.style import DENSE, PRUNED, QUANTIZED, SFT, Drawing
from derm_compress.report.results import Results
from derm_compress.report.sentences import Facts
from derm_compress.report.tables.answers import confusion

TARGET = 4.0  # GiB: the memory the paper aims at
KINDS = {  # (pruned, healed, quantized): label, colour, marker
    (False, False, False): ("unpruned", DENSE, "o"),
    (True, False, False): ("pruned", PRUNED, "s"),
    (False, True, False): ("after SFT", SFT, "P"),
    (True, True, False): ("after SFT", SFT, "P"),
    (False, False, True): ("quantized", QUANTIZED, "^"),
    (False, True, True): ("quantized", QUANTIZED, "^"),
    (True, False, True): ("pruned and quantized", QUANTIZED, "v"),
    (True, True, True): ("pruned, SFT and quantized", QUANTIZED, "D"),
}
POINTS = ["variant", "kind", "score", "score_lo", "score_hi", "n"]
POINTS += ["vram_gib_7b", "total_ms_per_token"]


def points(results: Results) -> pd.DataFrame:
    """Every variant's score on the same test questions beside its memory at 7B and its time.

    best, fastest: whether nothing that takes no more memory, no more time, scores as much.
    """
    table = results.models.drop_duplicates("variant")
    done = zip(table.units_removed > 0, table.healed.astype(bool), table.bits < 16, strict=True)
    table = table[["variant"]].assign(kind=[KINDS[what][0] for what in done])
    frames = [results.memory, results.one_prompt]
    if results.answers is not None:
        frames.append(metrics.score_table(results.answers, ["variant"], n_boot=500))
    for frame in frames:
        if frame is not None:
            table = table.merge(frame.drop_duplicates("variant"), on="variant", how="left")
    table = table.reindex(columns=POINTS)
    best = front(table.vram_gib_7b, table.score)
    return table.assign(best=best, fastest=front(table.total_ms_per_token, table.score))


def front(cost: pd.Series, score: pd.Series) -> pd.Series:
    """Whether a point scores more than every one that costs no more."""
    known = pd.DataFrame({"cost": cost, "score": score}).dropna()
    known = known.sort_values(["cost", "score"], ascending=[True, False])
    before = known.score.cummax().shift(fill_value=float("-inf"))
    return pd.Series(known.score > before, dtype=bool).reindex(cost.index, fill_value=False)


@style.figure("pareto", "table4_efficiency")
def pareto(facts: Facts, table4: pd.DataFrame) -> Drawing:
    """All points against planned memory at 7B, and those that were timed against a token's time."""
    frame = points(facts.results)
    scored = frame.dropna(subset=["score", "vram_gib_7b"])
    timed = frame.dropna(subset=["score", "total_ms_per_token"])
    share = f"{len(timed)} of {frame.score.notna().sum()} timed"
    rows = 2 if len(timed) else 1
    known = {"scored": scored.to_dict("records"), "target": TARGET}
    finding = facts.title("pareto", share=share if len(timed) else "", **known)
    figure, (memory, *times) = style.canvas(finding, 1.8 + 2.4 * rows, rows)
    memory.axvline(TARGET, color="#999999", linewidth=1)
    memory.text(TARGET, 92, f" {TARGET:.0f} GiB", color=style.QUIET)
    look = {"color": style.PAPER, "mfc": "white", "label": "paper, GB as printed"}
    memory.plot(table4.paper_vram, table4.paper_score, "*", **look)
    memory.set(xlim=(0, 15), xlabel="planned weights of a 7B model, GiB")
    _scatter(memory, scored, "vram_gib_7b", "best")
    for ax in times:
        ax.set_xlim(0, 1.1 * timed.total_ms_per_token.max())
        ax.set_xlabel(f"total time a token, ms, this machine ({share})")
        _scatter(ax, timed, "total_ms_per_token", "fastest", spread=True)
        style.score_axis(ax)
    style.score_axis(memory, "score, %")
    style.legend_below(figure, 2, memory)
    return Drawing(figure, frame, finding)


def _scatter(ax, frame: pd.DataFrame, cost: str, best: str, *, spread: bool = False) -> None:
    """The points by kind, and the step along the best scores for their cost."""
    for label, colour, marker in dict.fromkeys(KINDS.values()):
        rows = frame[frame.kind == label]
        if len(rows):
            ends = style.reach(rows, "score") if spread else None
            look = {"fmt": marker, "color": colour, "markersize": 5, "alpha": 0.8}
            size = {"capsize": 2, "elinewidth": 0.8}
            ax.errorbar(rows[cost], rows.score, yerr=ends, label=label, **look, **size)
    rows = frame[frame[best]].sort_values(cost)
    if len(rows):
        look = {"where": "post", "color": style.PAPER, "linewidth": 0.8}
        ax.step(rows[cost], rows.score, label="best for the memory or time", **look)


@style.figure("extra_diagnosis")
def confusions(facts: Facts) -> Drawing | None:
    """The original model and the full pipeline: rows the true disease, columns what is named."""
    names = facts.results.variant(0), facts.results.full
    counts = {name: confusion(facts.results, name) for name in names}
    counts = {name: table for name, table in counts.items() if table.size}
    if not counts:
        return None
    told, cells = [], []
    for name, table in counts.items():
        right = sum(table.at[disease, disease] for disease in table.index)
        told.append(f"{right / table.to_numpy().sum():.0%} ({name})")
        each = table.rename_axis(index="disease", columns="named").stack().rename("count")
        cells.append(each.reset_index().assign(variant=name))
    finding = f"The right disease is named in {', '.join(told)}"
    figure, axes = style.canvas(finding, 3.3 * len(counts) + 0.6, len(counts))
    for ax, (name, table) in zip(axes, counts.items(), strict=True):
        _matrix(ax, table)
        ax.set(title=name, ylabel="disease", xlabel="named")
    data = pd.concat(cells, ignore_index=True)[["variant", "disease", "named", "count"]]
    return Drawing(figure, data, finding)


def _matrix(ax, table: pd.DataFrame) -> None:
    """Counts, shaded by their share of the row."""
    shares = table.div(table.sum(axis=1).clip(lower=1), axis=0).to_numpy()
    ax.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in pd.DataFrame(table.to_numpy()).stack().items():
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            ax.text(column, row, count, color=colour, ha="center", va="center", fontsize=8)
    ax.set_xticks(range(table.shape[1]), table.columns, rotation=35, ha="right", fontsize=8)
    ax.set_yticks(range(table.shape[0]), table.index, fontsize=8)
    ax.grid(visible=False)
