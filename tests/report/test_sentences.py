"""Findings: what a claim says follows the numbers, in every stage, with few results and many."""

import dataclasses
import re

import fabricate
import pandas as pd
import pytest

from derm_compress.report import tables
from derm_compress.report.page import inert
from derm_compress.report.sentences import STAGES, Facts, findings, headline
from derm_compress.report.tables import criteria
from derm_compress.report.wording import made_on

HEALED_AWQ = "pruned-6+sft|awq4"


def said(results, stem):
    return " ".join(Facts(results).said(stem))


@pytest.fixture(scope="module")
def plain(results):
    """What is said of the run as it is, its tables made once."""
    facts = Facts(results)
    return lambda stem: " ".join(facts.said(stem))


def graded(results, grade, query):
    """The same run with every answer of the variants that a query finds given one grade."""
    names, changed = results.variants.query(query).variant, {}
    for frame in ("answers", "evaluation"):
        answers = getattr(results, frame)
        score = answers.score.mask(answers.variant.isin(names), grade)
        changed[frame] = answers.assign(score=score)
    return dataclasses.replace(results, **changed)


def test_how_far_the_base_is_from_our_grids_is_said_in_numbers(results):
    told = said(results, "table3_quantization")
    assert (
        "Rounding them at 4, 3 and 2 bits" in told
        and "0.0940, 0.2020, 0.4670 as they are; " in told
    )
    without = dataclasses.replace(results, rounded=results.rounded.iloc[:0])
    assert "Rounding them" not in said(without, "table3_quantization")


def test_every_stage_says_something_inert_as_markdown(results):
    for stage in STAGES:
        lines = findings(stage, results).data.splitlines()
        assert lines and all(line.startswith("- ") and line[-1] in ".)" for line in lines)
        assert not any(re.search(r"nan|None|  | [,;.]|<", line) for line in lines), lines
    shown = findings("01_data", fabricate.NOTED).data
    assert "1737 pictures" in shown and inert(fabricate.EVIL) in shown


def test_without_weights_there_is_nothing_to_say(results):
    bare = dataclasses.replace(
        results, answers=None, evaluation=None, predictions=None, errors=None, rounded=None
    )
    assert findings("02_finetune", bare).data == "- Scores need weights."
    for stem in ("table1_pruning", "extra_criteria", "table2_sft", "table3_quantization"):
        assert not said(bare, stem), stem
    assert headline(bare).startswith("Scores need weights")


def test_a_headline_says_what_a_run_lacks_and_what_is_the_matter_with_the_judge(results):
    early = results.variants[results.variants.blocks_removed == 0]
    assert headline(dataclasses.replace(results, variants=early)).startswith("No stage has left")
    other = results.variants[results.variants.method != "awq"]
    assert "add awq to methods" in headline(dataclasses.replace(results, variants=other))
    assert "of the bytes" in headline(results)
    assert "of the bytes" not in headline(dataclasses.replace(results, memory=None))
    alone = results.variants[results.variants.variant != "original+sft"]
    assert "not trained alike" in headline(dataclasses.replace(results, variants=alone))
    lost = {"score": float("nan"), "judge": "m (paper)", "error": "braces that hold no JSON object"}
    frames = {name: getattr(results, name).assign(**lost) for name in ("answers", "evaluation")}
    mute = dataclasses.replace(results, **frames)
    told = headline(mute)
    assert re.match(r"m \(paper\) gave (\d+) of \1 answers no score \(mostly: braces", told)
    assert "need weights" not in told + findings("04_pruning", mute).data


@pytest.mark.parametrize(
    "stem, query, grade, claim",
    [
        ("answer", "variant == @HEALED_AWQ", 4, "scores 100.0 % (100.0 to 100.0)"),
        ("answer", "variant == @HEALED_AWQ", 4, "above the unpruned model with the same training"),
        ("answer", "variant == @HEALED_AWQ", 1, "scores 25.0 % (25.0 to 25.0)"),
        ("answer", "variant == @HEALED_AWQ", 4, 'above "unpruned'),
        ("extra_criteria", "criterion == 'magnitude'", 1, "above magnitude, p < 0.001"),
        ("extra_criteria", "criterion == 'magnitude'", 4, "below magnitude, p < 0.001"),
        ("table1_pruning", "variant == 'pruned-12'", 1, "to 25.0 % (25.0 to 25.0)"),
        ("table3_quantization", "method == 'awq'", 1, "AWQ at 4 bits scores 5"),
        ("table3_quantization", "method == 'awq'", 1, "and 0 of these models"),
        ("table3_quantization", "method == 'bitsandbytes'", 1, "and 6 of these models"),
        ("table3_quantization", "method == 'awq'", 1, "activations is -"),
        ("extra_baselines", "variant == 'original'", 1, "below its own score without"),
        ("table5_ablation", "variant == @HEALED_AWQ", 1, "changes the score in 4 of 4"),
    ],
)
def test_a_claim_appears_only_where_its_numbers_support_it(
    results, plain, stem, query, grade, claim
):
    query = query.replace("@HEALED_AWQ", repr(HEALED_AWQ))
    assert claim in said(graded(results, grade, query), stem)
    assert claim not in plain(stem)


def test_training_is_compared_with_algebra_which_is_no_ranking(results):
    row = fabricate.variant("pruned-6-replace_me", 6, criterion="replace_me")
    heard = fabricate.variant("pruned-6-distilled+sft", 6, criterion="distilled", healed=True)
    alike, again = (
        results.answers[results.answers.variant == name].assign(variant=made["variant"])
        for name, made in (("pruned-6", row), ("pruned-6+sft", heard))
    )
    more = {
        "variants": pd.concat([results.variants, pd.DataFrame([row, heard])], ignore_index=True),
        "answers": pd.concat([results.answers, alike, again], ignore_index=True),
    }
    mended = dataclasses.replace(results, **more)
    beside = tables.make("extra_healed_rivals", mended).set_index("criterion")
    assert beside.score["replace_me"] == pytest.approx(25 * alike.score.mean())
    assert row["variant"] not in set(criteria.pruned_only(mended).variant)
    told = said(mended, "extra_healed_rivals")
    assert "beat linear algebra? The study's own healed model scores" in told
    assert "without training, scores like the pruned model alone (+0.0 points" in told
    assert "the unpruned model, too? The study's own healed model scores like the same" in told
    assert "pruned by ReplaceMe" not in told and "pruned by SFT" not in told
    assert "algebra" not in said(results, "extra_healed_rivals")


def test_equal_answers_are_never_told_apart(results):
    same = graded(results, 3, "bits > 0")
    for stem in ("answer", "extra_criteria", "extra_baselines", "table5_ablation"):
        assert not re.search(r"(scores|points).*(above|below) (?!its own)", said(same, stem)), stem
    assert "changes the score in 0 of 4" in said(same, "table5_ablation")
    assert "It scores like the unpruned model" in said(same, "answer")


def test_recovery_is_net_of_the_controls_gain(results):
    lost = graded(results, 2, "variant == 'pruned-6'")
    healed = graded(lost, 3, "variant in ('original', 'original+sft', 'pruned-6+sft')")
    assert "took 25.0 points" in said(healed, "table2_sft")
    assert "SFT gives 25.0 back: 100 % (100 to 100)" in said(healed, "table2_sft")
    control = graded(healed, 4, "variant == 'original+sft'")
    assert "SFT gives 0.0 back: 0 %" in said(control, "table2_sft")
    assert "took" not in said(graded(results, 4, "variant == 'pruned-6'"), "table2_sft")


def test_rankings_are_compared_where_they_look_at_blocks(results, plain, full):
    assert "and magnitude rank the blocks with a correlation of -0.04" in plain("extra_agreement")
    text = said(full, "extra_agreement")
    assert "Of 9 other criteria, perplexity ranks" in text and "correlation of 0.82" in text
    turn = full.values.ranking == "perplexity"
    turned = full.values.assign(value=full.values.value.mask(turn, -full.values.value))
    text = said(dataclasses.replace(full, values=turned), "extra_agreement")
    assert "and perplexity least, with -0.82" in text


def test_many_rivals_are_counted_and_the_extremes_named(results, plain, full):
    text = said(full, "extra_criteria")
    assert "Of 13 rivals with models at the same depths" in text  # the published order ends earlier
    assert "beats 7 and clearly loses to 2 (perplexity and perplexity (text only))" in text
    worst = said(graded(full, 1, "criterion == 'perplexity'"), "extra_criteria")
    assert re.search("against the weakest, .* above perplexity", worst)
    assert "with one seed" in plain("extra_seeds")
    assert "is the score of 6 blocks removed, healed: from" in said(full, "extra_seeds")


def test_faster_is_what_quartiles_tell_apart(results, plain):
    assert "no clear change" in plain("table4_efficiency")
    untimed = results.latency[results.latency.variant != "original"]
    assert not said(dataclasses.replace(results, latency=untimed), "table4_efficiency")
    columns = [name for name in results.latency if name.startswith("decode_ms")]
    for times, factor in ((0.5, "2.27"), (2.0, "0.57")):
        changed = results.latency.copy()
        changed.loc[changed.variant == HEALED_AWQ, columns] *= times
        said_then = said(dataclasses.replace(results, latency=changed), "table4_efficiency")
        assert f"together {factor} times" in said_then and "no clear change" not in said_then


def test_photographs_are_told_from_synthetic_pictures(results, plain):
    photographs = dataclasses.replace(results, data_report=fabricate.NOTED | {"source": "folder"})
    assert not plain("photographs") and "synthetic pictures" in plain("answer")
    text = said(photographs, "photographs")
    assert "1737 photographs, 0 of them test images" in text
    assert "synthetic pictures" not in said(photographs, "answer")
    assert "A model trained on synthetic pictures" in text


def test_a_page_names_the_machine_and_what_was_cut_down():
    cut = {"n_heldout": "39", "sft_seeds": "1", "device": "cpu"}
    known, cores = {"params_file": "params/small.yaml"}, {"cores": 2, "gpu": None}
    assert made_on(cores, known | {"seconds": 481.8}) == (
        "This run took 8 minutes on 2 CPU cores, without a GPU."
    )
    ends = {"seconds": 481.8, "seconds_are": "sum of the stages' own, some computed before"}
    told = made_on(cores, known | ends)
    assert told.startswith("Its stages, from where each last went on, took 8 minutes on")
    gpu = made_on({"cores": 16, "gpu": "Tesla T4"}, known | {"seconds": 7200, "overrides": {}})
    assert gpu == "This run took 2.0 hours on one Tesla T4."
    assert made_on(cores, known | {"overrides": cut}) == (
        "It ran on 2 CPU cores, without a GPU. It was cut down from params/small.yaml:"
        " 39 held-out pictures, 1 seed of SFT."
    )
    assert made_on(None, known) == made_on(cores, {}) == ""
