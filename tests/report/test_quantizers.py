"""Quantized models in pairs: closed forms, correction for many, equal bytes, errors by block."""

import dataclasses

import fabricate
import numpy as np
import pandas as pd
import pytest

from derm_compress.evaluate import metrics
from derm_compress.report import tables
from derm_compress.report.results import Results, answers_of
from derm_compress.report.tables import quantizers

METHODS = ("awq", "awq-text", "autoawq", "rtn", "rtn_symmetric", "bitsandbytes", "hqq")


def variants():
    """Seven quantizers at 4, 3 and 2 bits on the three main models, and one of two widths."""
    pruned = fabricate.variant("pruned-6", 6, criterion="output_similarity")
    healed = fabricate.variant("pruned-6+sft", 6, criterion="output_similarity", healed=True)
    rows = [fabricate.variant("original"), pruned, healed]
    for row in list(rows):
        for bits in (4, 3, 2):
            for name in METHODS:
                made = fabricate.quantized(row, name.split("-")[0], bits)
                made["variant"] += name.removeprefix(made["method"])
                rows.append(made | {"quantizer": name})
    mixed = fabricate.quantized(rows[0], "awq", 2)
    rows.append(mixed | {"variant": "original|awq2-mixed", "bits": 3.0, "quantizer": "awq-mixed"})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def results():
    table = variants()
    wanted = [(3, "original", "awq3"), (3, "original", "awq2-mixed"), (3, "pruned-6", "awq4")]
    wanted = pd.DataFrame(wanted, columns=["budget", "source", "form"]).assign(quantizer="awq")
    return Results(
        variants=table,
        answers=fabricate.answers(table, fabricate.items(heldout=0)),
        memory=fabricate.memory(table),
        choice={"criterion": "output_similarity", "operating": 6, "deeper": 9},
        equal_bytes=wanted,
    )


def test_all_pairs_at_once_are_the_paired_differences(results):
    table = quantizers.method_tests(results).set_index("variant")
    assert len(table) == 3 * 3 * 7 and "original|awq2-mixed" not in table.index
    for name, other, kind, p in (
        ("pruned-6|rtn4", "pruned-6|awq4", "difference", "p"),
        ("original|hqq3", "original", "cost", "p_cost"),
    ):
        pair = (answers_of(results.answers, v) for v in (name, other))
        told, row = metrics.paired_difference(*pair), table.loc[name]
        found = [row[kind], row[f"{kind}_lo"], row[f"{kind}_hi"], row[p], row.n]
        assert np.allclose(found, [*told[:4], told.n])
    assert table.loc["original|awq4", ["difference", "p", "p_holm"]].isna().all()
    four = table[table.bits == 4]
    assert np.allclose(four.p_holm, metrics.holm(four.p), equal_nan=True)
    assert table.calibrated["original|awq4-text"]
    assert not table.calibrated["original|bitsandbytes4"]


def test_a_second_training_and_a_rivals_models_are_not_the_studys_own(results):
    seed = fabricate.seeds().iloc[2].to_dict()
    rival = fabricate.variant("pruned-6-magnitude", 6, criterion="magnitude")
    more = [seed, fabricate.quantized(seed, "awq"), rival, fabricate.quantized(rival, "awq")]
    both = pd.concat([results.variants, pd.DataFrame(more)])
    known = quantizers.quantized(dataclasses.replace(results, variants=both))
    assert set(known.variant) == set(quantizers.quantized(results).variant)


def test_equal_bytes_are_compared_with_all_blocks_at_the_budget(results):
    table = tables.make("extra_equal_bytes", results)
    assert table.budget.tolist() == [3, 3, 3] and table.mean_bits.tolist() == [3, 3, 4]
    assert table.difference.isna().tolist() == [True, False, False] and table.score.notna().all()
    pair = (answers_of(results.answers, v) for v in ("pruned-6|awq4", "original|awq3"))
    assert table.difference[2] == pytest.approx(metrics.paired_difference(*pair).difference)


def test_errors_by_block_stand_side_by_side(results):
    table = results.variants[results.variants.bits < 16]
    of_awq = np.where(table.quantizer == "awq", 0.05, 0.1)
    each = [
        pd.DataFrame({"variant": table.variant, "block": b, "relative_error": of_awq * (1 + b)})
        for b in (0, 1)
    ]
    results = dataclasses.replace(results, errors=pd.concat(each))
    third = tables.make("table3_quantization", results)
    assert third.relative_error[third.method == "awq"].tolist() == pytest.approx([0.075] * 9)


def test_advice_for_the_bytes_of_a_width_takes_whatever_fits_them(results):
    asked = dataclasses.replace(results, evaluation=results.answers.assign(split="test"))
    table = tables.make("decisions", asked)
    told = table[table.situation.str.contains("bits in all blocks")]
    assert [*told.situation.str[13:19]] == ["2 bits", "3 bits"]
    sizes = asked.memory.set_index("variant").vram_gib
    room = 1.01 * sizes["original|awq3"]
    scores = asked.answers.groupby("variant").score.mean()
    best = scores[scores.index.map(sizes) <= room].idxmax()
    assert told["take"].iloc[-1] == asked.names[best]
