"""Tables from fabricated frames: the right rows beside the paper's, on the right items, as text."""

import re
from dataclasses import replace

import fabricate
import pandas as pd
import pytest

from derm_compress.report import tables
from derm_compress.report.page import to_markdown
from derm_compress.report.results import Results, items_hash, load_results, pick
from derm_compress.report.sentences import Facts
from derm_compress.report.tables import joins

GONE = ("blocks_removed", "attentions_removed", "mlps_removed")


def test_scores_are_the_mean_grade_over_four_on_the_right_items(results):
    first, third, fourth = (
        tables.make(stem, results)
        for stem in ("table1_pruning", "table3_quantization", "table4_efficiency")
    )
    original = results.answers[results.answers.variant == "original"]
    row = first.iloc[0]
    assert row.score == pytest.approx(original.score.mean() * 25) and row.n == 117
    assert row.score_lo < row.score < row.score_hi
    assert (fourth.n == (39 + 20) * 3).all() and (third.n == 117).all()
    gain = tables.make("table2_sft", results)
    assert (gain.score_after - gain.score_before).tolist() == pytest.approx(gain.gain.tolist())
    five = tables.make("table5_ablation", results)
    apart = (five.score - five.score[0])[1:]
    assert five.difference[1:].tolist() == pytest.approx(apart.tolist())


def test_a_smaller_model_is_matched_by_fraction(results):
    plans = {name: plan | {"blocks": 8} for name, plan in results.plans.items()}
    kept = results.variants[results.variants.variant.isin(["original", "pruned-2"])]
    small = replace(results, plans=plans, variants=kept, choice=None)
    table = tables.make("table1_pruning", small)
    assert table.fraction_removed.tolist() == [0, 0.25]
    assert table.paper_score.tolist() == [80.12, 49.5]  # 2 of 8 are 8 of 32
    assert (small.operating, small.deeper) == (2, 2)


def test_one_model_in_two_of_the_papers_places_has_one_row(results):
    """A model of so few blocks that none lies between the operating and the deeper depth."""
    one = replace(results, choice=results.choice | {"deeper": results.operating})
    keys = {"table2_sft": ["blocks_removed"], "table3_quantization": joins.FORM}
    for stem, key in keys.items():
        made = tables.make(stem, one)
        assert not made.duplicated(key).any()
        assert len(made) == len(tables.make(stem, results))
    assert Facts(one).errors() == Facts(results).errors()


def test_missing_scores_are_empty_in_the_csv_and_named_where_people_read(results):
    bare = replace(results, answers=None, evaluation=None, latency=None, training=None)
    for stem in ("table1_pruning", "table4_efficiency", "table5_ablation"):
        made = tables.make(stem, bare)
        frame = pd.read_csv(pd.io.common.StringIO(tables.to_csv(made)))
        assert frame.score.isna().all() and frame.vram_gib_7b.notna().all()
        assert "no score" in to_markdown(tables.readable(made))
        assert "no score" not in tables.to_csv(made)


def test_people_read_intervals_in_one_cell_with_units_and_no_empty_columns(results):
    shown = tables.table("table4_efficiency", results)
    assert shown.loc[0, "decode, ms/token (quartiles)"] == "10 (9 to 11)"
    assert "variant" not in shown
    taken = tables.table("extra_measured", results)
    assert not any("GPU" in name for name in taken)  # on a CPU
    tests = tables.table("extra_criteria_tests", results)
    assert re.fullmatch(
        r"-?[\d.]+ \(-?[\d.]+ to -?[\d.]+\)", tests["difference, all depths, points"][0]
    )
    judged = set(tables.table("extra_judges", results)["as expected, %"])
    assert judged - {"100.0", "0.0"} and "100.0" in judged


def test_people_read_words_for_ids_and_mib_below_a_gib(results):
    taken = tables.make("extra_measured", results)
    small = taken.assign(vram_gib=taken.vram_gib / 1000, rss_gib=3.0, repeats=3)
    shown = tables.readable(small, results.names)
    assert {"weights, MiB", "process, GiB"} <= set(shown) and "repeats" not in shown
    assert "6 blocks removed, healed, AWQ, 4 bits" in shown.variant.tolist()
    assert shown["weights, MiB"][0] == f"{1.024 * taken.vram_gib[0]:.3g}"
    for stem in (
        "extra_agreement",
        "extra_criteria",
        "extra_quantization_tests",
        "extra_baselines",
    ):
        csv, said = tables.make(stem, results), to_markdown(tables.table(stem, results))
        assert re.search("_similarity|magnitude|awq|shuffled", tables.to_csv(csv)), stem
        assert not re.search(r"output_similarity|random-0|awq|rtn|shuffled|\+sft", said), stem


def test_a_run_under_way_has_the_tables_that_its_frames_suffice_for(tmp_path, results):
    folders = fabricate.write_store(tmp_path, fabricate.stage_files())
    early = {stage: path for stage, path in folders.items() if stage < "05"}
    given = load_results(early, choice={"operating": 2, "deeper": 4})
    assert given.operating == 2 and given.evaluation is None
    assert len(tables.make("table1_pruning", given)) == 9
    assert tables.build(load_results({})) == {}
    assert tables.table("table1_pruning", Results()) is None
    third = load_results({}, values=results.values, plans=results.plans, scores=results.scores)
    known = {"extra_agreement", "extra_controls"}
    assert set(tables.build(third)) == known
    last = load_results({}, predictions=results.predictions)
    assert last.evaluation.variant.isin(["blank"]).any() and (last.answers.split == "test").all()


def test_variants_are_picked_by_their_columns(results):
    table = results.variants
    assert pick(table, blocks_removed=9, healed=True, quantizer="rtn") == "pruned-9+sft|rtn4"
    assert pick(table, blocks_removed=5) is None and pick(None, healed=True) is None
    assert results.variant(0) == "original" and results.full == "pruned-6+sft|awq4"
    rival = results.variant(6, criterion="magnitude", healed=True, quantizer="awq")
    assert rival == "pruned-6-magnitude+sft|awq4"
    assert results.variant(6, quantizer="awq", bits=3) is None


def test_models_of_single_sublayers_are_found_by_how_many_of_them_they_lack():
    """Of a plan of attentions and MLPs, a block that lost both counts as two units."""
    names = {"attention": (0, 6, 0), "mlp": (0, 0, 6), "sublayers": (2, 1, 1)}
    rows = [fabricate.variant("original")]
    for part, gone in names.items():
        removed = dict(zip(GONE, gone, strict=True))
        one = fabricate.variant(f"pruned-6-{part}", criterion=f"magnitude-{part}", **removed)
        rows += [one, fabricate.quantized(one, "awq")]
    results = Results(variants=pd.DataFrame(rows))
    for part in names:
        assert results.variant(6, criterion=f"magnitude-{part}") == f"pruned-6-{part}"
        own = replace(results, choice={"criterion": f"magnitude-{part}", "operating": 6})
        assert own.variant(6, quantizer="awq") == f"pruned-6-{part}|awq4"
        assert (own.variant(0), own.variant(2)) == ("original", None)
        table = tables.make("table1_pruning", own)
        assert table.blocks_removed.tolist() == [0, names[part][0]]
        assert table.paper_score.notna().tolist() == [True, False]  # the paper removes blocks


def test_the_studys_own_criterion_is_what_stage_04_notes(results):
    assert results.criterion == "output_similarity"
    assert replace(results, choice={"criterion": "taylor"}).criterion == "taylor"
    assert replace(results, choice=None).criterion == results.values.ranking.iloc[0]
    assert Results(plans={"last": {}, "taylor": {}}).criterion == "last"


def test_the_test_splits_hash_tells_items_and_facts_not_their_order(results):
    items = results.items
    known = items_hash(items)
    train = items.head(3).assign(split="train", id=["x", "y", "z"])
    assert items_hash(pd.concat([train, items[::-1]])) == known
    for column in ("disease", "facts", "id", "split"):
        changed = items.copy()
        changed.loc[0, column] = "other"
        assert items_hash(changed) != known, column
