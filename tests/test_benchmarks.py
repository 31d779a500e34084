"""Benchmarks on what a CPU runs in seconds, and the page that one of them wrote on a GPU."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from derm_compress.kaggle.setup import HOURS
from derm_compress.model import shapes

ROOT = Path(__file__).parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu():
    return script("gpu")


def test_every_part_is_tried_on_a_cpu_and_not_measured(gpu):
    found = gpu.measure(gpu.SMALL)
    assert all(each["ratio"] > 0 for name, each in found.items() if name != "decode")
    assert found["decode"]["w4_floor_ms"] < 0.6 * found["decode"]["fp16_floor_ms"]  # it is packed
    assert found["answers"]["texts_equal"] and found["load"]["models"] == 4
    assert gpu.summary(found, "cpu") == {
        "device": "cpu",
        "train": {"ratio": None},
        "train_small": {"ratio": None},
        "answers": {"ratio": None, "texts_equal": True},
        "decode": {"fp16_over_floor": None, "w4_over_fp16": None, "w4_over_floor": None},
        "load": {"ratio": None},
    }


def test_what_exceeds_memory_has_no_figures(gpu, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(gpu.rig, "shaped", full)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    found = gpu.measure(gpu.SMALL)
    assert found["load"] == {"skipped": "CUDA out of memory"}
    assert gpu.summary(found, "cuda")["decode"]["fp16_over_floor"] is None


def test_the_committed_figures_are_those_planned():
    rows = pd.read_csv(ROOT / "reports/gpu-rehearsal/rehearsal.csv")
    whole = rows[(rows.quantity == "parameters") & (rows.variant == "fp16, 32 blocks")]
    assert whole.measured.tolist() == [shapes.llava_7b().parameters()] == [7_063_427_072]
    assert rows[rows.quantity == "peak"].ratio.sub(1).abs().max() < 0.1


def test_hours_on_t4s_are_the_pages_and_within_their_limits():
    t4_hours = script("t4_hours")
    runs = t4_hours.read_runs()
    page = (ROOT / "docs/kaggle.md").read_text("utf-8")
    assert t4_hours.table(runs) in page, "docs/kaggle.md: take what benchmarks/t4_hours.py prints"
    small, day, whole = (sum(t4_hours.hours(run).values()) for run in runs.values())
    assert small < 75 / 60 and day < 10 and whole < runs["kaggle-t4"].sessions * HOURS
    assert sum(t4_hours.hours(runs["small"], 2).values()) > 75 / 60  # as the page says
    counts = runs["kaggle-t4"].counts
    assert len(counts.own) == 1 + 7 and counts.searched() == (5, 5)


def test_answers_without_a_block_are_raced_on_any_model(monkeypatch, capsys):
    importance = script("importance")
    monkeypatch.setattr(importance, "STUDY", 6)
    importance.of_model("pico", "cpu", 1, 3)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["texts_equal"] and found["equal"] == 1
    assert (found["blocks"], found["items"]) == (2, 2 * 3)
    assert 0 <= found["accepted"] <= 1 and found["near_ties"] >= 0 and found["ratio"] > 0
    assert found["loop_batch"] <= 3
