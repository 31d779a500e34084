"""Quantizers and forms by name, and the budgets of equal bytes."""

import json

import pandas as pd
import pytest

from derm_compress.errors import DermError
from derm_compress.method.quantization import budgets, forms, quantize
from derm_compress.model import memory
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe
from derm_compress.model.shapes import llava_7b

ORDER = list(range(30, 1, -1))  # 0, 1 and 31 are never removed


def test_names_say_method_width_and_options():
    found = forms.forms(["awq-clip", "awq_nf4-double", "llm_int8", "awq-text"], [4, 3], 64)
    names = ["awq4-clip", "awq3-clip", "awq_nf4-double", "llm_int8", "awq4-text", "awq3-text"]
    assert (
        list(found)
        == ["awq4-clip", "awq3-clip", "awq_nf4-double", "llm_int8", "awq4-text", "awq3-text"]
        == names
    )
    assert found["awq3-text"] == {"method": "awq", "bits": 3, "group_size": 64, "text": True}
    assert set(forms.METHODS) == set(quantize.METHODS)
    scaled = {method for method, (_, chosen) in quantize.METHODS.items() if chosen}
    assert scaled == set(forms.SCALED)


def test_mixed_forms_need_a_label_and_count_their_mean():
    mixed = forms.forms(["rtn"], 4, 64, block_bits={0: 2, 1: 3}, label="mixed")["rtn4-mixed"]
    assert forms.stored_as(mixed, 4) == {"method": "rtn", "bits": 13 / 4, "group_size": 64}
    with pytest.raises(DermError, match="need a label"):
        forms.forms(["rtn"], 4, 64, block_bits={0: 2})


@pytest.mark.parametrize("method", ("awq", "rtn_symmetric", "hqq", "bitsandbytes", "llm_int8"))
def test_blocks_left_at_16_bits_have_no_scales_in_the_plan(method):
    bits, arch = 8 if method == "llm_int8" else 4, llava_7b()
    form = {"method": method, "bits": bits, "group_size": 64}
    stored = forms.stored_as(form | {"block_bits": {0: 16, 3: 16, 4: 16}}, 32)
    mixed = memory.plan_weights(arch, blocks_removed=3, **form)
    plain = memory.plan_weights(arch, blocks_removed=29)
    mixed |= {name: mixed[name] + plain[name] for name in ("decoder_linears", "block_norms")}
    planned = memory.plan_weights(arch, **stored)
    scales = planned.pop("quantization_scales"), mixed.pop("quantization_scales")
    assert planned == pytest.approx(mixed) and stored["bits"] == (29 * bits + 48) / 32
    more = 32 / 29 if method == "llm_int8" else 1  # of whole rows: three blocks' too many
    assert scales[0] == pytest.approx(scales[1] * more)
    assert (
        forms.stored_as(form | {"block_bits": dict.fromkeys(range(4), 16)}, 4)["method"] == "fp16"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gptq", "methods are awq"),
        ("rtn-duo", "options of rtn, each once: clip"),
        ("hqq-text", "options of hqq, each once: none"),
        ("awq-clip-clip", "each once: duo, clip, text"),
    ],
)
def test_unknown_quantizers_are_refused(name, said):
    with pytest.raises(DermError, match=said):
        forms.quantizers(["awq", name])


def test_calibrations_are_what_needs_a_search_by_what_it_reads():
    wanted = forms.asked(["a", "b"], ["awq", "awq-text", "rtn", "rtn-clip"], 4, 64)
    found = forms.calibrations(wanted, "a")
    assert {text: list(steps) for text, steps in found.items()} == {
        False: ["awq4", "rtn4-clip"],
        True: ["awq4-text"],
    }
    assert all("text" not in step for steps in found.values() for step in steps.values())
    assert forms.calibrations(forms.asked(["a"], ["rtn"], 4, 64), "a") == {}


def known():
    original = Recipe("tiny", "f" * 16, 32)
    rows = [variants_of.variant("original", original)]
    for n in (7, 8, 15):
        kept = [b for b in range(32) if b not in ORDER[:n]]
        rows.append(variants_of.variant(f"pruned-{n}", original.pruned(kept), criterion="angular"))
    healed = [row | {"variant": row["variant"] + "+sft", "healed": True} for row in rows]
    return pd.DataFrame(rows + healed)


def test_equal_bytes_are_equal_to_two_percent():
    wanted = budgets.wanted(known(), ORDER, [15, 7, 8], [3, 2], 64)
    made = forms.quantized(known(), wanted, "07/k/scales").assign(budget=wanted.budget)
    shapes = llava_7b()
    made["gib"] = memory.plan_variants(made, shapes, shapes).vram_gib_7b
    uniform = made[(made.blocks_removed == 0) & (made.bits == made.budget)].drop_duplicates(
        "budget"
    )
    assert (made.gib / made.budget.map(uniform.set_index("budget").gib) - 1).abs().max() < 0.02
    plain = made[~made.healed]
    told = [
        (b, n, bits)
        for b, n, bits in zip(plain.budget, plain.blocks_removed, plain.bits, strict=True)
    ]
    assert told[:4] == [(3, 0, 3), (3, 0, 3), (3, 7, 4), (3, 8, 4)]
    assert [n for b, n, _ in told if b == 2] == [0, 7, 8, 15] and told[-1] == (2, 15, 4)
    assert set(made.variant[made.healed]) == {
        "original+sft|awq3", "original+sft|awq2-mixed", "pruned-7+sft|awq4", "pruned-8+sft|awq4",
        "original+sft|awq2", "pruned-7+sft|awq2-mixed", "pruned-8+sft|awq2-mixed", "pruned-15+sft|awq4",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("depths", "budgets_", "gone", "said"),
    [
        ([9], [3], [], "no pruned-9; add its depth to depths"),
        ([8], [3], ["pruned-8+sft"], "no pruned-8\\+sft; add its depth to sft_depths"),
        ([8], [], [], "set bits to several"),
        ([8], [8], [], "set bits to several"),
    ],
)
def test_a_table_of_equal_bytes_that_would_lack_models_names_the_parameter(
    depths, budgets_, gone, said
):
    there = known()
    with pytest.raises(DermError, match=said):
        budgets.wanted(there[~there.variant.isin(gone)], ORDER, depths, budgets_, 64)
    unhealed = there[~there.healed]
    assert set(budgets.wanted(unhealed, ORDER, [8], [3], 64).source) == {"original", "pruned-8"}


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("awq", 48, "48 does not divide the 64 inputs of q_proj"),
        ("bitsandbytes", 16, "bitsandbytes has blocks of 32, 64, 128, 256, not of 16"),
        ("awq_nf4", 512, "not of 512"),
        ("llm_int8", 48, None),
        ("rtn", 32, None),
    ],
)
def test_group_sizes_are_checked_without_a_model(name, size, said):
    steps = forms.forms([name], 4, size).values()
    if said is None:
        forms.check_groups(steps, {"q_proj": 64})
    else:
        with pytest.raises(DermError, match=said):
            forms.check_groups(steps, {"q_proj": 64})


def test_what_the_plan_removes_last_gets_the_wider_codes():
    wanted = budgets.wanted(known(), ORDER, [8], [3], 64)
    step = json.loads(
        wanted[(wanted.source == "original") & (wanted.form == "awq2-mixed")].step.iloc[0]
    )
    wide = {int(block) for block in step["block_bits"]}
    assert (
        wide == {0, 1, 31, *ORDER[-13:]}
        and set(step["block_bits"].values()) == {4}
        and step["bits"] == 2
    )
    assert budgets.important([0, 5, 9, 31], [9, 0, 5], 2) == [
        1,
        3,
    ]  # positions among the kept blocks


def test_without_depths_nothing_shares_a_budget():
    assert budgets.wanted(known(), ORDER, [], [3, 2], 64).empty
    assert budgets.widths(3, 32, 17, 64) == [] == budgets.widths(2, 32, 31, 1024)[1:]
