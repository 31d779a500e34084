"""Latency against a clock of our own, and a floor that is what a model reads."""

from itertools import islice

import pandas as pd
import pytest
import torch
from small_llava import batch, small_llava

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.evaluate import latency
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization import packed
from derm_compress.model import removal
from derm_compress.model import variants as variants_of
from derm_compress.model.cache import SlotCache


@pytest.mark.parametrize("whole", [False, True])
def test_the_step_of_answers_says_what_generate_says(whole, monkeypatch):
    """Also by a cache that is read whole, as on a GPU, and without an attention."""
    monkeypatch.setattr(latency, "SlotCache", lambda *size, **_: SlotCache(*size, whole=whole))
    model, inputs = small_llava(4), batch(2)
    removal.apply(model, (0, 1, 3), ["1.attention"])
    ours = model.generate(
        **inputs, do_sample=False, min_new_tokens=12, max_new_tokens=12, eos_token_id=None
    )
    for tokens, prefill, decode in islice(latency.greedy_runs(model, inputs, new_tokens=12), 2):
        assert torch.equal(tokens, ours[:, inputs["input_ids"].shape[1] :])
        assert prefill > 0 and decode > 0


def test_latency_tells_prefill_decode_and_total_apart(monkeypatch):
    """By a clock that a prompt moves on by 100 ms, and a token by 10."""
    model, time, widths = small_llava(2), 0.0, []

    def tick(norm, inputs):
        nonlocal time
        widths.append(inputs[0].shape[1])
        time += 0.010 if widths[-1] == 1 else 0.100

    model.model.language_model.norm.register_forward_pre_hook(tick)
    monkeypatch.setattr(latency, "_clock", lambda device: time)
    told = latency.summary(latency.sampled(model, batch(2), new_tokens=5, warmup=1, repeats=3))
    assert told["prefill_ms"] == pytest.approx(100)
    assert told["decode_ms_per_token"] == pytest.approx(10)
    assert told["total_ms_per_token"] == pytest.approx((100 + 4 * 10) / 5)
    sizes = {"batch": 2, "prompt_tokens": 30, "new_tokens": 5, "repeats": 3}
    assert sizes.items() <= told.items()
    assert widths == [30, 1, 1, 1, 1] * 4  # never stops, never reads twice


def test_latency_quartiles_leave_the_warm_up_out(monkeypatch):
    runs = [(None, seconds, 0.3) for seconds in (9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0)]
    monkeypatch.setattr(latency, "greedy_runs", lambda *_, **__: iter(runs))
    told = latency.summary(latency.sampled(None, batch(), new_tokens=4, warmup=2, repeats=5))
    assert (told["prefill_ms_lo"], told["prefill_ms"], told["prefill_ms_hi"]) == (2000, 3000, 4000)
    assert told["decode_ms_per_token"] == pytest.approx(100)
    with pytest.raises(DermError, match="at least 2"):
        latency.sampled(None, batch(), new_tokens=1)


def test_the_floor_is_what_a_step_reads_over_what_the_device_reads_a_second():
    model = small_llava(4, kv_heads=2)
    blocks = sum(
        p.nbytes for layer in model.model.language_model.layers for p in layer.parameters()
    )
    ends = model.lm_head.weight.nbytes + model.model.language_model.norm.weight.nbytes
    assert latency.read_bytes(model, batch=0, tokens=0) == blocks + ends
    cache = model(**batch(3), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    tokens = cache.get_seq_length()
    assert latency.read_bytes(model, batch=3, tokens=tokens) - blocks - ends == held


def test_bandwidth_is_the_best_copy_or_sum(monkeypatch):
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 39.0, 40.0, 40.5, 50.0, 59.0])
    monkeypatch.setattr(latency, "_clock", lambda device: next(ticks))
    assert latency.bandwidth("cpu", size=4000, repeats=2) == max(2 * 4000 / 1.0, 4000 / 0.5)
    monkeypatch.undo()
    assert 1e8 < latency.bandwidth("cpu", size=2**24, repeats=1) < 1e13


PLAN = Plan("output_similarity", (3, 5, 2, 6, 4), (0, 1, 7), 8, "f" * 16)
QUICK = {"device": "cpu", "new_tokens": 2, "repeats": 1, "warmup": 0}


@pytest.fixture
def frame(recipe):
    rounded = recipe.then("quantize", method="rtn", bits=4, group_size=16)
    frame = variants_of.pruned(recipe, [PLAN], [3])
    last = frame.iloc[[0]].assign(variant="original|rtn4", recipe=rounded.to_json())
    return pd.concat([frame, last], ignore_index=True)


def test_each_variant_is_measured_at_batch_1_first(frame, store, dataset):
    where = {"items": dataset.of("test")[:2], "images": dataset.images, "store": store}
    told = latency.time_variants(frame[:2], **where, batches=[3], **QUICK)
    assert told.variant.tolist() == ["original"] * 2 + ["pruned-3"] * 2
    assert told.batch.tolist() == [1, 3] * 2 and (told.prefill_ms > 0).all()
    assert told.weights_gib[0] == told.weights_gib[1] > told.weights_gib[2]
    assert told.read_mib[1] > told.read_mib[0] > told.read_mib[2]
    assert told.kernel_share.isna().all() and told.bandwidth_gb_s.nunique() == 1
    floor = told.read_mib * 2**20 / (told.bandwidth_gb_s * 1e9) * 1000
    assert (floor - told.floor_ms).abs().max() < 1e-9
    assert (told.times_floor * told.floor_ms - told.decode_ms_per_token).abs().max() < 1e-9


def test_what_was_measured_is_not_measured_again(frame, store, dataset, tmp_path, monkeypatch):
    path, real, asked = tmp_path / "j.jsonl", latency.sampled, []

    def killed(*words, **how):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*words, **how)

    monkeypatch.setattr(latency, "sampled", killed)
    where = {"items": dataset.of("test"), "images": dataset.images, "store": store}
    with pytest.raises(KeyboardInterrupt):
        latency.time_variants(frame, **where, journal=files.Journal(path), **QUICK)
    told = latency.time_variants(frame, **where, journal=files.Journal(path), **QUICK)
    assert len(asked) == 7 and told.variant.tolist() == frame.variant.tolist()
    again = latency.time_variants(frame, **where, journal=files.Journal(path), **QUICK)
    assert len(asked) == 7 and again.equals(told) and told.bandwidth_gb_s.nunique() == 1


def test_repeats_are_shared_by_two_rounds_the_second_backwards(frame, store, dataset, monkeypatch):
    """By a clock that slows down: what drifts meets all variants alike."""
    taken = []

    def slower(model, inputs, *, new_tokens, repeats, **how):
        taken.append(repeats)
        seconds = [float(len(taken))] * repeats
        told = {"batch": 1, "prompt_tokens": 30, "new_tokens": new_tokens}
        return told | {"prefill_s": seconds, "decode_s": seconds}

    monkeypatch.setattr(latency, "sampled", slower)
    where = {"items": dataset.of("test"), "images": dataset.images, "store": store}
    told = latency.time_variants(frame, **where, **QUICK | {"repeats": 3})
    assert taken == [2] * 6 and told.repeats.tolist() == [4] * 3
    assert told.prefill_ms.tolist() == [3500] * 3
    assert told.prefill_ms_lo.tolist() == [1000, 2000, 3000]


def test_a_batch_that_exceeds_memory_has_no_row(frame, store, dataset, monkeypatch, capsys):
    real = latency.sampled

    most = 1

    def full(model, inputs, **how):
        if len(inputs["input_ids"]) > most:
            raise torch.OutOfMemoryError
        return real(model, inputs, **how)

    monkeypatch.setattr(latency, "sampled", full)
    where = {"items": dataset.of("test"), "images": dataset.images, "store": store}
    told = latency.time_variants(frame, **where, batches=[1, 4], **QUICK)
    assert told.batch.tolist() == [1, 1, 1]
    said = "latency of original: out of GPU memory with 4 at once; not measured"
    assert said in capsys.readouterr().out
    most = 0
    assert latency.time_variants(frame, **where, **QUICK).empty


def test_packed_weights_without_a_kernel_are_told(frame, store, dataset):
    where = {"items": dataset.of("test"), "images": dataset.images, "store": store}
    told = latency.time_variants(frame, **where, **QUICK)
    assert told.kernel_share.fillna(-1).tolist() == [-1, -1, 0]  # groups of 16
    grouped = frame.assign(recipe=frame.recipe.str.replace('"group_size": 16', '"group_size": 32'))
    if packed.cpu_block():
        told = latency.time_variants(grouped, **where, **QUICK)
        assert (told.kernel_share.dropna() == 1).all()
