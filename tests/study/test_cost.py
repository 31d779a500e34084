from dataclasses import replace

import pytest

from derm_compress.model import shapes
from derm_compress.study import cost

TOY = shapes.Architecture(
    blocks=4, linears={"self_attn.q_proj": [8, 8], "mlp.up_proj": [16, 8]}, block_norms=16, hidden=8, intermediate=16,
    outside={"vision_tower": 100, "projector": 20, "embedding": 80, "final_norm": 8, "head": 80}, cache_width=4,
    vocabulary=10, image_tokens=6, tower_values=1,
)  # fmt: skip
BLOCK = 8 * 8 + 16 * 8
UNIT = cost.Device("unit", flops=1.0, bandwidth=1.0, prefill=1.0, decode=1.0)
STUDY = {
    "blocks": range(2, 31),
    "items": 100,
    "prompt_tokens": 40,
    "answer_tokens": 60,
    "accepted": 0.85,
    "batch": 3,
}


def test_a_reading_is_two_operations_a_weight_and_token_and_the_attention():
    pairs = 1 + 2 + 3  # of 3 tokens, each seeing itself and those before it
    assert cost.reading_flops(TOY, 3, blocks=1) == 2 * BLOCK * 3 + 4 * 8 * pairs
    assert cost.reading_flops(TOY, 3) == 4 * cost.reading_flops(TOY, 3, blocks=1)
    assert cost.reading_flops(TOY, 2, before=3) == cost.reading_flops(TOY, 5) - cost.reading_flops(
        TOY, 3
    )


def test_a_prefill_reads_prompt_picture_and_one_row_of_logits():
    expected = cost.reading_flops(TOY, 9, blocks=3) + 2 * 80 + 2 * 6 * 120
    assert cost.prefill_seconds(TOY, UNIT, batch=5, tokens=9, blocks_removed=1) == pytest.approx(
        5 * expected
    )
    half = replace(UNIT, flops=4.0, prefill=0.5)
    assert cost.prefill_seconds(TOY, half, batch=5, tokens=9, blocks_removed=1) == pytest.approx(
        5 * expected / 2
    )


def test_a_step_reads_weights_and_cache():
    weights = 2 * (2 * (BLOCK + 16) + 8 + 80)
    cache = 2 * 2 * 4 * 2 * 30
    assert cost.decode_bytes(TOY, batch=3, before=30, blocks_removed=2) == pytest.approx(
        weights + 3 * cache
    )
    slow = replace(UNIT, flops=1e9, decode=0.5)
    steps = cost.decode_seconds(TOY, slow, batch=3, tokens=10, before=25, blocks_removed=2)
    assert steps == pytest.approx(10 * (weights + 3 * cache) / 0.5)


def test_a_step_of_many_rows_is_bound_by_arithmetic():
    wide = replace(UNIT, bandwidth=1e9)
    flops = cost.reading_flops(TOY, 1, before=25) + 2 * 80
    assert cost.decode_seconds(TOY, wide, batch=50, tokens=10, before=20) == pytest.approx(
        10 * 50 * flops
    )


def test_less_model_and_less_work_take_less_time():
    arch = shapes.llava_7b()
    how = {"batch": 2, "tokens": 40, "before": 600}
    full = cost.decode_seconds(arch, cost.T4, **how)
    assert full > cost.decode_seconds(arch, cost.T4, **how, blocks_removed=6)
    assert full > cost.decode_seconds(arch, cost.T4, **how, method="bitsandbytes", bits=4)
    assert full < cost.decode_seconds(arch, cost.T4, **how | {"batch": 3})
    assert full < 2 * cost.decode_seconds(arch, cost.T4, **how | {"batch": 1})
    prefill = [
        cost.prefill_seconds(arch, cost.T4, tokens=600, blocks_removed=n) for n in (0, 3, 12)
    ]
    assert prefill == sorted(prefill, reverse=True) and prefill[0] > prefill[2]


def test_drafts_cost_the_full_answers_a_pass_and_what_was_lost():
    one = cost.importance_seconds(
        TOY, UNIT, blocks=[1], items=2, prompt_tokens=5, answer_tokens=4, accepted=1
    )
    full = 2 * (
        cost.prefill_seconds(TOY, UNIT, tokens=11)
        + cost.decode_seconds(TOY, UNIT, batch=1, tokens=4, before=11)
    )
    passes = (4 + 2) * cost.reading_flops(TOY, 15, blocks=1) + 2 * 6 * 120 + 2 * 2 * 80 * 5
    assert one["writing"] == 0 and one["reading"] == pytest.approx(2 * passes)
    assert one["drafts"] == pytest.approx(full + 2 * passes)
    without = cost.prefill_seconds(TOY, UNIT, tokens=11, blocks_removed=1)
    without += cost.decode_seconds(TOY, UNIT, batch=1, tokens=4, before=11, blocks_removed=1)
    assert one["loop"] == pytest.approx(full + 2 * without)


def test_more_accepted_more_a_step_and_shared_pictures_save_time():
    arch = shapes.llava_7b()
    base = cost.importance_seconds(arch, cost.T4, **STUDY)
    assert 0 < base["writing"] < base["drafts"] < base["loop"]
    assert (
        cost.importance_seconds(arch, cost.T4, **STUDY | {"accepted": 0.95})["drafts"]
        < base["drafts"]
    )
    narrow = cost.importance_seconds(arch, cost.T4, **STUDY, lines=1)
    assert narrow["writing"] > 2 * base["writing"] and narrow["loop"] == base["loop"]
    assert (
        cost.importance_seconds(arch, cost.T4, **STUDY, advance=4)["writing"] < base["writing"] / 2
    )
    thrice = cost.importance_seconds(arch, cost.T4, **STUDY, questions=3)
    assert (
        thrice["loop"] == pytest.approx(3 * base["loop"])
        and thrice["reading"] < 2 * base["reading"]
    )
    assert cost.importance_seconds(arch, cost.T4, **STUDY, image_tokens=0)["loop"] < base["loop"]
