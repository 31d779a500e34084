"""Agreement of rankings: closed forms, planted noise, disjoint draws."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from derm_compress.report.results import Results
from derm_compress.report.tables import rankings, specimen

BLOCKS, PROTECTED = 12, (0, 11)


def values_of(**known):
    """A values frame from {ranking: [blocks] without data or [blocks, items]}."""
    frames = []
    for name, value in known.items():
        table = np.asarray(value, float)
        table = table[:, None] if table.ndim == 1 else table
        items = [""] if np.ndim(value) == 1 else [f"i{k:02}" for k in range(table.shape[1])]
        grid = pd.DataFrame(table, range(BLOCKS), items).stack()
        grid = grid.rename_axis(["block", "item"]).rename("value").reset_index()
        frames.append(grid.assign(ranking=name, part="block"))
    return pd.concat(frames, ignore_index=True)


def noisy(noise, *, items=40, seed=0):
    rng = np.random.default_rng(seed)
    return np.arange(BLOCKS)[:, None] + rng.normal(0, noise, (BLOCKS, items))


def pair(values, one, other, **how):
    table = rankings.agreement(values, PROTECTED, **how).set_index(["one", "other"])
    return table.loc[(one, other)]


def curve_of(value, protected=PROTECTED, removed=4, **how):
    return rankings.calibration_curve(values_of(a=value), protected, removed=removed, **how)


def test_equal_rankings_agree_and_reversed_ones_disagree_in_every_draw():
    seen = noisy(2)
    values = values_of(a=seen, b=3 * seen + 1, c=-seen)
    assert pair(values, "a", "b").tolist() == pytest.approx([1, 1, 1])
    assert pair(values, "a", "c").tolist() == pytest.approx([-1, -1, -1])


def test_protected_blocks_and_sublayers_do_not_count():
    order = np.arange(BLOCKS, dtype=float)
    other = order.copy()
    other[[0, 11]] = 100, -100
    values = values_of(a=order, b=other)
    assert pair(values, "a", "b").rho == pytest.approx(1)
    assert rankings.agreement(values, ()).rho[0] < 0.9
    part = values_of(c=noisy(1)).assign(part="mlp")
    assert set(rankings.agreement(pd.concat([values, part]), PROTECTED).other) == {"b"}


def test_spearman_in_closed_form():
    order = np.arange(BLOCKS, dtype=float)
    other = order.copy()
    other[[3, 4]] = other[[4, 3]]  # neighbours among 10 exchanged: 1 - 6 * 2 / (10 * 99)
    assert pair(values_of(a=order, b=other), "a", "b").rho == pytest.approx(1 - 12 / 990)


def test_without_data_there_is_no_interval_and_with_it_there_is_one():
    values = values_of(a=np.arange(BLOCKS), b=-np.arange(BLOCKS), c=noisy(3))
    assert pair(values, "a", "b").isna().tolist() == [False, True, True]
    some = pair(values, "a", "c")
    assert some.notna().all() and some.rho_lo < some.rho_hi


def test_more_noise_lowers_the_correlation_and_more_items_narrow_the_interval():
    order = np.arange(BLOCKS)
    rho = [pair(values_of(a=order, b=noisy(n)), "a", "b").rho for n in (1, 30, 300)]
    assert rho[0] > 0.95 > rho[1] > rho[2]
    few, many = (pair(values_of(a=order, b=noisy(8, items=n)), "a", "b") for n in (5, 200))
    assert many.rho_hi - many.rho_lo < 0.5 * (few.rho_hi - few.rho_lo)


def test_a_draw_is_the_same_for_all_rankings():
    """Noise that two rankings share cancels only if the same items are drawn for both."""
    shared, common = noisy(30), np.arange(BLOCKS)[:, None] * 0.01
    assert pair(values_of(a=shared, b=shared + common), "a", "b").rho_lo > 0.95
    assert pair(values_of(a=shared, b=noisy(30, seed=9)), "a", "b").rho_lo < 0.6


def test_two_draws_share_no_item_and_smaller_ones_lie_within_larger():
    largest, _ = rankings.disjoint(15, 7, draws=50, seed=4)
    for size in (1, 3, 7):
        one, other = rankings.disjoint(15, size, draws=50, seed=4)
        assert one.shape == other.shape == (50, size)
        assert all(len({*a, *b}) == 2 * size for a, b in zip(one, other, strict=True))
        assert all(set(a) <= set(b) for a, b in zip(one, largest, strict=True))
    assert len(np.unique(np.sort(one), axis=0)) > 40


def test_sizes_go_up_to_half_of_the_items():
    assert rankings.sizes(7) == [1, 2, 5, 7] and rankings.sizes(50) == [1, 2, 5, 10, 20, 50]
    assert rankings.sizes(1) == [1] and rankings.sizes(0) == []
    assert curve_of(noisy(1, items=15))["items"].tolist() == [1, 2, 5, 7]
    assert curve_of(np.arange(BLOCKS)).empty  # it reads no picture


def test_a_curve_without_noise_is_flat_and_one_with_noise_rises():
    flat = curve_of(noisy(0))
    assert (flat[["rho", "rho_lo", "overlap", "overlap_lo"]] == 1).all(axis=None)
    assert flat.chance[0] == 0.4
    curve = curve_of(noisy(6))
    assert curve.rho.is_monotonic_increasing and curve.overlap.is_monotonic_increasing
    assert curve.rho.iloc[0] < 0.6
    assert ((curve.rho_lo < curve.rho) & (curve.rho < curve.rho_hi)).all()


def test_pure_noise_agrees_as_chance_does():
    rng = np.random.default_rng(3)
    curve = curve_of(rng.normal(size=(BLOCKS, 60)), (), removed=3, draws=1000)
    assert abs(curve.rho[0]) < 0.08 and curve.overlap[0] == pytest.approx(curve.chance[0], abs=0.05)
    level = curve_of(np.ones((BLOCKS, 8)), (), removed=3)
    assert (level.rho == 0).all()  # no order at all agrees with none


def test_draws_are_compared_in_pairs_the_studys_own_among_them():
    values = pd.DataFrame(
        {
            "ranking": "own",
            "block": [0, 1, 2, 3],
            "part": "block",
            "item": "a",
            "value": [9.0, 0.1, 0.2, 0.3],
        }
    )
    draws = pd.DataFrame({"draw": [1] * 4 + [2] * 4, "block": [0, 1, 2, 3] * 2})
    draws = draws.assign(score=[0, 1, 2, 3, 0, 3, 2, 1])
    plans = {"own": {"protected": [0], "order": [1, 2, 3], "blocks": 4}}
    results = Results(values=values, draws=draws, plans=plans)
    assert rankings.draws_apart(results) == pytest.approx([1, -1, -1])
    assert rankings.draws_apart(dataclasses.replace(results, draws=draws[:0])) == []
    found = specimen.draws_agree(results)
    assert found[:3] == pytest.approx((-1 / 3, -1, 1)) and not found.holds
