"""What a stage would refuse is refused before any kernel starts, in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import toy
from blotches import plant

from derm_compress.errors import DermError
from derm_compress.method.importance import embedder
from derm_compress.model import shapes
from derm_compress.study import checks, params, plan

ROOT = Path(__file__).parents[2]


def planned(tmp_path, run="smoke", **changed):
    """A run that has computed nothing, on pico with 8 blocks."""
    notebooks = params.read_notebooks(ROOT)
    file = ROOT / "params" / f"{run}.yaml"
    asked = params.read_params(file, params.known_parameters(notebooks))
    where = {"artifact_root": str(tmp_path)}
    return plan.make_plan(ROOT, notebooks, asked | where | changed)


@pytest.mark.parametrize("run", [path.stem for path in (ROOT / "params").glob("*.yaml")])
def test_the_committed_run_files_pass_but_for_pictures_and_gpu(tmp_path, run):
    made = planned(tmp_path, run)
    if made.values["device"] == "cuda":
        return  # its shapes are planned in test_preflight
    if made.values["source"] != "synthetic":
        with pytest.raises(DermError, match="needs data_root"):
            checks.check(made)
        made.values["source"] = "synthetic"
        made.values["n_train"] = 8
    checks.check(made)


WRONG = {
    "device is cuda, and no GPU is there": {"device": "cuda"},
    "judge: openai needs judge_model": {"judge": "openai"},
    "would go over plain http": {
        "judge": "openai",
        "judge_model": "x",
        "judge_url": "http://far.example/v1",
    },
    "image_size is 100, but pico reads 72 px: set image_size: 72": {"image_size": 100},
    "image_size: drawn pictures have a multiple of 4": {"image_size": 70, "device": "meta"},
    "n_train: drawn pictures need a number": {"n_train": 0},
    "source 'folder' needs data_root": {"source": "folder"},
    "notebooks holds no images": {"source": "folder", "data_root": "notebooks"},
    "label_column, dermatitis: not read by source synthetic; leave it out, or set source: folder": {
        "label_column": "dx",
        "dermatitis": "narrow",
    },
    "data folder .* does not exist": {"source": "dermnet", "data_root": "nowhere"},
    "model no/such/folder": {"model": "no/such/folder"},
    "llava-1.5-7b: shapes without weights": {"model": "llava-1.5-7b"},
    "llava-1.5-7b-hf reads 336 px": {"model": "llava-hf/llava-1.5-7b-hf"},
    "rankings: published is an order of 32 blocks, and pico has 8": {"rankings": ["published"]},
    "rankings .'magnitude'. need weights": {"rankings": ["magnitude"], "device": "meta"},
    r"protected \[8, -9\]: blocks are 0 to 7, or -1 to -8": {"protected": [0, 8, -9]},
    "protected: .* are all 8 blocks": {"protected": [*range(8)]},
    "goes as far as 2 units, and depths begin at 3": {
        "rankings": ["taylor-iterative"],
        "iterative_blocks": 2,
        "depths": [12],
    },
    "goes as far as 5 units": {"depths": [31]},
    r"sft_depths: \[16\] of 32 are not among depths": {"sft_depths": [16]},
    r"equal_bytes: \[16\] of 32 are not among depths": {"equal_bytes": [16]},
    r"equal_bytes: \[8\] of 32 are not healed": {"equal_bytes": [8]},
    "equal_bytes: the first ranking takes runs": {"rankings": ["angular-contiguous"]},
    "equal_bytes: no narrower width": {"bits": [4]},
    "methods: name at least one, such as awq": {"methods": []},
    "bits: name at least one, such as 4": {"bits": []},
    "bitsandbytes has 32, 64": {"group_size": 16},
    "48 does not divide the 64 .*64": {"group_size": 48, "methods": ["llm_int8"]},
    "answer_weight: autoawq weighs": {"methods": ["autoawq"], "answer_weight": 2.0},
}


@pytest.mark.parametrize(("said", "changed"), WRONG.items())
def test_what_a_stage_would_refuse_is_refused_first(tmp_path, monkeypatch, said, changed):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(DermError, match=said) as caught:
        checks.check(planned(tmp_path, **changed))
    assert "\n" not in str(caught.value)


def test_the_same_on_the_command_line_starts_no_kernel(tmp_path):
    for name in ("notebooks", "params"):
        shutil.copytree(ROOT / name, tmp_path / name)
    env = toy.environment(ROOT) | {"DERM_COMPRESS_ROOT": str(tmp_path)}
    asked = toy.command(ROOT, "run", "params/smoke.yaml", "--set", "n_train=0")
    done = toy.subprocess.run(asked, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and " starts" not in done.stdout
    assert done.stderr == "n_train: drawn pictures need a number, 2 at least\n"
    assert not (tmp_path / "artifacts").exists()


def test_what_is_to_be_known_of_photographs_is_said_before_any_kernel(tmp_path, capsys):
    plant(tmp_path)
    checks.check_source({"run": "mine", "source": "folder", "data_root": str(tmp_path)}, ROOT)
    said = capsys.readouterr().out
    assert said.startswith("mine: note: no column says which pictures are of one patient")


def test_later_stages_are_checked_where_the_data_is_there_already(tmp_path, monkeypatch):
    made = planned(tmp_path, image_size=100)
    monkeypatch.setattr(made.store, "ready", lambda stage, _: stage == "01_data")
    with pytest.raises(DermError, match="image_size"):
        checks.check(made)


def test_what_is_computed_already_is_not_asked_for_again(tmp_path, monkeypatch):
    made = planned(tmp_path, image_size=100, judge="openai")
    monkeypatch.setattr(made.store, "ready", lambda *_: True)
    checks.check(made)


@pytest.mark.parametrize("name", ["angular-contiguous", "last-unprotected", "taylor-iterative"])
def test_a_plan_goes_as_far_as_is_foretold(tmp_path, name):
    p = planned(tmp_path, rankings=[name], protected=[0, 3, -1], iterative_blocks=4).values
    reach = {"angular-contiguous": 3, "last-unprotected": 8, "taylor-iterative": 4}
    assert checks.own_plan(p, 8).most == reach[name]


def test_a_sentence_transformer_that_is_not_there_is_told_before_any_stage(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = planned(tmp_path, embedder="no/such/model", rankings=["output_similarity-iterative"])
    with pytest.raises(DermError, match="sentence transformer no/such/model cannot be loaded"):
        checks.check_embedder(asked)
    asked.values["rankings"] = ["magnitude"]
    checks.check_embedder(asked)  # nothing asks it
    folder = embedder.packaged()
    here = plan.Plan(folder.parent, asked.notebooks, asked.values | {"embedder": folder.name})
    here.values["rankings"] = ["output_similarity"]
    checks.check_embedder(here)


def test_a_projection_that_the_decoder_fuses_is_refused():
    arch = shapes.llava_7b()
    fused = replace(arch, linears={"self_attn.qkv_proj": [3, 1], "mlp.down_proj": [1, 2]})
    checks.check_projection({"shown_projection": "q_proj", "model": "m"}, arch)
    with pytest.raises(DermError, match="q_proj; m has qkv_proj, down_proj"):
        checks.check_projection({"shown_projection": "q_proj", "model": "m"}, fused)
