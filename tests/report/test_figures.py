"""Figures: equal bytes, titles that follow the data, labels that can be read, inert text."""

import dataclasses
import re
import warnings
from xml.etree import ElementTree

import fabricate
import matplotlib
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from derm_compress.evaluate.judges import rubric
from derm_compress.report import tables
from derm_compress.report.figures import FIGURES, ablation, draw_all, figure, pareto, quotes, style
from derm_compress.report.figures.quotes import Quote
from derm_compress.report.figures.typeset import COLUMNS, flow
from derm_compress.report.results import load_results
from derm_compress.report.sentences import Facts
from derm_compress.report.tables import TABLES


def facts(results, **changed):
    """What figures are drawn from, with some tables or results exchanged."""
    made = {name: frame for name, frame in changed.items() if name in TABLES}
    fields = {name: value for name, value in changed.items() if name not in TABLES}
    results = dataclasses.replace(results, **fields)
    return Facts(results, made, graph=fabricate.UPSTREAM, asked=rubric.explanation())


@pytest.fixture(scope="module")
def drawn(full):
    return draw_all(facts(full))


def texts(drawing):
    return [text.get_text() for text in drawing.figure.findobj(matplotlib.text.Text)]


def test_every_figure_is_drawn_with_its_finding_and_data(drawn):
    assert set(drawn) == set(FIGURES) - fabricate.UNASKED
    for stem, drawing in drawn.items():
        assert drawing.png.startswith(b"\x89PNG") and len(drawing.data), stem
        title = " ".join(" ".join(texts(drawing)).split()).lower()
        assert " ".join(drawing.finding.split()[:3]).lower() in title, stem
    data, metadata = drawn["fig3_layer_importance"]._repr_mimebundle_()
    assert data["image/png"].startswith("iVBOR")
    assert metadata["image/png"]["alt"] == drawn["fig3_layer_importance"].finding


def test_a_figure_that_the_results_do_not_suffice_for_is_left_out(full):
    nothing = load_results({})
    assert not any(figure(stem, nothing) for stem in FIGURES)
    unranked = full.scores[full.scores.criterion.isin(["random-0", "last"])]
    assert FIGURES["fig3_layer_importance"](facts(full, scores=unranked)) is None


def test_equal_results_give_equal_files_whatever_the_callers_style(full, drawn, tmp_path):
    with matplotlib.rc_context({"font.size": 30, "text.parse_math": True}):
        FIGURES["fig3_layer_importance"](facts(full)).save(tmp_path / "b")
    drawn["fig3_layer_importance"].save(tmp_path / "a")
    for end in ("png", "svg", "csv"):
        assert (tmp_path / f"a.{end}").read_bytes() == (tmp_path / f"b.{end}").read_bytes(), end
    svg = (tmp_path / "a.svg").read_text()
    assert "<dc:date>" not in svg and ElementTree.fromstring(svg) is not None


@pytest.mark.parametrize(
    "stem, name, values, said",
    [
        ("score_vs_blocks", "answers", {"score": 4}, "from 100.0 to 100.0 %; with 6 removed"),
        ("pareto", "memory", {"vram_gib": 9.0}, "with 100 % of the weights and 88 % of the time"),
        ("fig2_block_removal", "choice", {"operating": 2}, "the 2 that matter least go"),
        ("fig4_activations", "figure4", {"value": 99.0}, "the largest value is 99.0"),
        ("fig7_iterative_pruning", "answers", {"stopped": True}, "every answer ends"),
        ("extra_equal_bytes", "extra_equal_bytes", {"p_holm": 0.0}, "in 0 of 1 comparisons"),
        ("extra_criteria", "extra_criteria_tests", {"p_all_holm": 1.0}, "clearly beats none of"),
        ("extra_criteria", "extra_criteria_tests", {"p_all_holm": 0.0}, "clearly beats 1 of 1"),
    ],
)
def test_titles_follow_the_data(results, stem, name, values, said):
    frame = tables.make(name, results) if name in TABLES else getattr(results, name)
    changed = frame | values if isinstance(frame, dict) else frame.assign(**values)
    assert said in FIGURES[stem](facts(results, **{name: changed})).finding


def test_without_scores_the_paper_stands_alone(results):
    drawing = FIGURES["score_vs_blocks"](facts(results, answers=None, evaluation=None))
    assert "has a score" in drawing.finding and "paper" in " ".join(texts(drawing))
    unscored = facts(results, evaluation=results.evaluation.assign(score=np.nan))
    assert FIGURES["pareto"](unscored).finding.startswith("What 0 models score")


def test_figure_2_is_the_plan(results, full):
    data = figure("fig2_block_removal", results).data
    assert data[data.removed].sort_values("turn").block.tolist() == results.plan["order"][:6]
    assert data[data.protected].block.tolist() == results.plan["protected"]
    runs = full.plans["angular-contiguous"]
    drawing = FIGURES["fig2_block_removal"](facts(full, plans={"output_similarity": runs}))
    start = runs["starts"][5]
    assert drawing.data[drawing.data.removed].block.tolist() == list(range(start, start + 6))
    assert drawing.data.turn.isna().all() and "runs of 6 neighbouring" in drawing.finding


def test_figure_3_draws_six_criteria_and_names_the_rest(drawn):
    said = " ".join(" ".join(texts(drawn["fig3_layer_importance"])).split())
    assert "not drawn: a random order" in said and "output similarity (MLPs)" in said
    assert len(drawn["fig3_layer_importance"].figure.axes) == 6


def test_each_rival_has_a_panel_the_nearest_first(full, drawn):
    panels = [axes for axes in drawn["extra_criteria"].figure.axes if axes.axison]
    tests = tables.make("extra_criteria_tests", full)
    tests = tests[~tests.criterion.str.startswith("random")].sort_values("difference_all")
    said = [float(panel.get_title(loc="left").split(": ")[1]) for panel in panels]
    assert said == [round(-apart, 1) for apart in tests.difference_all] and len(said) > 12
    for panel in panels:
        mean, own, rival = (line.get_ydata()[0] for line in panel.lines)
        assert mean == own == rival  # all start unpruned


def test_further_seeds_stand_beside_the_first(full, drawn):
    lines = drawn["score_vs_blocks"].figure.axes[0].lines
    (again,) = (line for line in lines if line.get_label() == "with other seeds")
    marks = 25 * full.answers.groupby("variant").score.mean()
    assert sorted(again.get_ydata()) == sorted(marks[marks.index.str.contains("~")])


def unreadable(drawing):
    """Labels of one axis that lie over each other, and texts that the figure's edge cuts."""
    found, edge = [], drawing.figure.bbox.padded(2)
    whole = [box.get_window_extent() for box in [*drawing.figure.legends, *drawing.figure.texts]]
    found += [box for box in whole if box.x0 < edge.x0 or box.x1 > edge.x1 or box.y0 < edge.y0]
    for axes in drawing.figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            shown = [tick.label1 for tick in ticks if tick.label1.get_visible()]
            boxes = [label.get_window_extent() for label in shown if label.get_text()]
            found += [a for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
            boxes += [axis.label.get_window_extent()] if axis.label.get_text() else []
            found += [box for box in boxes if box.x0 < edge.x0 or box.y0 < edge.y0]
    return found


def test_every_figure_of_a_full_study_can_be_read_on_a_phone(drawn):
    for stem, drawing in drawn.items():
        assert not unreadable(drawing), stem
        small = [t for t in drawing.figure.findobj(matplotlib.text.Text) if t.get_fontsize() < 8]
        assert not [text for text in small if text.get_text()], stem
        assert drawing.figure.get_figwidth() == style.WIDTH, stem


def test_points_are_scored_as_in_table_4_and_best_on_two_sets_of_pictures(results):
    answers, four = results.evaluation, tables.make("table4_efficiency", results)
    points = pareto.points(results).set_index("variant")
    assert points.score[four.variant].tolist() == four.score.tolist()
    assert points.memory["original"] == points.time["original"] == 100
    for split in ("test", "heldout"):
        alike = answers.score.where(answers.split != split, 4)
        same = dataclasses.replace(results, evaluation=answers.assign(score=alike))
        assert pareto.points(same).best_memory.sum() <= 1  # all score alike: the least alone
    alone = dataclasses.replace(results, evaluation=answers[answers.split == "test"])
    assert not pareto.points(alone).best_memory.any()
    best = points.best_memory | points.best_time
    assert sorted(points.mark[best]) == list("abcdef"[: best.sum()])
    assert points.mark[~best].eq("").all()
    kinds = points.kind[["original", "pruned-6", "pruned-6+sft|awq4"]]
    assert kinds.tolist() == ["unpruned", "pruned", "pruned, healed, quantized"]
    drawing = FIGURES["pareto"](facts(results))
    said = "\n".join(texts(drawing))
    assert all(f"{row.mark}: {row.label}" in said for row in drawing.data.itertuples() if row.mark)
    assert len(FIGURES["pareto"](facts(results, latency=None)).figure.axes) == 1
    cost, score = pd.Series([1.0, 2, 2, 3, 4, None]), pd.Series([30.0, 50, 60, 60, 70, 99])
    assert pareto.front(cost, score).tolist() == [True, False, True, False, True, False]


SAID = "Psoriasis or melanoma <script>x</script>."


def test_right_and_wrong_facts_differ_by_more_than_colour():
    for disease, right, wrong in (("psoriasis", 0, 1), ("melanoma", 1, 0)):
        quote = Quote("Original", "name", SAID, f"This is {disease}.")
        text, found = quotes.cards([quote]), ("Psoriasis", "melanoma")
        assert f"<b class=right>{found[right]}</b>" in text
        assert f"<s class=wrong>{found[wrong]}</s>" in text
        runs = [run[1:] for line in quotes.lines([quote]) for run in line]
        assert (found[right], quotes.RIGHT) in runs and quotes.WRONG in [look for _, look in runs]
    assert quotes.RIGHT["fontweight"] == "bold" and quotes.WRONG["fontstyle"] == "italic"


def test_whatever_is_said_stays_text_and_whole(results):
    said = Quote("", "name", SAID, "This is psoriasis.")
    assert "".join(words for words, _ in said.pieces()) == SAID
    assert "<script" not in quotes.cards([said]) and "&lt;script&gt;" in quotes.cards([said])
    assert "(nothing)" in quotes.cards([Quote("", "name", " \x00 ", "")])
    odd = Quote("", "name", "İ psoriasis", "psoriasis")  # lower case is longer: no mark
    assert odd.pieces() == [(odd.answer, None)]
    ((words, _),) = Quote("", "name", "word " * 999, "").pieces()
    assert len(words) < quotes.SHOWN + 10
    answers = results.answers.assign(answer=fabricate.EVIL * 2 + " \x1b[31m \x00 日本")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font has not
        drawing = FIGURES["fig7_iterative_pruning"](facts(results, answers=answers))
        assert drawing.png and "\\frac{1}{2$" in " ".join(texts(drawing))
    assert not any(text.get_parse_math() for text in drawing.figure.texts)
    assert not any("\x00" in text or "\x1b" in text for text in texts(drawing))
    page = FIGURES["fig6_judge_prompt"](Facts(results, asked="First\n\n  <b>second</b>")).html
    assert page == "<pre class=text>First\n\n  &lt;b&gt;second&lt;/b&gt;</pre>"


def test_figures_5_and_7_show_every_answer_beside_its_reference(drawn):
    page = drawn["fig5_case_studies"].html
    assert page.count("<h3>") == 3 and page.count("Reference") == 3
    assert page.count("<figure class=said>") == 12 and "class=right" in page.split("</p>", 1)[1]
    assert page.count("unpruned, grade") == page.count("6 blocks removed, AWQ, 4 bits, grade") == 3
    assert "<dt>6 blocks removed, healed, AWQ, 4 bits</dt><dd>0.7 MiB, 8.8 ms a token" in page
    page, data = drawn["fig7_iterative_pruning"].html, drawn["fig7_iterative_pruning"].data
    changes = int(data.answer.ne(data.answer.shift()).sum())
    assert page.count("<figure class=said>") == 1 + min(changes, quotes.DEPTHS) < len(data)
    assert 0 < page.count("[does not end]") <= data[~data.stopped].answer.nunique()
    assert page.count("<div class=answers>") == page.count("<h3>") == 1  # one grid for all
    assert page.index("12 blocks removed") < page.index("[does not end]")


def test_text_figures_keep_every_word_within_their_width():
    text = "supercalifragilistic " * 3 + "x" * 200 + " end"
    for at, to in ((1, 0), (20, 40)):
        lines = flow(text, at=at, to=to)
        joined = "".join(run for line in lines for _, run, _ in line).replace(" ", "")
        assert joined == re.sub(r"\s", "", text)
        edges = [(column, column + len(run)) for line in lines for column, run, _ in line]
        assert all(at <= a < b <= (to or COLUMNS - 1) for a, b in edges)


def test_the_answer_without_each_block_shows_what_changed(results):
    same, evil = "A few red spots on the face.", f"A few {fabricate.EVIL}"
    said = [evil, "A few red scales on the face.", same, same, "A few red spots."]
    kept = pd.DataFrame({"block": range(5), "answer": said, "value": [0.5, 0.3, 0, 0, 0.1]})
    kept = kept.assign(ranking="output_similarity", part="block", question="features")
    kept = kept.assign(original=same, item="train-1")
    other = kept.assign(item="train-2", value=9.0, answer="never shown")
    shown = facts(results, ablations=pd.concat([kept, kept.assign(item="train-0"), other]))
    drawing = FIGURES["without_each_block"](shown)
    assert drawing.data.answer.tolist() == said
    assert "2 of 5 blocks can each" in drawing.finding and "block 0" in drawing.finding
    assert {"2 and 3", "the same, word for word", "scales"} <= set(texts(drawing))
    assert "leaves out: on the face." in texts(drawing)
    assert "never shown" not in texts(drawing)
    shades = [sum(matplotlib.colors.to_rgb(ablation.shade(x))) for x in (1, 0.99, 0.5, -0.2)]
    assert shades == sorted(shades, reverse=True) and shades[0] - shades[1] > 0.1
    unknown = facts(results, ablations=kept.drop(columns="answer"))
    assert FIGURES["without_each_block"](unknown) is None


def test_of_a_long_answer_the_part_that_changed_is_shown():
    whole = (
        "On the hand, a few small red spots; the border is sharp. It itches and lies in dry skin."
    )
    later = whole.replace("lies in dry skin", "shows fine white lines")
    for answer, words in (
        (later, "fine white lines."),
        (f"A few spots with a sharp border. {later}", "fine white lines."),
        ("dry skin in It itches and lies", "leaves out"),
        (" ".join(reversed(whole.split())), "the same words in another order"),
        ("x" * 99, "x"),
    ):
        pieces = ablation.changed(answer, whole)
        assert any(words in said for said, _ in pieces), answer
        assert {new for said, new in pieces if "white" in said} <= {True}
        assert answer[0] == "x" or len(" ".join(said for said, _ in pieces)) <= ablation.LINE


def test_a_picture_stands_beside_the_first_lines(results, tmp_path):
    images = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    save_file({"images": images}, tmp_path / "images.safetensors")
    items = results.items.assign(row=2)
    seen = facts(results, images=tmp_path / "images.safetensors", items=items)
    assert (np.asarray(seen.results.picture(items["id"][0])) == images[2]).all()
    assert seen.results.picture("nobody") is None
    for stem in ("fig5_case_studies", "fig7_iterative_pruning"):
        drawing = FIGURES[stem](seen)
        (frame,) = drawing.figure.axes
        edge = frame.get_window_extent()
        beside = [text.get_window_extent() for text in drawing.figure.texts]
        assert not any(edge.overlaps(box) for box in beside)
        assert drawing.html.count("<img src=") == 1


@pytest.mark.parametrize(
    "lost, typical", [("", "bb"), ("b", "cc"), ("bc", "da"), ("abc", "dd"), ("abcd", "ba")]
)
def test_the_example_is_the_most_typical_one_that_has_scores(lost, typical):
    rows = [(i, v, s) for i, s in (("a", 1), ("b", 2.4), ("c", 3), ("d", 4)) for v in "xy"]
    frame = pd.DataFrame(rows, columns=["item", "variant", "score"]).astype({"score": float})
    gone = frame["item"].isin(list(lost))
    half = frame.assign(score=frame.score.mask(gone & frame.variant.eq("x")))
    none = frame.assign(score=frame.score.mask(gone))
    assert [quotes.typical_item(some) for some in (half, none)] == list(typical)
