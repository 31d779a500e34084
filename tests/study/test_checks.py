"""What a stage would refuse is refused before any kernel starts, in one line."""

from dataclasses import replace

import pytest
import runs
import toy
from blotches import plant
from runs import NOTEBOOKS, ROOT, read_run

from derm_compress.data.request import Request
from derm_compress.errors import DermError
from derm_compress.method.importance import embedder
from derm_compress.model import loading, shapes
from derm_compress.study import checks, params, run
from derm_compress.study.keys import fingerprint
from derm_compress.study.store import Store


def planned(tmp_path, run="smoke", **changed):
    """A run that has computed nothing, on pico with 8 blocks."""
    return runs.planned(**read_run(run) | {"artifact_root": str(tmp_path)} | changed)


@pytest.mark.parametrize("run", [path.stem for path in (ROOT / "params").glob("*.yaml")])
def test_the_committed_run_files_pass_but_for_pictures_and_gpu(tmp_path, run):
    made = planned(tmp_path, run)
    if made.values["device"] == "cuda":
        return  # its shapes are planned in test_preflight
    if made.values["source"] != "synthetic":
        with pytest.raises(DermError, match="needs data_root"):
            checks.check(made, made.notebooks)
        made.values["source"] = "synthetic"
        made.values["n_train"] = 8
    checks.check(made, made.notebooks)


WRONG = {
    "device is cuda, and no GPU is there": {"device": "cuda"},
    "judge: openai needs judge_model": {"judge": "openai"},
    "would go over plain http": {
        "judge": "openai",
        "judge_model": "x",
        "judge_url": "http://far.example/v1",
    },
    "image_size is 100, but pico reads 72 px: set image_size: 72": {"image_size": 100},
    "image_size: synthetic pictures have a multiple of 4": {"image_size": 70, "device": "meta"},
    "n_train: synthetic pictures need a number": {"n_train": 0},
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
    "sft_rivals: .'last'. are not among rankings": {"sft_rivals": ["last"]},
    "sft_rivals: .'taylor-mlp'. remove attentions": {
        "sft_rivals": ["taylor-mlp"],
        "rankings": ["output_similarity", "taylor-mlp"],
    },
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
        checks.check(planned(tmp_path, **changed), NOTEBOOKS)
    assert "\n" not in str(caught.value)


def test_the_same_on_the_command_line_starts_no_kernel(tmp_path):
    runs.project(tmp_path)
    words = "run", str(tmp_path / "params" / "smoke.yaml"), "--set", "n_train=0"
    done = toy.call(ROOT, *words, DERM_COMPRESS_ROOT=str(tmp_path))
    assert done.returncode == 2 and " starts" not in done.stdout
    assert done.stderr == "n_train: synthetic pictures need a number, 2 at least\n"
    assert not (tmp_path / "artifacts").exists()


def test_what_is_to_be_known_of_photographs_is_said_before_any_kernel(tmp_path, capsys):
    plant(tmp_path)
    checks.check_source({"run": "mine", "source": "folder", "data_root": str(tmp_path)}, ROOT)
    said = capsys.readouterr().out
    assert said.startswith("mine: note: no column says which pictures are of one patient")


ASKED = {  # what a stage alone is not refused for, and what it is
    "01": ({"judge": "openai", "device": "cuda", "image_size": 100, "methods": []}, {"n_train": 0}),
    "02": ({"n_train": 0, "rankings": ["published"]}, {"image_size": 100}),
    "03": ({"sft_depths": [16], "depths": [31], "bits": []}, {"protected": [*range(8)]}),
    "04": ({"sft_depths": [16], "equal_bytes": [8], "image_size": 100}, {"depths": [31]}),
    "05": ({"equal_bytes": [8], "judge": "openai"}, {"sft_depths": [16]}),
    "06": ({"depths": [31], "methods": []}, {"shown_projection": "qkv_proj"}),
    "07": ({"shown_projection": "qkv_proj", "judge": "openai"}, {"equal_bytes": [8]}),
    "08": ({"sft_depths": [16], "methods": [], "n_train": 0}, {"judge": "openai"}),
}


@pytest.mark.parametrize(("number", "others", "own"), [(n, *told) for n, told in ASKED.items()])
def test_a_stage_alone_is_checked_for_what_it_needs(tmp_path, monkeypatch, number, others, own):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    made = planned(tmp_path, **others)
    stages = params.select(number, made.notebooks)
    checks.check(made, stages)
    with pytest.raises(DermError):
        checks.check(planned(tmp_path, **own), stages)


def test_what_is_computed_already_is_asked_for_again_by_force_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "foresee", lambda plan, stages, **_: asked.append(stages))
    monkeypatch.setattr(run, "run_one", lambda *_: True)
    monkeypatch.setattr(Store, "ready", lambda _, stage, key: stage < "05")
    for how in ({}, {"only": "04"}, {"only": "04", "force": True}, {"from_": "04", "force": True}):
        run.run([ROOT / "params" / "smoke.yaml"], root=ROOT, **how)
    assert [[stage[:2] for stage in stages] for stages in asked] == [
        ["05", "06", "07", "08"], [], ["04"], ["04", "05", "06", "07", "08"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["angular-contiguous", "last-unprotected", "taylor-iterative"])
def test_a_plan_goes_as_far_as_is_foretold(tmp_path, name):
    p = planned(tmp_path, rankings=[name], protected=[0, 3, -1], iterative_blocks=4).values
    reach = {"angular-contiguous": 3, "last-unprotected": 8, "taylor-iterative": 4}
    assert checks.own_plan(p, 8).most == reach[name]


def test_a_sentence_transformer_that_is_not_there_is_told_before_any_stage(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = planned(tmp_path, embedder="no/such/model", rankings=["output_similarity-iterative"])
    with pytest.raises(DermError, match="sentence transformer no/such/model cannot be loaded"):
        checks.check_embedder(asked.values)
    asked.values["rankings"] = ["magnitude"]
    checks.check_embedder(asked.values)  # nothing asks it


def test_folders_are_found_from_the_project_and_from_home(monkeypatch, tmp_path):
    """Whatever reads them: the model, the sentence transformer, the photographs, the store."""
    (tmp_path / "S").symlink_to(embedder.packaged())
    (tmp_path / "M").symlink_to(loading.TINY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, value in (("HOME", "~/"), ("DERM_COMPRESS_ROOT", "")):
        monkeypatch.setenv(name, str(tmp_path))
        assert embedder.Embedder(f"{value}S")("any text").shape == (384,)
        assert loading.check_model(f"{value}M") and loading.is_here(f"{value}M")
        request = Request.of({"data_root": f"{value}S"}, project=tmp_path)
        made = planned(tmp_path, artifact_root=f"{value}A", data_root=f"{value}S")
        made = replace(made, root=tmp_path)
        assert request.data_root == tmp_path / "S" and made.artifacts == tmp_path / "A"
        assert made._by_content(f"{value}M") == fingerprint(tmp_path / "M")
        monkeypatch.delenv(name)


def test_a_projection_that_the_decoder_fuses_is_refused():
    arch = shapes.llava_7b()
    fused = replace(arch, linears={"self_attn.qkv_proj": [3, 1], "mlp.down_proj": [1, 2]})
    checks.check_projection({"shown_projection": "q_proj", "model": "m"}, arch)
    with pytest.raises(DermError, match="q_proj; m has qkv_proj, down_proj"):
        checks.check_projection({"shown_projection": "q_proj", "model": "m"}, fused)
