"""Tables and findings from fabricated frames: right columns, right scores, and sentences that follow the data."""

import dataclasses
import re
import subprocess
import sys
from dataclasses import replace

import fabricate
import numpy as np
import pandas as pd
import pytest

from derm_compress.evaluate import metrics
from derm_compress.report import (
    findings,
    paper,
    quantization_findings,
    ranking_findings,
    render,
    tables,
)
from derm_compress.report.results import ANSWERING, Results, answers_of, load_results, variant_id

SHOWN = "tables, findings, figures, quotes, notebook_html, render, ranking_figures, ranking_findings, verdicts, "
SHOWN += "planner, power, statistics_tables, statistics_figures, statistics_findings"


def results_of(**changes):
    files = fabricate.stage_files(**changes)
    frames = {name: value for part in files.values() for name, value in part.items()}
    return Results(
        items=frames["items"], plans=frames["plans.json"],
        similarity=frames["similarity"], values=frames["values"], scores=frames["scores"],
        choice=frames["choice.json"],
        training=frames["measured/training"], statistics=frames["statistics"], errors=frames["errors"],
        search=frames["search"], channels=frames["channels"], equal_bytes=frames["equal_bytes"],
        variants=frames["variants"], evaluation=frames["answers"], memory=frames["memory"],
        latency=frames["measured/latency"], judge_controls=frames["judge_controls"],
        predictions=frames["predictions"], architecture_7b=frames["architecture_7b.json"],
        answers=pd.concat([files[s]["answers"] for s in ANSWERING[:-1]], ignore_index=True),
    )  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return results_of()


@pytest.fixture(scope="module")
def built(results):
    return tables.build(results)


def test_the_papers_tables_have_their_stems_keys_and_columns(built):
    keys = {
        "table1_pruning": ["blocks_removed", "fraction_removed", "peak_gib", "paper_score", "paper_vram"],
        "table2_sft": ["blocks_removed", "score_before", "score_before_lo", "score_before_hi", "score_after",
                       "score_after_lo", "score_after_hi", "seconds", "train_peak_gib", "paper_score_after"],
        "table3_quantization": ["blocks_removed", "healed", "method", "bits", "peak_gib", "paper_score"],
        "table4_efficiency": ["variant", "bits", "decode_ms_per_token", "prefill_ms", "total_ms_per_token",
                              "paper_ms_per_token"],
        "table5_ablation": ["setting", "paper_score"],
    }  # fmt: skip
    everywhere = ["params_b", "vram_gib", "blocks_removed_7b", "params_b_7b", "vram_gib_7b"]
    for stem, columns in keys.items():
        score = [] if stem == "table2_sft" else ["score", "score_lo", "score_hi", "n"]
        assert set(columns + score + everywhere) <= set(built[stem].columns), stem
    assert not built["table1_pruning"].duplicated("blocks_removed").any()
    assert not built["table2_sft"].duplicated("blocks_removed").any()
    assert (
        not built["table3_quantization"]
        .duplicated(["blocks_removed", "healed", "method", "bits"])
        .any()
    )


def test_rows_stand_beside_the_papers(built):
    first = built["table1_pruning"].set_index("blocks_removed")
    assert (
        first.paper_score.dropna().to_dict()
        == paper.table(1).set_index("blocks_removed").paper_score.to_dict()
    )
    healed = built["table2_sft"].set_index("blocks_removed").paper_score_after
    assert healed[6] == 74.25 and healed[9] == 52.25 and pd.isna(healed[0])
    third = (
        built["table3_quantization"].set_index(["blocks_removed", "healed", "method"]).paper_score
    )
    assert third[6, True, "awq"] == 54.25 and third[0, False, "bitsandbytes"] == 66.25
    assert pd.isna(third[6, False, "awq"]) and pd.isna(third[6, True, "rtn"])
    assert built["table4_efficiency"].paper_score.tolist() == [80.12, 62.5, 74.25, 64.72, 25, 54.25]
    assert built["table5_ablation"].paper_score[:4].tolist() == [54.25, 47, 50, 25]


def test_scores_are_the_mean_grade_over_four_on_the_right_items(results, built):
    original = results.answers[results.answers.variant == "original"]
    row = built["table1_pruning"].iloc[0]
    assert row.score == pytest.approx(original.score.mean() * 25) and row.n == 117
    assert row.score_lo < row.score < row.score_hi
    assert (built["table4_efficiency"].n == (39 + 20) * 3).all() and (
        built["table3_quantization"].n == 117
    ).all()
    gain = built["table2_sft"]
    assert (gain.score_after - gain.score_before).tolist() == pytest.approx(gain.gain.tolist())
    change = built["table5_ablation"]
    assert change.difference[1:].tolist() == pytest.approx(
        (change.score[1:] - change.score[0]).tolist()
    )


def test_a_smaller_model_is_matched_by_fraction(results):
    plans = {name: plan | {"blocks": 8} for name, plan in results.plans.items()}
    kept = results.variants[results.variants.variant.isin(["original", "pruned-2"])]
    table = tables.build(dataclasses.replace(results, plans=plans, variants=kept, choice=None))[
        "table1_pruning"
    ]
    assert table.fraction_removed.tolist() == [0, 0.25]
    assert table.paper_score.tolist() == [80.12, 49.5]  # 2 of 8 are 8 of 32


def test_missing_scores_are_empty_in_the_csv_and_named_where_people_read(results):
    bare = dataclasses.replace(results, answers=None, evaluation=None, latency=None, training=None)
    built = tables.build(bare)
    for stem in ("table1_pruning", "table4_efficiency", "table5_ablation"):
        frame = pd.read_csv(pd.io.common.StringIO(tables.to_csv(built[stem])))
        assert frame.score.isna().all() and frame.vram_gib_7b.notna().all()
        assert "needs weights" in render.to_markdown(tables.readable(built[stem]))
        assert "needs weights" not in tables.to_csv(built[stem])
    assert findings.headline(bare).startswith("Scores need weights") and "GiB" in findings.headline(
        bare
    )


def test_equal_results_give_equal_bytes_with_fixed_digits(results, built):
    again = tables.build(results_of())
    assert [tables.to_csv(f) for f in again.values()] == [tables.to_csv(f) for f in built.values()]
    row = tables.to_csv(built["table1_pruning"]).splitlines()[2].split(",")
    named = dict(zip(built["table1_pruning"].columns, row, strict=True))
    assert (
        named["params_b"] == "0.001600000"
        and named["params_b_7b"] == "6.658660"
        and named["n"] == "117"
    )
    assert re.fullmatch(r"\d\d\.\d\d", named["score"]) and named["paper_vram"] == "12.5"


def test_a_stage_under_way_hands_over_its_own_frames(tmp_path, results):
    folders = fabricate.write_store(tmp_path, fabricate.stage_files())
    stored = load_results(folders)
    pd.testing.assert_frame_equal(
        tables.build(stored)["table1_pruning"], tables.build(results)["table1_pruning"]
    )
    early = {stage: path for stage, path in folders.items() if stage < "05"}
    given = load_results(early, choice={"operating": 2, "deeper": 4})
    assert (
        given.operating == 2
        and given.evaluation is None
        and len(tables.build(given)["table1_pruning"]) == 9
    )
    assert load_results({}).variants is None and tables.build(load_results({})) == {}


def test_cells_stay_inert_in_markdown():
    frame = pd.DataFrame({"what": ["<img onerror=x> a|b `c` [d](javascript:e) *f* \n g"]})
    text = render.to_markdown(frame)
    assert "<img" not in text and "[d]" not in text and text.count("\n") == 3
    assert "\\|" in text and "`" not in text


def better(row):
    """The opposite world: pruning heals, quantization alone is fatal, blindness does not matter."""
    if row.blocks_removed == 0 and row.method != "fp16":
        return 1.2
    return min(
        4, 2.2 + 0.1 * row.blocks_removed - (1.5 if row.healed and row.method == "fp16" else 0)
    )


def test_every_finding_follows_the_data(results):
    other = results_of(grade=better)
    makers = (findings.headline, findings.findings_pruning, findings.findings_sft, quantization_findings.findings_quantization,
              findings.findings_evaluation)  # fmt: skip
    for make in makers:
        assert make(results) and make(results) != make(other), make.__name__
    assert "below quantization alone" in findings.headline(results)
    assert "above quantization alone" in findings.headline(other)
    assert "above pruning alone" in findings.headline(results)
    without = results.variants[~results.variants.variant.str.endswith("|awq4")]
    said = findings.headline(dataclasses.replace(results, variants=without))
    assert (
        said == "No model ends as the paper's does, in 4-bit AWQ: add awq to methods and 4 to bits."
    )
    assert any(
        "first depth whose interval of paired" in text
        for text in findings.findings_pruning(results)
    )
    assert any("No depth's" in text for text in findings.findings_pruning(other))
    assert "no loss to heal" in findings.findings_sft(other)[-1]
    back = metrics.recovery(*(answers_of(results.answers, name) for name in
                              ("original", "pruned-6", "pruned-6+sft", "original+sft")))  # fmt: skip
    told = f"{back.share:.0f} % ({back.lo:.0f} to {back.hi:.0f}) of the {back.loss:.1f} points"
    assert told in findings.findings_sft(results)[-1]


def marked(marks):
    """A frame of answers from [images, questions] marks."""
    rows = [(f"i{i}", f"q{q}", mark) for i, row in enumerate(marks) for q, mark in enumerate(row)]
    return pd.DataFrame(rows, columns=["item", "question", "score"])


def test_recovery_is_net_of_the_control_and_its_interval_holds_the_truth():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(60):
        whole = rng.normal(3.2, 0.2, (39, 3))
        cut, back, extra = (
            whole + shift + rng.normal(0, 0.1, (39, 3)) for shift in (-1, -0.4, 0.1)
        )
        told = metrics.recovery(
            *(marked(np.clip(marks, 1, 4)) for marks in (whole, cut, back, extra)), n_boot=400
        )
        covered += told.lo <= 50 <= told.hi
    assert 51 <= covered <= 60 and told.n == 117


def test_recovery_in_closed_form_and_without_a_loss():
    sets = [marked(marks) for marks in ([[4], [4]], [[2], [2]], [[3], [4]], [[4], [4]])]
    assert metrics.recovery(*sets, n_boot=20_000) == (37.5, 50, 75, 50, 100, 2)
    none = metrics.recovery(sets[0], sets[0], sets[2], sets[3])
    assert none.loss == 0 and np.isnan([none.share, none.lo, none.hi]).all()
    seldom = metrics.recovery(
        *(marked(marks) for marks in ([[4], [4]], [[2], [4]], [[3], [4]], [[4], [4]]))
    )
    assert seldom.share == 50 and np.isnan(seldom.lo)  # a quarter of the draws have no loss
    empty = metrics.recovery(*sets[:3], sets[3].assign(score=np.nan))
    assert empty.n == 0 and np.isnan(empty.share)


def test_a_loss_is_told_in_pairs_where_two_intervals_overlap(results):
    """Every image loses one grade in one answer of three: clear in pairs, lost between the images' differences."""
    answers = results.answers[results.answers.variant == "original"]
    better = answers.assign(score=answers.groupby("item").ngroup() % 3 + 2)
    worse = better.assign(score=better.score - (better.question == "name"), variant="pruned-2")
    kept = results.variants[results.variants.variant.isin(["original", "pruned-2"])]
    pair = dataclasses.replace(results, variants=kept, answers=pd.concat([better, worse]))
    before, after = tables.build(pair)["table1_pruning"].itertuples()
    assert after.score_hi > before.score_lo
    assert findings.findings_pruning(pair)[1].endswith("below 0: 2 blocks removed.")


def test_a_criterion_that_loses_is_said_to_lose(results):
    text = "".join(ranking_findings.findings_criteria(results))
    assert text.startswith("At 6 blocks the paper's criterion") and "magnitude" in text
    answers = results.answers.assign(
        score=results.answers.score.where(results.answers.variant != "pruned-6", 1)
    )
    assert (
        "below magnitude"
        in ranking_findings.findings_criteria(dataclasses.replace(results, answers=answers))[0]
    )


def test_times_are_labelled_with_their_quartiles_and_measured_memory_is_shown(built):
    shown = tables.readable(built["table4_efficiency"])
    cell = shown.loc[0, "decode, ms/token (quartiles)"]
    assert cell == "10 (9 to 11)" and "score, % (quartiles)" not in shown
    taken = tables.readable(built["extra_measured"])
    assert {"weights, GiB", "measured weights, GiB", "process, GiB", "process peak, GiB"} <= set(
        taken.columns
    )
    assert (
        len(taken) == built["extra_measured"].variant.nunique() and "GPU in use, GiB" not in taken
    )


def test_the_test_splits_hash_tells_items_and_facts_not_their_order(results):
    items = results.items
    known = tables.items_hash(items)
    train = items.head(3).assign(split="train", id=["x", "y", "z"])
    assert tables.items_hash(pd.concat([train, items[::-1]])) == known
    for column, value in (
        ("disease", "melanoma"),
        ("facts", "{}"),
        ("id", "other"),
        ("split", "train"),
    ):
        changed = items.copy()
        changed.loc[0, column] = value if items.loc[0, column] != value else "rosacea"
        assert tables.items_hash(changed) != known, column


def test_findings_on_fine_tuning_follow_the_data(results):
    base = results.answers[results.answers.variant == "original"].assign(variant="base")
    for score, ended, words in ((1, True, "points"), (4, False, "below its base")):
        answers = results.answers.assign(stopped=ended)
        answers = pd.concat([answers, base.assign(score=score)])
        compared, how = findings.findings_finetune(dataclasses.replace(results, answers=answers))
        assert words in compared and ("above its base" in compared) == (score == 1)
        assert how.startswith("100 %" if ended else "0 %")
    assert findings.findings_finetune(results) == ["Scores need weights."]


def test_findings_on_data_say_what_photographs_cannot_show():
    drawn = fabricate.NOTED | {"unreadable": []}
    assert "Every file could be read." in findings.findings_data(drawn)
    assert any(fabricate.EVIL in text for text in findings.findings_data(fabricate.NOTED))
    taken = drawn | {
        "source": "pad-ufes-20",
        "counts": {"train": {"melanoma": 30}, "test": {"melanoma": 7}},
    }
    first, second, *_ = findings.findings_data(taken)
    assert first.startswith("37 photographs, 7 of them test images") and "not how well" in first
    assert second == "37 pictures: 30 train, 7 test."
    assert not any("photographs" in text for text in findings.findings_data(drawn))
    assert (
        "name, treatment and general features only."
        in findings.findings_data(taken, "llava-1.5-7b")[0]
    )


def test_findings_on_importance_and_activations_follow_the_data(results):
    swapped = {name: plan | {"order": plan["order"][::-1]} for name, plan in results.plans.items()}
    moved = results.statistics.assign(max=results.statistics["max"][::-1].to_numpy())
    other = dataclasses.replace(results, plans=swapped, statistics=moved)
    assert ranking_findings.findings_importance(other) != ranking_findings.findings_importance(
        results
    )
    assert quantization_findings.findings_activations(
        other
    ) != quantization_findings.findings_activations(results)
    original, pruned, healed, closing = quantization_findings.findings_activations(results)
    assert (
        original.startswith("original: the largest output is 35.0")
        and "block 31; 48 of 64 projections" in original
    )
    assert (
        pruned.startswith("pruned-6: ")
        and healed.startswith("pruned-6+sft: ")
        and "36 of 52" in healed
    )
    assert "do not change" in closing and "pruned-6 differs from original in 0 of 52" in closing
    quiet = results.statistics.outlier_channels.where(
        results.statistics.variant != "pruned-6+sft", 0
    )
    table = results.statistics.assign(outlier_channels=quiet)
    changed = quantization_findings.findings_activations(
        dataclasses.replace(results, statistics=table)
    )[-1]
    assert (
        "healing change which" in changed
        and "pruned-6+sft differs from original in 36 of 52" in changed
    )
    alone = dataclasses.replace(results, statistics=table[table.variant == "original"])
    assert len(quantization_findings.findings_activations(alone)) == 1


def test_the_studys_own_criterion_is_told_by_its_variants_not_by_the_order_of_the_plans(results):
    assert results.criterion == "output_similarity"
    backwards = dataclasses.replace(results, plans=dict(reversed(results.plans.items())))
    assert (
        ranking_findings.findings_importance(backwards)[0]
        == ranking_findings.findings_importance(results)[0]
    )
    other = results.variants.replace({"criterion": {"output_similarity": "perplexity"}})
    assert dataclasses.replace(results, variants=other).criterion == "perplexity"


def test_equal_models_cannot_be_told_apart(results):
    same = results.evaluation.assign(
        score=results.evaluation.score.where(results.evaluation.variant == "", 3)
    )
    text = findings.headline(dataclasses.replace(results, evaluation=same))
    assert "cannot be told apart" in text and "above" not in text and "below" not in text


def test_nothing_that_shows_results_needs_torch():
    code = f"import sys; from derm_compress.report import {SHOWN}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_heads_of_points_and_percentages_say_so(results):
    for name in ("seed_sd", "chance_sd", "training_sd", "item_sd", "cost"):
        assert tables.heading(name).endswith(", points")
    shown = tables.readable(tables.build(results)["extra_judges"])
    assert set(shown["as expected, %"]) - {"100.0", "0.0"} and "100.0" in set(
        shown["as expected, %"]
    )


def test_what_is_compressed_and_how_fast_it_is_follows_the_data(results):
    full, timed = variant_id(results.operating, healed=True, method="awq"), results.latency
    scale = {
        name: timed.variant.eq(full) for name in timed if name.startswith("decode_ms_per_token")
    }

    def said_of(factor, **more):
        scaled = {
            name: timed[name].where(~rows, timed[name] * factor) for name, rows in scale.items()
        }
        return findings.findings_speed(replace(results, latency=timed.assign(**scaled, **more)))[0]

    assert (
        "times faster" in said_of(0.1)
        and "times slower" in said_of(9)
        and "unpacked" not in said_of(9)
    )
    assert "they do not differ by more than repeats" in said_of(1) and "times" not in said_of(1)
    assert "packed weights are unpacked at every step" in said_of(9, kernel_share=0.0)
    assert "int4 kernel reads packed weights;" in said_of(9, kernel_share=1.0)
    assert "reads 75% of the packed linears and the others are unpacked" in said_of(
        9, kernel_share=0.75
    )
    said = findings.about(results)
    assert "tiny" in said[0] and f"{results.operating} blocks and {results.deeper} here" in said[1]
    assert findings.about(replace(results, choice={"operating": 4, "deeper": 6}))[1] != said[1]


def test_tables_of_rankings_need_only_what_stage_03_leaves(results):
    early = load_results({}, values=results.values, plans=results.plans, scores=results.scores)
    built = tables.build(early)
    assert set(built) == {"extra_agreement", "extra_calibration_size"}
    pairs = built["extra_agreement"].set_index(["one", "other"])
    assert (
        pairs.rho_lo.notna().tolist() == [True, True, False] and len(pairs) == 3
    )  # magnitude, random-0: no data
    assert built["extra_calibration_size"]["items"].tolist() == [1, 2, 5, 7]
    assert set(tables.build(replace(results, values=None))) == set(tables.build(results)) - set(
        built
    )


def test_tables_of_criteria_stand_on_answers(results, built):
    tests = built["extra_criteria_tests"].iloc[0]
    ours, theirs = (
        results.answers[results.answers.variant == v] for v in ("pruned-6", "pruned-6-magnitude")
    )
    assert tests.difference == pytest.approx(25 * (ours.score.mean() - theirs.score.mean()))
    assert tests.blocks_removed == 6 and tests.depths == 2 and "extra_sublayers" not in built
    bare = tables.build(replace(results, answers=None, evaluation=None))
    assert not {"extra_criteria_tests", "extra_cliffs"} & set(bare)
    shown = tables.readable(built["extra_criteria_tests"])
    assert re.fullmatch(
        r"-?[\d.]+ \(-?[\d.]+ to -?[\d.]+\)", shown["difference, all depths, points"][0]
    )
    assert re.search(r",0\.\d{4},", tables.to_csv(built["extra_criteria_tests"]))


def test_a_full_study_has_every_table():
    results = results_of(full=True)
    built = tables.build(results)
    assert list(built) == list(tables.COLUMNS)
    assert {"random (mean of 3)", "published", "angular-contiguous"} <= set(
        built["extra_criteria_tests"].criterion
    )
    cut = built["extra_sublayers"]
    assert not set(cut.criterion) & set(built["extra_criteria"].criterion) and len(cut) == 14
    assert (cut.attentions_removed + cut.mlps_removed > 0).all() and (cut.nearest_score > 0).all()
    assert built["table1_pruning"].blocks_removed.tolist() == [*fabricate.DEPTHS, *fabricate.DEEP]
    sizes = ["params_b", "vram_gib", "peak_gib", "params_b_7b", "vram_gib_7b"]
    assert built["extra_criteria"][sizes].notna().all(axis=None)
    assert list(built["table2_sft"].blocks_removed) == [0, 6, 9]
