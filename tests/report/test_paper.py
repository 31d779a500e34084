"""The paper's numbers agree with their own arithmetic, and disagree exactly where the paper does."""

import subprocess
import sys

import pytest

from derm_compress.data import dialogue
from derm_compress.errors import DermError
from derm_compress.evaluate import metrics
from derm_compress.report import paper

PARAMETERS, BLOCK = 7_063_427_072, 202_383_360


def test_table1_counts_the_parameters_left():
    for row in paper.table(1).itertuples():
        assert row.paper_params_b == pytest.approx(
            (PARAMETERS - row.blocks_removed * BLOCK) / 1e9, abs=5e-4
        )


def test_table4_names_six_removed_blocks_where_tables_2_and_3_name_seven():
    printed = set(paper.table(4).query("role == 'operating'")["paper_params_b"])
    assert printed == {round((PARAMETERS - 6 * BLOCK) / 1e9, 2)}
    named = paper.table(3).query("role == 'operating'")["paper_model"]
    assert named.str.contains(str(round((PARAMETERS - 7 * BLOCK) / 1e9, 1))).all()


def test_scores_are_quarters_of_a_mark_with_the_three_known_exceptions():
    columns = {
        (1, "paper_score"),
        (2, "paper_score_before"),
        (2, "paper_score_after"),
        (3, "paper_score"),
    }
    columns |= {(4, "paper_score"), (5, "paper_score")}
    scores = {score for number, column in columns for score in paper.table(number)[column]}
    assert {s for s in scores if (s * 4) % 1} == {80.12, 73.15, 64.72}
    assert min(scores) == 25 == 100 * metrics.SCALE[0] / metrics.SCALE[1]


def test_what_several_tables_report_of_one_model_is_the_same_number():
    pipeline, ablation = paper.table(4).set_index("variant"), paper.table(5).set_index("variant")
    sft, quantized = paper.table(2).set_index("variant"), paper.table(3).set_index("variant")
    full = "pruned-6+sft|awq4"
    for frame in (pipeline, ablation, quantized):
        assert frame.loc[full, "paper_score"] == 54.25
    assert (
        pipeline.loc["pruned-6+sft", "paper_score"] == sft.loc["pruned-6+sft", "paper_score_after"]
    )
    assert pipeline.loc["pruned-6", "paper_score"] == sft.loc["pruned-6+sft", "paper_score_before"]
    assert pipeline.loc["original", "paper_score"] == paper.table(1)["paper_score"][0]
    for variant in pipeline.index.intersection(quantized.index):
        assert pipeline.loc[variant, "paper_vram"] == quantized.loc[variant, "paper_vram"]


def test_variants_follow_the_depths_of_a_run_and_are_unique():
    for number in range(2, 6):
        frame = paper.table(number, operating=8, deeper=12)
        assert frame["variant"].is_unique
        assert not frame["variant"].str.contains("pruned-6|pruned-9|{").any()
        assert (frame["variant"].str.contains("pruned-8") == (frame["role"] == "operating")).all()
        assert (frame["variant"].str.contains("pruned-12") == (frame["role"] == "deeper")).all()


def test_frames_are_fresh():
    spoiled = paper.table(1)
    spoiled["paper_score"] = 0.0
    assert paper.table(1)["paper_score"].min() > 25


def test_the_questions_are_those_the_study_asks():
    assert {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS} == paper.QUESTIONS


def test_an_unknown_table_is_refused_by_number():
    with pytest.raises(DermError, match="1 to 5, not 6"):
        paper.table(6)


def test_needs_no_torch():
    code = "import sys, derm_compress.report.paper, derm_compress.evaluate.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
