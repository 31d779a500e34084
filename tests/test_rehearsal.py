"""The rehearsal, small and on the CPU: it needs little, measures what it plans, goes on where it was."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from derm_compress import rehearsal, rehearsal_rig
from derm_compress.model import anatomy, shapes

ROOT = Path(__file__).parent.parent
ABSENT = (
    "papermill", "bitsandbytes", "sentence_transformers", "nbformat", "nbconvert", "seaborn", "matplotlib", "psutil",
    "scipy", "sklearn", "pandas", "pyarrow", "awq",
)  # fmt: skip


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A rehearsal in an environment that has torch, transformers, peft, accelerate, and none of ABSENT."""
    out = tmp_path_factory.mktemp("rehearsal")
    code = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n"
    code += "from derm_compress import rehearsal\nsys.exit(rehearsal.main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, str(out), "--shapes", "small"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_step_leaves_rows_beside_their_plans(without):
    rows = pd.read_csv(without / "rehearsal.csv")
    assert list(rows.columns) == [
        "step",
        "variant",
        "quantity",
        "unit",
        "measured",
        "planned",
        "ratio",
    ]
    assert (
        set(rows.step)
        == set(rehearsal.STEPS)
        == {path.stem for path in (without / "steps").glob("*.json")}
    )
    timed = rows[rows.unit.isin(["s", "ms", "ms/token", "tokens/s"])]
    assert len(timed) > 30 and (timed.measured > 0).all() and (timed.planned > 0).all()
    assert rows[rows.quantity == "peak"].measured.isna().all()  # unknown on a CPU, not zero


def test_weights_and_parameters_are_those_planned(without):
    rows = pd.read_csv(without / "rehearsal.csv")
    counted = rows[rows.quantity == "parameters"]
    assert len(counted) == 6 and (counted.measured == counted.planned).all()
    held = rows[rows.quantity == "weights"]
    assert len(held) == 6 + 8 and held.ratio.sub(1).abs().max() < 0.01


def test_what_is_absent_is_skipped_by_name(without):
    told = json.loads((without / "rehearsal.json").read_text())
    skipped = [case for step in told["steps"].values() for case in step["skipped"]]
    assert len(skipped) == 2 + 8 and all("NF4" in case["variant"] for case in skipped)
    assert all(case["reason"].startswith("bitsandbytes: ") for case in skipped)
    trained = {row["variant"] for row in told["steps"]["training"]["rows"]}
    assert len(trained) == 8 and all(variant.startswith("fp16") for variant in trained)


def test_the_page_says_what_it_is_and_has_no_paths(without):
    page = (without / "README.md").read_text("utf-8")
    for said in ("random", "not a T4", "bitsandbytes: ", "1,605,952 of 1,605,952 (1.00)"):
        assert said in page
    for path in (p for p in without.rglob("*") if p.is_file()):
        assert not re.search(r"(?<![\w.])/(?:root|work|home|tmp)/", path.read_text("utf-8"))


def test_finished_steps_are_taken_up_and_others_made(without, on_cpu, monkeypatch):
    where = json.loads((without / "rehearsal.json").read_text())["where"]
    monkeypatch.setattr(rehearsal_rig, "place", lambda rig: where)
    monkeypatch.setattr(rehearsal_rig, "build", lambda *_, **__: pytest.fail("built again"))
    page = (without / "README.md").read_text("utf-8")
    assert rehearsal.main([str(without), "--shapes", "small"]) == 0
    assert (without / "README.md").read_text("utf-8") == page
    monkeypatch.setattr(rehearsal_rig, "place", lambda rig: where | {"device": "another"})
    assert rehearsal.main([str(without), "--shapes", "small", "--only", "limits"]) == 0
    assert list(json.loads((without / "rehearsal.json").read_text())["steps"]) == ["limits"]


def test_7b_without_a_gpu_is_one_clear_line(on_cpu, tmp_path, capsys):
    assert rehearsal.main([str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "no CUDA device" in told and told.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_model_made_on_the_device_is_an_ordinary_one(on_cpu):
    rig = rehearsal_rig.find("small")
    made, loaded = rehearsal_rig.build(rig), LlavaForConditionalGeneration(rig.config())
    assert {p.dtype for p in made.parameters()} == {torch.float16} and not made.training
    assert [p.shape for p in made.parameters()] == [p.shape for p in loaded.parameters()]
    for (name, ours), (same, theirs) in zip(
        made.named_buffers(), loaded.named_buffers(), strict=True
    ):
        assert name == same and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    pruned = rehearsal_rig.build(rig, removed=6)
    assert len(anatomy.blocks(pruned)) == pruned.config.text_config.num_hidden_layers == 6


def test_nf4_is_used_where_bitsandbytes_works(on_cpu):
    rig = rehearsal_rig.find("small")
    (held, *_) = rehearsal.generate(rig, form="NF4", removed=6, batch=1)
    assert held["measured"] == pytest.approx(held["planned"], rel=0.01)
    rows = rehearsal.training(rig, form="NF4", removed=6, batch=1, checkpointing=True)
    assert [row["quantity"] for row in rows] == ["peak", "step", "speed"]
    assert {settings["form"] for settings in rehearsal.cases(rig)["training"][1].values()} == {
        "NF4"
    }


def test_what_does_not_fit_is_skipped(on_cpu, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"
        )

    monkeypatch.setattr(rehearsal_rig, "build", full)
    assert rehearsal.main([str(tmp_path), "--shapes", "small", "--only", "weights"]) == 0
    told = json.loads((tmp_path / "rehearsal.json").read_text())["steps"]["weights"]
    assert not told["rows"] and {case["reason"] for case in told["skipped"]} == {
        "CUDA out of memory"
    }
    assert "CUDA out of memory" in (tmp_path / "README.md").read_text("utf-8")


def test_the_committed_page_is_rendered_from_its_rows(tmp_path):
    folder = ROOT / "reports/gpu-rehearsal"
    shutil.copy(folder / "rehearsal.json", tmp_path)
    assert rehearsal.main([str(tmp_path), "--page"]) == 0
    for name in ("README.md", "rehearsal.csv", "rehearsal.json"):
        assert (tmp_path / name).read_text("utf-8") == (folder / name).read_text("utf-8")
    rows = pd.read_csv(folder / "rehearsal.csv").set_index(["step", "variant", "quantity"])
    whole = rows.loc[("weights", "fp16, 32 blocks", "parameters")]
    assert whole.measured == whole.planned == shapes.llava_7b().parameters() == 7_063_427_072
    peaks = rows.xs("peak", level="quantity").ratio
    assert len(peaks) == 18 and peaks.sub(1).abs().max() < 0.1


def test_make_installs_nothing_for_it():
    done = subprocess.run(
        ["make", "-n", "rehearsal-gpu", "PYTHON=python"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "pip" not in done.stdout and ".venv" not in done.stdout
    assert "derm_compress.rehearsal" in done.stdout
