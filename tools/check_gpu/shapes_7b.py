"""7B's shapes with a T4's memory: what is planned for params/kaggle-t4.yaml holds."""

import itertools
import json
import shutil
import time

import psutil
import torch
from safetensors.torch import save_file

from derm_compress import evaluate, method
from derm_compress.evaluate import latency
from derm_compress.method.activations import projection_statistics
from derm_compress.method.assemble import merge_adapter
from derm_compress.method.finetune import train
from derm_compress.method.importance.rankings import rankings
from derm_compress.method.quantization import packed
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize
from derm_compress.method.quantization.search import search_forms
from derm_compress.model import anatomy, calibration_batches, devices, loading, prompts, usage
from derm_compress.model.graphs import Recorded, Recording
from derm_compress.model.recipe import adapter_digest
from derm_compress.model.units import Unit
from tools.check_gpu import Skip, check, rig
from tools.check_gpu.training import timed

BYTES = 16e9  # that a kept 7B model takes


def built(device: str, **how):
    """(model, processor, items, pictures), where no more fits than a T4 holds."""
    rig.be_t4(device, capped=True)
    model, processor = rig.shaped(device, **how)
    return model, processor, *rig.noise(model, 8)


@check(120, alone=True)
def merge_7b(device, folder):
    """An adapter of rank 32 becomes part of the weights, W + B A, on one T4."""
    model, *_ = built(device)
    blocks, weights = anatomy.blocks(model), {}
    for index, block in enumerate(blocks):
        for name, linear in anatomy.linears(block).items():
            start = f"base_model.model.model.language_model.layers.{index}.{name}.lora"
            weights[f"{start}_A.weight"] = torch.full((32, linear.in_features), 1e-2)
            weights[f"{start}_B.weight"] = torch.full((linear.out_features, 32), 1e-2)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 32, "r": 32}))
    kept, last = tuple(range(len(blocks))), blocks[-1].mlp.down_proj.weight
    expected = last + 32 * 1e-4
    step = {"sha256": adapter_digest(folder), "kept": [*kept]}
    merge_adapter(model, folder, step, kept=kept)
    far = float((last - expected).abs().max())
    assert far < 1e-3, f"the last weights are {far} from W + B A"
    return rig.within(device, rig.needs().merging())


@check(200, alone=True)
def train_7b(device, folder):
    """QLoRA of rank 32, four conversations a step, stays within its plan and overflows nowhere."""
    if not rig.has_nf4(device):
        raise Skip("bitsandbytes does not work here")
    training = method.Training(32, 16, 2e-4, steps=4, batch_size=4, seed=0)
    asked, how = (*built(device), training), {"checkpointing": True}
    planned = max(usage.tensor_gib(asked[0]), train.planned_peak(*asked, **how))
    _, curve, told = train.train(*asked, checkpoint=folder / "none", what="7B", **how)
    assert told["skipped"] == 0 and curve.loss.notna().all(), f"losses {curve.loss.tolist()}"
    return f"{rig.within(device, planned)}, {told['seconds'] / 4:.2f} s a step"


@check(200, alone=True)
def score_7b(device, folder):
    """Answers without a block, one picture and drafts of full length, stay within their plan."""
    needs, (model, processor, items, images) = rig.needs(), built(device)
    most = 8 if device == "cpu" else needs.p["max_new_tokens"]
    how = {"batch_size": 1, "max_new_tokens": most}
    c, units = method.Calibration(model, processor, items[:1], images, **how), needs.arch.blocks
    began = time.monotonic()
    said = [one for one, _ in itertools.islice(c.answers([Unit(i) for i in range(units)]), 9)]
    assert len({one.key for one in said}) == 9 and all(len(one.tokens) <= most for one in said)
    seconds = time.monotonic() - began
    (ranking,) = rankings(["output_similarity"])
    return f"{rig.within(device, needs.scoring(ranking)(1))}, 9 answers in {seconds:.0f} s"


@check(150, alone=True)
def calibrate_7b(device, folder):
    """A search, its model on the CPU and one block at a time on the GPU, stays within its plan."""
    model, processor, items, images = built(device, blocks=2, place="cpu")
    began, how = time.monotonic(), {"batch_size": 3, "device": "cpu"}
    batches = calibration_batches(processor, items[:4], images, **how)
    found = search_forms(model, batches, {"awq4": Form("awq")}, device=device)
    scales, rows = found["awq4"]
    assert len(rows) == 8 and all(scale.isfinite().all() for scale in scales.values())
    seconds, needs = (time.monotonic() - began) / 2, rig.needs()
    planned = needs.calibrating(needs.p["quantization_batch"])
    return f"{rig.within(device, planned)}, {seconds:.1f} s a block and 4 pictures"


@check(150, alone=True)
def watch_7b(device, folder):
    """Statistics of projections, two prompts at a time, stay within their plan."""
    model, *asked = built(device)
    frame = projection_statistics(model, calibration_batches(*asked, batch_size=2, device=device))
    assert len(frame) == 7 * len(anatomy.blocks(model)) and frame["max"].gt(0).all()
    return rig.within(device, rig.needs().watching(2))


@check(150, alone=True)
def answer_7b(device, folder):
    """Answers to the three questions about a picture at a time stay within their plan."""
    asked, how = built(device), {"batch_size": 3, "max_new_tokens": 40}
    began = time.monotonic()
    tokens = evaluate.answer(*asked, variant="v", **how).tokens
    assert len(tokens) == 3 * len(asked[2]) and tokens.between(1, 40).all()
    needs, speed = rig.needs(), tokens.sum() / (time.monotonic() - began)
    needs.p["max_new_tokens"] = 40
    return f"{rig.within(device, needs.answering(3))}, {speed:.0f} tokens a second"


@check(200, alone=True)
def latency_7b(device, folder):
    """A recorded step writes tokens in fp16 and in packed 4 bits, all of which a kernel reads."""
    model, processor, _, images = built(device)
    asked = [prompts.prompt(processor, "features")], images[:1], model.device
    inputs, said, held = prompts.prepare(processor, *asked), [], rig.needs().timing(1)
    how = {"new_tokens": 8, "warmup": 1, "repeats": 2}
    for bits in (16, 4):
        if bits == 4:
            quantize(model, Form("rtn", 4, 64), packed=True)
            usage.reset_peak(device)
        samples, _, made = timed(latency, Recorded, lambda: latency.sampled(model, inputs, **how))
        ways = [way for one in made for way in one.ways.values()]
        recorded = any(isinstance(way, Recording) for way in ways)
        assert recorded or device == "cpu", f"{bits} bits: nothing was recorded"
        token = latency.summary(samples)["decode_ms_per_token"]
        said.append(f"{bits} bits {token:.1f} ms, {rig.within(device, held)}")
    assert packed.kernel_share(model) == 1 or device == "cpu", "weights are decoded every time"
    return "; ".join(said)


@check(240, alone=True)
def load_7b(device, folder):
    """A kept model comes back whole, and takes of a T4 no more than its weights."""
    free = min(shutil.disk_usage(folder).free, psutil.virtual_memory().available)
    if device != "cpu" and free < BYTES:
        raise Skip(f"needs {BYTES:.0e} bytes of disk and of memory")
    model, processor, *_ = built(device)
    held, whole = usage.tensor_gib(model), anatomy.fingerprint(model)
    for part in (model, processor):
        part.save_pretrained(folder / "kept")
    devices.let_go(model)
    usage.reset_peak(device)
    began = time.monotonic()
    again, _ = loading.load_base(str(folder / "kept"), device)
    seconds, host = time.monotonic() - began, usage.peak_gib()
    assert anatomy.fingerprint(again) == whole, "another model came back"
    return f"{rig.within(device, held)}, {seconds:.0f} s, {host:.1f} GiB of the host"
