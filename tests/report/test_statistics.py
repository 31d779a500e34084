"""Statistics in closed form: Holm, power against simulation, seeds with known noise, confusion by hand."""

import dataclasses
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from fabricate import answers, seeds
from test_tables import results_of

from derm_compress.evaluate import metrics, secondary
from derm_compress.report import (
    parts,
    power,
    statistics_figures,
    statistics_findings,
    statistics_tables,
    tables,
)
from derm_compress.report.results import answers_of, of_predictions

FULL = "pruned-6+sft|awq4"


@pytest.fixture(scope="module")
def results():
    return results_of()


def test_power_in_closed_form_and_against_simulation():
    assert power.quantiles() == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    line = power.detectable(10, 39)
    assert line == pytest.approx(2.801585 * 10 / np.sqrt(39), abs=1e-4)
    assert power.chance(10, 39, line) == pytest.approx(power.POWER, abs=1e-4)
    assert power.chance(10, 39, 0) == pytest.approx(power.ALPHA)
    assert power.images_needed(10, line) in (39, 40) and power.images_needed(
        10, line / 2
    ) == pytest.approx(156, abs=1)
    rng, images, repeats = np.random.default_rng(0), 60, 400
    apart = rng.normal(power.detectable(1, images), 1, (repeats, images))
    found = np.mean([metrics.sign_flip_p(sums, n_permutations=400) < 0.05 for sums in apart])
    assert abs(found - power.POWER) < 0.07
    assert np.isnan([power.detectable(1, 0), power.detectable(0, 9), power.chance(0, 9, 1)]).all()
    assert np.isnan(power.images_needed(1, 0))


def test_comparisons_are_paired_and_corrected_over_the_whole_family(results):
    table = statistics_tables.comparisons(results).set_index("setting")
    assert table.against.value_counts().to_dict() == {"Table 5": 4, "Table 4": 2}
    own = metrics.paired_difference(
        *(answers_of(results.evaluation, v) for v in ("original|awq4", FULL))
    )
    assert table.loc["Quantization Only", ["difference", "p", "n", "images"]].tolist() == [
        own[0],
        own[3],
        own[4],
        own[5],
    ]
    order = table.sort_values("p")
    by_hand, high = [], 0.0
    for rank, p in enumerate(order.p):
        high = max(high, min(1.0, p * (len(order) - rank)))
        by_hand.append(high)
    assert order.p_holm.tolist() == pytest.approx(by_hand)
    five = tables.build(results)["table5_ablation"].set_index("setting")
    assert five.p_holm.dropna().to_dict() == pytest.approx(
        table.p_holm[five.p_holm.dropna().index].to_dict()
    )
    assert len(five.p_holm.dropna()) == 4


def test_the_power_table_follows_the_runs_own_spread(results):
    table = statistics_tables.powers(results)
    assert table.groupby("pictures").images.unique().map(list).to_dict() == {
        "test": [39],
        "test and held-out": [59],
    }
    row = table[(table.variant == "pruned-6") & (table.pictures == "test")].iloc[0]
    test = results.evaluation[results.evaluation.split == "test"]
    marks = [test[test.variant == v].groupby("item").score.mean() for v in ("pruned-6", FULL)]
    apart = 25 * (marks[0] - marks[1])
    assert (row.sd, row.difference, row.n) == pytest.approx((apart.std(), apart.mean(), 117))
    assert row.detectable == pytest.approx(power.detectable(row.sd, 39))
    assert any(
        "39 test pictures (117 answers)" in text
        for text in statistics_findings.findings_power(results)
    )


def seeds_of(training, rng, *, items=200, seeds=3, error=0.0):
    """Marks [answers, seeds]: pictures vary, each training shifts all of its answers, each answer errs on its own."""
    index = pd.MultiIndex.from_product(
        [[f"i{i:03}" for i in range(items)], ["a", "b", "c"]], names=["item", "question"]
    )
    picture = np.repeat(rng.normal(2.5, 0.4, items), 3)[:, None]
    shift = rng.normal(0, training, (1, seeds))
    return pd.DataFrame(
        picture + shift + rng.normal(0, error, (items * 3, seeds)), index=index
    ), shift


def spread(marks):
    return dict(
        zip(
            statistics_tables.COLUMNS["extra_seeds"][1:],
            statistics_tables.spread(marks),
            strict=True,
        )
    )


def test_training_noise_without_errors_is_the_spread_of_the_shifts():
    marks, shift = seeds_of(0.1, np.random.default_rng(1))
    told = spread(marks)
    assert (
        told["seed_sd"]
        == pytest.approx(25 * shift.std(ddof=1))
        == pytest.approx(told["training_sd"])
    )
    assert told["chance_sd"] == pytest.approx(0, abs=1e-9)
    assert told["item_sd"] == pytest.approx(
        25 * marks.mean(axis=1).groupby(level=0).mean().std() / np.sqrt(200)
    )
    assert (
        told["score_points_lo"] < told["score_points"] < told["score_points_hi"]
        and told["n"] == 600
    )
    half = (told["score_points_hi"] - told["score_points_lo"]) / 2
    assert half == pytest.approx(1.96 * told["item_sd"], rel=0.1)


def test_seeds_that_are_equally_good_have_no_training_noise_on_average():
    rng, runs = np.random.default_rng(2), {}
    for training in (0, 0.2):
        made = [
            statistics_tables.variances(seeds_of(training, rng, items=39, error=0.6)[0])
            for _ in range(200)
        ]
        runs[training] = np.mean(made, axis=0)
    assert runs[0][0] == pytest.approx(runs[0][1], rel=0.15)
    assert np.sqrt(runs[0.2][0] - runs[0.2][1]) == pytest.approx(25 * 0.2, rel=0.15)


def test_one_seed_gives_no_table_and_three_give_scores_and_the_net_gain(results):
    assert (
        statistics_tables.seeds(results).empty and statistics_findings.findings_seeds(results) == []
    )
    three = seeds()
    answered = pd.concat(
        [results.answers, answers(three, results.items[results.items.split == "test"])]
    )
    full = dataclasses.replace(
        results, variants=pd.concat([results.variants, three]), answers=answered
    )
    table = tables.tidy(statistics_tables.seeds(full), "extra_seeds")
    assert table.measure.tolist() == [
        "score of original+sft", "score of pruned-6+sft", "gain of pruned-6+sft, net of the control's",
    ]  # fmt: skip
    assert (table.seeds == 3).all() and table.n.tolist() == [117] * 3
    mean = {v: 25 * answers_of(full.answers, v).score.mean() for v in set(full.variants.variant)}
    trained = [mean[f"pruned-6+sft{end}"] - mean[f"original+sft{end}"] for end in ("", "~1", "~2")]
    net = np.array(trained) - mean["pruned-6"] + mean["original"]
    assert table.score_points[2] == pytest.approx(net.mean()) and table.lowest[2] == pytest.approx(
        net.min()
    )
    assert len(statistics_findings.findings_seeds(full)) == 3


def named(*pairs):
    """Predictions of the original: (disease, answer to the name question)."""
    rows = [
        (
            "original",
            f"i{i}",
            "test",
            disease,
            "name",
            text,
            f"It is {disease}.",
            True,
            4.0,
            "08_evaluation",
        )
        for i, (disease, text) in enumerate(pairs)
    ]
    names = [
        "variant",
        "item",
        "split",
        "disease",
        "question",
        "answer",
        "reference",
        "stopped",
        "score",
        "stage",
    ]
    return pd.DataFrame(rows, columns=names)


def test_diagnosis_accuracy_and_confusion_by_hand(results):
    frame = named(
        ("psoriasis", "This is psoriasis."), ("psoriasis", "lichen planus, I think"), ("psoriasis", "Lichen planus."),
        ("melanoma", "a melanoma"), ("melanoma", "melanoma or rosacea"), ("rosacea", "no idea"),
    )  # fmt: skip
    frame = frame.assign(
        diagnosis=secondary.diagnosis(frame), fact_f1=secondary.fact_f1(frame), similarity=np.nan
    )
    assert frame.diagnosis.tolist() == [
        "psoriasis",
        "lichen planus",
        "lichen planus",
        "melanoma",
        "several",
        "none",
    ]
    assert frame.fact_f1.tolist() == pytest.approx([1, 0, 0, 1, 2 / 3, 0])
    small = dataclasses.replace(results, predictions=frame)
    row = statistics_tables.diagnoses(small).iloc[0]
    assert (row.accuracy, row.n, row["none"], row.several) == (pytest.approx(100 / 3), 6, 1, 1)
    assert row.balanced == pytest.approx(100 * (1 / 3 + 1 / 2 + 0) / 3)
    assert row.most_confused == "psoriasis called lichen planus (2)"
    counts = statistics_tables.confusion(small, "original")
    assert counts.loc["psoriasis"].to_dict() == {
        "melanoma": 0, "psoriasis": 1, "rosacea": 0, "lichen planus": 2, "none": 0, "several": 0,
    }  # fmt: skip
    assert counts.to_numpy().sum() == 6
    drawn = statistics_figures.draw({"original": counts})
    assert drawn.data["count"].sum() == 6 and "33 % (original)" in drawn.finding


def test_secondary_scores_are_means_over_answers_with_runaways_counted(results):
    table = statistics_tables.secondary_scores(results).set_index("variant")
    test = results.predictions[results.predictions.split == "test"]
    one = test[test.variant == "pruned-10"]
    assert table.fact_f1["pruned-10"] == pytest.approx(100 * one.fact_f1.mean())
    assert (
        table.runaway["pruned-10"] == 117 == table.n["pruned-10"] and table.runaway["original"] == 0
    )
    names = one[one.question == "name"]
    assert table.name_exact["pruned-10"] == pytest.approx(
        100 * (names.diagnosis == names.disease).mean()
    )
    said = statistics_findings.findings_secondary(results)
    assert "117 of 117" in said[-1] and said[0].startswith("Rank correlation")


def test_similarity_is_1_for_the_reference_itself():
    frame = named(("psoriasis", "It is psoriasis."), ("psoriasis", "Bananas are yellow."))
    told = secondary.similarity(frame)
    assert told[0] == pytest.approx(1, abs=1e-5) and told[1] < 0.5
    known = secondary.predictions({}, frame, alike=["nobody"])
    some = pd.concat(
        [frame, frame.assign(split="heldout", item="h"), frame.assign(variant="other")]
    )
    told = secondary.predictions({}, some, alike=["original"])
    compared = told[told.similarity.notna()]
    assert set(compared.variant) == {"original"} and set(compared.split) == {"test"}
    assert "the variants of notebook 08 on test pictures alone" in parts.CAPTIONS["extra_secondary"]
    assert known.similarity.isna().all() and known.stage.tolist() == ["08_evaluation"] * 2


def test_every_score_table_is_rebuilt_from_the_one_file(results, tmp_path):
    results.predictions.to_parquet(tmp_path / "predictions.parquet")
    frame = pd.read_parquet(tmp_path / "predictions.parquet")
    assert not frame.duplicated(["variant", "item", "question"]).any()
    again = dataclasses.replace(results, predictions=frame, **of_predictions(frame))
    makers = [getattr(tables, f"table{n}") for n in range(1, 6)]
    makers += [
        tables.baselines,
        tables.criteria,
        statistics_tables.powers,
        statistics_tables.diagnoses,
    ]
    for make in makers:
        assert make(results).equals(make(again)), make.__name__


def test_statistics_need_no_torch():
    modules = (
        "statistics_tables statistics_findings statistics_figures planner power results secondary"
    )
    code = "import sys\n" + "".join(f"import derm_compress.{m}\n" for m in modules.split())
    done = subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"])
    assert done.returncode == 0


def test_findings_follow_plan_latency_and_comparisons(results):
    said = " ".join(statistics_findings.findings_planner(results))
    assert "19 of 19 figures" in said and "are GiB" in said and "settings differed" in said
    lines = statistics_findings.findings_latency(results)
    assert "4.0 times the" in lines[0] and "times as many tokens a second" in lines[-1]
    assert not any("No kernel" in line for line in lines)
    slow = results.latency.assign(
        kernel_share=np.where(results.latency.variant.isin([FULL, "original|awq4"]), 0.0, np.nan)
    )
    slow.loc[slow.kernel_share == 0, "decode_ms_per_token"] *= 10
    told = statistics_findings.findings_latency(dataclasses.replace(results, latency=slow))[-1]
    assert told.startswith("No kernel of this device reads the integers of") and FULL in told
    assert ", 10.0 times as long as unquantized" in told
    full = answers_of(results.evaluation, FULL)
    alike = [full.assign(variant=v, score=1.0 if "|rtn" in v else full.score)
             for v in (FULL, *(row[2] for row in statistics_tables.family(results)))]  # fmt: skip
    told = statistics_findings.findings_comparisons(
        dataclasses.replace(results, evaluation=pd.concat(alike))
    )
    assert "2 differ after Holm" in told[0] and "Quantization Only" in told[1]
    assert tables.tidy(statistics_tables.latencies(results), "extra_latency").batch.tolist()[0] == 1
