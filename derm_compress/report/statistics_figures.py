"""Which disease is taken for which: confusion of the original model and of the full pipeline. No torch."""

from __future__ import annotations

import pandas as pd

from derm_compress.report import figures, statistics_tables
from derm_compress.report.results import Results, variant_id


def confusions(results: Results) -> figures.Drawing | None:
    """One matrix a model, rows the true disease, columns what the answer names; None without answers."""
    names = [variant_id(0), variant_id(results.operating, healed=True, method="awq")]
    counts = {name: statistics_tables.confusion(results, name) for name in names}
    counts = {name: table for name, table in counts.items() if table.size}
    return draw(counts) if counts else None


@figures.styled
def draw(counts: dict[str, pd.DataFrame]) -> figures.Drawing:
    """Matrices of counts [disease, named] below each other; a row's share is its shade."""
    right = {
        name: 100 * sum(t.at[d, d] for d in t.index) / t.to_numpy().sum()
        for name, t in counts.items()
    }
    finding = "The right disease is named in " + ", ".join(
        f"{share:.0f} % ({name})" for name, share in right.items()
    )
    figure, axes = figures.canvas(finding, 3.3 * len(counts) + 0.6, rows=len(counts), squeeze=False)
    for ax, (name, table) in zip(axes[:, 0], counts.items(), strict=True):
        shares = table.div(table.sum(axis=1).clip(lower=1), axis=0)
        ax.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for row, column in ((r, c) for r in range(table.shape[0]) for c in range(table.shape[1])):
            count, dark = table.iat[row, column], shares.iat[row, column] > 0.5
            if count:
                ax.text(
                    column,
                    row,
                    count,
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                    fontsize=8,
                )
        ax.set_xticks(range(table.shape[1]), table.columns, rotation=35, ha="right", fontsize=8)
        ax.set_yticks(range(table.shape[0]), table.index, fontsize=8)
        ax.set(title=name, ylabel="disease", xlabel="named")
        ax.grid(visible=False)
    return figures.Drawing(figure, tidy(counts), finding)


def tidy(counts: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """variant, disease, named, count of all cells."""
    frames = [t.rename_axis(index="disease", columns="named").stack().rename("count").reset_index().assign(variant=name)
              for name, t in counts.items()]  # fmt: skip
    return pd.concat(frames, ignore_index=True)[["variant", "disease", "named", "count"]]
