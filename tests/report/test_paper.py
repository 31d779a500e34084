"""The paper's numbers agree with their own arithmetic, and disagree where the paper does."""

from pathlib import Path

import pytest

from derm_compress.errors import DermError
from derm_compress.evaluate import metrics
from derm_compress.model import shapes
from derm_compress.report import paper
from derm_compress.report.paper import memory as plan
from derm_compress.report.paper import model, page

ROOT = Path(__file__).parents[2]
MODEL = ["role", "healed", "quantizer"]


@pytest.fixture(scope="module")
def rows():
    return plan.beside_plan()


def test_the_7b_shapes_are_those_that_torch_counts():
    assert shapes.llava_7b() == model.LLAVA_7B
    assert [model.blocks_gone(b) for b in (7, 7.06, 5.85, 5.6, 5.2)] == [0, 0, 6, 7, 9]


def test_tables_1_and_4_count_the_parameters_left_and_3_names_another_depth():
    one = paper.table(1)
    left = [model.params_b(n) for n in one.blocks_removed]
    assert one.paper_params_b.tolist() == pytest.approx(left, abs=5e-4)
    four, three = (paper.table(k).query("role == 'operating'") for k in (4, 3))
    assert set(four.paper_params_b) == {round(model.params_b(6), 2)}
    assert set(three.paper_model.map(model.billions)) == {round(model.params_b(7), 1)}


def test_scores_are_quarters_of_a_mark_with_the_three_known_exceptions():
    columns = [(k, "paper_score") for k in (1, 3, 4, 5)]
    columns += [(2, "paper_score_before"), (2, "paper_score_after")]
    scores = {score for number, column in columns for score in paper.table(number)[column]}
    assert {s for s in scores if (s * 4) % 1} == {80.12, 73.15, 64.72}
    assert min(scores) == 25 == 100 * metrics.SCALE[0] / metrics.SCALE[1]


def test_what_several_tables_report_of_one_model_is_the_same_number():
    two, three, four, five = (paper.table(k).set_index(MODEL) for k in (2, 3, 4, 5))
    full, healed = ("operating", True, "awq"), ("operating", True, "")
    assert four.paper_score[full] == three.paper_score[full] == five.paper_score[full].iloc[0]
    assert four.paper_score[healed] == two.paper_score_after[healed]
    assert four.paper_score["operating", False, ""] == two.paper_score_before[healed]
    assert four.paper_score["unpruned", False, ""] == paper.table(1).paper_score[0]
    for key in four.index.intersection(three.index):
        assert four.paper_vram[key] == three.paper_vram[key]


def test_frames_are_fresh_and_an_unknown_table_is_refused_by_number():
    spoiled = paper.table(1)
    spoiled["paper_score"] = 0.0
    assert paper.table(1)["paper_score"].min() > 25
    with pytest.raises(DermError, match="1 to 5, not 6"):
        paper.table(6)


def test_every_printed_vram_is_within_its_bound_of_the_plan_read_as_gib_alone(rows):
    assert rows.groupby("table").size().to_dict() == {1: 7, 3: 6, 4: 6}
    assert rows.within.all()
    far = plan.worst(rows)
    assert far["fp16_gib"] == pytest.approx(100 * (1 - 10.895 / 11.2), abs=0.01)
    assert far["packed_gib"] == pytest.approx(3.7 - 3.431, abs=0.001)
    assert far["fp16_gb"] > plan.LARGE
    before, after = rows[(rows.table == 4) & ~rows.packed].plan_gib.iloc[:2]
    assert before - after == pytest.approx(6 * 0.202383360 * 2e9 / 2**30)


def test_the_page_is_made_anew_as_it_is_kept():
    assert page.text() == (ROOT / "docs" / "paper.md").read_text("utf-8")
