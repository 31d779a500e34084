"""Criteria in pairs: the right difference at the right depths, Holm, cliffs, sublayers beside blocks."""

import numpy as np
import pandas as pd
import pytest

from derm_compress.evaluate import metrics
from derm_compress.report import rivals

ITEMS = 20


def table_of(**criteria):
    """(answers, variants) from {criterion: {depth: mean mark}}; the first is the study's own, the original 3.5."""
    rng = np.random.default_rng(0)
    quality = rng.normal(0, 0.3, (ITEMS, 3))
    rows, answers = [("original", 0, "")], []
    for i, (name, depths) in enumerate(criteria.items()):
        name = name.replace("_", "-")
        rows += [(f"pruned-{n}" + f"-{name}" * (i > 0), n, name) for n in depths]
    variants = pd.DataFrame(rows, columns=["variant", "blocks_removed", "criterion"])
    marks = [3.5, *(mark for depths in criteria.values() for mark in depths.values())]
    for name, mark in zip(variants.variant, marks, strict=True):
        seen = np.clip(mark + quality + rng.normal(0, 0.05, quality.shape), 1, 4)
        answers += [(name, f"i{i}", f"q{q}", seen[i, q]) for i in range(ITEMS) for q in range(3)]
    variants = variants.assign(healed=False, bits=16, method="fp16")
    return pd.DataFrame(answers, columns=["variant", "item", "question", "score"]), variants


def compared(pair, operating=4):
    return rivals.criteria_tests(*pair, "own", operating=operating).set_index("criterion")


def test_differences_are_own_minus_rival_at_the_depth_and_over_shared_depths():
    pair = table_of(
        own={2: 3.0, 4: 2.5, 6: 2.0}, better={2: 3.2, 4: 2.7}, worse={4: 1.5, 6: 2.2, 8: 1.2}
    )
    table, answers = compared(pair), pair[0]
    score = 25 * answers.groupby("variant").score.mean()
    assert table.difference["better"] == pytest.approx(score["pruned-4"] - score["pruned-4-better"])
    over = (
        score[["pruned-2", "pruned-4"]].mean()
        - score[["pruned-2-better", "pruned-4-better"]].mean()
    )
    assert table.difference_all["better"] == pytest.approx(over) and table.difference["better"] < 0
    assert table.depths.to_dict() == {"better": 2, "worse": 2} and table.ahead.to_dict() == {
        "better": 0,
        "worse": 1,
    }
    direct = metrics.paired_difference(
        *(answers[answers.variant == v] for v in ("pruned-4", "pruned-4-worse"))
    )
    assert table.loc[
        "worse", ["difference", "difference_lo", "difference_hi", "p"]
    ].tolist() == pytest.approx(list(direct[:4]))
    assert table.n.tolist() == [ITEMS * 3] * 2


def test_p_values_are_corrected_over_the_rivals():
    pair = table_of(own={4: 2.5}, a={4: 2.4}, b={4: 2.49}, c={4: 2.5})
    table = compared(pair)
    assert table.p_holm.tolist() == metrics.holm(table.p).tolist()
    assert (
        table.p_holm["a"] == pytest.approx(3 * table.p["a"])
        and table.p_holm["a"] < 0.05 < table.p_holm["c"]
    )


def test_random_orders_are_one_rival_over_the_depths_that_all_have():
    pair = table_of(own={2: 3.0, 4: 2.5}, random_0={2: 2.0, 4: 2.9}, random_1={4: 1.9})
    table, score = compared(pair), 25 * pair[0].groupby("variant").score.mean()
    assert list(table.index) == ["random (mean of 2)"] and table.depths.tolist() == [1]
    mean = score[["pruned-4-random-0", "pruned-4-random-1"]].mean()
    assert table.difference.iloc[0] == pytest.approx(score["pruned-4"] - mean)
    assert list(compared(table_of(own={4: 2.5}, random_0={4: 2.0})).index) == ["random-0"]


def test_a_rival_without_the_operating_depth_has_no_difference_there_and_does_not_count():
    table = compared(table_of(own={2: 3.0, 4: 2.5}, short={2: 2.0}, other={2: 2.9, 4: 1.5}))
    assert (
        np.isnan(table.p["short"])
        and np.isnan(table.p_holm["short"])
        and table.p_all["short"] < 0.01
    )
    assert table.p_holm["other"] == table.p["other"]
    assert rivals.criteria_tests(*table_of(own={2: 3.0}), "own", operating=2).empty


def test_unscored_answers_and_other_models_are_left_out():
    answers, variants = table_of(own={4: 2.5}, other={4: 2.4})
    known = compared((answers, variants))
    packed = variants.assign(variant=variants.variant + "|awq4", bits=4)
    healed = variants.assign(variant=variants.variant + "+sft", healed=True)
    more = pd.concat(
        [
            answers,
            *(answers.assign(variant=answers.variant + end, score=1) for end in ("|awq4", "+sft")),
        ]
    )
    both = compared((more, pd.concat([variants, packed, healed])))
    pd.testing.assert_frame_equal(both, known)
    gap = answers.assign(
        score=answers.score.mask((answers.variant == "pruned-4") & (answers["item"] == "i3"))
    )
    assert compared((gap, variants)).n.tolist() == [57]


def test_the_cliff_is_where_a_block_costs_most():
    pair = table_of(own={2: 3.4, 4: 3.3, 5: 2.6, 9: 1.6}, other={2: 2.0, 4: 1.9})
    table = rivals.cliffs(*pair).set_index("criterion")
    own = table.loc["own"]
    assert (own.fall_from, own.fall_to) == (4, 5) and own.fall_lo < own.fall < own.fall_hi
    assert (
        own.fall == own.fall_per_block == pytest.approx(25 * 0.7, abs=2)
    )  # 5 to 9 falls more, but over four blocks
    assert (table.fall_from["other"], table.fall_per_block["other"]) == (0, table.fall["other"] / 2)
    low = metrics.paired_difference(
        *(pair[0][pair[0].variant == v] for v in ("pruned-4", "pruned-5"))
    )
    assert (own.fall_lo, own.fall_hi) == pytest.approx((low.lo, low.hi))


def test_level_ends_before_the_first_depth_that_is_clearly_worse_than_the_unpruned_model():
    dips = {2: 3.5, 4: 3.0, 6: 3.6}
    table = rivals.cliffs(
        *table_of(own={2: 3.5, 4: 3.6, 6: 2.0}, other={2: 3.0}, dips=dips, flat={2: 3.6, 4: 3.6})
    )
    assert table.set_index("criterion").level_until.to_dict() == {
        "own": 4,
        "other": 0,
        "dips": 2,
        "flat": 4,
    }


def sublayer_study(share=1 / 3):
    """Own's blocks 1 to 4 and models without 3 and 7 attentions, which take `share` of a block each."""
    answers, variants = table_of(own={1: 3.0, 2: 2.8, 3: 2.4, 4: 2.0}, attention={3: 3.4, 7: 1.5})
    cut = variants.criterion == "attention"
    variants = variants.assign(
        attentions_removed=variants.blocks_removed.where(cut, 0), mlps_removed=0
    )
    variants["blocks_removed"] = variants.blocks_removed.where(~cut, 0)
    gone = variants.blocks_removed + share * variants.attentions_removed
    return answers, variants, pd.DataFrame({"variant": variants.variant, "params_b": 1 - gone / 10})


def test_sublayers_stand_beside_the_nearest_model_of_whole_blocks():
    answers, variants, sizes = sublayer_study()
    table = rivals.sublayers(answers, variants, sizes, "own")
    assert table.nearest.tolist() == [
        "pruned-1",
        "pruned-2",
    ] and table.apart.tolist() == pytest.approx([0, 1 / 3])
    direct = metrics.paired_difference(
        *(answers[answers.variant == v] for v in ("pruned-3-attention", "pruned-1"))
    ).difference
    assert table.difference[0] == direct > 0 > table.difference[1]
    larger = rivals.sublayers(*sublayer_study(share=0.5)[:2], sublayer_study(share=0.5)[2], "own")
    assert larger.nearest[1] in ("pruned-3", "pruned-4")


def test_sublayers_are_no_rivals_and_without_sizes_nothing_is_near():
    answers, variants, _ = sublayer_study()
    assert rivals.criteria_tests(answers, variants, "own", operating=3).empty
    assert list(rivals.cliffs(answers, variants).criterion) == ["own"]
    none = rivals.sublayers(answers, variants, pd.DataFrame({"variant": [], "params_b": []}), "own")
    assert len(none) == 2 and none.nearest.isna().all() and none.p.isna().all()


def test_a_block_that_lost_both_its_parts_makes_no_plan_of_blocks():
    """Of seven sublayers that go, all may belong to whole blocks: the plan is one of sublayers nevertheless."""
    answers, variants, sizes = sublayer_study()
    both = variants.variant == "pruned-7-attention"
    variants = variants.assign(
        blocks_removed=variants.blocks_removed.mask(both, 2),
        attentions_removed=variants.attentions_removed.mask(both, 0),
    )
    assert rivals.criteria_tests(answers, variants, "own", operating=2).empty
    assert list(rivals.sublayers(answers, variants, sizes, "own").variant) == [
        "pruned-3-attention",
        "pruned-7-attention",
    ]


def test_old_frames_without_sublayer_columns_are_read():
    assert (rivals.pruned_only(table_of(own={2: 3.0})[1]).sublayers_removed == 0).all()
