"""Benchmarks on what a CPU runs in seconds, and the page that one of them wrote on a GPU."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from derm_compress.model import anatomy, shapes

ROOT = Path(__file__).parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu():
    return script("gpu")


def test_each_step_gives_rows_and_files(gpu, tmp_path):
    last = {case[0]: case for case in gpu.cases(gpu.SMALL)}
    rows, skipped = gpu.measure(gpu.SMALL, last.values())
    assert set(rows.step) == set(gpu.STEPS) and not skipped
    held = rows[rows.quantity == "weights"]
    assert len(held) == 2 and held.ratio.sub(1).abs().max() < 0.01
    assert (rows[rows.unit != "GiB"].measured > 0).all()
    assert rows[rows.quantity == "peak"].measured.isna().all()  # unknown on a CPU, not zero
    gpu.write(tmp_path, {"shapes": "small", "device": "cpu", "repeats": 1}, rows, skipped)
    kept = pd.read_csv(tmp_path / "rehearsal.csv").fillna({"unit": ""})
    pd.testing.assert_frame_equal(kept, rows)
    assert len(json.loads((tmp_path / "rehearsal.json").read_text())["rows"]) == len(rows)
    assert "| fp16, 2 blocks |" in (tmp_path / "README.md").read_text("utf-8")


def test_what_does_not_fit_is_skipped(gpu, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(gpu, "build", full)
    rows, skipped = gpu.measure(gpu.SMALL, [("weights", "fp16", {"removed": 0})])
    assert rows.empty
    assert skipped == [{"step": "weights", "variant": "fp16", "reason": "CUDA out of memory"}]


def test_a_pruned_model_has_fewer_blocks(gpu):
    model = gpu.build(gpu.SMALL, removed=6)
    assert len(anatomy.blocks(model)) == model.config.text_config.num_hidden_layers == 6
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_the_committed_figures_are_those_planned():
    rows = pd.read_csv(ROOT / "reports/gpu-rehearsal/rehearsal.csv")
    whole = rows[(rows.quantity == "parameters") & (rows.variant == "fp16, 32 blocks")]
    assert whole.measured.tolist() == [shapes.llava_7b().parameters()] == [7_063_427_072]
    assert rows[rows.quantity == "peak"].ratio.sub(1).abs().max() < 0.1


def test_answers_without_a_block_are_raced_on_any_model(monkeypatch, capsys):
    importance = script("importance")
    monkeypatch.setattr(importance, "STUDY", 6)
    importance.of_model("pico", "cpu", 1, 3)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["texts_equal"] and found["equal"] == 1
    assert (found["blocks"], found["items"]) == (2, 2 * 3)
    assert 0 <= found["accepted"] <= 1 and found["near_ties"] >= 0 and found["ratio"] > 0
    assert found["loop_batch"] <= 3
