"""Figure 3: what each criterion says of every block. No torch."""

from __future__ import annotations

import textwrap

import pandas as pd

from derm_compress.report.figures import style
from derm_compress.report.figures.style import DENSE, PRUNED, Drawing
from derm_compress.report.sentences import Facts
from derm_compress.report.wording import looks_at_blocks, words

PANELS = 6  # criteria that Figure 3 draws
VALUES = {
    "output_similarity": "output similarity: mean cosine (Eq. 5)",
    "magnitude": "magnitude: sum of |w|",
    "perplexity": "log perplexity",
}


@style.figure("fig3_layer_importance", "scores")
def layer_importance(facts: Facts, scores: pd.DataFrame) -> Drawing | None:
    """Each criterion's value of every block; the least important filled, protected ones as crosses.

    Output similarity is drawn as the paper's Figure 3 has it, the mean cosine (high: unimportant),
    its score being 1 minus that. The axis names the rankings that are not drawn.
    """
    removed, groups = facts.results.operating, panels(scores)
    if not groups:
        return None
    gone = {name: set(group.nsmallest(removed, "rank").block) for name, group in groups.items()}
    first = next(iter(groups.values()))
    known = {"least": first.block[first["rank"].idxmin()], "names": list(groups)}
    finding = facts.title("fig3_layer_importance", gone=list(gone.values()), **known)
    height = 1.3 + (1.5 if len(groups) < 4 else 1.1) * len(groups)
    figure, axes = style.canvas(finding, height, len(groups), sharex=True)
    for ax, (name, group) in zip(axes, groups.items(), strict=True):
        _panel(ax, name, group, gone[name])
    below = "decoder block"
    if left := [words(name) for name in dict.fromkeys(scores.criterion) if name not in groups]:
        below += "\n" + textwrap.fill("not drawn: " + ", ".join(left), 60)
    style.legend_below(figure, 3, title=below)
    return Drawing(figure, scores, finding)


def panels(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Scores of whole blocks by the first criteria that look at them, with images."""
    whole = scores if "part" not in scores else scores[scores.part == "block"]
    groups = dict(list(whole.groupby("criterion", sort=False)))
    shown = [n for n in groups if looks_at_blocks(n) and not n.endswith("-text")]
    return {name: groups[name] for name in shown[:PANELS]}


def _panel(ax, name: str, group: pd.DataFrame, gone: set) -> None:
    """One criterion; protected blocks stand at the edge, since they would flatten the rest."""
    value = 1 - group.score if name == "output_similarity" else group.score
    out, fixed = group.block.isin(gone), group["rank"].isna()
    room = 0.1 * (value[~fixed].max() - value[~fixed].min() or 1)
    low, high = value[~fixed].min() - room, value[~fixed].max() + room
    value = value.clip(low, high)
    ax.vlines(group.block, low, value, color="#bbbbbb", linewidth=1)
    ax.set(ylim=(low, high), title=VALUES.get(name, words(name)))
    protected = {"label": "protected", "clip_on": False}
    for rows, mark, look in (
        (out, "o", {"color": PRUNED, "label": "least important, to go"}),
        (~out & ~fixed, "o", {"color": DENSE, "mfc": "white", "label": "stays"}),
        (fixed, "x", {"color": DENSE, **protected}),
    ):
        ax.plot(group.block[rows], value[rows], mark, **look)
