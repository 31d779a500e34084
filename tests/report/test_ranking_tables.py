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


def pair(values, one, other):
    table = rankings.agreement(values, PROTECTED).set_index(["one", "other"])
    return table.loc[(one, other)]


def halves(value, protected=PROTECTED, **how):
    return rankings.halves_agree(values_of(a=value), protected, "a", **how)


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


def test_halves_agree_as_far_as_noise_lets_them():
    assert halves(noisy(0)) == pytest.approx((1, 1, 1))
    few, many = halves(noisy(6, items=8)), halves(noisy(6, items=80))
    assert few[0] < many[0] and few[1] < few[0] < few[2]
    assert halves(np.arange(BLOCKS)) is None and halves(noisy(1, items=1)) is None
    noise = np.random.default_rng(3).normal(size=(BLOCKS, 60))
    assert abs(halves(noise, (), draws=1000)[0]) < 0.08
    assert halves(np.ones((BLOCKS, 8)), ()) == (0, 0, 0)  # no order at all agrees with none


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
    assert rankings.draws_agree(dataclasses.replace(results, draws=draws[:0])) is None
    found = specimen.draws_agree(results)  # the pairs: 1, -1, -1
    assert found[:3] == pytest.approx((-1 / 3, -1, 1)) and not found.holds


def test_the_interval_of_a_rank_correlation_holds_it_as_often_as_it_says():
    rng, blocks, covered = np.random.default_rng(0), 27, []
    true = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's, of two normal scores that correlate at 0.5
    for _ in range(300):
        one, other = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], blocks).T
        told = {"ranking": "own", "block": range(blocks), "part": "block", "item": "a"}
        draws = pd.DataFrame({"draw": 1, "block": range(blocks), "score": other})
        plans = {"own": {"protected": [], "order": [*range(blocks)], "blocks": blocks}}
        values = pd.DataFrame(told | {"value": one})
        _, lo, hi = rankings.draws_agree(Results(values=values, draws=draws, plans=plans))
        covered.append(lo < true < hi)
    assert 0.92 < np.mean(covered) < 0.98
