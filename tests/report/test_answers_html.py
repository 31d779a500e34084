"""Answers as readable text, and the figure of what a score costs."""

import re

import fabricate
import pandas as pd
import pytest

from derm_compress.report import answers_html, pareto, quotes, tables
from derm_compress.report.results import load_results

SAID = "Psoriasis or melanoma <script>x</script>."


def test_right_and_wrong_facts_differ_by_more_than_colour():
    text = answers_html.marked(SAID, "This is psoriasis.", "name")
    assert "<b class=right>Psoriasis</b>" in text and "<s class=wrong>melanoma</s>" in text
    turned = answers_html.marked(SAID, "This is melanoma.", "name")
    assert "<s class=wrong>Psoriasis</s>" in turned and "<b class=right>melanoma</b>" in turned


def test_whatever_is_said_stays_text_and_whole():
    text = answers_html.marked(SAID, "This is psoriasis.", "name")
    assert "<script" not in text and "&lt;script&gt;x&lt;/script&gt;." in text
    assert re.sub(r"</?[bs][^>]*>", "", text).replace("&lt;", "<").replace("&gt;", ">") == SAID
    assert "(nothing)" in answers_html.marked(" \x00 ", "", "name")
    odd = answers_html.marked(
        "İ psoriasis", "psoriasis", "name"
    )  # lower case is longer: no mark beats a wrong one
    assert odd == "İ psoriasis"
    assert len(answers_html.marked("word " * 999, "", "name")) < answers_html.LIMIT + 10


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return load_results(
        fabricate.write_store(tmp_path_factory.mktemp("a"), fabricate.stage_files())
    )


def test_figure_5_shows_every_case_of_every_question_beside_the_reference(results):
    cases = {"Original": "original", "Pruned + quantized": "pruned-6|awq4"}
    page = answers_html.case_studies(quotes.fig5_case_studies(results.answers, cases).data)
    assert (
        page.count("<h3>") == 3
        and page.count("<figure class=said>") == 9
        and page.count("Reference") == 3
    )
    assert page.count("Original, grade") == page.count("Pruned + quantized, grade") == 3
    assert "class=right" in page.split("</p>", 1)[1]


def test_figure_7_says_which_answers_do_not_end(results):
    depths = {0: "original", 6: "pruned-6", 10: "pruned-10"}
    page = answers_html.iterative_pruning(
        quotes.fig7_iterative_pruning(results.answers, depths).data
    )
    assert page.count("<figure class=said>") == 4 and page.count("[does not end]") == 1
    assert (
        page.count("<div class=answers><figure class=said><figcaption>Reference")
        == page.count("<h3>")
        == 1
    )
    assert (
        page.endswith("</figure>\n</div>") and page.count("</div>") == 1
    )  # all cards lie in one grid
    assert (
        page.index("10 blocks removed") < page.index("[does not end]")
        and "100 % of all answers" in page
    )


def test_the_front_holds_what_nothing_cheaper_beats():
    cost, score = pd.Series([1.0, 2, 2, 3, 4, None]), pd.Series([30.0, 50, 60, 60, 70, 99])
    assert pareto.front(cost, score).tolist() == [True, False, True, False, True, False]
    assert not pareto.front(cost, score * float("nan")).any()


def test_every_variant_of_a_run_is_a_point(results):
    points = pareto.points(results)
    assert set(points.variant) == set(results.variants.variant) and points.variant.is_unique
    kinds = points.set_index("variant").kind
    assert (
        kinds["original"] == "unpruned"
        and kinds["original|awq4"] == "quantized"
        and kinds["pruned-6"] == "pruned"
    )
    assert (
        kinds["pruned-6+sft"] == "after SFT"
        and kinds["pruned-6+sft|awq4"] == "pruned, SFT and quantized"
    )
    drawing = pareto.fig_pareto(points, tables.build(results)["table4_efficiency"])
    assert len(drawing.figure.axes) == 2 and drawing.data is points
    timed, (memory, time) = (
        points.total_ms_per_token.notna() & points.score.notna(),
        drawing.figure.axes,
    )
    share = f"{timed.sum()} of {points.score.notna().sum()} timed"
    assert (
        0 < timed.sum() < len(points)
        and share in time.get_xlabel()
        and drawing.finding.endswith(share)
    )
    for ax, cost, best in (
        (memory, "vram_gib_7b", "best"),
        (time, "total_ms_per_token", "fastest"),
    ):
        step = next(line for line in ax.lines if line.get_drawstyle() == "steps-post")
        rows = points[points[best]].sort_values(cost)
        assert len(rows) and step.get_xydata().tolist() == rows[[cost, "score"]].to_numpy().tolist()
    untimed = points.assign(total_ms_per_token=float("nan"))
    assert (
        len(pareto.fig_pareto(untimed, tables.build(results)["table4_efficiency"]).figure.axes) == 1
    )


def test_figure_6_is_the_prompt_as_it_is():
    page = answers_html.prompt(quotes.fig6_judge_prompt("First\n\n  <b>second</b>").data)
    assert page == "<pre class=text>First\n\n  &lt;b&gt;second&lt;/b&gt;</pre>"
