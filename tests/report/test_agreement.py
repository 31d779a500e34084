"""Agreement of rankings: closed forms, planted noise, disjoint draws."""

import numpy as np
import pandas as pd
import pytest

from derm_compress.report import agreement

BLOCKS, PROTECTED = 12, (0, 11)


def values_of(**rankings):
    """A values frame from {ranking: [blocks] without data or [blocks, items]}."""
    frames = []
    for name, value in rankings.items():
        table = np.asarray(value, float)
        table = table[:, None] if table.ndim == 1 else table
        items = [""] if np.ndim(value) == 1 else [f"i{k:02}" for k in range(table.shape[1])]
        grid = (
            pd.DataFrame(table, range(BLOCKS), items)
            .stack()
            .rename_axis(["block", "item"])
            .rename("value")
        )
        frames.append(grid.reset_index().assign(ranking=name, part="block"))
    return pd.concat(frames, ignore_index=True)


def noisy(noise, *, items=40, seed=0):
    rng = np.random.default_rng(seed)
    return np.arange(BLOCKS)[:, None] + rng.normal(0, noise, (BLOCKS, items))


def pair(values, one, other, **how):
    table = agreement.agreement(values, PROTECTED, **how).set_index(["one", "other"])
    return table.loc[(one, other)]


def test_equal_rankings_agree_and_reversed_ones_disagree_in_every_draw():
    seen = noisy(2)
    values = values_of(a=seen, b=3 * seen + 1, c=-seen)
    assert pair(values, "a", "b").tolist() == pytest.approx([1, 1, 1])
    assert pair(values, "a", "c").tolist() == pytest.approx([-1, -1, -1])


def test_protected_blocks_do_not_count():
    order = np.arange(BLOCKS, dtype=float)
    other = order.copy()
    other[[0, 11]] = 100, -100
    values = values_of(a=order, b=other)
    assert pair(values, "a", "b").rho == pytest.approx(1)
    assert agreement.agreement(values, ()).rho[0] < 0.9


def test_sublayers_are_no_blocks():
    values = values_of(a=noisy(1), b=noisy(1, seed=1))
    part = values_of(c=noisy(1)).assign(part="mlp")
    assert set(agreement.agreement(pd.concat([values, part]), PROTECTED).other) == {"b"}


def test_spearman_in_closed_form():
    order = np.arange(BLOCKS, dtype=float)
    other = order.copy()
    other[[3, 4]] = other[[4, 3]]  # one exchange of neighbours among 10: 1 - 6 * 2 / (10 * 99)
    assert pair(values_of(a=order, b=other), "a", "b").rho == pytest.approx(1 - 12 / 990)


def test_without_data_there_is_no_interval_and_with_it_there_is_one():
    table = agreement.agreement(
        values_of(a=np.arange(BLOCKS), b=-np.arange(BLOCKS), c=noisy(3)), PROTECTED
    )
    table = table.set_index(["one", "other"])
    assert table.loc[("a", "b")].isna().tolist() == [False, True, True]
    assert table.loc[("a", "c")].notna().all() and table.lo["a", "c"] < table.hi["a", "c"]


def test_more_noise_lowers_the_correlation_and_more_items_narrow_the_interval():
    rho = [
        pair(values_of(a=np.arange(BLOCKS), b=noisy(noise)), "a", "b").rho for noise in (1, 30, 300)
    ]
    assert rho[0] > 0.95 > rho[1] > rho[2]
    few, many = (
        pair(values_of(a=np.arange(BLOCKS), b=noisy(8, items=n)), "a", "b") for n in (5, 200)
    )
    assert many.hi - many.lo < 0.5 * (few.hi - few.lo)


def test_a_draw_is_the_same_for_all_rankings():
    """Noise that two rankings share cancels in their difference only if the same items are drawn for both."""
    shared, common = noisy(30), np.arange(BLOCKS)[:, None] * 0.01
    assert pair(values_of(a=shared, b=shared + common), "a", "b").lo > 0.95
    assert pair(values_of(a=shared, b=noisy(30, seed=9)), "a", "b").lo < 0.6


def test_the_seed_decides_the_draws_alone():
    values = values_of(a=noisy(5), b=noisy(5, seed=2))
    for make in (
        agreement.agreement,
        lambda v, p, **k: agreement.calibration_curve(v, p, removed=4, **k),
    ):
        once, again, other = (make(values, PROTECTED, seed=seed) for seed in (0, 0, 1))
        pd.testing.assert_frame_equal(once, again)
        assert not once.equals(other)
    assert agreement.agreement(values, PROTECTED).rho.equals(
        agreement.agreement(values, PROTECTED, seed=1).rho
    )


def test_two_draws_share_no_item_and_smaller_ones_lie_within_larger():
    for size in (1, 3, 7):
        one, other = agreement.disjoint(15, size, draws=50, seed=4)
        assert one.shape == other.shape == (50, size)
        assert all(len({*a, *b}) == 2 * size for a, b in zip(one, other, strict=True))
        assert all(
            set(a) <= set(b)
            for a, b in zip(one, agreement.disjoint(15, 7, draws=50, seed=4)[0], strict=True)
        )
    assert len(np.unique(np.sort(one), axis=0)) > 40


def test_sizes_go_up_to_half_of_the_items():
    assert agreement.sizes(7) == [1, 2, 5, 7] and agreement.sizes(50) == [1, 2, 5, 10, 20, 50]
    assert agreement.sizes(1) == [1] and agreement.sizes(0) == []
    curve = agreement.calibration_curve(
        values_of(a=noisy(1, items=15), b=np.arange(BLOCKS)), PROTECTED, removed=4
    )
    assert curve[curve.ranking == "a"]["items"].tolist() == [1, 2, 5, 7] and "b" not in set(
        curve.ranking
    )


def test_a_curve_without_noise_is_flat_and_one_with_noise_rises():
    flat = agreement.calibration_curve(values_of(a=noisy(0)), PROTECTED, removed=4)
    assert (flat[["rho", "rho_lo", "overlap", "overlap_lo"]] == 1).all(axis=None) and flat.chance[
        0
    ] == 0.4
    curve = agreement.calibration_curve(values_of(a=noisy(6)), PROTECTED, removed=4)
    assert (
        curve.rho.is_monotonic_increasing
        and curve.overlap.is_monotonic_increasing
        and curve.rho.iloc[0] < 0.6
    )
    assert ((curve.rho_lo < curve.rho) & (curve.rho < curve.rho_hi)).all()


def test_one_picture_agrees_with_the_others_as_far_as_its_noise_lets_it():
    assert agreement.one_picture(values_of(a=noisy(0)), PROTECTED, "a") == pytest.approx((1, 1, 1))
    alone, lo, hi = agreement.one_picture(values_of(a=noisy(6, items=40)), PROTECTED, "a")
    curve = agreement.calibration_curve(
        values_of(a=noisy(6, items=40)), PROTECTED, removed=4
    ).set_index("items")
    assert lo < alone < hi and curve.rho[1] < alone < curve.rho[20], (
        "more than one picture against one, less than many"
    )


def test_pure_noise_agrees_as_chance_does():
    rng = np.random.default_rng(3)
    curve = agreement.calibration_curve(
        values_of(a=rng.normal(size=(BLOCKS, 60))), (), removed=3, draws=1000
    )
    assert abs(curve.rho[0]) < 0.08 and curve.overlap[0] == pytest.approx(curve.chance[0], abs=0.05)
    level = agreement.calibration_curve(values_of(a=np.ones((BLOCKS, 8))), (), removed=3)
    assert (level.rho == 0).all()  # no order at all agrees with none


def test_enough_is_the_first_size_near_the_largest_ones_value():
    curve = pd.DataFrame({"items": [1, 2, 5, 10], "rho": [0.5, 0.7, 0.74, 0.8]})
    assert agreement.enough(curve) == 5
    assert agreement.enough(curve.assign(rho=[0.5, 0.6, 0.7, 0.8])) is None
    assert agreement.enough(curve.assign(rho=[-0.2, -0.2, -0.2, -0.1])) is None
    assert agreement.enough(curve.iloc[:1]) is None
