"""A control holds where its interval is as expected, and takes along what rests on it."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from derm_compress.evaluate import metrics
from derm_compress.report import rule, tables
from derm_compress.report.results import Results, load_results
from derm_compress.report.sentences import Facts
from derm_compress.report.tables import claims, specimen


def holds(results):
    table = specimen.controls(results)
    return dict(zip(table.control, table.holds, strict=True))


def of_variant(frame, named, **changes):
    """The frame with other values in the rows whose variant holds a word."""
    rows = frame.variant.str.contains(named)
    return frame.assign(**{name: frame[name].mask(rows, value) for name, value in changes.items()})


def test_every_control_of_a_good_specimen_holds_and_no_claim_is_lost(results):
    assert set(holds(results).values()) == {True}
    table = claims.claims(results)
    assert table.failed.eq("").all()
    assert "all of them hold" in Facts(results, {"claims": table}).said("extra_controls")[0]


TURNED = {
    "protected blocks": lambda r: {
        "removal_answers": of_variant(r.removal_answers, "protected-1", score=4)
    },
    "run of blocks": lambda r: {"removal_losses": of_variant(r.removal_losses, "run", loss=3.0)},
    "criterion against chance": lambda r: {
        "removal_losses": of_variant(r.removal_losses, "random", loss=0.5)
    },
    "outlier channels": lambda r: {"inputs": r.inputs.assign(outlier_channels=0)},
    "weights off the grid": lambda r: {
        "rounded": r.rounded.assign(
            relative_error=r.rounded.relative_error.mask(r.rounded.weights == "as they are", 0)
        )
    },
    "AWQ at 3 bits": lambda r: {"losses": of_variant(r.losses, "awq", loss=0.9)},
    "blank pictures": lambda r: {"evaluation": of_variant(r.evaluation, "blank", score=4)},
    "other pictures": lambda r: {"evaluation": of_variant(r.evaluation, "shuffled", score=4)},
    "copied answer": lambda r: {"judge_controls": r.judge_controls.assign(score=4.0)},
    "training without pruning": lambda r: {
        "answers": of_variant(r.answers, r"original\+sft", score=4)
    },
    "blocks in random order": lambda r: {
        "answers": of_variant(r.answers, r"shuffled\+sft", score=4)
    },
    "two draws": lambda r: {
        "values": r.values.assign(value=np.random.default_rng(0).permutation(r.values.value))
    },
}


@pytest.mark.parametrize("name", specimen.CONTROLS)
def test_a_control_turns_with_its_data(results, name):
    turned = dataclasses.replace(results, **TURNED[name](results))
    assert specimen.measure(name, results).holds is True
    assert specimen.measure(name, turned).holds is False


def test_a_control_that_fails_takes_along_what_rests_on_it_and_nothing_else(results):
    turned = dataclasses.replace(results, **TURNED["outlier channels"](results))
    assert specimen.failed(turned) == ["outlier channels"]
    table = claims.claims(turned)
    resting = table.rests_on.str.contains("outlier channels")
    assert (table.verdict[resting] == rule.UNTESTABLE).all() and resting.sum() > 3
    assert (table.failed[resting] == "outlier channels").all() and table.failed[~resting].eq(
        ""
    ).all()
    assert (table.because[resting] == "true here alone; fails: outlier channels").all()
    said = Facts(turned, {"claims": table}).said("extra_controls")
    assert "1 of them fails: outlier channels" in said[0]


def test_every_control_has_a_claim_on_it_and_every_claim_on_scores_has_controls():
    told = claims.TOLD["claims"]
    assert {name for claim in told for name in claims.controls_of(claim)} == set(specimen.CONTROLS)
    shapes = {"weights", "peak", "saved", "faster"}
    assert all(bool(claims.controls_of(claim)) != (claim["ask"][0] in shapes) for claim in told)


def test_what_a_run_leaves_out_is_neither_held_nor_failed():
    nothing = Results()
    assert not any(value is not None for value in holds(nothing).values())
    assert specimen.failed(nothing) == [] and tables.make("extra_controls", nothing) is None
    read = tables.controls("07_quantization", load_results({}))
    assert read.holds.tolist() == ["not tested"] * 2


def test_one_row_a_control_with_its_interval_for_people_and_as_csv(results):
    table = tables.make("extra_controls", results)
    assert list(table.control) == list(specimen.CONTROLS)
    assert list(table)[:7] == ["control", "question", "expected", "value", "lo", "hi", "holds"]
    assert (table.claims > 0).all()
    people = tables.readable(table).set_index("control")
    assert people.value["outlier channels"] == "50.00" and people.holds["outlier channels"] == "yes"
    assert "to" in people.value["blank pictures"]


def test_random_orders_are_drawn_again_beside_pictures():
    """With one effect a draw the interval is that of the draws; pictures alone would have none."""
    by_draw = np.tile([0.0, 10.0, 20.0, 30.0], (50, 1))
    lo, hi = metrics.crossed_interval(by_draw)
    assert lo < 8 and hi > 22
    same = metrics.crossed_interval(np.full((50, 4), 3.0))
    assert same == pytest.approx((3.0, 3.0))


def test_a_share_of_what_is_lost_has_no_interval_without_a_score():
    lost, whole = pd.Series([1.0, 2.0]), pd.Series([4.0, 4.0])
    assert metrics.ratio_interval(lost, whole)[0] == pytest.approx(37.5)
    assert np.isnan(metrics.ratio_interval(lost, whole * 0)[1:]).all()
