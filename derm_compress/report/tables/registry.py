"""All tables of a report by stem: their columns, what makes them, and what they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.report.results import Results
from derm_compress.report.tables import (
    answers,
    cells,
    claims,
    criteria,
    pipeline,
    quantizers,
    rankings,
    statistics,
)
from derm_compress.report.tables.text import COUNTS, readable


@dataclass(frozen=True)
class Table:
    """`make` takes Results that have every field in `needs` and returns a frame, empty where they
    do not suffice; `columns`: what is shown of it, in order, and a column for each `each_`."""

    stem: str
    make: Callable[[Results], pd.DataFrame]
    needs: str
    columns: str
    each: str = ""

    def made(self, results: Results) -> pd.DataFrame | None:
        if any(getattr(results, name) is None for name in self.needs.split()):
            return None
        frame = self.make(results)
        if frame.empty:
            return None
        more = [name for name in frame if self.each and name.startswith(self.each)]
        frame = frame.reindex(columns=[*self.columns.split(), *more]).reset_index(drop=True)
        return frame.astype(dict.fromkeys((name for name in COUNTS if name in frame), "Int64"))


SCORE = "score score_lo score_hi n"
BESIDE = "score paper_score score_lo score_hi n"  # what the paper gives stands beside what is ours
DIFFERENCE = "difference difference_lo difference_hi p"
COST = "cost cost_lo cost_hi p_cost"
MODEL = "blocks_removed healed method bits"
SIZE = "params_b vram_gib peak_gib"
SIZE_7B = "blocks_removed_7b params_b_7b vram_gib_7b peak_gib_7b"
SIZES = f"{SIZE} blocks_removed_7b params_b_7b vram_gib_7b paper_vram peak_gib_7b"
PAPER_SIZES = SIZES.replace("params_b_7b", "params_b_7b paper_params_b")
DECODE = "decode_ms_per_token decode_ms_per_token_lo decode_ms_per_token_hi"
PREFILL = "prefill_ms prefill_ms_lo prefill_ms_hi"
TOTAL = "total_ms_per_token total_ms_per_token_lo total_ms_per_token_hi"
OURS = "paper ours ours_lo ours_hi tested_as"

TABLES = (
    Table(
        "table1_pruning",
        pipeline.pruning,
        "variants",
        f"blocks_removed fraction_removed {BESIDE} {PAPER_SIZES}",
    ),
    Table(
        "table2_sft",
        pipeline.sft,
        "variants",
        "blocks_removed fraction_removed"
        " score_before paper_score_before score_before_lo score_before_hi"
        " score_after paper_score_after score_after_lo score_after_hi gain gain_lo gain_hi n"
        " seconds paper_seconds train_peak_gib paper_vram"
        " params_b vram_gib blocks_removed_7b params_b_7b vram_gib_7b paper_model",
    ),
    Table(
        "table3_quantization",
        pipeline.quantization,
        "variants",
        f"{MODEL} {BESIDE} relative_error {SIZES}",
    ),
    Table(
        "table4_efficiency",
        pipeline.efficiency,
        "variants",
        f"setting variant {MODEL} {BESIDE}"
        f" {DECODE} paper_ms_per_token {PREFILL} {TOTAL} {PAPER_SIZES}",
    ),
    Table(
        "table5_ablation",
        pipeline.ablation,
        "variants",
        f"setting variant {MODEL} {BESIDE} {DIFFERENCE} p_holm {SIZE} {SIZE_7B} paper_notes",
    ),
    Table(
        "extra_quantization_tests",
        quantizers.method_tests,
        "variants answers",
        f"blocks_removed healed method bits calibrated {DIFFERENCE} p_holm {COST} p_cost_holm n",
    ),
    Table(
        "extra_errors",
        quantizers.block_errors,
        "variants errors",
        "blocks_removed healed bits block",
        each=quantizers.ERROR,
    ),
    Table(
        "extra_equal_bytes",
        quantizers.equal_bytes,
        "variants equal_bytes",
        f"budget blocks_removed healed method mean_bits {SCORE} {DIFFERENCE} p_holm"
        " vram_gib params_b_7b vram_gib_7b",
    ),
    Table("extra_agreement", rankings.agreements, "values", "one other rho rho_lo rho_hi"),
    Table(
        "extra_calibration_size",
        rankings.calibration_sizes,
        "values",
        "ranking items rho rho_lo rho_hi overlap overlap_lo overlap_hi chance",
    ),
    Table(
        "extra_criteria",
        criteria.criteria,
        "variants",
        f"criterion blocks_removed {SCORE} {SIZE} params_b_7b vram_gib_7b",
    ),
    Table(
        "extra_criteria_tests",
        criteria.criteria_tests,
        "variants answers",
        f"criterion blocks_removed {DIFFERENCE} p_holm depths ahead"
        " difference_all difference_all_lo difference_all_hi p_all p_all_holm n",
    ),
    Table(
        "extra_cliffs",
        criteria.cliffs,
        "variants answers",
        "criterion depths fall_from fall_to fall fall_lo fall_hi fall_per_block level_until",
    ),
    Table(
        "extra_sublayers",
        criteria.sublayers,
        "variants",
        "criterion blocks_removed attentions_removed mlps_removed"
        f" {SCORE} {SIZE} params_b_7b vram_gib_7b"
        " nearest nearest_params_b nearest_score nearest_score_lo nearest_score_hi apart"
        f" {DIFFERENCE}",
    ),
    Table(
        "extra_measured",
        pipeline.running,
        "variants latency",
        "variant vram_gib measured_weights_gib rss_gib rss_peak_gib allocated_peak_gib"
        " reserved_peak_gib device_used_gib prompt_tokens new_tokens repeats",
    ),
    Table("extra_baselines", pipeline.baselines, "variants", f"variant {SCORE}"),
    Table(
        "extra_judges",
        answers.judges,
        "judge_controls",
        "judge control expected n unscored mean_score lowest highest as_expected",
    ),
    Table(
        "extra_latency",
        answers.latencies,
        "latency",
        f"variant batch prompt_tokens new_tokens {PREFILL} {DECODE} {TOTAL}"
        " tokens_per_second read_mib bandwidth_gb_s floor_ms times_floor",
    ),
    Table(
        "extra_comparisons",
        statistics.comparisons,
        "variants evaluation",
        f"against setting variant {DIFFERENCE} p_holm n images",
    ),
    Table(
        "extra_power",
        statistics.powers,
        "variants evaluation",
        "pictures setting variant images n sd detectable difference power images_needed",
    ),
    Table(
        "extra_seeds",
        statistics.seeds,
        "variants answers",
        "measure seeds score_points score_points_lo score_points_hi lowest highest"
        " seed_sd chance_sd training_sd item_sd n",
    ),
    Table(
        "extra_diagnosis",
        answers.diagnoses,
        "predictions",
        "variant accuracy accuracy_lo accuracy_hi balanced none several most_confused n",
    ),
    Table(
        "extra_secondary",
        answers.secondary_scores,
        "predictions",
        "variant score name_exact name_exact_lo name_exact_hi fact_f1 fact_f1_lo fact_f1_hi"
        " similarity similarity_lo similarity_hi runaway n",
    ),
    Table("extra_side_by_side", cells.cells, "variants", f"table row cell verdict {OURS} why"),
    Table("extra_verdicts", claims.claims, "variants", f"claim verdict {OURS} why where"),
)
_BY_STEM = {table.stem: table for table in TABLES}


def make(stem: str, results: Results) -> pd.DataFrame | None:
    """One table; None where the results do not suffice. DermError for a stem that is none."""
    if stem not in _BY_STEM:
        raise DermError(f"report: there is no table {stem}; there are {', '.join(_BY_STEM)}")
    return _BY_STEM[stem].made(results)


def build(results: Results) -> dict[str, pd.DataFrame]:
    """{stem: table} of everything that the results suffice for."""
    made = {stem: make(stem, results) for stem in _BY_STEM}
    return {stem: frame for stem, frame in made.items() if frame is not None}


def table(stem: str, results: Results) -> pd.DataFrame | None:
    """One table as people read it; None where the results do not suffice."""
    frame = make(stem, results)
    return None if frame is None else readable(frame)
