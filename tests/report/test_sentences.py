"""Findings: what a claim says follows the numbers, in every stage, with few results and many."""

import dataclasses
import re

import fabricate
import pytest

from derm_compress.report.page import inert
from derm_compress.report.results import load_results
from derm_compress.report.sentences import STAGES, Facts, findings, headline
from derm_compress.report.wording import listed, p, percent, verdict, words


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    return load_results(fabricate.write_store(folder, fabricate.stage_files()))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return load_results(fabricate.write_store(folder, fabricate.stage_files(full=True)))


def said(results, *stems):
    return " ".join(text for stem in stems for text in Facts(results).said(stem))


def graded(results, grade, wanted):
    """The same run with every answer of the variants for which `wanted` holds given one grade."""
    names = {row.variant for row in results.variants.itertuples() if wanted(row)}
    changed = {}
    for frame in ("answers", "evaluation"):
        answers = getattr(results, frame)
        score = answers.score.mask(answers.variant.isin(names), grade)
        changed[frame] = answers.assign(score=score)
    return dataclasses.replace(results, **changed)


def test_every_stage_says_something_inert_as_markdown(few):
    for stage in STAGES:
        lines = findings(stage, few).data.splitlines()
        assert lines and all(line.startswith("- ") and line[-1] in ".)" for line in lines)
        assert not any(re.search(r"nan|None|  | [,;.]|<", line) for line in lines), lines
    report = fabricate.NOTED
    shown = findings("01_data", report).data
    assert "1737 pictures" in shown and inert(fabricate.EVIL) in shown


def test_without_weights_there_is_nothing_to_say(few):
    bare = dataclasses.replace(few, answers=None, evaluation=None, predictions=None, errors=None)
    assert findings("02_finetune", bare).data == "- Scores need weights."
    for stem in ("table1_pruning", "extra_criteria", "table2_sft", "table3_quantization"):
        assert not said(bare, stem), stem
    assert headline(bare).startswith("Scores need weights; with 6 of 32 blocks removed")


def test_a_headline_says_what_is_the_matter_with_the_judge(few):
    lost = {"score": float("nan"), "judge": "m (paper)", "error": "braces that hold no JSON object"}
    frames = {name: getattr(few, name).assign(**lost) for name in ("answers", "evaluation")}
    mute = dataclasses.replace(few, **frames)
    said = headline(mute)
    assert re.match(r"m \(paper\) gave (\d+) of \1 answers no score \(mostly: braces", said)
    assert "need weights" not in said + findings("04_pruning", mute).data


HEALED_AWQ = "pruned-6+sft|awq4"


@pytest.mark.parametrize(
    "stem, wanted, grade, claim",
    [
        ("headline", lambda row: row.variant == HEALED_AWQ, 4, "100.0 % (100.0 to 100.0) against"),
        ("headline", lambda row: row.variant == HEALED_AWQ, 4, "above quantization alone"),
        ("headline", lambda row: row.variant == HEALED_AWQ, 1, "25.0 % (25.0 to 25.0) against"),
        ("headline", lambda row: row.variant == HEALED_AWQ, 1, "below pruning alone"),
        (
            "extra_criteria",
            lambda row: row.criterion == "magnitude",
            1,
            "above magnitude, p < 0.001",
        ),
        (
            "extra_criteria",
            lambda row: row.criterion == "magnitude",
            4,
            "below magnitude, p < 0.001",
        ),
        ("table1_pruning", lambda row: row.variant == "pruned-2", 1, "clear at every depth"),
        (
            "table1_pruning",
            lambda row: row.blocks_removed > 0,
            4,
            "Up to 12 blocks no loss is clear",
        ),
        (
            "table3_quantization",
            lambda row: row.method == "awq",
            1,
            "On the unpruned model, AWQ at 4 bits scores",
        ),
        ("table3_quantization", lambda row: row.method == "awq", 1, "Here 0 of 6 such models"),
        ("table3_quantization", lambda row: row.method == "bitsandbytes", 1, "Here 6 of 6"),
        ("extra_baselines", lambda row: row.variant == "original", 1, "below itself shown no"),
        ("extra_comparisons", lambda row: row.variant == HEALED_AWQ, 1, "6 differ clearly"),
    ],
)
def test_a_claim_appears_only_where_its_numbers_support_it(few, stem, wanted, grade, claim):
    assert claim in said(graded(few, grade, wanted), stem)
    assert claim not in said(few, stem)


def test_equal_answers_are_never_told_apart(few):
    same = graded(few, 3, lambda row: True)
    for stem in ("headline", "extra_criteria", "extra_baselines", "extra_comparisons"):
        assert not re.search(r"(scores|points).*(above|below) (?!itself)", said(same, stem)), stem
    assert "0 differ clearly" in said(same, "extra_comparisons")


def test_a_headline_says_what_a_run_lacks(few):
    early = few.variants[few.variants.blocks_removed == 0]
    assert headline(dataclasses.replace(few, variants=early)).startswith("No stage has left")
    other = few.variants[few.variants.method != "awq"]
    assert "add awq to methods" in headline(dataclasses.replace(few, variants=other))
    assert "its memory is not planned" in headline(dataclasses.replace(few, memory=None))


def test_recovery_is_net_of_the_controls_gain(few):
    lost = graded(few, 2, lambda row: row.variant == "pruned-6")
    healed = graded(
        lost, 3, lambda row: row.variant in ("original", "original+sft", "pruned-6+sft")
    )
    assert "took 25.0 points" in said(healed, "table2_sft")
    assert "gives 25.0 points back, 100 % (100 to 100)" in said(healed, "table2_sft")
    control = graded(healed, 4, lambda row: row.variant == "original+sft")
    assert "gives 0.0 points back, 0 %" in said(control, "table2_sft")
    assert "took" not in said(graded(few, 4, lambda row: row.variant == "pruned-6"), "table2_sft")


def test_rankings_are_compared_where_they_look_at_blocks(few, full):
    assert "by magnitude have a rank correlation of -0.04" in said(few, "extra_agreement")
    text = said(full, "extra_agreement")
    assert "by perplexity have a rank correlation of 0.82" in text and "highest of 9" in text
    turn = full.values.ranking == "perplexity"
    turned = full.values.assign(value=full.values.value.mask(turn, -full.values.value))
    text = said(dataclasses.replace(full, values=turned), "extra_agreement")
    assert "with perplexity it is lowest, at -0.82" in text
    plans = said(full, "fig3_layer_importance")
    assert "the other 16 rankings" in plans and "share 1.2 on average" in plans  # 6 * 6 / 29
    deep = dataclasses.replace(full, choice={"operating": 16, "deeper": 16})
    assert "the other 15 rankings" in said(deep, "fig3_layer_importance")  # the published one ends


def test_many_rivals_are_counted_and_the_extremes_named(full):
    text = said(full, "extra_criteria")
    assert "Of 13 rivals with models at the same depths" in text  # the published order ends earlier
    assert "clearly above 7 and clearly below 2 (perplexity and perplexity (text only))" in text
    worst = graded(full, 1, lambda row: row.criterion == "perplexity")
    assert re.search("against the weakest, .* above perplexity", said(worst, "extra_criteria"))


def test_seeds_are_told_apart_from_pictures(few, full):
    assert "with one seed" in said(few, "extra_seeds")
    assert "3 trainings give" in said(full, "extra_seeds")


def test_faster_is_what_quartiles_tell_apart(few):
    assert "no clear change" in said(few, "table4_efficiency")
    for times, claim in ((0.5, "times faster"), (2.0, "times slower")):
        full = few.latency.variant == HEALED_AWQ
        columns = [name for name in few.latency if name.startswith("decode_ms")]
        changed = few.latency.copy()
        changed.loc[full, columns] *= times
        assert claim in said(dataclasses.replace(few, latency=changed), "table4_efficiency")


def test_photographs_are_told_from_drawn_pictures(few):
    photographs = dataclasses.replace(few, data_report=fabricate.NOTED | {"source": "folder"})
    assert not said(few, "photographs") and "drawn pictures" in said(few, "about")
    assert "1737 photographs, 0 of them test images" in said(photographs, "photographs")
    assert "asked about photographs" in said(photographs, "about")
    assert "A tiny model trained on drawn pictures" in said(photographs, "photographs")


def test_words():
    assert words("output_similarity-text") == "output similarity (text only)"
    assert words("perplexity-text-iterative") == "perplexity (text only, iterative)"
    assert listed(["a"]) == "a" and listed(range(3)) == "0, 1 and 2"
    assert [p(value) for value in (1e-4, 0.0123, 0.4)] == ["p < 0.001", "p = 0.012", "p = 0.40"]
    row = {"score": 62.5, "score_lo": 58.06, "score_hi": 66.94}
    assert percent(row) == "62.5 % (58.1 to 66.9)"
    change = {"difference": -3.0, "difference_lo": -5.0, "difference_hi": -1.0}
    assert verdict(change, "a", "b") == "a scores 3.0 points (1.0 to 5.0) below b"
    assert verdict(change | {"difference_hi": 0.0}, "a", "b").startswith("a cannot be told apart")
