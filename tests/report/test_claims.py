"""Every verdict follows its rule: turned data turn it."""

import dataclasses

import fabricate
import numpy as np
import pandas as pd
import pytest

from derm_compress.evaluate import metrics
from derm_compress.report import paper
from derm_compress.report.paper import model
from derm_compress.report.results import Results
from derm_compress.report.tables import cells, claims, verdicts
from derm_compress.report.tables.verdicts import NOT, REPRODUCED, UNTESTED

FULL, HEALED = "pruned-6+sft|awq4", "pruned-6+sft"
MARKS = {"original": 3.4, "pruned-4": 3.3, "pruned-6": 2.5, "pruned-10": 1.0, HEALED: 3.0}
MARKS |= {"original|awq4": 2.0, "pruned-6|awq4": 1.0, FULL: 2.9}
MARKS |= {f"{HEALED}|bitsandbytes4": 2.5, f"{HEALED}|rtn4": 1.0, f"{HEALED}|rtn_symmetric4": 1.0}
MARKS |= {"pruned-6-magnitude+sft|awq4": 2.6}


def change(lo, hi, n=9):
    return metrics.Difference((lo + hi) / 2, lo, hi, 0.01, n, n)


def run(marks=MARKS, *, sizes=None, peak=4.2):
    """Results of a run whose variants get these marks, half a mark more on every third of 12
    pictures; sizes: their planned GiB at 7B."""
    table, names = fabricate.variants(), list(marks)
    planned = pd.DataFrame({"variant": names, "params_b": 0.003, "peak_gib_7b": peak})
    planned["blocks_removed_7b"] = 6
    planned["vram_gib_7b"] = planned.variant.map(dict.fromkeys(names, 4.0) | (sizes or {}))
    rows = [
        (name, f"i{i}", "name", mark + 0.5 if i % 3 == 0 else mark)
        for name, mark in marks.items()
        for i in range(12)
    ]
    answers = pd.DataFrame(rows, columns=["variant", "item", "question", "score"])
    return Results(
        answers=answers,
        evaluation=answers,
        variants=table[table.variant.isin(marks)],
        memory=planned,
        choice={"criterion": "output_similarity", "operating": 6, "deeper": 9},
    )


def with_score(results, score):
    answers = results.answers.assign(score=score)
    return dataclasses.replace(results, answers=answers, evaluation=answers)


def of_papers_size(results, **changes):
    planned = results.memory.assign(params_b=model.TOTAL / 1e9)
    return dataclasses.replace(results, memory=planned, **changes)


def timed(full, gpu="Tesla T4"):
    ms = {"variant": ["original", FULL], "total_ms_per_token": [150.0, full], "gpu": gpu}
    return pd.DataFrame(ms)


def row_of(results, start):
    found = claims.claims(results).set_index("claim")
    (claim,) = [name for name in found.index.unique() if name.startswith(start)]
    return found.loc[claim]


def verdict_of(results, start):
    return row_of(results, start).verdict


def cell_verdicts(results):
    return cells.cells(results).set_index(["table", "row", "cell"]).verdict


def test_numbers_are_near_as_their_rules_say():
    assert verdicts.rounds_to(5.04, 5.0396).verdict == REPRODUCED
    assert verdicts.rounds_to(5, 5.73).verdict == verdicts.rounds_to(6.659, 6.6601).verdict == NOT
    for printed, gib, bits, verdict in (
        (10.0, 10.29, 16, REPRODUCED),
        (10.0, 10.31, 16, NOT),
        (4.0, 4.29, 4, REPRODUCED),
        (4.0, 3.69, 4, NOT),
    ):
        assert verdicts.fits(printed, gib, bits=bits).verdict == verdict
    assert verdicts.lies_in(50, 49, 51).verdict == REPRODUCED
    assert verdicts.lies_in(50, 51, 53).verdict == NOT
    for lo, hi, verdict in ((-9, -1, NOT), (-9, 1, UNTESTED), (-3, 1, REPRODUCED), (-3, -1, NOT)):
        assert verdicts.stable(6, change(lo, hi)).verdict == verdict


@pytest.mark.parametrize(
    "claimed,lo,hi,verdict",
    [
        (7, 1, 4, REPRODUCED),
        (-7, -4, -1, REPRODUCED),
        (7, -4, -1, NOT),
        (7, -1, 4, NOT),
        (-2, -1, 4, NOT),
        (3, -1, 4, UNTESTED),
        (-1, -1, 4, UNTESTED),
    ],
)
def test_a_direction_needs_an_interval_on_the_claims_side(claimed, lo, hi, verdict):
    assert verdicts.points_to(claimed, change(lo, hi)).verdict == verdict
    assert verdicts.points_to(claimed, change(lo, hi, n=0)).verdict == UNTESTED


@pytest.mark.parametrize(
    "claim,worse,mark",
    [
        ("SFT heals", HEALED, 2.0),
        ("SFT before quantizing", FULL, 1.0),
        ("without SFT", "pruned-6|awq4", 2.0),
        ("AWQ scores 7", f"{HEALED}|bitsandbytes4", 3.4),
        ("the criterion scores 4", "pruned-6-magnitude+sft|awq4", 3.3),
        ("quantization without calibration fails", f"{HEALED}|rtn4", 2.9),
        ("round-to-nearest gives", f"{HEALED}|rtn4", 2.0),
        ("stable with up to 4", "pruned-4", 2.0),
        ("collapse with 10", "pruned-10", 2.0),
    ],
)
def test_a_claim_on_scores_turns_with_the_scores(claim, worse, mark):
    marks = MARKS | {"pruned-4": 3.4}
    sure = run(marks)
    if claim.startswith(("round", "collapse", "without")):
        sure = with_score(sure, sure.answers.score.mask(sure.answers.variant == worse, 1.0))
    assert verdict_of(sure, claim) == REPRODUCED
    assert verdict_of(run(marks | {worse: mark}), claim) == NOT
    gone = {name: value for name, value in marks.items() if name != worse}
    if not claim.startswith("quantization without"):
        assert verdict_of(run(gone), claim) == UNTESTED


def test_stable_is_refuted_by_any_depth_that_clearly_lost(monkeypatch):
    told = {"pruned-2": change(-6, -1), "pruned-4": change(-9, 1)}  # the second only uncertain
    monkeypatch.setattr(verdicts, "difference", lambda _, one, other: told.get(one, change(-1, 1)))
    results = run(MARKS | {"pruned-2": 3.4})
    assert verdict_of(results, "stable with up to 6") == NOT
    told["pruned-2"] = change(-6, 1)
    assert verdict_of(results, "stable with up to 4") == UNTESTED


@pytest.mark.parametrize(
    "claim,rival",
    [("better than pruning", "pruned-10"), ("better than quantization", "original|awq4")],
)
def test_the_same_ratio_needs_a_rival_of_the_same_size(claim, rival):
    near = {FULL: 3.7, rival: 3.8, "pruned-4": 9, "pruned-6": 9}
    far, better = near | {rival: 8}, MARKS | {rival: 3.4}
    assert verdict_of(run(sizes=near), claim) == REPRODUCED
    assert verdict_of(run(better, sizes=far), claim) == UNTESTED  # says nothing
    assert verdict_of(run(sizes=far), claim) == REPRODUCED  # larger and worse says more
    others = {"original|rtn_symmetric4": 1.0, "pruned-6-magnitude": 1.0}  # another criterion
    beside = near | dict.fromkeys(others, 3.75)
    assert verdict_of(run(better | others, sizes=beside), claim) == NOT
    small = dict.fromkeys(MARKS, 1.0)
    assert verdict_of(run(sizes=small | {FULL: 3.7}), claim) == UNTESTED


def test_sizes_turn_with_the_plan_and_what_is_ours_alone_has_no_verdict(monkeypatch):
    told = row_of(run(), "a 7B model")
    assert told.verdict.tolist() == [REPRODUCED, NOT]  # the weights fit 4 GB, the peak does not
    assert told.ours.tolist() == [model.weights_gib(6, "awq"), model.peak_gib(6, "awq")]
    assert told.why.iloc[0].endswith("below 4 in GiB")
    ours = row_of(run(peak=3.7), "ours, beside it")
    assert (ours.verdict, ours.ours) == (verdicts.OURS, 3.7)
    assert ours.why == "3.70 GiB are 3.97 GB: below 4 in GiB and GB"
    assert verdict_of(run(), "70 %") == verdict_of(run(), "71 %") == REPRODUCED
    monkeypatch.setattr(model, "weights_gib", lambda n, quantizer="": 3.83 if quantizer else 13.0)
    assert verdict_of(run(), "70 %") == REPRODUCED and verdict_of(run(), "71 %") == NOT


def test_speed_is_tested_with_the_papers_model_on_its_machine_alone():
    on_t4 = of_papers_size(run(), latency=timed(30.0))
    assert verdict_of(on_t4, "4.2 times") == REPRODUCED
    assert verdict_of(dataclasses.replace(on_t4, latency=timed(60.0)), "4.2 times") == NOT
    elsewhere = dataclasses.replace(on_t4, latency=timed(30.0, gpu="NVIDIA H100"))
    small = dataclasses.replace(run(), latency=timed(30.0))
    for results, of in ((elsewhere, "NVIDIA H100"), (small, "another model")):
        told = row_of(results, "4.2 times")
        assert told.verdict == UNTESTED and told.why.endswith(f"ours is the ratio of {of}")
        assert set(cell_verdicts(results).xs("latency, ms/token", level="cell")) == {UNTESTED}
    latency = cell_verdicts(on_t4).xs("latency, ms/token", level="cell")
    assert latency[4, "Original LLaVA"] == REPRODUCED  # 150 ms where 154 are printed
    assert latency[4, "Prune + SFT + Quant"] == NOT and latency[4, "Pruning Only"] == UNTESTED
    like = dataclasses.replace(on_t4, latency=timed(30.0, gpu="NVIDIA T400"))
    assert not verdicts.on_papers_machine(like)


def test_the_papers_model_must_show_the_papers_value():
    big = of_papers_size(run())
    assert verdict_of(big, "SFT heals") == NOT  # 12.5 points without any spread, 11.75 claimed
    spread = np.where(big.answers.variant == HEALED, np.resize([0.4, -0.4], len(big.answers)), 0)
    assert verdict_of(with_score(big, big.answers.score + spread), "SFT heals") == REPRODUCED
    found = cells.cells(big)
    assert set(found[found.cell.str.startswith("score")].tested_as) == {"value", ""}


def test_cells_of_a_small_run_are_directions():
    found = cell_verdicts(run())
    assert found[4, "Pruning Only", "score, %"] == REPRODUCED
    assert found[4, "Original LLaVA", "score, %"] == UNTESTED
    assert found[2, "Pruned LLaVA (5.2 B)", "score after SFT, %"] == UNTESTED
    better = cell_verdicts(run(MARKS | {"pruned-6": 3.5}))
    assert better[4, "Pruning Only", "score, %"] == NOT


def test_every_cell_of_the_papers_tables_is_there_and_shapes_turn_with_the_plan(monkeypatch):
    found = cells.cells(run())
    assert found.groupby("table").size().tolist() == [7 * 4, 2 * 4, 6 * 2, 6 * 4, 4]
    printed = [gb for k in (1, 3, 4) for gb in paper.table(k).paper_vram]
    assert found[found.cell == "VRAM, GB"].paper.tolist() == printed
    wrong = found[found.tested_as.str.startswith("7B plan") & (found.verdict == NOT)]
    assert wrong.cell.tolist() == ["compression, %"] * 2
    monkeypatch.setattr(model, "weights_gib", lambda n, quantizer="": 20.0)
    assert (cells.cells(run()).query("cell == 'VRAM, GB'").verdict == NOT).all()
