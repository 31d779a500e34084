"""Batch sizes left open: the same on every CPU, what the plan holds on a GPU."""

from dataclasses import replace

import pytest
from runs import DEFAULTS, KNOWN, planned

from derm_compress.errors import DermError
from derm_compress.model import devices, shapes
from derm_compress.study import batches, preflight
from derm_compress.study.needs import Needs

ARCH = shapes.llava_7b()
TINY = replace(ARCH, blocks=4)


def test_on_a_cpu_open_sizes_are_the_fixed_ones_and_others_stay():
    assert all(DEFAULTS[name] == batches.OPEN for name in batches.ON_CPU)
    found = batches.of_stage(planned(), "07_quantization", measure=True)
    assert (found["batch_size"], found["quantization_batch"]) == (120, 12)
    assert "importance_batch" not in found
    found = batches.of_stage(planned(), "03_layer_importance", measure=True)
    assert found["importance_batch"] == 120
    found = batches.of_stage(planned(), "06_activation_analysis", measure=True)
    assert found["activation_batch"] == 12
    found = batches.of_stage(planned(batch_size=7), "04_pruning", measure=True)
    assert found == planned(batch_size=7).parameters("04_pruning")


def test_on_a_gpu_they_are_the_largest_that_its_memory_holds(monkeypatch, capsys):
    monkeypatch.setattr(devices, "rooms", lambda: [79.0, 78.0])
    asked = planned(device="cuda", model="pico", activation_batch=5)
    found = batches.of_stage(asked, "07_quantization", measure=True)
    assert found["batch_size"] == found["quantization_batch"] == batches.SIZES[-1]
    assert "batch_size: 768, as many as 78.0 GiB of GPU memory hold" in capsys.readouterr().out
    monkeypatch.setattr(devices, "rooms", lambda: 1 / 0)  # a finished stage asks no GPU
    assert batches.of_stage(asked, "04_pruning", measure=False)["batch_size"] == 120
    monkeypatch.setattr(devices, "rooms", list)  # nor is one there: the checks say so
    assert batches.of_stage(asked, "04_pruning", measure=True)["batch_size"] == 120
    assert batches.of_stage(asked, "06_activation_analysis", measure=True)["activation_batch"] == 5


@pytest.mark.parametrize(("gpus", "gib"), [(1, 78.0), (2, 14.2)])
def test_one_size_more_would_not_fit(gpus, gib):
    found = batches.settled(DEFAULTS, ARCH, gpus, gib)
    assert batches.settled(found, ARCH, 1, 1.0) is found  # nothing is open
    needs = Needs(found, ARCH, gpus)
    for name in batches.ON_CPU:
        steps = [step for step in needs.steps() if step.parameter == name]
        larger = batches.SIZES[batches.SIZES.index(found[name]) + 1]
        assert found[name] == 1 or all(step.gib(found[name]) <= 0.8 * gib for step in steps)
        assert not all(step.gib(larger) <= 0.8 * gib for step in steps)


def test_the_preflight_plans_open_sizes_and_refuses_what_no_size_fits():
    fits = DEFAULTS | {"rankings": ["magnitude"], "latency_batches": [1]}
    assert preflight.faults(fits, TINY) == []
    (said, *_) = preflight.faults(fits, ARCH, replace(preflight.KAGGLE, gpus=1, gib=8))
    assert "take a smaller model or a larger GPU" in said


def test_a_size_below_zero_is_refused():
    with pytest.raises(DermError, match="batch_size is -1"):
        KNOWN["batch_size"].check(-1, "here")
