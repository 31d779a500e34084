"""What the study needs of a machine, and what is refused before anything is loaded."""

import re
from dataclasses import replace

import pytest
import runs
from runs import DEFAULTS, KNOWN, NOTEBOOKS, ROOT, read_run

from derm_compress.errors import DermError
from derm_compress.files import MODELS
from derm_compress.method.quantization import calibration
from derm_compress.model import devices, memory, prompts, shapes
from derm_compress.study import batches, checks, params, preflight, run
from derm_compress.study.needs import Needs
from derm_compress.study.stage import start_stage

ARCH = shapes.llava_7b()
T4 = {
    "model": "llava-hf/llava-1.5-7b-hf", "device": "cuda", "image_size": 336, "max_new_tokens": 200,
    "batch_size": 16, "importance_batch": 3, "depths": [2, 4, 6, 7, 8, 9, 10],
    "rankings": ["published", "block_influence", "magnitude", "random-0"], "rival_depths": [6, 9],
    "finetune_batch": 8, "sft_batch": 8, "activation_batch": 1, "quantization_batch": 2,
    "latency_batches": [1],
}  # fmt: skip


def values(**changed):
    return DEFAULTS | T4 | changed


def planned(**changed):
    return runs.planned(run="x", **T4 | changed)


@pytest.fixture
def two_t4(monkeypatch):
    """Two GPUs that report what a T4 does."""

    class Properties:
        name, total_memory = "Tesla T4", int(14.56 * memory.GIB)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Properties)


@pytest.mark.parametrize("name", ["kaggle-t4", "kaggle-t4-day"])
def test_the_run_files_for_kaggle_fit_two_t4(name, two_t4):
    asked = values() | read_run(name)
    machine = preflight.here()
    assert machine.gib == pytest.approx(preflight.KAGGLE.gib) == pytest.approx(14.02)
    assert preflight.faults(asked, ARCH, machine) == []
    steps = Needs(asked, ARCH, gpus=2).steps()
    assert len({step.stage for step in steps}) == 8
    assert 10 < max(step.gib(step.batch) for step in steps) < machine.gib - 0.2
    assert 0 < sum(step.disk for step in steps) < 20e9


def test_a_teacher_has_the_room_of_a_whole_model_and_mending_is_planned():
    plain, more = (
        {step.what: step.gib(8) for step in Needs(asked, ARCH).steps() if step.stage == "05_sft"}
        for asked in (values(), values(distillation=0.5, replace_me=True))
    )
    whole = Needs(values(), ARCH).weights
    assert more["fine-tuning"] - plain["fine-tuning"] == pytest.approx(whole)  # before NF4
    assert more.keys() - plain.keys() == {"ReplaceMe"} and whole < more["ReplaceMe"] < whole + 3


def test_nothing_is_refused_for_a_rounding_and_what_is_close_says_so():
    asked, machine = values(latency_batches=[2]), preflight.KAGGLE
    most = max(step.gib(step.batch) for step in preflight.steps_of((), asked, ARCH, machine))
    assert preflight.faults(asked, ARCH, replace(machine, gib=most)) == []
    (said,) = preflight.faults(asked, ARCH, replace(machine, gib=most - 0.02))
    assert f"{most:.2f} GiB of {most - 0.02:.2f} on one GPU" in said
    told = preflight.says(planned(latency_batches=[2]), ["08_evaluation"])
    assert told.endswith("; close to the 14.02 GiB of one GPU"), told


def test_merging_holds_the_weights_and_one_linear_twice():
    needs = Needs(values(), ARCH)
    largest = 4096 * 11008
    assert needs.merging() == pytest.approx(needs.weights + 6 * largest / memory.GIB)
    stages = [step.stage[:2] for step in needs.steps() if step.what == "merging"]
    assert stages == ["02", "03", "04", "05", "06", "07", "08"]


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_small_run_fits_t4_whose_memory_sets_its_batch_sizes(gpus):
    machine = preflight.Machine("T4", gpus, 14.56 - memory.CONTEXT)
    asked = DEFAULTS | read_run("small")
    arch = preflight.architecture(asked)
    assert preflight.faults(asked, arch, machine) == []
    assert all(asked[name] == batches.OPEN for name in batches.ON_CPU)
    found = batches.settled(asked, arch, machine.gpus, machine.gib)
    assert min(found[name] for name in batches.ON_CPU) >= 96
    steps = preflight.steps_of((), asked, arch, machine)
    assert len({step.stage for step in steps}) == 8
    assert max(step.gib(step.batch) for step in steps) <= batches.SHARE * machine.gib


def test_what_the_small_runs_file_offers_would_run(monkeypatch, tmp_path):
    monkeypatch.setenv(MODELS, str(tmp_path))
    head = (ROOT / "params" / "small.yaml").read_text("utf-8").replace("\n#", "")
    on_cpu, core = re.findall('SET="(.*?)"', head)
    for offered in (on_cpu, core):
        told = params.check_texts(params.assignments([offered]), KNOWN, "SET")
        made = runs.planned(**DEFAULTS | read_run("small") | told | {"device": "cpu"})
        checks.check(made, [stage for stage in NOTEBOOKS if stage[:2] not in ("02", "09")])
    assert made.values["sft_seeds"] == made.values["importance_draws"] == 1
    first = {*NOTEBOOKS["01_data"].schema, *NOTEBOOKS["02_finetune"].schema}
    assert set(told) & first == {"run"}  # which is part of no key


def test_a_model_is_spread_where_no_gpu_holds_it_and_a_batch_of_its_answers(two_t4):
    """As the preflight plans and a run decides; the process that starts others is there, too."""
    spread, whole = (Needs(values(), ARCH, 2, gib) for gib in (14.02, 24))
    alone, more = Needs(values(), ARCH, 1, 24), Needs(values(batch_size=32), ARCH, 2, 24)
    assert spread.answering(16) < whole.answering(16) == alone.answering(16) < 24
    assert (spread.spread, whole.spread, alone.spread, more.spread) == (True, False, False, True)
    three = alone.answering(3)
    room = three + memory.CONTEXT
    for gib, batch, told in ((room, 1, False), (room - 0.01, 1, True), (room, 4, True)):
        assert memory.too_small(ARCH, 2, gib, batch=batch, new_tokens=200) is told
    asked = {"batch": 1, "new_tokens": 200}
    assert devices.too_small(shapes.llava_7b_config(), "cuda", **asked)
    assert not devices.too_small(shapes.llava_7b_config(), "cpu", **asked)


@pytest.mark.parametrize(
    ("name", "too_many", "stage"),
    [
        ("batch_size", 64, "04_pruning"),
        ("activation_batch", 40, "06_activation_analysis"),
        ("quantization_batch", 30, "07_quantization"),
        ("sft_batch", 100, "05_sft"),
        ("finetune_batch", 100, "02_finetune"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_largest_value_that_does(name, too_many, stage):
    asked = values(**{name: too_many})
    said = [line for line in preflight.faults(asked, ARCH) if line.startswith(stage)]
    fits = int(re.search(rf"set {name}: (\d+)", "".join(said))[1])
    for batch, fault in ((fits, False), (fits + 1, True)):
        left = preflight.faults(values(**{name: batch}), ARCH)
        assert any(line.startswith(stage) for line in left) == fault


def test_hidden_states_between_two_blocks_take_what_is_planned(pico, dataset):
    model, processor = pico
    held, items = [], dataset.of("train")[:4]
    how = {"batch_size": 6, "device": "cpu"}
    for batch in prompts.calibration_batches(processor, items, dataset.images, **how):
        held += [part.hidden.numel() for part in calibration.split(model, batch)]
    needs = Needs(values(quantization_items=4), shapes.architecture(model.config))
    assert 0.5 * needs.waiting() < 2 * sum(held) <= needs.waiting()  # its words are shorter
    on_t4 = Needs(values(quantization_items=16), ARCH)
    assert on_t4.waiting() < 0.1 * memory.GIB < 0.03 * on_t4.calibrating(2) * memory.GIB


def test_gptq_takes_memory_for_its_factor_and_disk_for_its_codes():
    plain, coded = (Needs(values(methods=[name], bits=[4, 3]), ARCH) for name in ("awq", "gptq"))
    wider = coded.calibrating(3) - plain.calibrating(3)
    assert wider > 2 * 4 * 11008**2 / memory.GIB  # at least two more of the widest H
    before, after = (sum(step.disk for step in one.steps()) for one in (plain, coded))
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    codes = linears * ((4 + 3) / 8 + (4 + 7 / 8) / 64)  # and each group's fp16 scale and zero
    assert after - before == pytest.approx(3 * codes)


def test_latency_is_planned_at_its_largest_batch_on_one_gpu():
    (said,) = preflight.faults(values(latency_batches=[1, 4]), ARCH)
    assert said.startswith("08_evaluation, latency: 14.")
    assert said.endswith("set latency_batches: [2]")
    assert preflight.faults(values(latency_batches=[2]), ARCH) == []


def test_what_no_batch_makes_fit_says_what_else_to_do():
    asked = values(rankings=["published", "output_similarity"], max_new_tokens=1000)
    (said,) = [line for line in preflight.faults(asked, ARCH) if line.startswith("03_")]
    assert said.startswith("03_layer_importance, output_similarity: ")
    assert "leave it out of rankings" in said
    (full,) = preflight.faults(values(n_train=60_000), ARCH)
    assert full.startswith("disk: ")
    alone = replace(preflight.KAGGLE, gpus=1)  # one model at a time
    assert preflight.faults(values(batch_size=1), ARCH, alone) == []


def test_a_smaller_model_needs_less_of_everything():
    big, less = (Needs(values(), arch, gpus=2).steps() for arch in (ARCH, replace(ARCH, blocks=16)))
    for one, other in zip(less, big, strict=True):
        assert one.gib(one.batch) <= other.gib(other.batch) and one.disk <= other.disk


def test_the_runner_says_what_is_needed_and_refuses_what_does_not_fit(two_t4, capsys):
    made = planned()
    stages = list(made.notebooks)
    run.foresee(made, stages, refuse=True)
    said = capsys.readouterr().out
    assert (
        "x, planned for 2 x Tesla T4, over all of which the model lies when it answers:" in said
        and said.count("GB of disk") == 8
    )
    assert said.startswith("x: checking what it needs")  # before torch is there
    run.foresee(planned(device="meta", batch_size=640), stages, refuse=False)
    assert "set batch_size: " in capsys.readouterr().out
    with pytest.raises(DermError, match="does not fit 2 x Tesla T4: .*set batch_size"):
        run.foresee(planned(batch_size=640), stages, refuse=True)
    run.foresee(planned(device="cpu", batch_size=640), stages, refuse=True)
    run.foresee(planned(batch_size=640), ["03_layer_importance"], refuse=True)
    said = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in said[-2:]] == ["x,", "03"]  # of others nothing is said


def test_a_notebook_run_alone_refuses_too_and_prints_no_plan(two_t4, tmp_path, capsys):
    cell = values(artifact_root=str(tmp_path), batch_size=640)
    cell["In"] = ["# Parameters\nimage_size = 336\n"]
    with pytest.raises(DermError, match="does not fit 2 x Tesla T4: .*set batch_size"):
        start_stage("02_finetune", cell, root=ROOT)
    assert "planned for" not in capsys.readouterr().out


def test_a_stage_asks_for_as_many_gpus_as_it_computes_on():
    one = planned()
    assert preflight.share(one, "01_data", preflight.KAGGLE) == (0, 0.0)
    gpus, gib = preflight.share(one, "05_sft", preflight.KAGGLE)
    assert gpus == 2 and 10 < gib < preflight.KAGGLE.gib
    assert preflight.share(one, "05_sft", preflight.Machine("a node", 1, 78))[0] == 1
