"""Score against memory and against time, as shares of the unpruned model's. No torch."""

from __future__ import annotations

import string
import textwrap

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report.figures import style
from derm_compress.report.figures.style import DENSE, PRUNED, QUANTIZED, SFT, Drawing
from derm_compress.report.results import Results
from derm_compress.report.sentences import Facts

KINDS = {  # (pruned, healed, quantized): label, colour, marker
    (False, False, False): ("unpruned", DENSE, "o"),
    (False, True, False): ("unpruned, healed", DENSE, "s"),
    (True, False, False): ("pruned", PRUNED, "X"),
    (True, True, False): ("pruned, healed", SFT, "s"),
    (False, False, True): ("quantized", QUANTIZED, "^"),
    (False, True, True): ("quantized", QUANTIZED, "^"),
    (True, False, True): ("pruned, quantized", QUANTIZED, "v"),
    (True, True, True): ("pruned, healed, quantized", QUANTIZED, "D"),
}
COSTS = {"memory": "vram_gib", "time": "decode_ms_per_token"}
SAID = {
    "memory": "weights, % of the unpruned model's",
    "time": "time a token once the prompt is read, on this machine,\n% of the unpruned model's",
}
CIRCLED = (
    "Circled: best for its cost on the test pictures and again on the held-out ones. On "
    "development pictures healed and quantized models have no scores."
)
LINE = 64  # characters below the panels


def points(results: Results) -> pd.DataFrame:
    """Stage 08's models, scored as in Table 4.

    memory, time: percent of the unpruned model's weights and time a token. best_memory, best_time:
    whether no model that costs no more scores as much, on the test and on the held-out pictures;
    mark: a letter for each that is best.
    """
    answers = results.evaluation
    table = results.models[results.models.variant.isin(answers.variant)].drop_duplicates("variant")
    done = zip(table.units_removed > 0, table.healed.astype(bool), table.bits < 16, strict=True)
    table = table[["variant"]].assign(kind=[KINDS[what][0] for what in done])
    table = table.merge(metrics.score_table(answers, ["variant"]), on="variant")
    halves = [answers[answers.split == split] for split in ("test", "heldout")]
    means = [table.variant.map(half.groupby("variant").score.mean()) for half in halves]
    frames = {"memory": results.memory, "time": results.one_prompt}
    for name, column in COSTS.items():
        known = pd.Series(dtype=float)
        if frames[name] is not None:
            known = frames[name].drop_duplicates("variant").set_index("variant")[column]
        whole = known.get(results.variant(0), float("nan"))
        table[name] = 100 * table.variant.map(known) / whole
        one, other = (front(table[name], mean) for mean in means)
        table[f"best_{name}"] = one & other
    best = table.variant[table.best_memory | table.best_time]
    letters = dict(zip(best, string.ascii_lowercase, strict=False))
    return table.assign(mark=[letters.get(name, "") for name in table.variant])


def front(cost: pd.Series, score: pd.Series) -> pd.Series:
    """Whether a point scores more than every one that costs no more."""
    known = pd.DataFrame({"cost": cost, "score": score}).dropna()
    known = known.sort_values(["cost", "score"], ascending=[True, False])
    before = known.score.cummax().shift(fill_value=float("-inf"))
    return pd.Series(known.score > before, dtype=bool).reindex(cost.index, fill_value=False)


@style.figure("pareto", "table4_efficiency", "evaluation")
def pareto(facts: Facts, table4: pd.DataFrame, answers: pd.DataFrame) -> Drawing:
    """Scores against memory and against time, with the paper's."""
    table = points(facts.results).dropna(subset=["score"])
    table["label"] = [facts.label(name) for name in table.variant]
    theirs = {"memory": table4.paper_vram, "time": table4.paper_ms_per_token}
    there = [name for name in COSTS if table[name].notna().any()] or ["memory"]
    finding = facts.title("pareto", rows=table.to_dict("records"))
    best = table[table.mark.ne("")].sort_values("mark")
    below = [f"{row.mark}: {row.label}" for row in best.itertuples()]
    below = [textwrap.fill(line, LINE) for line in [*below, CIRCLED]]
    height = 2.5 + 2.1 * len(there) + 0.15 * len(below)
    figure, axes = style.canvas(finding, height, len(there))
    for ax, name in zip(axes, there, strict=True):
        known = table.dropna(subset=[name])
        look = {"color": style.PAPER, "mfc": "white", "label": "paper, LLaVA-1.5-7B"}
        ax.plot(100 * theirs[name] / theirs[name].max(), table4.paper_score, "*", **look)
        _scatter(ax, known, name)
        ax.set_xlim(0, 1.08 * max(100, known[name].max()))
        ax.set_xlabel(SAID[name])
        style.score_axis(ax, "score, %")
    style.legend_below(figure, 2, title="\n".join(below), alignment="left")
    return Drawing(figure, table, finding)


def _scatter(ax, table: pd.DataFrame, cost: str) -> None:
    """The points by kind, those ringed and marked that are best for their cost."""
    for label, colour, marker in dict.fromkeys(KINDS.values()):
        rows = table[table.kind == label]
        if len(rows):
            look = {"fmt": marker, "color": colour, "ms": 5, "elinewidth": 0.8, "label": label}
            ax.errorbar(rows[cost], rows.score, yerr=style.reach(rows, "score"), **look)
    best = table[table[f"best_{cost}"]].sort_values(cost)
    ax.plot(best[cost], best.score, "o", color=style.PAPER, mfc="none", ms=10)
    for i, row in enumerate(best.itertuples()):
        place = {"xytext": (14 * (i % 2) - 7, 4), "ha": ("right", "left")[i % 2]}
        at = getattr(row, cost), row.score
        ax.annotate(row.mark, at, textcoords="offset points", fontweight="bold", **place)
