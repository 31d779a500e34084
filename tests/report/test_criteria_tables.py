"""Criteria in pairs: the right difference at the right depths, Holm, cliffs, sublayers."""

import dataclasses
import json

import fabricate
import numpy as np
import pandas as pd
import pytest

from derm_compress.evaluate import metrics
from derm_compress.report.results import Results
from derm_compress.report.tables import criteria, joins

ITEMS = 20


def study(operating=4, **plans):
    """Results from {criterion: {depth: mean mark}}; the first is the study's own, the original's
    mark is 3.5."""
    rng = np.random.default_rng(0)
    quality = rng.normal(0, 0.3, (ITEMS, 3))
    rows, marks = [fabricate.variant("original")], [3.5]
    for name, depths in plans.items():
        name = name.replace("_", "-")
        end = "" if name == "own" else f"-{name}"
        rows += [fabricate.variant(f"pruned-{n}{end}", n, criterion=name) for n in depths]
        marks += depths.values()
    answers = []
    for row, mark in zip(rows, marks, strict=True):
        seen = np.clip(mark + quality + rng.normal(0, 0.05, quality.shape), 1, 4)
        name = row["variant"]
        answers += [(name, f"i{i}", f"q{q}", seen[i, q]) for i in range(ITEMS) for q in range(3)]
    return Results(
        variants=pd.DataFrame(rows),
        answers=pd.DataFrame(answers, columns=["variant", "item", "question", "score"]),
        choice={"criterion": "own", "operating": operating},
    )


def with_blocks(results, left):
    """The results with {variant: the blocks that it keeps} in their recipes."""
    recipes = {
        name: json.dumps({"steps": [{"step": "prune", "kept": kept}]})
        for name, kept in left.items()
    }
    table = results.variants
    recipe = table.variant.map(recipes).fillna(table.recipe)
    return dataclasses.replace(results, variants=table.assign(recipe=recipe))


def test_rivals_that_leave_the_same_blocks_count_once():
    rivals = {"one": {2: 2.9, 4: 2.4}, "two": {2: 2.8, 4: 2.4}, "other": {2: 2.0, 4: 2.2}}
    results = study(own={2: 3.0, 4: 2.5}, same={2: 3.0, 4: 2.5}, **rivals)
    told = {"pruned-2": [2, 3], "pruned-4": [4], "pruned-2-same": [2, 3], "pruned-4-same": [4]}
    told |= {"pruned-2-one": [1, 2], "pruned-4-one": [1], "pruned-2-two": [5, 6]}
    found = against_rivals(with_blocks(results, told | {"pruned-4-two": [1]}))
    first, second = [name for name in found.index if name in ("one", "two")]
    assert found.same_as.to_dict() == {"same": "own", first: "", second: first, "other": ""}
    assert found.same_as_all.to_dict() == {"same": "own", "one": "", "two": "", "other": ""}
    once = dict(zip([first, "other"], metrics.holm(found.p[[first, "other"]]), strict=True))
    assert found.p_holm[[first, "other"]].to_dict() == once
    assert found.p_holm[second] == found.p_holm[first] and found.p_holm["same"] == found.p["same"]
    over = ["one", "two", "other"]
    assert found.p_all_holm[over].tolist() == metrics.holm(found.p_all[over]).tolist()


def against_rivals(results):
    return criteria.criteria_tests(results).set_index("criterion")


def scores(results):
    return 25 * results.answers.groupby("variant").score.mean()


def direct(results, one, other):
    answers = results.answers
    return metrics.paired_difference(*(answers[answers.variant == v] for v in (one, other)))


def test_differences_are_own_minus_rival_at_the_depth_and_over_shared_depths():
    results = study(
        own={2: 3.0, 4: 2.5, 6: 2.0}, better={2: 3.2, 4: 2.7}, worse={4: 1.5, 6: 2.2, 8: 1.2}
    )
    table, score = against_rivals(results), scores(results)
    assert table.difference["better"] == pytest.approx(score["pruned-4"] - score["pruned-4-better"])
    over = score[["pruned-2", "pruned-4"]].mean()
    over -= score[["pruned-2-better", "pruned-4-better"]].mean()
    assert table.difference_all["better"] == pytest.approx(over) and table.difference["better"] < 0
    assert table.depths.to_dict() == {"better": 2, "worse": 2}
    assert table.ahead.to_dict() == {"better": 0, "worse": 1}
    told = direct(results, "pruned-4", "pruned-4-worse")
    assert table.loc["worse", joins.CHANGE].tolist() == pytest.approx(list(told[:4]))


def test_p_values_are_corrected_over_the_rivals():
    table = against_rivals(study(own={4: 2.5}, a={4: 2.4}, b={4: 2.49}, c={4: 2.5}))
    assert table.p_holm.tolist() == metrics.holm(table.p).tolist()
    assert table.p_holm["a"] == pytest.approx(3 * table.p["a"])
    assert table.p_holm["a"] < 0.05 < table.p_holm["c"]


def test_random_orders_are_one_rival_over_the_depths_that_all_have():
    results = study(own={2: 3.0, 4: 2.5}, random_0={2: 2.0, 4: 2.9}, random_1={4: 1.9})
    table, score = against_rivals(results), scores(results)
    assert list(table.index) == ["random (mean of 2)"] and table.depths.tolist() == [1]
    mean = score[["pruned-4-random-0", "pruned-4-random-1"]].mean()
    assert table.difference.iloc[0] == pytest.approx(score["pruned-4"] - mean)
    assert list(against_rivals(study(own={4: 2.5}, random_0={4: 2.0})).index) == ["random-0"]


def test_of_several_random_orders_the_interval_tells_what_other_orders_would_give():
    orders = {"random_0": {4: 2.4}, "random_1": {4: 1.2}, "random_2": {4: 1.8}}
    found = against_rivals(study(own={4: 2.5}, **orders)).iloc[0]
    alone = against_rivals(study(own={4: 2.5}, mean={4: 1.8})).iloc[0]
    assert found.difference_hi - found.difference_lo > 2 * (
        alone.difference_hi - alone.difference_lo
    )
    assert found.difference_lo < found.difference < found.difference_hi
    assert found.p > 100 * alone.p


def test_a_rival_without_the_operating_depth_has_no_difference_there_and_does_not_count():
    table = against_rivals(study(own={2: 3.0, 4: 2.5}, short={2: 2.0}, other={2: 2.9, 4: 1.5}))
    assert np.isnan([table.p["short"], table.p_holm["short"]]).all()
    assert table.p_all["short"] < 0.01 and table.p_holm["other"] == table.p["other"]
    assert criteria.criteria_tests(study(own={2: 3.0})).empty


def test_unscored_answers_and_other_models_are_left_out():
    results = study(own={4: 2.5}, other={4: 2.4})
    answers, variants = results.answers, results.variants
    packed = variants.assign(variant=variants.variant + "|awq4", bits=4, quantizer="awq")
    healed = variants.assign(variant=variants.variant + "+sft", healed=True)
    ends = [answers.assign(variant=answers.variant + end, score=1) for end in ("|awq4", "+sft")]
    more = dataclasses.replace(
        results, variants=pd.concat([variants, packed, healed]), answers=pd.concat([answers, *ends])
    )
    pd.testing.assert_frame_equal(against_rivals(more), against_rivals(results))
    lost = (answers.variant == "pruned-4") & (answers["item"] == "i3")
    gap = dataclasses.replace(results, answers=answers.assign(score=answers.score.mask(lost)))
    assert against_rivals(gap).n.tolist() == [57]


def test_sublayers_are_no_rivals():
    results = study(3, own={1: 3.0, 2: 2.8, 3: 2.4}, attention={3: 3.4})
    cut = results.variants.criterion == "attention"
    parts = results.variants.blocks_removed.where(cut, 0)
    blocks = results.variants.blocks_removed.where(~cut, 0)
    table = results.variants.assign(attentions_removed=parts, blocks_removed=blocks)
    assert criteria.criteria_tests(dataclasses.replace(results, variants=table)).empty
