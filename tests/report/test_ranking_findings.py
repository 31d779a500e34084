"""Sentences on rankings and rivals: they follow the data, and read well with two criteria and with many."""

from dataclasses import replace

import fabricate
import numpy as np
import pandas as pd
import pytest

from derm_compress.report import findings, ranking_findings, tables
from derm_compress.report.results import first_to_go, load_results, reaches
from derm_compress.report.wording import explained, joined, p_value, words


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return load_results(
        fabricate.write_store(tmp_path_factory.mktemp("few"), fabricate.stage_files())
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    files = fabricate.stage_files(full=True)
    return load_results(fabricate.write_store(tmp_path_factory.mktemp("full"), files))


def turned(results, *names):
    """The same run with the values of these rankings reversed."""
    turn = results.values.ranking.isin(names)
    return replace(
        results,
        values=results.values.assign(
            value=results.values.value.where(~turn, -results.values.value)
        ),
    )


def marked(results, grade, criterion):
    """The same run with every answer of one criterion's models given one grade."""
    gone = results.variants.variant[results.variants.criterion == criterion]
    scores = results.answers.score.where(~results.answers.variant.isin(gone), grade)
    return replace(results, answers=results.answers.assign(score=scores))


def test_the_order_names_blocks_and_few_others_one_by_one(few):
    own, other = ranking_findings.findings_order(few)
    order = few.plans["output_similarity"]["order"][:6]
    assert f"blocks {', '.join(map(str, order))} go first; 0, 1, 31 are protected" in own
    shared = len(set(order) & set(few.plans["magnitude"]["order"][:6]))
    assert (
        other.startswith("By magnitude")
        and f"{shared} of these 6" in other
        and "random" not in other
    )


def test_many_plans_are_summed_up_with_their_extremes(full):
    own, others = ranking_findings.findings_order(full)
    plans = {
        n: p
        for n, p in full.plans.items()
        if ranking_findings.compared(n, p) and n != "output_similarity"
    }
    gone = set(full.plans["output_similarity"]["order"][:6])
    shared = [len(gone & set(first_to_go(plan, 6))) for plan in plans.values()]
    assert (
        f"the other {len(plans)} plans remove between {min(shared)} (" in others
        and f"and {max(shared)} (" in others
    )
    assert "output_similarity-mlp" not in plans and "1.2 on average" in others  # 6 * 6 / 29
    same = full.plans | dict.fromkeys(plans, full.plans["output_similarity"])
    assert "remove between 6 (" in ranking_findings.findings_order(replace(full, plans=same))[1]


def test_a_plan_of_runs_goes_by_its_start():
    plan = {"order": [], "starts": [9, 8, 4]}
    assert first_to_go(plan, 3) == [4, 5, 6] == first_to_go(plan, 7) and first_to_go(plan, 0) == []
    assert first_to_go({"order": [3, 1, 2], "starts": []}, 2) == [3, 1]
    assert [reaches(p, n) for p in (plan, {"order": [3, 1, 2]}) for n in (3, 4)] == [
        True,
        False,
    ] * 2


def test_a_plan_that_ends_before_the_operating_point_is_not_compared_there(full):
    for n, missing in ((14, set()), (16, {"published"})):
        asked = replace(full, choice={"operating": n, "deeper": n})
        plans = {name for name, plan in full.plans.items() if ranking_findings.compared(name, plan)}
        assert (
            f"the other {len(plans - missing) - 1} plans"
            in ranking_findings.findings_order(asked)[1]
        )
    short = {
        name: full.plans[name] for name in ("output_similarity", "published", "angular-contiguous")
    }
    assert len(ranking_findings.findings_order(replace(asked, plans=short))) == 2


def test_how_much_was_read_and_how_near_the_ties_were_is_said(few):
    (said,) = ranking_findings.findings_drafts(few)
    assert "Of the 20 tokens" in said and "75% were read" in said and "2 were near ties" in said
    (said,) = ranking_findings.findings_drafts(
        replace(few, similarity=few.similarity.assign(accepted=5, near_ties=0))
    )
    assert "50% were read" in said and "0 were near ties" in said
    assert ranking_findings.findings_drafts(replace(few, similarity=few.similarity[:0])) == []


@pytest.mark.parametrize("own", ["perplexity", "output_similarity-iterative", "taylor-unprotected"])
def test_before_pruning_the_first_ranking_is_the_studys_own(full, own):
    """In the order of the parameter, or as they are stored, in the alphabet's, beside values in their order."""
    base = own.removesuffix("-iterative").removesuffix("-unprotected")
    left = {
        name: plan
        for name, plan in full.plans.items()
        if name != own and name.partition("-")[0] != base
    }
    plans = {own: full.plans[own]} | left
    keep = {base, "magnitude", "angular"}
    values = pd.concat(
        [
            full.values[full.values.ranking == base],
            full.values[full.values.ranking.isin(keep - {base})],
        ]
    )
    for given in (plans, dict(sorted(plans.items()))):
        early = load_results({}, plans=given, values=values)
        assert early.criterion == own
        assert ranking_findings.findings_importance(early)[0].startswith(f"By {words(own)} blocks")
    assert load_results({}, plans=plans).criterion == own
    said = " ".join(
        ranking_findings.findings_importance(load_results({}, plans=plans, values=values))
    )
    assert ("correlates in rank" in said) == (
        own == base
    )  # what is done after scoring has no values of its own


def test_agreement_names_the_strongest_and_the_weakest(full, few):
    said = ranking_findings.findings_agreement(full)[0]
    assert (
        "Over the 29 unprotected blocks" in said
        and "with perplexity at 0.82" in said
        and "strongest of 9" in said
    )
    row = (
        ranking_findings.with_own(tables.agreements(full), "output_similarity")
        .set_index("other")
        .loc["perplexity"]
    )
    assert f"{row.rho:.2f} ({row.rho_lo:.2f} to {row.rho_hi:.2f})" in said and "random" not in said
    assert (
        "with perplexity at -0.82"
        in ranking_findings.findings_agreement(turned(full, "perplexity"))[0]
    )
    alone, _ = ranking_findings.findings_agreement(few)
    assert "magnitude at" in alone and "strongest" not in alone and "text only:" not in alone
    assert "text only: ranked" in ranking_findings.findings_agreement(full)[1]


def test_how_many_pictures_are_enough_follows_their_noise(few):
    (said,) = ranking_findings.findings_calibration(few)
    curve = tables.calibration_sizes(few)
    assert (
        f"correlation of {curve.rho.iloc[-1]:.2f}" in said
        and "first reached with 5 pictures" in said
    )
    rng = np.random.default_rng(1)
    loud = few.values.value + rng.normal(0, 3, len(few.values)) * (few.values["item"] != "")
    (noisy,) = ranking_findings.findings_calibration(
        replace(few, values=few.values.assign(value=loud))
    )
    assert noisy != said and "is not reached with fewer pictures" in noisy


def test_images_change_a_ranking_only_beyond_what_other_pictures_do(full, few):
    own, others = ranking_findings.findings_images(full)
    assert "leaving images out changes the ranking more than other pictures do" in own
    assert others.startswith("Of 4 other rankings") and "changes 4 (" in others
    pictures = full.values[full.values.ranking == "output_similarity"]
    same = pictures.assign(ranking="output_similarity-text")
    equal = replace(
        full, values=pd.concat([full.values[full.values.ranking != "output_similarity-text"], same])
    )
    assert "does not change the ranking more" in ranking_findings.findings_images(equal)[0]
    assert ranking_findings.findings_images(few) == []


def test_three_answers_without_pictures_are_compared_with_those_about_one_picture(full):
    """The image-free ranking is one picture's own: no more than noise, though halves agree far better."""
    pictures = full.values[full.values.ranking == "output_similarity"]
    rng = np.random.default_rng(5)
    spread = pictures.value.std()
    noisy = pictures.assign(value=pictures.value + rng.normal(0, spread, len(pictures)))
    names, told = sorted(noisy["item"].unique()), []
    others = full.values[~full.values.ranking.str.startswith("output_similarity")]
    for item in names[:6]:
        one = noisy[noisy["item"] == item].assign(ranking="output_similarity-text", item="")
        told.append(
            ranking_findings.findings_images(replace(full, values=pd.concat([others, noisy, one])))[
                0
            ]
        )
    assert all("one picture and the others at" in said for said in told)
    assert sum("does not change the ranking more" in said for said in told) >= 5
    back = noisy[noisy["item"] == names[0]].assign(ranking="output_similarity-text", item="")
    back = back.assign(value=-pictures.groupby("block").value.transform("mean"))
    (said, *_) = ranking_findings.findings_images(
        replace(full, values=pd.concat([others, noisy, back]))
    )
    assert "changes the ranking more" in said


def test_old_runs_without_values_say_what_they_can(few):
    old = replace(few, values=None)
    assert ranking_findings.findings_importance(old) == ranking_findings.findings_order(
        few
    ) + ranking_findings.findings_drafts(few)
    assert ranking_findings.findings_importance(replace(old, plans=None, similarity=None)) == []


def test_few_rivals_each_get_a_sentence_and_one_answer(few):
    duel, answer = ranking_findings.findings_rivals(few)
    row = tables.criteria_tests(few).iloc[0]
    assert duel.startswith("At 6 blocks the paper's criterion cannot be told apart from magnitude")
    assert (
        f"{row.difference:.1f} points" in duel and f"ahead at {row.ahead} of {row.depths}" in duel
    )
    assert answer.startswith(
        "Does the paper's criterion beat magnitude here? Over all depths it wins significantly"
    )
    assert "against 0 of 1 and loses to 0 of 1" in answer


@pytest.mark.parametrize(
    "grade, side, counts",
    [
        (1, "above", "against 1 of 1 (magnitude) and loses to 0"),
        (4, "below", "against 0 of 1 and loses to 1 of 1 (magnitude)"),
    ],
)
def test_wins_and_losses_follow_the_answers(few, grade, side, counts):
    duel, answer = ranking_findings.findings_rivals(marked(few, grade, "magnitude"))
    assert f"{side} magnitude, p < 0.001" in duel and answer.count(counts) == 2


def test_many_rivals_leave_the_details_to_the_table(full):
    said = ranking_findings.findings_rivals(full)
    assert len(said) == 7 and "best over all depths is perplexity" in said[3]
    assert "worst over all depths is taylor (unprotected)" in said[4]
    assert said[5].startswith(
        "Does the paper's criterion beat block influence, magnitude and random (mean of 3) here?"
    )
    assert "against 8 of 14 and loses to 2 of 14 (perplexity, perplexity (text only))" in said[6]
    fallen = ranking_findings.findings_rivals(marked(full, 1, "perplexity"))
    assert "worst over all depths is perplexity." in " ".join(fallen)


def test_best_and_worst_are_among_models_at_the_same_depths(full):
    """The published order ends at 14 of 16 blocks, where the others have fallen deepest."""
    tests = tables.criteria_tests(full).set_index("criterion")
    assert tests.shared["published"] == tests.shared["last"][:-1] and tests.shared["last"][-1] == 16
    for grade in (1, 4):
        said = " ".join(ranking_findings.findings_rivals(marked(full, grade, "published")))
        assert (
            "Of the 13 rivals with models at the same 9 depths the best over all depths is perplexity."
            in said
        )
        assert "the worst over all depths is taylor (unprotected)." in said


def test_a_rival_that_stops_short_is_said_to_be_missing(full):
    answers = full.answers[full.answers.variant != "pruned-6-block_influence"]
    duel = next(
        s
        for s in ranking_findings.findings_rivals(replace(full, answers=answers))
        if "block influence" in s
    )
    assert duel.startswith(
        "At 6 blocks block influence has no model to compare the paper's criterion with; over all 8"
    )


def test_the_cliff_is_told_by_place_and_size(full, few):
    own, others = ranking_findings.findings_cliffs(full)
    row = tables.cliffs(full).set_index("criterion").loc["output_similarity"]
    assert f"from {row.fall_from:.0f} to {row.fall_to:.0f} blocks, by {row.fall:.1f} points" in own
    assert (
        f"up to {row.level_until:.0f} blocks" in own
        and "by perplexity, the longest, up to 4." in others
    )
    flat = ranking_findings.findings_cliffs(marked(full, 4, "output_similarity"))[0]
    assert "up to 16 blocks" in flat
    assert (
        "already at the first depth"
        in ranking_findings.findings_cliffs(marked(few, 1, "output_similarity"))[0]
    )


def test_sublayers_are_judged_at_equal_parameters(full, few):
    attentions, mlps = ranking_findings.findings_sublayers(full)
    assert attentions.startswith("output similarity (attentions)") and "at 2 sizes" in attentions
    assert "below at 1" in mlps and "below at 0" in attentions
    worse = ranking_findings.findings_sublayers(marked(full, 1, "output_similarity-attention"))[0]
    assert "above at 0 and below at 2" in worse
    assert ranking_findings.findings_sublayers(few) == []
    assert ranking_findings.findings_sublayers(replace(full, memory=None)) == []


def test_the_parts_together_are_the_notebooks_findings(full, few):
    criteria = ranking_findings.findings_criteria(few)
    assert (
        findings.findings_pruning(few) == findings.findings_depths(few) + criteria
        and len(criteria) == 4
    )
    whole = ranking_findings.findings_importance(full)
    assert whole == [s for part in ("order", "drafts", "agreement", "calibration", "images")
                     for s in getattr(ranking_findings, f"findings_{part}")(full)]  # fmt: skip


def test_names_for_people():
    assert (
        words("output_similarity-text") == "output similarity (text only)"
        and words("random-0") == "random-0"
    )
    assert words("perplexity-text-iterative") == "perplexity (text only, iterative)"
    assert (
        explained(["perplexity-text-iterative"]).startswith("text only: ranked")
        and explained(["random-3"]) == ""
    )
    assert "iterative: scored anew" in explained(["perplexity-text-iterative"])
    assert joined(["a"]) == "a" and joined(["a", "b", "c"]) == "a, b and c"
    assert [p_value(p) for p in (1e-4, 0.0123, 0.4)] == ["p < 0.001", "p = 0.012", "p = 0.40"]


def test_the_glossary_explains_the_criteria_that_the_run_has(few, full):
    said, many = (ranking_findings.findings_agreement(results)[-1] for results in (few, full))
    assert "magnitude, the sum of absolute weights; random-0" in said and "perplexity" not in said
    assert (
        "text only:" not in said
        and "text only: ranked" in many
        and "the published order, the order that comes with" in many
    )
    other = replace(
        few, plans=None, values=few.values.replace({"ranking": {"magnitude": "taylor-text"}})
    )
    other = replace(other, variants=few.variants[few.variants.criterion != "magnitude"])
    (said,) = ranking_findings.glossary(other)
    assert "taylor, the sum of" in said and "magnitude" not in said and "text only: ranked" in said
