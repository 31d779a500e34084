"""Scores, intervals and paired tests against closed forms and simulation."""

import numpy as np
import pandas as pd
import pytest

from derm_compress.errors import DermError
from derm_compress.evaluate import metrics


def answers(marks):
    """A frame from [images, questions] marks."""
    marks = np.asarray(marks, dtype=float)
    rows = [
        {"item": f"i{i}", "question": f"q{q}", "score": mark}
        for i, row in enumerate(marks)
        for q, mark in enumerate(row)
    ]
    return pd.DataFrame(rows)


def correlated(rng, images=39, questions=3, quality=None):
    """Marks 1 to 4 whose questions share most of their image's quality."""
    quality = rng.normal(0, 1, images) if quality is None else quality
    raw = 2.5 + quality[:, None] + rng.normal(0, 0.4, (images, questions))
    return np.clip(np.round(raw), 1, 4)


def test_percent_is_the_papers():
    assert metrics.percent(4) == 100
    assert metrics.percent(2.63) == pytest.approx(65.75)
    assert metrics.FLOOR == 25


def test_one_image_or_equal_images_give_a_degenerate_interval():
    assert metrics.score_interval(answers([[1, 2, 3]])) == (50, 50, 50, 3)
    assert metrics.score_interval(answers([[1, 4], [4, 1], [2, 3]])) == (62.5, 62.5, 62.5, 6)


def test_two_images_draw_the_four_outcomes():
    estimate = metrics.score_interval(answers([[1], [3]]), n_boot=20_000)
    assert estimate == (50, 25, 75, 2)  # 1/4 both low, 1/4 both high: far beyond 2.5 %


def test_answers_without_a_score_are_counted_and_never_scored():
    frame = answers([[4, np.nan], [2, np.nan], [np.nan, np.nan]])
    assert metrics.unscored(frame) == 4
    estimate = metrics.score_interval(frame)
    assert (estimate.score, estimate.n) == (75, 2)
    nothing = metrics.score_interval(frame.assign(score=np.nan))
    assert np.isnan(nothing.score) and nothing.n == 0


def test_images_with_more_answers_weigh_more():
    frame = answers([[4, 4, 4], [2, np.nan, np.nan]])
    assert metrics.score_interval(frame).score == pytest.approx(metrics.percent(3.5))


@pytest.mark.parametrize("mark", [0, 5, -1])
def test_a_mark_off_the_scale_is_an_error(mark):
    with pytest.raises(DermError, match="1 to 4"):
        metrics.score_interval(answers([[2, mark]]))


def test_the_interval_covers_the_truth_where_single_answers_as_units_would_not():
    rng = np.random.default_rng(1)
    truth = metrics.percent(correlated(rng, images=100_000).mean())
    clustered = naive = 0
    for _ in range(200):
        frame = answers(correlated(rng))
        estimate = metrics.score_interval(frame, n_boot=400)
        clustered += estimate.lo <= truth <= estimate.hi
        alone = metrics.score_interval(frame.assign(item=np.arange(len(frame))), n_boot=400)
        naive += alone.lo <= truth <= alone.hi
    assert 0.90 <= clustered / 200 <= 0.985
    assert naive / 200 < 0.85


def test_an_interval_is_the_same_in_any_order_of_rows():
    frame = answers(correlated(np.random.default_rng(2)))
    shuffled = frame.sample(frac=1, random_state=0)
    assert metrics.score_interval(frame) == metrics.score_interval(shuffled)


def test_score_table_has_one_row_a_group_in_order():
    frame = pd.concat(
        [answers([[2, 2]]).assign(variant="b"), answers([[4, np.nan]]).assign(variant="a")]
    )
    table = metrics.score_table(frame, ["variant"])
    assert table.to_dict("list") == {
        "variant": ["b", "a"], "score": [50, 100], "score_lo": [50, 100], "score_hi": [50, 100],
        "n": [2, 1], "unscored": [0, 1],
    }  # fmt: skip


def test_pairing_is_narrower_than_two_intervals_on_correlated_answers():
    rng = np.random.default_rng(5)
    quality = rng.normal(0, 1, 39)
    a, b = (answers(correlated(rng, quality=quality + shift)) for shift in (0.3, 0))
    paired = metrics.paired_difference(a, b)
    one, other = metrics.score_interval(a), metrics.score_interval(b)
    assert paired.difference == pytest.approx(one.score - other.score)
    unpaired = np.hypot(one.hi - one.lo, other.hi - other.lo)
    assert paired.hi - paired.lo < 0.5 * unpaired
    assert paired.lo > 0 and paired.p < 0.05
    assert (paired.n, paired.images) == (117, 39)


def test_a_difference_with_sides_swapped_changes_sign_alone():
    rng = np.random.default_rng(6)
    a, b = answers(correlated(rng, images=8)), answers(correlated(rng, images=8))
    forth, back = metrics.paired_difference(a, b), metrics.paired_difference(b, a)
    assert (back.difference, back.p, back.n) == (-forth.difference, forth.p, forth.n)
    assert (back.lo, back.hi) == pytest.approx((-forth.hi, -forth.lo))


def test_equal_answers_differ_by_nothing():
    frame = answers(correlated(np.random.default_rng(7)))
    assert metrics.paired_difference(frame, frame) == (0, 0, 0, 1, 117, 39)


def test_only_answers_that_both_have_are_paired():
    a, b = answers([[4, 4], [4, np.nan]]), answers([[3, 4], [2, 2], [1, 1]])
    paired = metrics.paired_difference(a, b)
    assert (paired.difference, paired.n, paired.images) == (metrics.percent(1), 3, 2)
    nothing = metrics.paired_difference(a, b.assign(item="other" + b["item"]))
    assert nothing.n == 0 and np.isnan(nothing.p)


def test_two_variants_in_one_frame_are_refused():
    frame = answers([[4, 4]])
    with pytest.raises(DermError, match="one variant"):
        metrics.paired_difference(pd.concat([frame, frame]), frame)


def test_the_exact_permutation_p_counts_sign_patterns():
    assert metrics.sign_flip_p(np.array([1.0, 2.0, 3.0])) == 2 / 8  # only +++ and ---
    assert metrics.sign_flip_p(np.array([1.0, -1.0])) == 1  # |0| is the least extreme
    assert metrics.sign_flip_p(np.array([3.0, 1.0, 1.0, -1.0])) == 8 / 16  # |sum| 4 or 6


def test_holm_multiplies_the_smallest_p_most_and_never_turns_the_order():
    assert metrics.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx(
        [0.03, 0.06, 0.06]
    )  # Holm 1979, by hand
    assert metrics.holm([0.5, 0.6]).tolist() == [1, 1] and metrics.holm([0.02]).tolist() == [0.02]
    assert metrics.holm([]).tolist() == []


def test_holm_does_not_count_what_is_unknown():
    corrected = metrics.holm([np.nan, 0.02, np.nan, 0.01])
    assert np.isnan(corrected[[0, 2]]).all() and corrected[[1, 3]].tolist() == [0.02, 0.02]


def test_mean_intervals_are_those_of_single_columns():
    rng = np.random.default_rng(11)
    frames = [answers(correlated(rng)) for _ in range(2)]
    wide = pd.concat(
        [frame.set_index(["item", "question"]).score for frame in frames], axis=1, keys=["a", "b"]
    )
    wide.iloc[4, 1] = np.nan
    frames[1] = frames[1].drop(index=frames[1].index[4])
    table = metrics.mean_intervals(wide)
    for name, frame in zip("ab", frames, strict=True):
        assert table.loc[name].tolist() == pytest.approx(list(metrics.score_interval(frame)[:3]))
    change = metrics.mean_intervals(wide[["a"]].sub(wide.b, axis=0)).iloc[0]
    assert change.tolist() == pytest.approx(list(metrics.paired_difference(*frames)[:3]))


def test_random_permutations_agree_with_exact_ones_and_never_give_zero():
    sums = np.random.default_rng(8).integers(-3, 5, 10).astype(float)
    exact = metrics.sign_flip_p(sums, n_permutations=2**10)
    drawn = metrics.sign_flip_p(
        np.append(sums, 0.0), n_permutations=2**11 - 1
    )  # a zero changes no p
    assert drawn == pytest.approx(exact, abs=0.04)
    assert metrics.sign_flip_p(np.ones(60), n_permutations=999) == 1 / 1000


def test_the_permutation_test_keeps_its_level_when_nothing_differs():
    rng = np.random.default_rng(9)
    p = [metrics.sign_flip_p(rng.normal(0, 1, 12), n_permutations=500) for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.09


def test_recovery_is_net_of_the_control_and_its_interval_holds_the_truth():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(60):
        whole = rng.normal(3.2, 0.2, (39, 3))
        sets = [whole] + [whole + by + rng.normal(0, 0.1, (39, 3)) for by in (-1, -0.4, 0.1)]
        told = metrics.recovery(*(answers(np.clip(marks, 1, 4)) for marks in sets), n_boot=400)
        covered += told.lo <= 50 <= told.hi
    assert 51 <= covered <= 60 and told.n == 117


def test_recovery_in_closed_form_and_without_a_loss():
    sets = [answers(marks) for marks in ([[4], [4]], [[2], [2]], [[3], [4]], [[4], [4]])]
    assert metrics.recovery(*sets, n_boot=20_000) == (37.5, 50, 75, 50, 100, 2)
    none = metrics.recovery(sets[0], sets[0], sets[2], sets[3])
    assert none.loss == 0 and np.isnan([none.share, none.lo, none.hi]).all()
    half = answers([[2], [4]])
    seldom = metrics.recovery(sets[0], half, sets[2], sets[3])
    assert seldom.share == 50 and np.isnan(seldom.lo)  # a quarter of the draws have no loss
    empty = metrics.recovery(*sets[:3], sets[3].assign(score=np.nan))
    assert empty.n == 0 and np.isnan(empty.share)
