import dataclasses
import gc
import multiprocessing
import weakref
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from derm_compress.data import items
from derm_compress.errors import DermError
from derm_compress.method import assemble
from derm_compress.method.assemble import materialize, merge_adapter
from derm_compress.method.finetune import distill, jobs, train
from derm_compress.method.finetune.jobs import Job, Worker
from derm_compress.method.finetune.workers import side_by_side
from derm_compress.method.quantization import quantize
from derm_compress.model import anatomy, devices, loading, memory, prompts, shapes, usage
from derm_compress.model.recipe import adapter_digest

TRAINING = train.Training(
    rank=4, alpha=8, learning_rate=1e-2, steps=4, batch_size=4, seed=0, checkpoint_every=2
)
BLOCKS = tuple(range(8))


def trained(dataset, tmp_path, training=TRAINING, name="a", **how):
    """Trains the pico model into tmp_path/<name>: (peft model, curve, told)."""
    model, processor = loading.load_base("pico")
    data = dataset.of("train"), dataset.images
    checkpoint = tmp_path / f"{name}.ckpt"
    how |= {"checkpoint": checkpoint, "what": name}
    made = train.train(model, processor, *data, training, **how)
    made[0].save_pretrained(tmp_path / name)
    return made


def batch_of(pico, dataset, rows):
    some, rng = dataset.of("train")[:rows], np.random.default_rng(0)
    return train.training_batch(*pico, some, dataset.images, rng)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """(folder of the adapter, its curve) of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "a", trained(dataset, folder)[1]


def weights_of(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_labels_are_answers_and_their_ends_alone(pico):
    tokenizer = pico[1].tokenizer
    turns = [("What is it?", "This is rosacea."), ("And the treatment?", "Sun protection.")]
    ids, labels = prompts.encode(pico[1], turns, image_tokens=36)
    assert (ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == 36
    assert ids[0] == tokenizer.bos_token_id
    kept = labels != prompts.IGNORED
    assert torch.equal(labels[kept], ids[kept])
    assert tokenizer.decode(ids[kept]) == " This is rosacea.</s> Sun protection.</s>"


def test_an_old_torchao_beside_it_is_not_asked(pico, tmp_path, monkeypatch):
    """peft refuses any below 0.16 as soon as a linear gets that far; Kaggle's image has 0.10."""
    from peft import import_utils

    told = tmp_path / "torchao-0.10.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    import_utils.is_torchao_available.cache_clear()
    with pytest.raises(ImportError, match=r"torchao. Found version 0\.10"):
        import_utils.is_torchao_available()
    tuned = train.attach(pico[0], TRAINING)
    linear = anatomy.linears(anatomy.blocks(tuned.get_base_model())[0])["mlp.up_proj"]
    assert type(linear).__module__ == "peft.tuners.lora.bnb"
    assert not hasattr(pico[0], "is_loaded_in_4bit")


def test_a_trained_model_is_gone_as_soon_as_it_is_let_go(dataset, tmp_path):
    """On a GPU the next one is loaded at once, and both have no room."""
    gc.collect()
    gc.disable()
    try:
        tuned, _, _ = trained(dataset, tmp_path)
        block = anatomy.blocks(tuned.get_base_model())[0]
        held = [weakref.ref(linear.base_layer.weight) for linear in anatomy.linears(block).values()]
        assert len(held) == 7 and all(ref() is not None for ref in held)
        del tuned, block
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


def test_a_gpu_is_emptied_before_a_model_is_loaded_on_it(recipe, store, monkeypatch):
    seen = []
    monkeypatch.setattr(usage, "reset_peak", seen.append)
    monkeypatch.setattr(assemble, "load_base", lambda name, *where: seen.append(name))
    with pytest.raises(TypeError):
        materialize(recipe, store, "cuda")
    assert seen == ["cuda", "pico"]


def test_training_lowers_the_loss(dataset, tmp_path):
    longer = train.Training(rank=8, alpha=16, learning_rate=1e-2, steps=12, batch_size=4, seed=0)
    _, curve, _ = trained(dataset, tmp_path, longer)
    assert curve.loss.iloc[-3:].mean() < 0.9 * curve.loss.iloc[:3].mean()


def test_a_teacher_of_weight_0_changes_no_bit(dataset, whole, tmp_path, pico):
    _, curve, _ = trained(dataset, tmp_path, teacher=distill.Teacher(pico[0], 0.0))
    assert curve.equals(whole[1]) and weights_of(whole[0]) == weights_of(tmp_path / "a")


def test_divergence_is_of_the_answers_tokens_alone():
    p, q = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])
    labels = torch.tensor([[prompts.IGNORED, 1, prompts.IGNORED]])  # told by the first token
    theirs, ours = torch.randn(2, 1, 3, 2)
    theirs[0, 0], ours[0, 0] = p.log(), q.log() + 3
    found = distill.divergence(theirs, ours, labels)
    assert found.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    assert distill.divergence(ours, ours, labels) == 0


def test_a_pruned_model_comes_nearer_to_its_teacher(dataset, recipe, store, tmp_path):
    items.save_dataset(tmp_path, dataset)
    settings = train.Training(4, 8, 1e-2, steps=6, batch_size=4, seed=0, distillation=1.0)
    pruned = recipe.pruned([0, 1, 2, 7]).to_json()
    heard = Job("heard", "heard+sft", pruned, settings, teacher=recipe.to_json())
    alone = dataclasses.replace(heard, adapter="alone", teacher="")
    jobs.fine_tune(heard, data=tmp_path, store=store, scratch=tmp_path)
    loss = jobs.loss_curves(tmp_path, [heard]).loss
    assert loss.iloc[-2:].mean() < 0.8 * loss.iloc[:2].mean() and loss.gt(0).all()
    two, one = (sum(jobs.plan_of(job, checkpointing=False).values()) for job in (heard, alone))
    arch = shapes.architecture(loading.config_of(recipe.base))
    assert two - one > sum(memory.plan_weights(arch).values())


def test_a_cut_training_goes_on_to_the_same_adapter(dataset, whole, tmp_path, monkeypatch):
    real, calls = train.training_batch, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "training_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(dataset, tmp_path, name="cut")
    _, resumed, _ = trained(dataset, tmp_path, name="cut")
    assert resumed.equals(whole[1]) and len(calls) == 4 + 2
    assert weights_of(whole[0]) == weights_of(tmp_path / "cut")


def overflowing(monkeypatch, steps):
    """Gradients that are not finite at these steps."""
    real, calls = torch.nn.utils.clip_grad_norm_, iter(range(10**6))

    def clip(*words):
        norm = real(*words)
        return norm * torch.inf if next(calls) in steps else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def test_steps_that_overflow_are_counted_and_a_checkpoint_needs_none(
    dataset, tmp_path, monkeypatch
):
    overflowing(monkeypatch, (0, 1))
    _, curve, told = trained(dataset, tmp_path)
    assert told["skipped"] == 2 and len(curve) == 4 and told["seconds"] > 0
    kept = load_file(tmp_path / "a.ckpt")  # of step 2, when none was taken yet
    assert not any(name.startswith("exp_avg") for name in kept)
    overflowing(monkeypatch, ())
    _, again, told = trained(dataset, tmp_path)
    assert told["skipped"] == 2 and again.equals(curve)


def test_blocks_that_are_computed_again_take_the_same_attention(dataset, pico):
    """Whatever torch would take by itself: another one keeps other tensors, or gives NaN."""
    tuned = train.attach(pico[0], TRAINING).train()
    train.save_memory(pico[0])
    optimizer = torch.optim.AdamW(weight for weight in tuned.parameters() if weight.requires_grad)
    batch = batch_of(pico, dataset, 2)
    found = []
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            found.append(train.one_step(tuned, batch, optimizer)[0])
    assert found[1] < found[0]


def test_a_training_that_overflows_is_refused(dataset, tmp_path, monkeypatch):
    overflowing(monkeypatch, range(100))
    why = "x: gradients of 4 of 4 steps were not finite; set the learning rate lower"
    with pytest.raises(DermError, match=why):
        trained(dataset, tmp_path, name="x")
    train.check_skipped(9, 20, 50, "x")
    train.check_skipped(100, 900, 1000, "x")
    for skipped, steps in ((10, 50), (101, 1000)):
        with pytest.raises(DermError, match="not finite"):
            train.check_skipped(skipped, 900, steps, "x")


def test_merged_equals_unmerged_on_the_unquantized_base(dataset, whole, pico):
    from peft import PeftModel

    model, _ = pico
    step = {"kept": list(BLOCKS), "sha256": adapter_digest(whole[0])}
    merge_adapter(model, whole[0], step, kept=BLOCKS)
    other = PeftModel.from_pretrained(loading.load_base("pico")[0], whole[0])
    batch = batch_of(pico, dataset, 3)
    with torch.inference_mode():
        merged, unmerged = model(**batch).logits, other(**batch).logits
        plain = loading.load_base("pico")[0](**batch).logits
    assert torch.allclose(merged, unmerged, atol=1e-3)
    assert not torch.allclose(merged, plain, atol=1e-2)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert quantize.quantized_linears(model)["decoder"] == 0


def test_an_adapter_of_other_bytes_is_refused(whole, pico):
    step = {"kept": list(BLOCKS), "sha256": "0" * 64}
    with pytest.raises(DermError, match="not those that the recipe names"):
        merge_adapter(pico[0], whole[0], step, kept=BLOCKS)


def test_a_fine_tune_elsewhere_is_the_same_and_finished_ones_are_kept(
    dataset, recipe, store, tmp_path
):
    data, scratch, out = (tmp_path / name for name in ("data", "scratch", "out"))
    for folder in (data, scratch, out):
        folder.mkdir()
    items.save_dataset(data, dataset)
    short = train.Training(rank=2, alpha=2, learning_rate=1e-3, steps=1, batch_size=2, seed=0)
    pruned = recipe.then("prune", kept=[0, 1, 2, 7])
    recipes = {"original": recipe, "again": recipe, "pruned-4": pruned}
    asked = [Job(name, f"{name}+sft", one.to_json(), short) for name, one in recipes.items()]
    where = {"data": data, "store": store, "scratch": scratch}
    side_by_side(partial(jobs.fine_tune, **where), asked[1:2])  # in a process of its own
    before = (scratch / "again" / "curve.parquet").stat().st_mtime_ns
    jobs.fine_tune_all(out, asked, **where, processes=1)
    assert (scratch / "again" / "curve.parquet").stat().st_mtime_ns == before
    assert weights_of(out / "original") == weights_of(out / "again")
    curves = jobs.loss_curves(out, asked)
    assert curves.groupby("variant").size().to_dict() == dict.fromkeys(recipes, 1)
    told = jobs.training_costs(scratch, asked)
    assert told.variant.tolist() == [f"{name}+sft" for name in recipes]
    assert told.skipped.tolist() == [0, 0, 0] and (told.measured_peak_gib > 0.1).all()
    small, same, smaller = told.train_peak_gib  # planned: tensors of a pico model, not the process
    assert 0.1 > small == same > smaller > 0
    healed = pruned.with_adapter("out/pruned-4", out / "pruned-4")
    assert len(anatomy.blocks(materialize(healed, store)[0])) == 4


HALF = dataclasses.replace(TRAINING, base="half")


def test_half_trains_on_the_base_as_it_is_and_merges_the_same_way(dataset, whole, tmp_path, pico):
    model, _ = pico
    tuned, curve, told = trained(dataset, tmp_path, HALF)
    linear = anatomy.linears(anatomy.blocks(tuned.get_base_model())[0])["mlp.up_proj"]
    assert torch.equal(linear.base_layer.weight, anatomy.blocks(model)[0].mlp.up_proj.weight)
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in weights} == {torch.float32} and told["skipped"] == 0
    on_nf4, on_half = (
        load_file(f / "adapter_model.safetensors") for f in (whole[0], tmp_path / "a")
    )
    assert {name: x.shape for name, x in on_half.items()} == {n: x.shape for n, x in on_nf4.items()}
    batch = batch_of(pico, dataset, 3)
    step = {"kept": list(BLOCKS), "sha256": adapter_digest(tmp_path / "a")}
    merge_adapter(model, tmp_path / "a", step, kept=BLOCKS)
    with torch.inference_mode():
        assert torch.allclose(model(**batch).logits, tuned(**batch).logits, atol=1e-3)
    assert curve.loss.sub(whole[1].loss).abs().max() < 0.1 * whole[1].loss.iloc[0]
    assert not curve.loss.equals(whole[1].loss)


def test_half_asks_no_old_torchao_either(pico, monkeypatch):
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: 1 / 0)
    tuned = train.attach(pico[0], HALF)
    linear = anatomy.linears(anatomy.blocks(tuned.get_base_model())[0])["mlp.up_proj"]
    assert type(linear).__name__ == "Linear" and not hasattr(pico[0], "is_loaded_in_4bit")


def test_half_computes_in_half_precision_and_nf4_as_it_did(pico, dataset):
    model, _ = pico
    batch = batch_of(pico, dataset, 2)
    seen = set()
    model.lm_head.register_forward_hook(lambda _, __, made: seen.add(made.dtype))
    tuned = train.attach(model, HALF)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    train.one_step(tuned, batch, optimizer, base="half")
    train.one_step(tuned, batch, optimizer)
    assert seen == {torch.bfloat16, torch.float32}


def test_blocks_are_computed_twice_only_where_memory_is_not_ample(
    pico, dataset, monkeypatch, capsys
):
    class OnGpu:  # what the plan asks of a model, said to be on a GPU
        device = torch.device("cuda")

        def __getattr__(self, name):
            return getattr(pico[0], name)

    plans = {True: 2.0, False: 7.0}
    monkeypatch.setattr(train, "planned_peak", lambda *_, checkpointing=False: plans[checkpointing])
    for room, told in ((10.1, (7.0, False)), (9.9, (2.0, True))):
        monkeypatch.setattr(devices, "room", lambda _, room=room: room)
        assert train.planned(OnGpu(), what="fine-tuning x") == told
    said = "fine-tuning x: no gradient checkpointing, 7.0 of 10.1 GiB planned"
    assert capsys.readouterr().out.splitlines() == [said]
    assert train.planned(pico[0], what="x") == (7.0, False)


def test_the_plan_knows_what_adapters_are_trained_on(pico, dataset):
    data = *pico, dataset.of("train"), dataset.images
    arch, gib = shapes.architecture(pico[0].config), memory.GIB
    weights = arch.over_linears(lambda out, into: out * into)
    wide = 4 * weights + 2 * weights  # fp32 on a CPU, and autocast's copies
    assert train.planned_peak(*data, HALF) * gib > wide
    asked = {"rank": 16, "batch": 4, "checkpointing": True}
    big = {
        name: sum(memory.plan_training(shapes.llava_7b(), form=form, **asked).values())
        for name, form in memory.ADAPTED.items()
    }
    assert 8 < big["half"] - big["nf4"] < 10  # 6.5 billion weights of 12 bits more


def test_two_processes_that_share_batches_make_the_adapter_of_one(dataset, recipe, store, tmp_path):
    """Of three rows one reads two. Adam divides by gradients: a high rate makes rounding large."""
    training = dataclasses.replace(TRAINING, steps=2, batch_size=3, learning_rate=1e-3)
    job, curves = Job("a", "a+sft", recipe.to_json(), training), []
    items.save_dataset(tmp_path, dataset)
    for name, ranks in (("alone", 1), ("shared", 2)):
        scratch = tmp_path / name
        scratch.mkdir()
        where = {"data": tmp_path, "store": store, "scratch": scratch}
        first, *others = (Worker([job], "cpu", r, ranks, scratch / "met") for r in range(ranks))
        beside = [
            multiprocessing.get_context("fork").Process(  # has imported all that this one has
                target=jobs.fine_tune_here, args=[other], kwargs=where
            )
            for other in others
        ]
        for process in beside:
            process.start()
        jobs.fine_tune_here(first, **where)
        assert [process.join() or process.exitcode for process in beside] == [0] * len(others)
        curves.append(jobs.loss_curves(scratch, [job]).loss)
    files = [tmp_path / name / "a" / "adapter_model.safetensors" for name in ("alone", "shared")]
    alone, shared = map(load_file, files)
    assert all((alone[name] - shared[name]).abs().max() < 1e-6 for name in alone)
    assert np.allclose(*curves, rtol=1e-6) and curves[0].iloc[-1] < curves[0].iloc[0]


@pytest.fixture
def dealt(recipe, tmp_path, monkeypatch):
    """(adapters, processes, room of each GPU) -> (adapters, device, rank of ranks) a worker."""
    one = Job("a", "a", recipe.to_json(), TRAINING, "cuda")
    needed = (jobs.CONTEXT + sum(jobs.plan_of(one, checkpointing=False).values())) / train.AMPLE

    def deal(names, processes, models):
        asked = [dataclasses.replace(one, adapter=name) for name in names]
        if models is None:
            asked = [dataclasses.replace(job, device="cpu") for job in asked]
        rooms = [needed * room for room in models or ()]
        monkeypatch.setattr(devices, "rooms", lambda: rooms)
        return [
            ("".join(job.adapter for job in w.jobs), w.device, f"{w.rank} of {w.ranks}")
            for w in jobs.divided(asked, processes=processes, meeting=tmp_path)
        ]

    return deal


def test_several_fine_tunes_on_a_cpu_go_side_by_side(dealt):
    assert dealt("abc", 2, None) == [("ac", "cpu", "0 of 1"), ("b", "cpu", "0 of 1")]
    assert dealt("a", 2, None) == [("a", "cpu", "0 of 1")] and dealt("", 2, None) == []


def test_a_gpu_takes_as_many_fine_tunes_as_it_holds(dealt):
    assert [len(dealt("abcd", 6, [room])) for room in (9, 3.01, 1.99, 0.5)] == [4, 3, 1, 1]


def test_gpus_take_fine_tunes_in_turn_and_share_one(dealt):
    told = dealt("abcde", 3, [2.01, 9])
    assert told == [
        ("ad", "cuda:0", "0 of 1"),
        ("be", "cuda:1", "0 of 1"),
        ("c", "cuda:0", "0 of 1"),
    ]
    for asked in (("ab", 1, [2.01, 2.01]), ("ab", 2, [0.5, 0.5])):
        assert dealt(*asked) == [("ab", "cuda:0", "0 of 2"), ("ab", "cuda:1", "1 of 2")]
    devices_of = [(names, device) for names, device, _ in dealt("ab", 2, [1.01] * 4)]
    assert devices_of == [("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:2"), ("b", "cuda:3")]
    assert len(dealt("a", 1, [9] * 6)) == TRAINING.batch_size  # a row each


def test_further_seeds_train_with_other_seeds_and_random_weights_at_full_rank(recipe):
    told = {"recipe": recipe.to_json(), "criterion": ["own", "own", "reinitialized"]}
    sources = pd.DataFrame({"adapter": ["a", "a~1", "b"], "sft_seed": [0, 1, 0]}).assign(**told)
    sources["healed_variant"] = sources.adapter + "+sft"
    settings = train.Training(rank=2, alpha=4, learning_rate=1e-3, steps=1, batch_size=2, seed=5)
    sources = pd.concat([sources, sources.iloc[:1].assign(criterion="distilled")])
    sources["variant"] = ["original", *"bcd"]
    made = jobs.fine_tune_jobs(sources, settings, "cpu", distillation=0.5)
    assert [(job.makes, job.training.seed) for job in made[:2]] == [("a+sft", 5), ("a~1+sft", 6)]
    width = loading.config_of(recipe.base).text_config.hidden_size
    assert [job.training.rank for job in made] == [2, 2, width, 2]
    assert [job.training.distillation for job in made] == [0, 0, 0, 0.5]
    assert [job.teacher for job in made] == ["", "", "", recipe.to_json()]
    assert made[2].training.alpha == 2 * width
