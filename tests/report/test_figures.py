"""Figures: deterministic bytes, titles that follow the data, inert text."""

import dataclasses
import re
import warnings
from xml.etree import ElementTree

import fabricate
import matplotlib
import pandas as pd
import pytest

from derm_compress.evaluate.judges import rubric
from derm_compress.report import figures, pareto, quotes, ranking_figures, render, tables
from derm_compress.report.results import load_results, variant_id

STEMS = {"fig1_pipeline", "fig2_block_removal", "fig3_layer_importance", "fig4_activations", "fig5_case_studies",
         "fig6_judge_prompt", "fig7_iterative_pruning", "score_vs_blocks", "pareto",
         "extra_agreement", "extra_calibration_size", "extra_criteria",
         "extra_activations", "extra_alpha", "extra_errors", "extra_equal_bytes", "extra_diagnosis"}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return load_results(
        fabricate.write_store(tmp_path_factory.mktemp("store"), fabricate.stage_files())
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    files = fabricate.stage_files(full=True)
    return load_results(fabricate.write_store(tmp_path_factory.mktemp("full"), files))


@pytest.fixture(scope="module")
def built(full):
    return tables.build(full)


@pytest.fixture(scope="module")
def drawn(results):
    return render.draw(results, tables.build(results), fabricate.UPSTREAM, rubric.explanation())


def texts(drawing):
    return [text.get_text() for text in drawing.figure.findobj(matplotlib.text.Text)]


def test_every_figure_is_drawn_with_its_finding_and_data(drawn):
    assert set(drawn) == STEMS
    for stem, drawing in drawn.items():
        assert drawing.finding and drawing.png().startswith(b"\x89PNG"), stem
        assert drawing.data is None or len(drawing.data), stem
        title = " ".join(" ".join(texts(drawing)).split())
        assert drawing.finding.split()[0].lower() in title.lower(), stem


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
    louder = results.figure4.assign(
        value=results.figure4.value.where(results.figure4.channel != 3, 99.0)
    )
    tamed = results.answers.assign(stopped=True)
    depths = {n: variant_id(n) for n in fabricate.DEPTHS}
    pairs = {
        "score_vs_blocks": figures.score_vs_blocks(worse, built["table2_sft"]),
        "pareto": pareto.fig_pareto(
            pareto.points(results).assign(vram_gib_7b=9.0), built["table4_efficiency"]
        ),
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
    bare = dataclasses.replace(results, answers=None, evaluation=None)
    built = tables.build(bare)
    curve = figures.score_vs_blocks(built["table1_pruning"], built["table2_sft"])
    bought = pareto.fig_pareto(pareto.points(bare), built["table4_efficiency"])
    assert "need weights" in curve.finding and "need weights" in bought.finding
    assert "paper, LLaVA-1.5-7B" in texts(curve)


def test_figure_2_is_the_plan(results):
    plan = results.plans["output_similarity"]
    data = figures.fig2_block_removal(plan, 6).data
    assert data[data.removed].sort_values("turn").block.tolist() == plan["order"][:6]
    assert (
        data[data.protected].block.tolist() == plan["protected"]
        and data[data.protected].turn.isna().all()
    )


def test_figure_2_draws_a_plan_of_one_run(full):
    drawing = figures.fig2_block_removal(full.plans["angular-contiguous"], 6)
    start = full.plans["angular-contiguous"]["starts"][5]
    assert drawing.data[drawing.data.removed].block.tolist() == list(range(start, start + 6))
    assert drawing.data.turn.isna().all() and "runs of 6 neighbouring" in drawing.finding
    assert "without 2 to 7" in texts(drawing) and "without 25 to 30" in texts(drawing)


def test_figure_3_draws_six_criteria_and_names_the_rest(full, results):
    groups, left = figures.drawn_in_figure_3(full.scores)
    assert list(groups) == [
        "output_similarity",
        "magnitude",
        "perplexity",
        "block_influence",
        "angular",
        "taylor",
    ]
    assert all(len(group) == fabricate.BLOCKS for group in groups.values())
    assert {"output_similarity-text", "output_similarity-mlp", "last", "random-4"} <= set(left)
    drawing = figures.fig3_layer_importance(full.scores, 6)
    said = " ".join(" ".join(texts(drawing)).split())
    assert "not drawn: random-0" in said and "output similarity (MLPs)" in said
    assert (
        len(drawing.figure.axes) == 6
        and len(figures.fig3_layer_importance(results.scores, 6).figure.axes) == 2
    )
    many = pd.concat(
        [
            full.scores[full.scores.criterion == "magnitude"].assign(criterion=f"c{i}")
            for i in range(8)
        ]
    )
    assert figures.drawn_in_figure_3(many)[1] == ["c6", "c7"]


def test_without_a_ranking_to_draw_figure_3_is_left_out(full):
    scores = full.scores[full.scores.criterion.isin(["random-0", "last", "output_similarity-mlp"])]
    bare = dataclasses.replace(full, scores=scores, answers=None)
    assert len(scores) and set(render.draw(bare, {}, fabricate.UPSTREAM, "")) >= {
        "fig2_block_removal"
    }
    assert "fig3_layer_importance" not in render.draw(bare, {}, fabricate.UPSTREAM, "")


def overlapping(drawing):
    """Pairs of visible labels of one axis that lie over each other."""
    figure, found = drawing.figure, []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            boxes = [label.get_window_extent(figure.canvas.get_renderer()) for label in labels]
            found += [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    return found


def outside(drawing):
    """Texts that the figure's edge cuts."""
    figure = drawing.figure
    edge = figure.bbox.padded(2)
    unseen = [
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    texts = [
        text
        for text in figure.findobj(matplotlib.text.Text)
        if text.get_text() and text not in unseen
    ]
    boxes = {
        text.get_text(): text.get_window_extent(figure.canvas.get_renderer()) for text in texts
    }
    inside = {
        t: edge.x0 <= b.x0 and b.x1 <= edge.x1 and edge.y0 <= b.y0
        for t, b in boxes.items()
        if edge.overlaps(b)
    }
    return [text for text, whole in inside.items() if not whole]


def test_no_label_of_twenty_rankings_lies_over_another_or_outside(full):
    names = [
        *dict.fromkeys(full.values.ranking),
        "a_long_name-iterative",
        "another_long_name-text",
        "x",
    ]
    whole = full.values[full.values.part == "block"]
    one = whole[whole.ranking == "magnitude"]
    more = pd.concat(
        [
            whole,
            *(one.assign(ranking=name, value=one.value**k) for k, name in enumerate(names[-3:], 2)),
        ]
    )
    built = tables.build(dataclasses.replace(full, values=more))
    drawings = render.draw_rankings(full, built)
    assert built["extra_agreement"].other.nunique() + 1 == 20 and len(drawings) == 3
    for stem, drawing in drawings.items():
        assert not overlapping(drawing) and not outside(drawing), stem


def test_a_heat_map_shows_every_pair_once_most_agreeing_first(built):
    table = built["extra_agreement"]
    names = ranking_figures.ordered(table, "output_similarity")
    grid = ranking_figures.square(table, names)
    assert (
        names[0] == "output_similarity" and (grid == grid.T).all() and (grid.diagonal() == 1).all()
    )
    assert list(grid[0, 1:]) == sorted(grid[0, 1:], reverse=True)
    printed = [
        t
        for t in texts(ranking_figures.fig_agreement(table, names[0]))
        if re.fullmatch(r"-?\.\d\d", t)
    ]
    assert len(printed) == len(table) == len(names) * (len(names) - 1) / 2


def test_the_titles_of_rankings_follow_the_data(built):
    turned = built["extra_agreement"].assign(rho=-built["extra_agreement"].rho)
    both = [
        ranking_figures.fig_agreement(t, "output_similarity").finding
        for t in (built["extra_agreement"], turned)
    ]
    assert "most like perplexity" in both[0] and "least like perplexity" in both[1]
    tests = built["extra_criteria_tests"]
    for sign, said in (
        (1, "beats 8 of 14 rivals and loses to 2"),
        (-1, "beats 2 of 14 rivals and loses to 8"),
    ):
        assert said in ranking_figures.rivals_in_words(
            tests.assign(difference_all=sign * tests.difference_all), "own"
        )
    assert ranking_figures.rivals_in_words(tests.assign(p_all_holm=1.0), "own").startswith(
        "Over all depths own beats 0"
    )
    one = tests[tests.criterion == "last"]
    assert (
        ranking_figures.rivals_in_words(one, "own") == "Over all depths own beats last blocks first"
    )
    assert "no scored rival" in ranking_figures.rivals_in_words(None, "own")


def test_at_most_a_dozen_lines_are_told_apart(built):
    frames = built["extra_criteria"], built["table1_pruning"], built["extra_criteria_tests"]
    drawing = ranking_figures.fig_criteria(*frames, "output_similarity")
    labels = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert (
        len(labels) <= 13
        and "random (mean and range of 3)" in labels
        and "4 others (table)" in labels
    )
    assert "paper, LLaVA-1.5-7B" in labels and len(drawing.data.criterion.unique()) == 17
    lines = {line.get_label(): line for line in drawing.figure.axes[0].lines}
    assert lines["output similarity"].get_linewidth() == max(
        line.get_linewidth() for name, line in lines.items() if "random" not in name
    )
    assert (
        lines["perplexity"].get_ydata()[0] == lines["output similarity"].get_ydata()[0]
    )  # all start unpruned
    shades = [
        (look["color"], look.get("marker"))
        for look in ranking_figures.looks(list("abcdefghij"), "a").values()
    ]
    assert len(set(shades)) == 10


def test_what_a_model_says_is_never_parsed(results):
    said = results.answers.assign(answer=fabricate.EVIL * 2 + " \x1b[31m \x00 日本")
    depths = {n: variant_id(n) for n in fabricate.DEPTHS}
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
    assert (
        quotes.RIGHT["fontweight"] == "bold" and quotes.WRONG["fontstyle"] == "italic"
    )  # survive a grey print


def test_every_answer_of_figures_5_and_7_has_its_facts_marked(results):
    said = results.answers.assign(
        answer="It is psoriasis or melanoma.", reference="This is psoriasis."
    )
    drawings = (
        quotes.fig5_case_studies(said, {"Original": "original"}),
        quotes.fig7_iterative_pruning(said, {0: "original", 10: "pruned-10"}, "name"),
    )
    for drawing, count in zip(drawings, (1, 2), strict=True):
        colours = [(text.get_text(), text.get_color()) for text in drawing.figure.texts]
        assert (
            colours.count(("psoriasis", quotes.RIGHT["color"])) == count
            and quotes.LOOKS in drawing.finding
        )
        assert colours.count(("melanoma.", quotes.WRONG["color"])) == count


def test_the_example_is_the_most_typical_one():
    rows = [(item, v, s) for item, s in (("a", 1), ("b", 2), ("c", 3)) for v in "xy"]
    assert quotes.typical_item(pd.DataFrame(rows, columns=["item", "variant", "score"])) == "b"


@pytest.mark.parametrize(
    "lost, typical", [("b", "cc"), ("bc", "da"), ("abc", "dd"), ("abcd", "ba")]
)
def test_an_example_without_scores_is_not_typical(lost, typical):
    rows = [(i, v, s) for i, s in (("a", 1), ("b", 2.4), ("c", 3), ("d", 4)) for v in "xy"]
    frame = pd.DataFrame(rows, columns=["item", "variant", "score"]).astype({"score": float})
    half = frame.assign(
        score=frame.score.mask(frame["item"].isin(list(lost)) & frame.variant.eq("x"))
    )
    none = frame.assign(score=frame.score.mask(frame["item"].isin(list(lost))))
    assert [quotes.typical_item(some) for some in (half, none)] == list(typical)


def test_jupyter_gets_a_picture_with_its_text_alternative(drawn):
    data, metadata = drawn["fig6_judge_prompt"]._repr_mimebundle_()
    assert data["image/png"].startswith("iVBOR")
    assert metadata["image/png"]["alt"] == drawn["fig6_judge_prompt"].finding
    assert rubric.explanation().splitlines()[0] in " ".join(texts(drawn["fig6_judge_prompt"]))
