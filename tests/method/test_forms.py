"""Methods and forms by name, the frames of stage 07, and the budgets of equal bytes."""

import json

import pandas as pd
import pytest

from derm_compress.errors import DermError
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization import methods, wanted
from derm_compress.method.quantization.grids import grid_of
from derm_compress.method.quantization.methods import Form, quantizers
from derm_compress.model import memory
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe
from derm_compress.model.shapes import llava_7b

ORDER = list(range(30, 1, -1))  # 0, 1 and 31 are never removed
PLAN = Plan("angular", tuple(ORDER), (0, 1, 31), 32)
SCALES = f"07_quantization/{'a' * 64}/scales"


def known():
    """The original, three depths, and each after SFT."""
    original = Recipe("tiny", "f" * 16, 32)
    rows = [variants_of.variant("original", original)]
    for n in (7, 8, 15):
        kept = [block for block in range(32) if block not in ORDER[:n]]
        rows.append(variants_of.variant(f"pruned-{n}", original.pruned(kept), criterion="angular"))
    healed = [row | {"variant": row["variant"] + "+sft", "healed": True} for row in rows]
    return pd.DataFrame(rows + healed)


def test_names_say_method_width_and_options():
    names = ["awq-clip", "awq_nf4-double", "llm_int8", "awq-text"]
    found = {form.name: form for form in methods.forms(names, [4, 3], 64)}
    expected = ["awq4-clip", "awq3-clip", "awq_nf4-double", "llm_int8", "awq4-text", "awq3-text"]
    assert list(found) == expected
    assert found["awq3-text"] == Form("awq", 3, 64, text=True)
    assert found["awq3-text"].quantizer == "awq-text"
    assert found["awq3-text"].step == {"method": "awq", "bits": 3, "group_size": 64}
    assert Form("awq", 2, 64, block_bits={3: 4}).name == "awq2-mixed"


def test_a_step_is_read_with_defaults_and_unknown_fields_are_refused():
    step = {"step": "quantize", "method": "awq", "bits": 4, "group_size": 64, "ref": "x"}
    assert Form.of(step) == Form("awq", 4, 64)
    mixed = Form("awq", 4, 64, clip=True, block_bits={3: 2})
    assert Form.of(json.loads(json.dumps(mixed.step))) == mixed
    assert grid_of(mixed, 3).bits == 2 and grid_of(mixed, 0).bits == 4
    with pytest.raises(DermError, match="unknown fields \\['clips'\\]"):
        Form.of(step | {"clips": True})


def test_mixed_forms_count_their_mean():
    mixed = Form("rtn", 4, 64, block_bits={0: 2, 1: 3})
    assert mixed.format(4) == memory.Format(13 / 4, 64, 2 + 13 / 32)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("spqr", "methods are awq"),
        ("rtn-duo", "rtn has no duo; options of it: clip"),
        ("hqq-text", "hqq has no text; options of it: none"),
        ("awq-clip-clip", "an option is named once"),
    ],
)
def test_unknown_quantizers_are_refused(name, said):
    with pytest.raises(DermError, match=said):
        quantizers(["awq", name])


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"method": "spqr"}, "'spqr': methods are awq"),
        ({"method": "rtn", "bits": 5}, "bits: rtn has 2, 3, 4, 8, not 5"),
        ({"method": "rtn", "block_bits": {0: 5}}, "rtn has 2, 3, 4, 8, not 5"),
        ({"method": "bitsandbytes", "bits": 3}, "bitsandbytes has 4, not 3"),
        ({"method": "bitsandbytes", "group_size": 16}, "bitsandbytes has 32, 64, 128, 256, not 16"),
        ({"method": "awq_nf4", "group_size": 512}, "group_size: awq_nf4 has .* not 512"),
        ({"method": "llm_int8", "bits": 8, "clip": True}, "llm_int8 has no clip"),
    ],
)
def test_wrong_forms_are_refused(form, said):
    with pytest.raises(DermError, match=said):
        Form(**form)


def test_group_sizes_are_checked_without_a_model():
    with pytest.raises(
        DermError, match="48 does not divide the 64 inputs of q_proj; .* such as 64"
    ):
        methods.check_groups(methods.forms(["awq"], [4], 48), {"q_proj": 64})
    methods.check_groups(methods.forms(["llm_int8"], [4], 48), {"q_proj": 64})  # whole rows
    methods.check_groups(methods.forms(["rtn"], [4], 32), {"q_proj": 64})


def test_calibrations_are_what_needs_a_search_by_what_it_reads():
    frame = wanted.asked(["a", "b"], ["awq", "awq-text", "rtn", "rtn-clip"], [4], 64)
    found = wanted.calibrations(frame, "a")
    assert list(found) == [False, True]
    assert list(found[False]) == ["awq4", "rtn4-clip"] and list(found[True]) == ["awq4-text"]
    assert wanted.calibrations(wanted.asked(["a"], ["rtn"], [4], 64), "a") == {}


def test_main_models_get_all_that_is_asked_and_further_ones_the_papers_methods():
    shared = wanted.equal_bytes(known(), PLAN, [8], [3], group_size=64)
    frame = wanted.wanted_forms(["original"], ["pruned-8"], ["awq", "hqq"], [4, 3], 64, shared)
    asked = frame.groupby("source").form.agg(list)
    assert asked["original"] == ["awq4", "awq3", "hqq4", "hqq3", "awq2-mixed"]
    assert asked["pruned-8"] == ["awq4"] == asked["pruned-8+sft"]


def test_variants_know_their_source_and_where_their_scales_are():
    asked = wanted.asked(["pruned-8+sft"], ["awq-clip", "rtn"], [3], 64)
    searched, plain = wanted.quantized_variants(known(), asked, SCALES).to_dict("records")
    assert searched["variant"] == "pruned-8+sft|awq3-clip"
    told = ("source", "quantizer", "method", "bits", "healed", "blocks_removed")
    expected = ["pruned-8+sft", "awq-clip", "awq", 3, True, 8]
    assert [searched[column] for column in told] == expected
    step = Recipe.from_json(searched["recipe"]).steps[-1]
    assert step["ref"] == f"{SCALES}/awq3-clip/pruned-8+sft.safetensors"
    assert "ref" not in Recipe.from_json(plain["recipe"]).steps[-1]


def test_equal_bytes_are_equal_to_two_percent():
    asked = wanted.equal_bytes(known(), PLAN, [15, 7, 8], [3, 2], group_size=64)
    made = wanted.quantized_variants(known(), asked, SCALES).assign(budget=asked.budget)
    shapes = llava_7b()
    made["gib"] = memory.plan_variants(made, shapes, shapes).vram_gib_7b
    uniform = made[(made.blocks_removed == 0) & (made.bits == made.budget)]
    uniform = uniform.drop_duplicates("budget").set_index("budget").gib
    assert (made.gib / made.budget.map(uniform) - 1).abs().max() < 0.02
    plain = made[~made.healed]
    depths = plain.groupby("budget", sort=False).blocks_removed.agg(list)
    assert depths[3] == [0, 0, 7, 8] and depths[2] == [0, 7, 8, 15]
    assert set(made.variant[made.healed]) == {
        "original+sft|awq3",
        "original+sft|awq2-mixed",
        "pruned-7+sft|awq4",
        "pruned-8+sft|awq4",
        "original+sft|awq2",
        "pruned-7+sft|awq2-mixed",
        "pruned-8+sft|awq2-mixed",
        "pruned-15+sft|awq4",
    }


def test_what_the_plan_removes_last_gets_the_wider_codes():
    asked = wanted.equal_bytes(known(), PLAN, [8], [3], group_size=64).set_index(["source", "form"])
    step = json.loads(asked.step["original", "awq2-mixed"])
    assert step["bits"] == 2 and set(step["block_bits"].values()) == {4}
    assert {int(block) for block in step["block_bits"]} == {0, 1, 31, *ORDER[-13:]}
    positions = wanted.important([0, 5, 9, 31], [9, 0, 5], 2)
    assert positions == [1, 3]  # among the kept blocks


@pytest.mark.parametrize(
    ("depths", "widths", "gone", "said"),
    [
        ([9], [3], [], "no model without 9 blocks; add its depth to depths"),
        ([8], [3], ["pruned-8+sft"], "no model without 8 blocks; add its depth to sft_depths"),
        ([8], [], [], "set bits to several"),
        ([8], [8], [], "set bits to several"),
    ],
)
def test_equal_bytes_that_would_lack_models_name_the_parameter(depths, widths, gone, said):
    there = known()
    with pytest.raises(DermError, match=said):
        wanted.equal_bytes(there[~there.variant.isin(gone)], PLAN, depths, widths, group_size=64)


def test_equal_bytes_of_what_there_is():
    assert wanted.equal_bytes(known(), PLAN, [], [3, 2], group_size=64).empty
    unhealed = known().query("not healed")
    found = wanted.equal_bytes(unhealed, PLAN, [8], [3], group_size=64)
    assert set(found.source) == {"original", "pruned-8"}
    assert wanted.widths(3, 32, 17, 64) == []  # 4 bits leave bytes over


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_size": {}},
        {"group_size": 64.0},
        {"bits": 4.0},
        {"bits": True},
        {"duo": 1},
        {"method": []},
        {"block_bits": {"1": 4.0}},
        {"block_bits": {"x": 4}},
        {"block_bits": [4]},
    ],
)
def test_a_field_of_another_type_is_refused(wrong):
    with pytest.raises(DermError, match="a recipe's step is no form"):
        Form.of({"step": "quantize", "method": "rtn"} | wrong)
