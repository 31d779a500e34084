"""Statistics in closed form: Holm, the smallest margin, seeds with known noise, diagnoses."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from fabricate import answers, seeds

from derm_compress.evaluate import metrics, secondary
from derm_compress.report import tables, trainings
from derm_compress.report.results import Results, answers_of
from derm_compress.report.tables import statistics

FULL = "pruned-6+sft|awq4"


def test_the_smallest_margin_is_found_with_power_where_nothing_differs():
    assert statistics.quantiles() == pytest.approx(1.959964 + 1.281552, abs=1e-5)
    rng, images, repeats = np.random.default_rng(0), 60, 4000
    margin = statistics.quantiles() / np.sqrt(images)
    means = rng.normal(0, 1 / np.sqrt(images), repeats)
    excluded = np.abs(means) + 1.959964 / np.sqrt(images) < margin
    assert abs(excluded.mean() - statistics.POWER) < 0.03


def test_comparisons_are_paired_and_corrected_over_the_whole_family(results):
    table = statistics.comparisons(results).set_index("setting")
    assert table.against.value_counts().to_dict() == {"Table 5": 4, "Table 4": 2}
    pair = (answers_of(results.evaluation, v) for v in ("original|awq4", FULL))
    own, row = metrics.paired_difference(*pair), table.loc["Quantization Only"]
    assert row[["difference", "p", "n", "images"]].tolist() == [own[0], own[3], own[4], own[5]]
    assert table.p_holm.tolist() == pytest.approx(metrics.holm(table.p))
    five = tables.make("table5_ablation", results).set_index("setting").p_holm.dropna()
    assert len(five) == 4 and five.to_dict() == pytest.approx(table.p_holm[five.index].to_dict())


def test_the_smallest_margin_follows_the_test_pictures_own_spread(results):
    test = results.evaluation[results.evaluation.split == "test"]
    names = statistics.family(results).variant
    marks = {name: test[test.variant == name].groupby("item").score.mean() for name in names}
    full = test[test.variant == FULL].groupby("item").score.mean()
    errors = [25 * (one - full).std() / np.sqrt(39) for one in marks.values()]
    known = statistics.quantiles() * np.median(errors)
    assert statistics.smallest_margin(results) == pytest.approx(known)


def seeds_of(training, rng, *, items=200, seeds=3, error=0.0):
    """(marks [answers, seeds], each training's shift): pictures vary, each training shifts all of
    its answers, each answer errs on its own."""
    names = [f"i{i:03}" for i in range(items)], ["a", "b", "c"]
    index = pd.MultiIndex.from_product(names, names=["item", "question"])
    picture = np.repeat(rng.normal(2.5, 0.4, items), 3)[:, None]
    shift = rng.normal(0, training, (1, seeds))
    noise = rng.normal(0, error, (items * 3, seeds))
    return pd.DataFrame(picture + shift + noise, index=index), shift


def test_training_noise_without_errors_is_the_spread_of_the_shifts():
    marks, shift = seeds_of(0.1, np.random.default_rng(1))
    told = statistics.spread(marks)
    assert told["seed_sd"] == pytest.approx(25 * shift.std(ddof=1))
    assert told["training_sd"] == pytest.approx(told["seed_sd"])
    assert told["chance_sd"] == pytest.approx(0, abs=1e-9)
    by_image = 25 * marks.mean(axis=1).groupby(level=0).mean()
    assert told["item_sd"] == pytest.approx(by_image.std() / np.sqrt(200)) and told["n"] == 600
    half = (told["score_points_hi"] - told["score_points_lo"]) / 2
    assert half == pytest.approx(1.96 * told["item_sd"], rel=0.1)


def test_seeds_that_are_equally_good_have_no_training_noise_on_average():
    rng, runs = np.random.default_rng(2), {}
    for training in (0, 0.2):
        draws = [seeds_of(training, rng, items=39, error=0.6)[0] for _ in range(200)]
        runs[training] = np.mean([trainings.variances(marks) for marks in draws], axis=0)
    assert runs[0][0] == pytest.approx(runs[0][1], rel=0.15)
    assert np.sqrt(runs[0.2][0] - runs[0.2][1]) == pytest.approx(25 * 0.2, rel=0.15)


def test_one_seed_gives_no_table_and_three_give_scores_and_the_net_gain(results):
    assert statistics.seeds(results).empty
    test = results.items[results.items.split == "test"]
    full = dataclasses.replace(
        results,
        variants=pd.concat([results.variants, seeds()]),
        answers=pd.concat([results.answers, answers(seeds(), test)]),
    )
    table = statistics.seeds(full)
    healed = "6 blocks removed, healed"
    gain = f"gain of {healed}, net of the control's"
    assert table.measure.tolist() == ["score of unpruned, healed", f"score of {healed}", gain]
    assert (table.seeds == 3).all() and table.n.tolist() == [117] * 3
    mean = 25 * full.answers.groupby("variant").score.mean()
    net = [mean[f"pruned-6+sft{end}"] - mean[f"original+sft{end}"] for end in ("", "~1", "~2")]
    net = np.array(net) - mean["pruned-6"] + mean["original"]
    assert table.score_points[2] == pytest.approx(net.mean())
    assert table.lowest[2] == pytest.approx(net.min())


def test_diagnosis_accuracy_by_hand():
    said = (
        ("psoriasis", "This is psoriasis."),
        ("psoriasis", "lichen planus, I think"),
        ("psoriasis", "Lichen planus."),
        ("melanoma", "a melanoma"),
        ("melanoma", "melanoma or rosacea"),
        ("rosacea", "no idea"),
    )
    frame = pd.DataFrame(said, columns=["disease", "answer"])
    frame = frame.assign(variant="original", question="name", stage="08_evaluation")
    frame["item"] = [f"i{i}" for i in range(6)]
    frame["diagnosis"] = secondary.diagnosis(frame)
    results = Results(predictions=frame)
    row = tables.make("extra_diagnosis", results).iloc[0]
    assert (row.accuracy, row.n, row["none"], row.several) == (pytest.approx(100 / 3), 6, 1, 1)
    assert row.balanced == pytest.approx(100 * (1 / 3 + 1 / 2 + 0) / 3)
