"""Quantized models in pairs: closed forms, the correction for many, and sentences that follow the data."""

import dataclasses

import fabricate
import numpy as np
import pandas as pd
import pytest

from derm_compress.evaluate import metrics
from derm_compress.method import activations
from derm_compress.report import precision, quantization_figures, quantization_findings, tables
from derm_compress.report.results import Results, answers_of

FREE = ("rtn", "rtn_symmetric", "bitsandbytes", "hqq")
SOURCES = ("original", "pruned-6", "pruned-6+sft")


def results_of(grade):
    """Nine quantizers at 4, 3 and 2 bits on the three models, and the ways to spend the bytes of 3 bits."""
    rows = [
        fabricate.variant("original"),
        fabricate.variant("pruned-6", 6, criterion="output_similarity"),
    ]
    rows.append(rows[1] | {"variant": "pruned-6+sft", "healed": True})
    for row in list(rows):
        for bits in (4, 3, 2):
            for name in ("awq", "awq-text", "autoawq", *FREE):
                made = fabricate.quantized(row, name.split("-")[0], bits)
                rows.append(
                    made
                    | {
                        "quantizer": name,
                        "variant": f"{row['variant']}|{name.replace('awq', f'awq{bits}')}",
                    }
                )
                if "awq" not in name:
                    rows[-1]["variant"] = made["variant"]
    mixed = fabricate.quantized(rows[0], "awq", 2) | {
        "variant": "original|awq2-mixed",
        "bits": 3.0,
        "quantizer": "mixed",
    }
    rows.append(mixed | {"bits": 3.0, "quantizer": "awq-mixed"})
    table = pd.DataFrame(rows)
    items = fabricate.items(heldout=0)
    wanted = [(3, "original", "awq3"), (3, "original", "awq2-mixed"), (3, "pruned-6", "awq4")]
    wanted = pd.DataFrame(wanted, columns=["budget", "source", "form"]).assign(
        quantizer="awq", step="{}"
    )
    files = fabricate.stage_files()
    return Results(
        variants=table, answers=fabricate.answers(table, items, grade=grade), memory=fabricate.memory(table),
        choice={"operating": 6, "deeper": 9}, plans=files["03_layer_importance"]["plans.json"], equal_bytes=wanted,
        errors=pd.DataFrame({"variant": table.variant[3:], "block": 0, "relative_error": 1.0 / table.bits[3:]}),
    )  # fmt: skip


def fails(row):
    """The paper's world: what sees no activations fails once blocks are gone."""
    return 1.3 if row.method in FREE and row.blocks_removed else 3.2 - 0.1 * row.blocks_removed


@pytest.fixture(scope="module")
def paper():
    return results_of(fails)


@pytest.fixture(scope="module")
def alike():
    return results_of(lambda row: 2.6)


def test_all_pairs_at_once_are_the_paired_differences(paper):
    table = precision.method_tests(paper.answers, paper.variants).set_index("variant")
    assert len(table) == 3 * 3 * 7
    for name, other, kind in (
        ("pruned-6|rtn4", "pruned-6|awq4", "difference"),
        ("original|hqq3", "original", "cost"),
    ):
        told = metrics.paired_difference(
            answers_of(paper.answers, name), answers_of(paper.answers, other)
        )
        row = table.loc[name]
        found = [
            row[kind],
            row[f"{kind}_lo"],
            row[f"{kind}_hi"],
            row["p" if kind == "difference" else "p_cost"],
            row.n,
        ]
        assert np.allclose(found, [*told[:4], told.n])
    assert table.loc["original|awq4", ["difference", "p", "p_holm"]].isna().all()
    four = table[table.bits == 4]
    assert np.allclose(four.p_holm, metrics.holm(four.p), equal_nan=True)
    assert (
        not table.loc["original|bitsandbytes4", "calibrated"]
        and table.loc["original|awq4-text", "calibrated"]
    )


def test_unanswered_models_have_empty_cells(paper):
    table = precision.method_tests(None, paper.variants)
    assert (
        len(table) == 63
        and table[["difference", "cost", "p_holm"]].isna().all().all()
        and not table.n.any()
    )


def test_the_papers_claim_is_seen_where_it_holds_and_only_there(paper, alike):
    seen, unseen = (
        " ".join(quantization_findings.findings_quantization(r)) for r in (paper, alike)
    )
    assert "as the paper has it, is seen here: on models with blocks removed 8 of 8 lose" in seen
    some = results_of(lambda row: 1.3 if row.method == "rtn_symmetric" else 3.2)
    anywhere = " ".join(quantization_findings.findings_quantization(some))
    assert "is not seen here: on models with blocks removed 0 of 8" in anywhere, (
        "they fail on the unpruned model too"
    )
    one = results_of(lambda row: fails(row) if row.method == "rtn" else 2.9)
    assert "is seen for some: on models with blocks removed 2 of 8" in " ".join(
        quantization_findings.findings_quantization(one)
    )
    assert (
        "of 4 methods without calibration at 4 bits 0 score below AWQ" in seen
    )  # the unpruned model
    assert "is not seen here" in unseen
    assert (
        "AWQ calibrated on text alone against plain AWQ, 9 pairs" in seen
        and "scales chosen by AutoAWQ" in seen
    )
    assert quantization_findings.findings_quantization(
        dataclasses.replace(paper, answers=None)
    ) == ["Scores need weights."]


def test_scales_on_the_nf4_grid_are_compared_with_the_grid_alone(paper):
    four = paper.variants[paper.variants.variant.str.endswith("|bitsandbytes4")]
    names, scaled = (
        four.variant.str.replace("bitsandbytes4", "awq_nf4"),
        {"method": "awq_nf4", "quantizer": "awq_nf4"},
    )
    made = four.assign(variant=names, **scaled)
    table, pictures = pd.concat([paper.variants, made]), fabricate.items(heldout=0)
    for gain in (-0.8, 0.8):
        grade = lambda row, gain=gain: 2.5 + gain * (row.quantizer == "awq_nf4")  # noqa: E731
        graded = fabricate.answers(pd.concat([four, made]), pictures, grade=grade)
        row = precision.nf4_pairs(graded, table).set_index("variant").loc["pruned-6|awq_nf4"]
        pair = [answers_of(graded, f"pruned-6|{name}") for name in ("awq_nf4", "bitsandbytes4")]
        told = metrics.paired_difference(*pair)
        assert (
            np.allclose([row.difference, row.difference_lo, row.difference_hi, row.p], told[:4])
            and row.n == told.n
        )
        (said,) = quantization_findings.scaled_nf4(
            dataclasses.replace(paper, variants=table, answers=graded)
        )
        assert (
            f"{3 * (gain < 0)} clearly worse, {3 * (gain > 0)} clearly better of 3 (Holm)" in said
        )
    assert quantization_findings.scaled_nf4(paper) == []


def test_wins_and_losses_at_equal_bytes_are_both_told():
    one = lambda better, worse: quantization_findings.equal_bytes_verdict(
        [(3, True, better, worse, 2)]
    )  # noqa: E731
    assert (
        "better in some pairs and worse in others than 3 bits after SFT (1 above, 1 below"
        in one(1, 1)
    )
    assert "is, at equal bytes and corrected for all comparisons (Holm), better than" in one(2, 0)
    assert "worse than" in one(0, 1) and "neither clearly better nor worse than" in one(0, 0)


def test_equal_bytes_are_compared_with_all_blocks_at_the_budget(paper):
    table = tables.build(paper)["extra_equal_bytes"]
    assert table.budget.tolist() == [3, 3, 3] and table.mean_bits.tolist() == [3, 3, 4]
    assert table.difference.isna().tolist() == [True, False, False] and table.score.notna().all()
    worse, better = (
        results_of(lambda row, s=s: 2.5 + s * (row.blocks_removed > 0)) for s in (-1, 1)
    )
    for results, word in ((worse, "is, at equal bytes and corrected for all comparisons (Holm), worse than 3 bits"),
                          (better, "better than 3 bits before SFT (1 above, 0 below, of 1)")):  # fmt: skip
        assert word in quantization_findings.findings_equal_bytes(results)[-1]
    assert quantization_figures.fig_equal_bytes(table).finding.startswith("highest score")
    assert (
        quantization_findings.findings_equal_bytes(dataclasses.replace(paper, equal_bytes=None))
        == []
    )


def with_errors(results, factor):
    """A block's error is 0.1 a method, AWQ's `factor` of it, and twice that in block 1."""
    table = results.variants[results.variants.bits < 16]
    first = np.where(table.quantizer == "awq", 0.1 * factor, 0.1)
    each = [
        pd.DataFrame({"variant": table.variant, "block": b, "relative_error": first * (1 + b)})
        for b in (0, 1)
    ]
    return dataclasses.replace(results, errors=pd.concat(each))


def test_awqs_error_is_told_beside_plain_roundings_for_each_model(alike):
    for factor, word in ((0.5, "below"), (2, "above"), (1, "at")):
        said = quantization_findings.findings_quantization(with_errors(alike, factor))
        (told,) = [text for text in said if text.startswith("AWQ's mean output error")]
        models = ("the unpruned model", "without 6 blocks before SFT", "without 6 blocks after SFT")
        assert told.count(f"{word} it for") == 3 and all(name in told for name in models)
        assert told.count(f"({0.15 * factor:.4f} and 0.1500, 4 bits)") == 3


def test_errors_by_block_are_drawn_for_all_main_models_and_stand_in_a_table(paper):
    results = with_errors(paper, 0.5)
    tests = precision.method_tests(results.answers, results.variants)
    drawing = quantization_figures.fig_errors(results.errors, tests, list(SOURCES))
    panels = drawing.figure.axes
    assert [axis.get_title(loc="left") for axis in panels] == [
        f"{name}, 4 bits" for name in SOURCES
    ] + [""]
    assert all(len(axis.lines) == 7 for axis in panels[:3])
    assert drawing.finding.startswith(
        "smallest output error: AWQ on original, pruned-6 and pruned-6+sft"
    )
    table = tables.build(results)["extra_errors"]
    names = ("awq", "awq-text", "autoawq", *FREE)
    assert len(table) == 3 * 3 * 2 and set(table.columns[4:]) == {f"error_{name}" for name in names}
    row = table[(table.blocks_removed == 6) & table.healed & (table.bits == 3) & (table.block == 1)]
    assert row.error_awq.tolist() == [0.1] and row.error_rtn.tolist() == [0.2]
    assert "0.2000" in tables.to_csv(row) and "error rtn symmetric" in tables.readable(table)


def test_scales_of_outlier_channels_are_told_apart():
    assert quantization_findings.OUTLIER_FACTOR == activations.OUTLIER_FACTOR
    frame = pd.DataFrame({"variant": "original", "block": 0, "group": "qkv", "channel": range(64)})
    frame = frame.assign(peak=np.r_[np.ones(63), 7.0], scale=np.r_[np.ones(63), 2.0])
    said = quantization_findings.findings_channels(Results(channels=frame))[0]
    assert "of 64 input channels 1 are outliers" in said
    assert (
        f"by {2 ** (63 / 64):.2f}, all others' by {2 ** (-1 / 64):.2f}" in said
        and "in rank at 1.00" in said
    )
    quiet = quantization_findings.findings_channels(
        Results(channels=frame.assign(peak=range(1, 65)))
    )
    assert "multiplies" not in quiet[0]


def test_models_without_figure_4s_block_are_named():
    files = fabricate.stage_files()["06_activation_analysis"]
    surface, told = files["figure4"].assign(block=29), quantization_findings.findings_activations
    (said,) = [text for text in told(Results(**files | {"figure4": surface})) if "Figure 4" in text]
    assert said == (
        "Block 29 (30 counted from 1) of Figure 4 is gone in pruned-6 and pruned-6+sft: the figure leaves them out."
    )
    everywhere = pd.concat([surface.assign(variant=name) for name in SOURCES])
    assert "Figure 4" not in " ".join(told(Results(**files | {"figure4": everywhere})))
    assert (
        "The block of Figure 4 is gone in original, pruned-6 and pruned-6+sft"
        in told(Results(**files | {"figure4": surface[:0]}))[-1]
    )


def test_outliers_and_tails_of_every_projection_are_told():
    files = fabricate.stage_files()["06_activation_analysis"]
    said = quantization_findings.findings_outliers(Results(statistics=files["statistics"]))
    assert len(said) == 3 and said[0].startswith(
        "original: q_proj has most outlier channels, 1.5 a block"
    )
    drawing = quantization_figures.fig_activation_map(files["statistics"])
    assert drawing.finding.endswith("original 75%, pruned-6 69%, pruned-6+sft 69%")
