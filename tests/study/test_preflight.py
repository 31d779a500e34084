from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from derm_compress.errors import DermError
from derm_compress.method.pruning.plan import published_plan
from derm_compress.method.importance import criteria
from derm_compress.method.quantization import wanted as wanted_frames
from derm_compress.model import memory, shapes
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe
from derm_compress.study import cost, params, plan, preflight, stage_costs
from derm_compress.study.stage import start_stage

ROOT = Path(__file__).parents[2]
ARCH = shapes.llava_7b()
T4 = {
    "model": "llava-hf/llava-1.5-7b-hf", "device": "cuda", "image_size": 336, "max_new_tokens": 200, "batch_size": 16,
    "importance_batch": 3, "rankings": ["published", "block_influence", "magnitude", "random-0"],
    "depths": [2, 4, 6, 7, 8, 9, 10], "rival_depths": [6, 9], "finetune_batch": 8, "finetune_steps": 3 * 1737 // 8,
    "sft_batch": 8, "sft_steps": 3 * 1737 // 8, "activation_batch": 1, "quantization_batch": 2,
    "latency_batches": [1],
}  # fmt: skip


def values(**changed):
    known = params.known_parameters(params.read_notebooks(ROOT))
    return {name: parameter.default for name, parameter in known.items()} | T4 | changed


def test_the_papers_study_fits_two_t4_in_sessions_of_twelve_hours():
    made = preflight.table(values(), ARCH)
    assert made.stage.tolist()[0] == "01_data" and len(made) == 8
    assert made.gpu_gib.max() <= preflight.KAGGLE.gib and made.disk_gib.sum() * memory.GIB < 20e9
    assert (
        made.groupby("session").minutes.sum() <= 11.3 * 60
    ).all() and made.session.is_monotonic_increasing
    assert preflight.faults(values(), ARCH) == []
    preflight.check(values(), ARCH)
    said = preflight.says(values(), ARCH)
    assert all(stage in said for stage in made.stage) and "session(s) of at most 11.3 h" in said


@pytest.mark.parametrize(("name", "digits"), [("kaggle-t4", 0), ("kaggle-t4-quick", 1)])
def test_the_run_files_for_kaggle_fit_and_say_what_they_cost(name, digits):
    known, file = (
        params.known_parameters(params.read_notebooks(ROOT)),
        ROOT / "params" / f"{name}.yaml",
    )
    asked = {key: parameter.default for key, parameter in known.items()} | params.read_params(
        file, known
    )
    made = preflight.table(asked, ARCH)
    assert (
        preflight.faults(asked, ARCH) == []
        and (made.groupby("session").minutes.sum() <= 11.3 * 60).all()
    )
    head = file.read_text().split("run:")[0]
    assert f"not measured: {made.minutes.sum() / 60:.{digits}f} h of T4 x2" in head
    if name == "kaggle-t4":
        second = made.stage[made.session == 2]
        assert (
            second.tolist() == ["07_quantization", "08_evaluation"]
            and "(01 to 06, then 07 and 08)" in head
        )
        hours = made.set_index("stage").minutes / 60
        assert f"{hours['02_finetune']:.0f} h in 02 and {hours['05_sft']:.0f} h in 05" in head
    else:
        assert made.minutes.sum() < 120


def test_what_cannot_fit_is_refused_with_the_value_that_does():
    for name, too_many, stage in (
        ("batch_size", 64, "04_pruning"), ("activation_batch", 40, "06_activation_analysis"),
        ("quantization_batch", 30, "07_quantization"), ("sft_batch", 100, "05_sft"),
        ("finetune_batch", 100, "02_finetune"),
    ):  # fmt: skip
        asked = values(**{name: too_many})
        (said, *_) = [
            line
            for line in preflight.faults(asked, ARCH)
            if line.startswith(stage) and name in line
        ]
        fits = int(said.split(f"set {name}: ")[1])
        steps = stage_costs.Costs(asked, ARCH, gpus=2).steps()
        (step,) = {
            s.what: s
            for s in steps
            if s.stage == stage and s.parameter == name and s.gib(too_many) > 14.2
        }.values()
        assert step.gib(fits) <= preflight.KAGGLE.gib < step.gib(fits + 1), said
        with pytest.raises(DermError, match=f"does not fit Kaggle, two T4: .*set {name}: {fits}"):
            preflight.check(asked, ARCH)


def test_latency_is_planned_at_its_largest_batch_on_one_gpu():
    (said,) = preflight.faults(values(latency_batches=[1, 4]), ARCH)
    assert said.startswith("08_evaluation, latency: 14.") and said.endswith(
        "set latency_batches: [2]"
    )
    assert preflight.faults(values(latency_batches=[2]), ARCH) == []


def test_latency_of_integers_takes_what_decoding_all_weights_does():
    asked = values(
        latency_tokens=16,
        latency_repeats=10,
        methods=["awq", "rtn"],
        rankings=["published", "magnitude"],
    )
    costs = stage_costs.Costs(asked, ARCH)
    assert costs.timed == (4, 5)
    ones = stage_costs.Costs(asked | {"methods": []}, ARCH)
    assert ones.timed == (4, 0) and ones.measuring() < 3 * 60
    decoded = 13 * 16 * 5 * cost.unpacking_seconds(ARCH, cost.T4)
    assert costs.measuring() == pytest.approx(9 / 4 * ones.measuring() + decoded) and decoded > 900


def test_a_batch_waits_for_an_answer_without_end():
    tokens = ARCH.image_tokens + stage_costs.PROMPT
    for batch, steps in ((16, 3), (1, 48)):
        how = {"batch": batch, "before": tokens}
        short, long = (
            cost.decode_seconds(ARCH, cost.T4, tokens=n, **how) for n in (stage_costs.ANSWER, 200)
        )
        ends = (1 - stage_costs.ENDLESS) ** batch
        taken = 48 * cost.prefill_seconds(ARCH, cost.T4, tokens=tokens) + steps * (
            ends * short + (1 - ends) * long
        )
        assert stage_costs.Costs(values(batch_size=batch), ARCH).answers(16) == pytest.approx(taken)
    assert 0.4 < (1 - stage_costs.ENDLESS) ** 16 < 0.6


def test_a_ranking_that_no_batch_makes_fit_is_named():
    asked = values(rankings=["published", "output_similarity"], max_new_tokens=1000)
    (said,) = [line for line in preflight.faults(asked, ARCH) if line.startswith("03_")]
    assert (
        said.startswith("03_layer_importance, output_similarity: ")
        and "leave it out of rankings" in said
    )


def test_time_and_disk_have_limits_too():
    (long,) = preflight.faults(values(sft_steps=5000), ARCH)
    assert long.startswith("05_sft: ") and long.endswith("set sft_steps lower")
    (full,) = preflight.faults(values(n_train=60_000, finetune_steps=10), ARCH)
    assert full.startswith("disk: ")


def test_two_models_at_once_need_two_gpus():
    alone = replace(preflight.KAGGLE, gpus=1)
    asked = values(batch_size=1)
    assert preflight.faults(asked, ARCH) == []
    assert [line.split(":")[0] for line in preflight.faults(asked, ARCH, alone)] == [
        "07_quantization, errors"
    ]


def test_a_smaller_model_needs_less_of_everything():
    small = replace(ARCH, blocks=16)
    big, less = (preflight.table(values(), arch).set_index("stage") for arch in (ARCH, small))
    assert (less.gpu_gib <= big.gpu_gib).all() and less.minutes.sum() < big.minutes.sum()


def test_a_training_step_is_three_forwards_with_checkpointing():
    unit = cost.Device("unit", flops=1.0, bandwidth=1.0, prefill=1.0, decode=1.0)
    one = {"tokens": 700, "blocks_removed": 6}
    plain, kept = (cost.training_seconds(ARCH, unit, **one, checkpointing=c) for c in (False, True))
    forward = cost.reading_flops(ARCH, 700, blocks=26)
    assert kept - plain == pytest.approx(forward)
    assert plain == pytest.approx(
        2 * forward + 2 * cost.head_flops(ARCH, 700) + cost.picture_flops(ARCH)
    )


def test_times_on_a_t4_follow_bytes_and_operations():
    recipe = Recipe("llava-1.5-7b", "0", 32)
    known = variants_of.pruned(recipe, [published_plan()], [6])
    packed = wanted_frames.quantized_variants(
        known, wanted_frames.asked(known.variant, ["awq"], [4], 64), f"07_quantization/{64 * '0'}"
    )
    told = preflight.times(pd.concat([known, packed]), ARCH).set_index("variant")
    assert 60 < told.t4_decode_ms_per_token["original"] < 80  # 13.2 GB at 60 % of 320 GB/s
    assert (
        told.t4_decode_ms_per_token["original|awq4"] < 0.4 * told.t4_decode_ms_per_token["original"]
    )
    assert (
        told.t4_prefill_ms["original|awq4"]
        == told.t4_prefill_ms["original"]
        > told.t4_prefill_ms["pruned-6"]
    )
    assert told.disk_gib["original"] == pytest.approx(13.16, abs=0.01)


def test_blocks_that_are_not_there_cannot_be_protected():
    assert preflight.faults(values(protected=[0, -32, 31]), ARCH) == []
    assert preflight.faults(values(protected=[0, 40, -33]), ARCH) == [
        "protected [40, -33]: blocks are 0 to 31, or -1 to -32 from the end"
    ]


def test_the_runner_says_it_first_and_refuses_before_anything_is_loaded(capsys):
    notebooks = params.read_notebooks(ROOT)
    for device, wrong in (("cpu", False), ("cuda", False), ("cuda", True), ("meta", True)):
        asked = plan.make_plan(
            ROOT, notebooks, values(run="x", device=device, batch_size=640 if wrong else 16)
        )
        if device == "cuda" and wrong:
            with pytest.raises(DermError, match="does not fit Kaggle, two T4"):
                preflight.foresee(asked, refuse=True)
        else:
            preflight.foresee(asked, refuse=device == "cuda")
        said = capsys.readouterr().out
        assert ("x, planned for Kaggle, two T4" in said) == (device != "cpu")
        assert ("set batch_size: " in said) == (device == "meta")


@pytest.mark.parametrize(
    ("device", "wrong", "said"),
    [
        ("cpu", {"group_size": 16}, "bitsandbytes has blocks of 32"),
        ("cpu", {"methods": []}, "methods: name at least one, such as awq"),
        (
            "cpu",
            {"model": "tiny", "group_size": 48, "methods": ["awq"]},
            "48 does not divide the 64 .*such as 64",
        ),
        ("cpu", {"equal_bytes": [8], "bits": [4]}, "set bits to several"),
        (
            "meta",
            {"group_size": 48, "methods": ["rtn"]},
            "48 does not divide the 4096 inputs of self_attn.q_proj",
        ),
        (
            "cuda",
            {"group_size": 48, "methods": ["llm_int8"], "equal_bytes": [8], "bits": [4, 3]},
            "48 does not",
        ),
    ],
)
def test_quantizers_that_stage_07_would_refuse_are_refused_first(device, wrong, said):
    asked = plan.make_plan(
        ROOT, params.read_notebooks(ROOT), values(run="x", device=device, **wrong)
    )
    with pytest.raises(DermError, match=said):
        preflight.foresee(asked, refuse=True)
    preflight.foresee(asked, refuse=False)


def test_a_notebook_run_alone_refuses_too(monkeypatch, tmp_path):
    schema = params.read_notebooks(ROOT)["02_finetune"].schema
    cell = {name: known.default for name, known in schema.items()} | values()
    cell |= {"device": "cuda", "artifact_root": str(tmp_path), "batch_size": 640}
    with pytest.raises(DermError, match="does not fit Kaggle, two T4: .*set batch_size"):
        start_stage("02_finetune", cell, root=ROOT)


def test_a_sentence_transformer_that_is_not_there_is_told_before_any_stage(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cpu = {"run": "x", "device": "cpu", "embedder": "no/such/model", "artifact_root": str(tmp_path)}

    def made(**changed):
        return plan.make_plan(ROOT, params.read_notebooks(ROOT), values(**cpu | changed))

    for ranking in ("output_similarity", "output_similarity-iterative"):
        with pytest.raises(DermError, match="sentence transformer no/such/model cannot be loaded"):
            preflight.foresee(made(rankings=[ranking]), refuse=True)
        preflight.foresee(made(rankings=[ranking]), refuse=False)
    preflight.foresee(made(rankings=["magnitude"]), refuse=True)  # nothing asks it
    finished = made(rankings=["output_similarity"])
    finished.store.entry("03_layer_importance", finished.keys["03_layer_importance"]).mkdir(
        parents=True
    )
    monkeypatch.setattr(type(finished.store), "manifest", lambda *_: {"files": {}})
    preflight.foresee(finished, refuse=True)


def test_a_sentence_transformer_in_the_projects_folder_is_found(tmp_path):
    folder = criteria._packaged()
    root = folder.parent
    asked = plan.make_plan(root, params.read_notebooks(ROOT), values(
        run="x", device="cpu", embedder=folder.name, rankings=["output_similarity"], artifact_root=str(tmp_path)
    ))  # fmt: skip
    preflight.foresee(asked, refuse=True)


def test_a_judging_model_is_told_before_any_other_is_loaded(monkeypatch):
    asked = plan.make_plan(
        ROOT, params.read_notebooks(ROOT), values(run="x", device="cuda", judge="transformers")
    )
    asked.values["judge_model"] = "no/such/folder/anywhere"
    with pytest.raises(DermError, match="judge no/such/folder/anywhere cannot be loaded"):
        preflight.foresee(asked, refuse=True)


def test_a_gpu_at_hand_counts_with_its_own_memory(monkeypatch):
    class Properties:
        name, total_memory = "Tesla T4", int(14.74 * memory.GIB)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Properties)
    found = preflight.here("cuda")
    assert (found.name, found.gpus, found.gib) == ("2 x Tesla T4", 2, 14.2)
    assert preflight.here("meta") == preflight.KAGGLE
