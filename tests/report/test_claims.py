"""Every verdict follows the one rule: turned data turn it."""

import dataclasses

import fabricate
import pandas as pd
import pytest

from derm_compress.report import rule, tables, trainings
from derm_compress.report.paper import model, numbers
from derm_compress.report.results import Results
from derm_compress.report.rule import HOLDS, NOT, OPEN, UNTESTABLE
from derm_compress.report.tables import answer, claims

FULL, HEALED = "pruned-6+sft|awq4", "pruned-6+sft"
MARKS = {"original": 3.4, "original+sft": 3.4, "pruned-4": 3.3, "pruned-6": 2.5, "pruned-10": 1.0}
MARKS |= {HEALED: 3.3, "original|awq4": 3.3, "pruned-6|awq4": 1.0, FULL: 3.2}
MARKS |= {f"{HEALED}|bitsandbytes4": 2.1, f"{HEALED}|rtn4": 1.0, f"{HEALED}|rtn_symmetric4": 1.0}
MARKS |= {"pruned-6-magnitude+sft|awq4": 2.6}


def run(marks=MARKS, *, sizes=None, pictures=12):
    """Results of a run whose variants get these marks, with a little noise over the pictures;
    sizes: GiB of their weights."""
    table = fabricate.variants()
    planned = pd.DataFrame({"variant": list(marks), "params_b": 0.003})
    planned["vram_gib"] = planned.variant.map(dict.fromkeys(marks, 4.0) | (sizes or {}))
    rows = [
        (name, f"i{i}", "name", min(4, mark + 0.02 * (i * (k + 2) % 5)), "test")
        for k, (name, mark) in enumerate(marks.items())
        for i in range(pictures)
    ]
    answers = pd.DataFrame(rows, columns=["variant", "item", "question", "score", "split"])
    return Results(
        answers=answers,
        evaluation=answers,
        variants=table[table.variant.isin(marks)],
        memory=planned,
        choice={"criterion": "output_similarity", "operating": 6, "deeper": 9},
    )


def row_of(results, start):
    (claim,) = [one for one in claims.TOLD["claims"] if one["claim"].startswith(start)]
    return claims.claims(results, [claim]).iloc[0]


def verdict_of(results, start):
    return row_of(results, start).verdict


@pytest.mark.parametrize("claimed,at", [(20, 15), (-20, -15), (4, 2), (-8, -4), (10, 5)])
def test_a_bound_is_the_claim_less_its_margin_but_at_least_half_of_it(claimed, at):
    assert rule.bound(claimed, 5) == at


def test_the_papers_figures_are_those_of_its_tables():
    scores = {n: numbers.table(n).set_index("setting").paper_score for n in (4, 5)}
    one, told = numbers.table(1).set_index("blocks_removed").paper_score, []
    for claim in claims.TOLD["claims"]:
        name, *where = claim["ask"]
        if name == "difference":
            told.append(scores[where[0]][where[1]] - scores[where[0]][where[2]])
        elif name in ("score", "score_without"):
            told.append(scores[where[0]][where[1]] if name == "score" else one[where[0]])
        else:
            continue
        assert claim["paper"] == pytest.approx(told[-1]), claim["claim"]
        assert (claims.bound(claim) < claim["paper"]) != claim.get(
            "below", False
        ) or "bound" in claim
    assert len(told) == 7


@pytest.mark.parametrize(
    "lo,hi,above,verdict",
    [(3, 6, True, HOLDS), (-3, 1, True, NOT), (1, 6, True, OPEN), (3, 6, False, NOT)],
)
def test_the_rule_is_symmetric(lo, hi, above, verdict):
    assert rule.side(lo, hi, 2, above) == verdict
    assert rule.side(-hi, -lo, -2, not above) == verdict


def test_p_is_below_five_percent_exactly_where_the_interval_excludes_the_bound():
    assert rule.p_value(4, 2, 6, 2) == pytest.approx(0.05)
    assert rule.p_value(4, 2.1, 6, 2) < 0.05 < rule.p_value(4, 1.9, 6, 2)
    assert rule.p_value(4, 3, 9, 9) == pytest.approx(0.05)  # the nearer end counts
    assert (rule.p_value(1, 1, 1, 1), rule.p_value(1, 1, 1, 0)) == (1, 0)


def test_holm_runs_over_all_claims_that_count_and_can_be_tested():
    told = {"ours": 4.0, "lo": 2.1, "hi": 5.9, "bound": 2.0, "above": True}
    told |= {"counted": True, "untestable": False}
    one = rule.judge(pd.DataFrame([told]))
    assert one.verdict.tolist() == [HOLDS]
    rows = [told, told, told | {"counted": False}, told | {"untestable": True}]
    many = rule.judge(pd.DataFrame(rows))
    assert many.verdict.tolist() == [OPEN, OPEN, HOLDS, UNTESTABLE]  # twice p is above 0.05
    assert many.p_holm[0] == pytest.approx(2 * one.p_holm[0]) and many.p_holm[2:].isna().all()


@pytest.mark.parametrize(
    "claim,worse,mark",
    [
        ("SFT gives back", HEALED, 2.5),
        ("SFT before quantizing", FULL, 1.5),
        ("AWQ costs the unpruned", "original|awq4", 2.8),
        ("AWQ scores 7", f"{HEALED}|bitsandbytes4", 3.2),
        ("Without calibration", f"{HEALED}|rtn4", 3.2),
        ("Rounding to nearest", f"{HEALED}|rtn4", 2.0),
        ("Without SFT", "pruned-6|awq4", 2.0),
        ("The criterion scores", "pruned-6-magnitude+sft|awq4", 3.2),
        ("Scores are stable with up to 4", "pruned-4", 2.0),
        ("Without 10", "pruned-10", 2.0),
    ],
)
def test_a_claim_on_scores_turns_with_the_scores(claim, worse, mark):
    assert verdict_of(run(), claim) == HOLDS
    assert verdict_of(run(MARKS | {worse: mark}), claim) == NOT
    gone = {name: value for name, value in MARKS.items() if name != worse}
    if not claim.startswith("Without calibration"):
        assert verdict_of(run(gone), claim) == UNTESTABLE


@pytest.mark.parametrize(
    "claim,rival",
    [("4 points above pruning", "pruned-10"), ("4 points above quant", "original|awq4")],
)
def test_one_technique_is_compared_at_equal_bytes(claim, rival):
    near = dict.fromkeys(MARKS, 9.0) | {FULL: 3.7, rival: 3.8}
    worse, better = MARKS | {rival: 2.0}, MARKS | {rival: 3.4}
    assert verdict_of(run(worse, sizes=near), claim) == HOLDS
    assert verdict_of(run(better, sizes=near), claim) == NOT
    far = near | {rival: 8.0}
    assert verdict_of(run(worse, sizes=far), claim) == HOLDS  # larger and worse says more
    assert verdict_of(run(better, sizes=far), claim) == UNTESTABLE  # larger and better says nothing
    assert verdict_of(run(sizes=dict.fromkeys(MARKS, 1.0) | {FULL: 3.7}), claim) == UNTESTABLE


def test_of_equal_bytes_the_healed_and_better_rival_counts():
    sizes = dict.fromkeys(MARKS, 9.0) | {FULL: 3.7, "original|awq4": 3.6, HEALED: 3.8}
    assert answer.single(run(sizes=sizes)).variant == HEALED
    assert answer.single(run(sizes=sizes), answer.QUANTIZATION).variant == "original|awq4"
    assert answer.single(dataclasses.replace(run(), memory=None)) is None


def test_sizes_are_arithmetic_in_both_units_and_are_not_counted(monkeypatch):
    weights, peak = row_of(run(), "Weights of the 7B"), row_of(run(), "Its peak")
    assert (weights.verdict, peak.verdict) == (OPEN, NOT)  # 3.74 GiB are 4.01 GB
    assert not weights.counted and not peak.counted and pd.isna(weights.p_holm)
    assert weights.because == "3.74 GiB or 4.01 GB, 6 of 32 blocks removed"
    assert verdict_of(run(), "Memory falls") == HOLDS
    monkeypatch.setattr(model, "weights_gib", lambda n, quantizer="": 6.0 if quantizer else 13.0)
    assert verdict_of(run(), "Weights of the 7B") == NOT
    assert verdict_of(run(), "Memory falls") == OPEN  # of the weights less, of the peak as before


def timed(full, gpu="Tesla T4"):
    ms = {"variant": ["original", FULL], "decode_ms_per_token": [150.0, full], "gpu": gpu}
    ends = {f"decode_ms_per_token_{end}": ms["decode_ms_per_token"] for end in ("lo", "hi")}
    return pd.DataFrame(ms | ends)


def test_speed_is_tested_with_the_papers_model_on_its_machine_alone():
    big = run().memory.assign(params_b=model.TOTAL / 1e9)
    for gpu, full, size, verdict in (
        ("Tesla T4", 30.0, big, HOLDS),
        ("Tesla T4", 60.0, big, NOT),
        ("NVIDIA T400", 30.0, big, UNTESTABLE),
        ("Tesla T4", 30.0, run().memory, UNTESTABLE),
    ):
        results = dataclasses.replace(run(), latency=timed(full, gpu), memory=size)
        assert verdict_of(results, "A T4 answers") == verdict


def test_trainings_widen_what_was_trained_and_only_that(full):
    better = full.answers.score.mask(full.answers.variant == f"{HEALED}~1", 4.0)
    several = dataclasses.replace(full, answers=full.answers.assign(score=better))
    once = dataclasses.replace(several, variants=full.variants[full.variants.sft_seed == 0])
    variance = trainings.variance(several)
    assert variance > 0 == trainings.variance(once)
    for one, other, trained in (
        (HEALED, "pruned-6", 1),
        (FULL, "original+sft", 2),
        (FULL, f"{HEALED}|rtn4", 0),  # both of one training
        ("pruned-6", "original", 0),
    ):
        wide, plain = (trainings.apart(run, run.answers, one, other) for run in (several, once))
        reach = ((plain.hi - plain.difference) ** 2 + trained * rule.Z**2 * variance) ** 0.5
        assert wide.hi - wide.difference == pytest.approx(reach)
    two, plain = (
        tables.make("table2_sft", run).set_index("blocks_removed") for run in (several, once)
    )
    for column, trained in (("score_before", 0), ("score_after", 1), ("gain", 1)):
        wide, narrow = (t.loc[6, f"{column}_hi"] - t.loc[6, column] for t in (two, plain))
        assert wide**2 - narrow**2 == pytest.approx(trained * rule.Z**2 * variance)
