"""Fine-tunes of the tiny model, and CUDA graphs of these and of answers."""

import contextlib
import time
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.attention import SDPBackend

from derm_compress.data import save_dataset
from derm_compress.method import Job, Training, fine_tune_all, loss_curves, materialize
from derm_compress.method.finetune import train
from derm_compress.model import devices, graphs, loading, writing
from tools.check_gpu import answering, check, rig

TRAINING = Training(8, 8, 4e-3, steps=8, batch_size=4, seed=0, checkpoint_every=3)
CUDNN = [SDPBackend.CUDNN_ATTENTION, *devices.ATTENTION]


def gradients_on(base: str, device: str) -> str:
    data, training = rig.drawn(), replace(TRAINING, base=base)
    model, processor = loading.load_base("tiny", device)
    tuned = train.attach(model, training).train()
    weights = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    for name in (name for name in weights if "lora_B" in name):
        torch.nn.init.normal_(weights[name], std=0.02)  # else A has no gradient
    optimizer = torch.optim.AdamW(weights.values())
    asked = data.of("train")[:4], data.images, np.random.default_rng(0)
    batch = train.training_batch(model, processor, *asked)
    mask = batch["attention_mask"]
    assert not mask.all() and (device == "cpu" or mask.shape[1] % train.WIDTHS == 0), mask.shape

    def found():
        with torch.no_grad(), train.autocast(device, base):
            x = train.embedded(model, batch)
        _, *parts = train.gradients_of(tuned, optimizer, base=base)(x, mask, batch["labels"])
        return torch.cat([part.flatten() for part in parts])

    once = found()
    with patch.object(devices, "ATTENTION", CUDNN):
        cudnn = bool(found().isfinite().all())
    train.save_memory(model)
    far = rig.apart(found(), once)
    assert once.isfinite().all() and once.norm() > 0 and far < 0.05, f"computed twice: {far} apart"
    return f"computed twice within {far:.1e}; cuDNN's finite: {cudnn}"


@check(150)
def gradients(device, folder):
    """Padded batches give finite gradients, the same where blocks are computed twice."""
    bases = ["half"] + ["nf4"] * rig.has_nf4(device)
    return "; ".join(f"{base}: {gradients_on(base, device)}" for base in bases)


@check(300)
def fine_tunes(device, folder):
    """Fine-tunes cut off, two at once or by all GPUs are alike; adapters merge as on the CPU."""
    data, store, recipe = rig.drawn(), rig.Stored(folder), rig.tiny_recipe()
    (folder / "data").mkdir()
    save_dataset(folder / "data", data)
    base = rig.base(device)
    trainings = [replace(TRAINING, seed=seed, base=base) for seed in (0, 1)]
    jobs = [Job(f"a{one.seed}", "v", recipe.to_json(), one, device) for one in trainings]

    def losses(name, chosen, processes=1):
        scratch = folder / f"{name}-scratch"
        scratch.mkdir(exist_ok=True)
        where = {"data": folder / "data", "store": store, "scratch": scratch}
        fine_tune_all(folder / name, chosen, **where, processes=processes)
        return loss_curves(folder / name, chosen).loss.to_numpy()

    def dying(*kept, keep=train.keep):
        keep(*kept)
        raise InterruptedError

    first = devices.rooms()[:1]
    with patch.object(devices, "rooms", lambda: first):
        whole = losses("whole", jobs)
        with patch.object(train, "keep", dying), contextlib.suppress(InterruptedError):
            losses("cut", jobs[:1])
        cut = losses("cut", jobs[:1])
    beside, shared = losses("beside", jobs, processes=2), losses("shared", jobs[:1])
    far = max(abs(cut / whole[:8] - 1).max(), abs(beside / whole - 1).max())
    far = max(far, abs(shared / whole[:8] - 1).max())
    told = f"losses {whole}, cut {cut}, two at once {beside}, by all GPUs {shared}"
    assert whole[7] < whole[0] and far < 0.05, told
    merged = recipe.with_adapter(f"{rig.KEY}/whole/a0", folder / "whole" / "a0").pruned(range(4))
    one, _ = materialize(merged, store, device)
    other, _ = materialize(merged, store, dtype=devices.half(device))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    gap = max(float((a.cpu() - b).abs().max()) for a, b in pairs)
    assert gap < 5e-3, f"merged weights are {gap} apart"
    return f"losses within {far:.1e}, merged within {gap:.1e}"


def timed(module, make, work):
    """(what work() gives with steps that `make` made, how many a second, what was made)."""
    made, calls = [], []

    def counting(function, what):
        made.append(step := make(function, what))

        def counted(*inputs):
            calls.append(what)
            return step(*inputs)

        return counted

    with patch.object(module, "Recorded", counting):
        began = time.perf_counter()
        found = work()
        return found, len(calls) / (time.perf_counter() - began), made


@check(200)
def recordings(device, folder):
    """Answers and losses are the same with CUDA graphs and without; steps a second of both."""
    data, steps, said = rig.drawn(), 3 if device == "cpu" else 40, []
    model = loading.load_base("tiny", device, torch.float32)
    training = replace(TRAINING, steps=steps, checkpoint_every=99, base=rig.base(device))

    def losses():
        asked = *loading.load_base("tiny", device), data.of("train"), data.images, training
        curve = train.train(*asked, checkpoint=folder / "none", what="training")[1]
        return curve.loss[:8].tolist()  # further on rounding adds up

    for module, work in ((writing, lambda: answering.told(*model, data)), (train, losses)):
        work()  # what is slow the first time does not count
        plain, slow, _ = timed(module, lambda function, what: function, work)
        found, fast, made = timed(module, graphs.Recorded, work)
        ways = [way for one in made for way in one.ways.values()]
        held = sum(isinstance(way, graphs.Recording) for way in ways)
        assert held or device == "cpu", f"{made[0].what}: nothing was recorded"
        same = found == plain if module is writing else np.allclose(found, plain, rtol=0.02)
        assert same, f"{made[0].what}: {found} {plain}"
        said.append(f"{made[0].what}: {slow:.0f} steps a second, {fast:.0f} of {held} recordings")
    return "; ".join(said)
