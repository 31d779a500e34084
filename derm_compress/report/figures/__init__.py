"""The report's figures: each one's drawing by stem, from results and tables. No torch."""

from __future__ import annotations

from derm_compress.report import tables
from derm_compress.report.figures import evaluation, importance, pruning, quantization, quotes
from derm_compress.report.figures.style import Drawing, Source
from derm_compress.report.results import Results

FIGURES = {  # stem: a function of Source to a Drawing, or None where the results do not suffice
    "fig1_pipeline": pruning.pipeline,
    "fig2_block_removal": pruning.block_removal,
    "fig3_layer_importance": importance.layer_importance,
    "extra_agreement": importance.agreement,
    "extra_calibration_size": importance.calibration_size,
    "fig4_activations": quantization.activations,
    "extra_activations": quantization.activation_map,
    "score_vs_blocks": pruning.score_vs_blocks,
    "extra_criteria": importance.criteria,
    "extra_alpha": quantization.exponents,
    "extra_errors": quantization.errors,
    "extra_equal_bytes": quantization.equal_bytes,
    "pareto": evaluation.pareto,
    "extra_diagnosis": evaluation.confusions,
    "fig5_case_studies": quotes.case_studies,
    "fig6_judge_prompt": quotes.judge_prompt,
    "fig7_iterative_pruning": quotes.iterative_pruning,
}


def figure(stem: str, results: Results) -> Drawing | None:
    """One figure, for a notebook's cell; None where the results do not suffice."""
    return FIGURES[stem](Source(results, lambda table: tables.make(table, results)))


def draw_all(source: Source) -> dict[str, Drawing]:
    """{stem: drawing} of every figure that the results suffice for."""
    drawn = {stem: draw(source) for stem, draw in FIGURES.items()}
    return {stem: drawing for stem, drawing in drawn.items() if drawing is not None}
