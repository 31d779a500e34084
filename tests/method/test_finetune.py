import gc
import subprocess
import sys
import time
import weakref

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from derm_compress.data import dialogue, items
from derm_compress.errors import DermError
from derm_compress.method.finetune import jobs as jobs_
from derm_compress.method.finetune import train
from derm_compress.method.finetune.jobs import Job, measured, read_curves, run_all
from derm_compress.method.finetune.merge import merge_adapter
from derm_compress.method.materialize import materialize
from derm_compress.method.quantization import quantize
from derm_compress.model import anatomy, loading, memory, prompts
from derm_compress.model.recipe import adapter_digest

TRAINING = train.Training(
    rank=4, alpha=8, learning_rate=1e-2, steps=4, batch_size=4, seed=0, checkpoint_every=2
)


def trained(dataset, tmp_path, training=TRAINING, name="a"):
    model, processor = loading.load_base("pico")
    tuned, curve, _ = train.train(
        model, processor, dataset.of("train"), dataset.images, training,
        checkpoint=tmp_path / f"{name}.ckpt", what=name,
    )  # fmt: skip
    tuned.save_pretrained(tmp_path / name)
    return tuned, curve


def test_labels_are_answers_and_their_ends_alone(pico):
    tokenizer = pico[1].tokenizer
    turns = [("What is it?", "This is rosacea."), ("And the treatment?", "Sun protection.")]
    ids, labels = prompts.encode(tokenizer, turns, 36)
    assert (ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == 36 and ids[
        0
    ] == tokenizer.bos_token_id
    kept = labels != prompts.IGNORED
    assert torch.equal(labels[kept], ids[kept])
    told = tokenizer.decode(ids[kept])
    assert told == " This is rosacea.</s> Sun protection.</s>"
    assert (labels == tokenizer.eos_token_id).sum() == 2
    assert not (labels == tokenizer.convert_tokens_to_ids("<image>")).any()


def test_training_prompts_are_the_tests_prompts(pico):
    """The ids before the first answer equal what the processor makes of the test's prompt, image tokens included."""
    from derm_compress.model import prompts

    processor = pico[1]
    question = dialogue.question("name")
    ids, labels = prompts.encode(
        processor.tokenizer, [(question, "This is rosacea.")], prompts.image_tokens(pico[0])
    )
    first = int((labels != prompts.IGNORED).int().argmax())
    pixels = np.zeros((1, 72, 72, 3), np.uint8)
    asked = prompts.prepare(processor, [prompts.prompt(processor, "name")], pixels, "cpu")[
        "input_ids"
    ][0]
    assert asked.tolist() == ids[:first].tolist()


def test_batches_are_padded_on_the_right_and_padding_has_no_label(pico, dataset):
    model, processor = pico
    batch = train.training_batch(
        model, processor, dataset.of("train")[:5], dataset.images, np.random.default_rng(0)
    )
    mask = batch["attention_mask"]
    assert (mask[:, 0] == 1).all() and (mask.diff(dim=1) <= 0).all()
    assert (batch["labels"][mask == 0] == prompts.IGNORED).all()


def test_adapters_sit_on_the_decoder_alone_over_nf4(pico):
    tuned = train.attach(pico[0], TRAINING)
    trained_names = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained_names) == 8 * 7 * 2 and all(
        "language_model" in n and "lora_" in n for n in trained_names
    )
    counts = quantize.quantized_linears(tuned.get_base_model())
    assert counts["decoder"] == 56 and sum(counts.values()) == 56


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
    tuned.save_pretrained(tmp_path / "adapter")
    linear = anatomy.linears(anatomy.blocks(tuned.get_base_model())[0])["mlp.up_proj"]
    assert type(linear).__module__ == "peft.tuners.lora.bnb" and not hasattr(
        pico[0], "is_loaded_in_4bit"
    )


def test_a_trained_model_is_gone_as_soon_as_it_is_let_go(dataset, tmp_path):
    """On a GPU the next one is loaded at once, and both have no room."""
    gc.collect()
    gc.disable()
    try:
        tuned, _ = trained(dataset, tmp_path)
        block = anatomy.blocks(tuned.get_base_model())[0]
        held = [weakref.ref(linear.base_layer.weight) for linear in anatomy.linears(block).values()]
        assert len(held) == 7 and all(ref() is not None for ref in held)
        del tuned, block
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


def test_a_gpu_is_emptied_before_a_model_is_loaded_on_it(recipe, store, monkeypatch):
    seen = []
    monkeypatch.setattr(memory, "reset_peak", seen.append)
    monkeypatch.setattr(loading, "load_base", lambda name, *where: seen.append(name))
    with pytest.raises(TypeError):
        materialize(recipe, store, "cuda")
    assert seen == ["cuda", "pico"]


def test_training_lowers_the_loss_and_is_repeatable(dataset, tmp_path):
    longer = train.Training(rank=8, alpha=16, learning_rate=1e-2, steps=12, batch_size=4, seed=0)
    _, one = trained(dataset, tmp_path, longer, "one")
    _, two = trained(dataset, tmp_path, longer, "two")
    assert one.loss.iloc[-3:].mean() < 0.9 * one.loss.iloc[:3].mean()
    assert one.equals(two)
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two")]
    assert files[0] == files[1]


def test_a_cut_training_goes_on_to_the_same_adapter(dataset, tmp_path, monkeypatch):
    _, whole = trained(dataset, tmp_path, name="whole")
    real = train.training_batch

    def dies(*args, **kwargs):
        dies.calls += 1
        if dies.calls == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    dies.calls = 0
    monkeypatch.setattr(train, "training_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(dataset, tmp_path, name="cut")
    monkeypatch.setattr(train, "training_batch", real)
    _, resumed = trained(dataset, tmp_path, name="cut")
    assert resumed.equals(whole)
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "cut")]
    assert files[0] == files[1]


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
    model, processor = loading.load_base("pico")
    where = {"checkpoint": tmp_path / "c", "what": "x"}
    overflowing(monkeypatch, (0, 1))
    _, curve, told = train.train(
        model, processor, dataset.of("train"), dataset.images, TRAINING, **where
    )
    assert told["skipped"] == 2 and len(curve) == 4 and told["seconds"] > 0
    assert not any(
        name.startswith("exp_avg") for name in load_file(tmp_path / "c")
    )  # of step 2: none was taken yet
    overflowing(monkeypatch, ())
    model, processor = loading.load_base("pico")
    _, again, told = train.train(
        model, processor, dataset.of("train"), dataset.images, TRAINING, **where
    )
    assert told["skipped"] == 2 and again.equals(curve)


def test_a_training_that_overflows_is_refused(dataset, tmp_path, monkeypatch):
    overflowing(monkeypatch, range(100))
    with pytest.raises(
        DermError, match="x: gradients of 4 of 4 steps were not finite; set the learning rate lower"
    ):
        trained(dataset, tmp_path, name="x")
    train._check_skipped(9, 20, 50, "x")
    train._check_skipped(100, 900, 1000, "x")
    for skipped, steps in ((10, 50), (101, 1000)):
        with pytest.raises(DermError, match="not finite"):
            train._check_skipped(skipped, 900, steps, "x")


def test_merged_equals_unmerged_on_the_unquantized_base(dataset, tmp_path, pico):
    from peft import PeftModel

    trained(dataset, tmp_path, name="a")
    model, processor = pico
    step = {"kept": list(range(8)), "sha256": adapter_digest(tmp_path / "a")}
    merge_adapter(model, tmp_path / "a", step, kept=tuple(range(8)))
    other = PeftModel.from_pretrained(loading.load_base("pico")[0], tmp_path / "a")
    batch = train.training_batch(
        model, processor, dataset.of("train")[:3], dataset.images, np.random.default_rng(0)
    )
    with torch.inference_mode():
        merged, unmerged = model(**batch).logits, other(**batch).logits
        plain = loading.load_base("pico")[0](**batch).logits
    assert torch.allclose(merged, unmerged, atol=1e-3) and not torch.allclose(
        merged, plain, atol=1e-2
    )
    assert not any("lora" in n for n, _ in model.named_parameters())
    assert quantize.quantized_linears(model)["decoder"] == 0


def test_an_adapter_of_other_blocks_or_other_bytes_is_refused(dataset, tmp_path, pico):
    trained(dataset, tmp_path, name="a")
    whole = tuple(range(8))
    step = {"kept": whole, "sha256": adapter_digest(tmp_path / "a")}
    with pytest.raises(DermError, match="merge it before pruning"):
        merge_adapter(pico[0], tmp_path / "a", step, kept=whole[:7])
    with pytest.raises(DermError, match="not those that the recipe names"):
        merge_adapter(pico[0], tmp_path / "a", step | {"sha256": "0" * 64}, kept=whole)


def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    """Else it would write into the folder of the resumed run."""
    code = (
        "import multiprocessing as m, time, os\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from derm_compress.method.finetune.jobs import _end_with\n"
        "def work(path):\n"
        "    open(path, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, m.get_context('spawn'), _end_with, (os.getpid(),)) as pool:\n"
        f"        pool.submit(work, {str(tmp_path / 'pid')!r}).result()\n"
    )
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 90)
    parent.kill()
    parent.wait()
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie", 10)


def wait_for(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_jobs_run_side_by_side_and_are_kept(dataset, recipe, store, tmp_path):
    (tmp_path / "data").mkdir()
    items.save_dataset(tmp_path / "data", dataset)
    short = train.Training(rank=2, alpha=2, learning_rate=1e-3, steps=1, batch_size=2, seed=0)
    pruned = recipe.then("prune", kept=[0, 1, 2, 7])
    jobs = [Job("original", recipe.to_json(), short), Job("pruned-4", pruned.to_json(), short)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "out").mkdir()
    run_all(
        tmp_path / "out", jobs, data=tmp_path / "data", store=store, scratch=scratch, processes=2
    )
    curves = read_curves(tmp_path / "out", ["original", "pruned-4"])
    assert curves.groupby("variant").size().to_dict() == {"original": 1, "pruned-4": 1}
    told = measured(scratch, ["original", "pruned-4"])
    assert told.skipped.tolist() == [0, 0]
    assert (
        told.variant.tolist() == ["original+sft", "pruned-4+sft"]
        and (told.measured_peak_gib > 0.1).all()
    )
    small, smaller = told.train_peak_gib  # planned: tensors of a pico model, not the process
    assert 0.1 > small > smaller > 0
    healed = materialize(pruned.with_adapter("out/pruned-4", tmp_path / "out" / "pruned-4"), store)[
        0
    ]
    assert len(anatomy.blocks(healed)) == 4


def test_further_seeds_train_with_other_seeds():
    sources = pd.DataFrame({"adapter": ["a", "a~1"], "recipe": ["{}", "{}"], "sft_seed": [0, 1]})
    settings = train.Training(rank=2, alpha=2, learning_rate=1e-3, steps=1, batch_size=2, seed=5)
    made = jobs_.jobs(sources, settings, "cpu")
    assert [(job.variant, job.training.seed) for job in made] == [("a", 5), ("a~1", 6)]
