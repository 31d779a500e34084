"""The report's figures: each one's drawing by stem, from results and tables. No torch."""

from __future__ import annotations

from derm_compress.report.figures import (
    ablation,
    allocation,
    importance,
    pareto,
    pruning,
    quantization,
    quotes,
)
from derm_compress.report.figures.style import FIGURES, Drawing
from derm_compress.report.results import Results
from derm_compress.report.sentences import Facts

# Each registers its figures.
MODULES = (ablation, allocation, importance, pareto, pruning, quantization, quotes)


def figure(stem: str, results: Results) -> Drawing | None:
    """One figure, for a notebook's cell; None where the results do not suffice."""
    return FIGURES[stem](Facts(results))


def draw_all(facts: Facts) -> dict[str, Drawing]:
    """{stem: drawing} of every figure that the results suffice for."""
    drawn = {stem: draw(facts) for stem, draw in FIGURES.items()}
    return {stem: drawing for stem, drawing in drawn.items() if drawing is not None}
