"""Figures: deterministic bytes, titles that follow the data, inert text."""

import dataclasses
import re
import warnings
from xml.etree import ElementTree

import fabricate
import matplotlib
import pandas as pd
import pytest

from derm_compress import figures, judge, quotes, report, tables

STEMS = {"fig1_pipeline", "fig2_block_removal", "fig3_layer_importance", "fig4_activations", "fig5_case_studies",
         "fig6_judge_prompt", "fig7_iterative_pruning", "score_vs_blocks", "pareto"}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tables.load_results(fabricate.write_store(tmp_path_factory.mktemp("store"), fabricate.stage_files()))


@pytest.fixture(scope="module")
def drawn(results):
    return report.draw(results, tables.build(results), fabricate.UPSTREAM)


def texts(drawing):
    return [text.get_text() for text in drawing.figure.findobj(matplotlib.text.Text)]


def test_every_figure_is_drawn_with_its_finding_and_data(drawn):
    assert set(drawn) == STEMS
    for stem, drawing in drawn.items():
        assert drawing.finding and drawing.png().startswith(b"\x89PNG"), stem
        assert drawing.data is None or len(drawing.data), stem
        title = " ".join(" ".join(texts(drawing)).split())
        assert drawing.finding.split()[0] in title, stem


def test_equal_results_give_equal_files(results, drawn, tmp_path):
    again = figures.fig3_layer_importance(results.scores, results.operating)
    for name, drawing in (("a", drawn["fig3_layer_importance"]), ("b", again)):
        drawing.save(tmp_path / name)
    for end in ("png", "svg", "csv"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes(), end
    svg = (tmp_path / "a.svg").read_text()
    assert "<dc:date>" not in svg and ElementTree.fromstring(svg) is not None


def test_a_style_of_the_caller_changes_nothing(results, drawn):
    with matplotlib.rc_context({"font.size": 30, "text.parse_math": True}):
        other = figures.fig3_layer_importance(results.scores, results.operating)
        assert other.png() == drawn["fig3_layer_importance"].png()


def test_titles_follow_the_data(results, drawn):
    built = tables.build(results)
    worse = built["table1_pruning"].assign(score=built["table1_pruning"].score[::-1].to_numpy())
    turned = results.scores.assign(rank=28 - results.scores["rank"])
    louder = results.figure4.assign(value=results.figure4.value.where(results.figure4.channel != 3, 99.0))
    tamed = results.answers.assign(stopped=True)
    depths = {n: tables.variant_id(n) for n in fabricate.DEPTHS}
    pairs = {
        "score_vs_blocks": figures.score_vs_blocks(worse, built["table2_sft"]),
        "pareto": figures.pareto(built["table4_efficiency"].assign(vram_gib_7b=9.0)),
        "fig2_block_removal": figures.fig2_block_removal(results.plans["output_similarity"], 2),
        "fig3_layer_importance": figures.fig3_layer_importance(turned, results.operating),
        "fig4_activations": figures.fig4_activations(louder),
        "fig7_iterative_pruning": quotes.fig7_iterative_pruning(tamed, depths),
    }
    for stem, other in pairs.items():
        assert other.finding != drawn[stem].finding, stem
    assert "Every answer ends" in pairs["fig7_iterative_pruning"].finding
    assert "10 blocks" in drawn["fig7_iterative_pruning"].finding
    assert "99.0" in pairs["fig4_activations"].finding
    assert drawn["fig4_activations"].finding.startswith("original, block 30")
    assert "No variant" in pairs["pareto"].finding


def test_without_scores_the_paper_stands_alone(results):
    built = tables.build(dataclasses.replace(results, answers=None, evaluation=None))
    curve = figures.score_vs_blocks(built["table1_pruning"], built["table2_sft"])
    assert "need weights" in curve.finding and "need weights" in figures.pareto(built["table4_efficiency"]).finding
    assert "paper, LLaVA-1.5-7B" in texts(curve)


def test_figure_2_is_the_plan(results):
    plan = results.plans["output_similarity"]
    data = figures.fig2_block_removal(plan, 6).data
    assert data[data.removed].sort_values("turn").block.tolist() == plan["order"][:6]
    assert data[data.protected].block.tolist() == plan["protected"] and data[data.protected].turn.isna().all()


def test_what_a_model_says_is_never_parsed(results):
    said = results.answers.assign(answer=fabricate.EVIL * 2 + " \x1b[31m \x00 日本")
    depths = {n: tables.variant_id(n) for n in fabricate.DEPTHS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font has not
        drawing = quotes.fig7_iterative_pruning(said, depths)
        assert drawing.png() and "\\frac{1}{2$" in " ".join(texts(drawing))
        assert quotes.fig6_judge_prompt(fabricate.EVIL).png()
    assert not any(text.get_parse_math() for text in drawing.figure.texts)
    assert not any("\x00" in text or "\x1b" in text for text in texts(drawing))


def test_text_figures_keep_every_word_within_their_width():
    text = "supercalifragilistic " * 3 + "x" * 200 + " end"
    lines = quotes.flow(text, limit=1000)
    joined = "".join(run for line in lines for run, _ in line).replace(" ", "")
    assert joined == re.sub(r"\s", "", text)
    assert all(sum(len(run) + 1 for run, _ in line) <= quotes.COLUMNS - 3 for line in lines)
    assert len(quotes.flow("word " * 500, limit=100)) < 4


def test_right_and_wrong_facts_are_told_apart():
    reference, answer = "This is psoriasis.", "It is psoriasis or melanoma."
    marks = {answer[a:b]: style for a, b, style in quotes.marks(answer, reference, "name")}
    assert marks == {"psoriasis": quotes.RIGHT, "melanoma": quotes.WRONG}
    assert quotes.RIGHT["fontweight"] == "bold" and quotes.WRONG["fontstyle"] == "italic"  # survive a grey print


def test_the_example_is_the_most_typical_one():
    rows = [(item, v, s) for item, s in (("a", 1), ("b", 2), ("c", 3)) for v in "xy"]
    assert quotes.typical_item(pd.DataFrame(rows, columns=["item", "variant", "score"])) == "b"


def test_jupyter_gets_a_picture_with_its_text_alternative(drawn):
    data, metadata = drawn["fig6_judge_prompt"]._repr_mimebundle_()
    assert data["image/png"].startswith("iVBOR")
    assert metadata["image/png"]["alt"] == drawn["fig6_judge_prompt"].finding
    assert judge.explanation().splitlines()[0] in " ".join(texts(drawn["fig6_judge_prompt"]))
