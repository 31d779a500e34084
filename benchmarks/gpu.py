"""Training, answers, decoding and loading at LLaVA-1.5-7B's shapes, and training at `small`'s.

The plain way and this one's, one after the other in one process, with random weights. The plain
ways are kept here, that of answers in tools/check_gpu/rig.py. Without a GPU tiny shapes run on the
CPU: that tries the code and measures nothing. `--out FOLDER` keeps benchmark.json.

Last line: one JSON object. `ratio` is the plain way's time over the other's; `texts_equal` compares
answers in fp32; decoding is one prompt's, over the time to read its bytes once. null: not measured.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose awq.py would stand before AutoAWQ's package
    sys.path.insert(0, str(Path(__file__).parents[1]))  # which has tools

import numpy as np
import pandas as pd
import torch
from transformers import LlavaForConditionalGeneration

from derm_compress.data.items import Item
from derm_compress.evaluate import answers as answering
from derm_compress.evaluate import latency
from derm_compress.files import write_json
from derm_compress.method.finetune import train as finetune
from derm_compress.method.iterate import each_model
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize, quantize_step
from derm_compress.model import anatomy, devices, loading, prompts, removal, usage, variants
from derm_compress.model.recipe import Recipe
from derm_compress.study.plan import environment
from tools.check_gpu import rig

W4 = {"method": "rtn", "bits": 4, "group_size": 64}
WAYS = {"plain_tokens": rig.plain_replies, "tokens": answering.picture_replies}


@dataclass(frozen=True)
class Sizes:
    """Of what is measured. cut: blocks where all would take too long; 0 is all of them."""

    device: str
    name: str = loading.SEVEN_B
    blocks: int = 0
    cut: int = 8
    rows: int = 4  # of a training batch
    small_rows: int = 24  # of one of `small`
    pictures: int = 16
    batch: int = 16
    new_tokens: int = 40
    repeats: int = 5

    def model(self, blocks: int | None = None) -> tuple[object, object, list[Item], np.ndarray]:
        """(model, processor, items, pictures of noise), the device emptied before."""
        gc.collect()
        usage.reset_peak(self.device)
        blocks = self.blocks if blocks is None else blocks
        made = rig.shaped(self.device, self.name, blocks=blocks)
        return *made, *rig.noise(made[0], self.pictures)

    def seconds(self, work, repeats: int = 0) -> float:
        """Median of work(), after three that do not count: by then all is recorded."""
        taken = [self.once(work) for _ in range(3 + (repeats or self.repeats))]
        return statistics.median(taken[3:])

    def once(self, work) -> float:
        began = self.now()
        work()
        return self.now() - began

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


SMALL = Sizes(
    "cpu", blocks=2, cut=2, rows=2, small_rows=2, pictures=2, batch=4, new_tokens=4, repeats=1
)


def train(sizes: Sizes) -> dict:
    """A step of QLoRA; plainly every block is computed twice."""
    model, processor, items, images = sizes.model()
    base, rows = rig.base(sizes.device), items[: sizes.rows]
    training = finetune.Training(16, 8, 1e-4, steps=1, batch_size=sizes.rows, seed=0, base=base)
    tuned = finetune.attach(model, training).train()
    batch = finetune.training_batch(model, processor, rows, images, np.random.default_rng(0))
    learned = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=training.learning_rate)
    finetune.save_memory(model)
    plain = sizes.seconds(lambda: plain_step(tuned, batch, optimizer))
    anatomy.decoder(model).gradient_checkpointing_disable()
    gradients = finetune.gradients_of(tuned, optimizer, base=base, recorded=True)

    def step():
        found = finetune.forward_backward(tuned, batch, gradients, base=base)
        finetune.update(optimizer, *found)

    tokens, recorded = batch["input_ids"].numel(), sizes.seconds(step)
    speeds = {"plain_tokens_s": tokens / plain, "tokens_s": tokens / recorded}
    return {"ratio": plain / recorded, **speeds, "peak_gib": usage.peak_gib(sizes.device)}


def train_small(sizes: Sizes) -> dict:
    """The same at the shapes of `small`, where a step is little but launches."""
    rows = sizes.small_rows
    return train(replace(sizes, name="small", rows=rows, pictures=rows))


def plain_step(tuned, batch: dict, optimizer) -> None:
    with devices.attention_with_gradients():
        loss = tuned(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def answers(sizes: Sizes) -> dict:
    """Answers to the three questions about each picture; plainly each is a prompt of its own."""
    asked, found = sizes.model(), {}
    how = {"batch_size": sizes.batch, "max_new_tokens": sizes.new_tokens}
    for name, way in WAYS.items():
        replies = way(*asked, **how)
        tokens = sum(reply["tokens"] for reply in replies.values())
        found[f"{name}_s"] = tokens / sizes.once(lambda way=way: way(*asked, **how))
    ratio = found["tokens_s"] / found["plain_tokens_s"]
    devices.let_go(asked[0])
    model, *asked = sizes.model(sizes.cut)
    said = [way(model.float(), *asked, **how) for way in WAYS.values()]
    return {"ratio": ratio, "texts_equal": said[0] == said[1], **found}


def decode(sizes: Sizes) -> dict:
    """A token of one prompt, in fp16 and in packed integers of 4 bits; plainly launch by launch."""
    model, processor, _, images = sizes.model()
    text, found = prompts.prompt(processor, "features"), {}
    inputs = prompts.prepare(processor, [text], images[:1], model.device)
    speed, how = latency.bandwidth(sizes.device), {"new_tokens": sizes.new_tokens}
    for name, form in (("fp16", None), ("w4", Form(**W4))):
        if form:
            quantize(model, form, packed=True)
        samples = latency.sampled(model, inputs, warmup=1, repeats=sizes.repeats, **how)
        told = latency.summary(samples)
        floor = latency.floor(model, told, speed)
        found[f"{name}_over_floor"] = told["decode_ms_per_token"] / floor["floor_ms"]
        found[f"{name}_floor_ms"] = floor["floor_ms"]
        found[f"{name}_ms"] = told["decode_ms_per_token"]
        runs = [plain_decoding(model, inputs, sizes) for _ in range(1 + sizes.repeats)]
        found[f"plain_{name}_ms"] = 1000 * statistics.median(runs[1:])
    return {"w4_over_fp16": found["w4_ms"] / found["fp16_ms"], **found, "bandwidth": speed}


@torch.inference_mode()
def plain_decoding(model, inputs, sizes: Sizes) -> float:
    """Seconds a token, with a cache that grows and every kernel launched anew."""
    step, mask, began = inputs, inputs["attention_mask"], 0.0
    for place in range(sizes.new_tokens):
        out = model(**step, use_cache=True, logits_to_keep=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        step = {"input_ids": out.logits.argmax(-1), "attention_mask": mask}
        step["past_key_values"] = out.past_key_values
        if place == 0:
            began = sizes.now()
    return (sizes.now() - began) / (sizes.new_tokens - 1)


def load(sizes: Sizes) -> dict:
    """A model, cut and in 4 bits, as each_model gives them; plainly each is read, by the host."""
    model, processor, *_ = sizes.model(sizes.cut)
    blocks = len(anatomy.blocks(model))
    with tempfile.TemporaryDirectory() as folder:
        for part in (model, processor):
            part.save_pretrained(folder)
        whole = Recipe(folder, anatomy.fingerprint(model), blocks)
        devices.let_go(model)
        recipes = [whole, *(whole.pruned(range(n)) for n in range(1, blocks))]
        recipes += [recipe.then("quantize", **W4) for recipe in recipes[:2]]
        plain = sizes.once(lambda: [plain_model(recipe, sizes) for recipe in recipes])
        rows = [variants.variant(f"v{i}", recipe) for i, recipe in enumerate(recipes)]
        asked = pd.DataFrame(rows), None, sizes.device, "models"
        shared = sizes.once(lambda: [None for _ in each_model(*asked, quantize=quantize_step)])
    return {"ratio": plain / shared, "models": len(recipes), "plain_s": plain, "shared_s": shared}


def plain_model(recipe: Recipe, sizes: Sizes) -> None:
    half = devices.half(sizes.device)
    model = LlavaForConditionalGeneration.from_pretrained(recipe.base, dtype=half)
    model = model.to(sizes.device)
    assert anatomy.fingerprint(model) == recipe.fingerprint
    for step in recipe.steps:
        if step["step"] == "prune":
            removal.apply(model, recipe.kept())
        else:
            quantize_step(model, step, None)
    devices.let_go(model)


PARTS = {
    train: ["ratio"],
    train_small: ["ratio"],
    answers: ["ratio", "texts_equal"],
    decode: ["fp16_over_floor", "w4_over_fp16", "w4_over_floor"],
    load: ["ratio"],
}


def measure(sizes: Sizes) -> dict:
    """{part: figures}; a part that exceeds memory has none."""
    found = {}
    for part in PARTS:
        try:
            found[part.__name__] = part(sizes)
        except torch.OutOfMemoryError as error:
            found[part.__name__] = {"skipped": str(error).split(". ")[0]}
        print(f"{part.__name__}: {found[part.__name__]}", flush=True)
    return found


def summary(found: dict, device: str) -> dict:
    """The last line; of a CPU, whose shapes are small, what needs no clock."""
    told = {"device": device if device == "cpu" else torch.cuda.get_device_name()}
    for part, names in PARTS.items():
        figures = found[part.__name__]
        kept = names if device != "cpu" else {"texts_equal"} & set(names)
        told[part.__name__] = {name: figures.get(name) if name in kept else None for name in names}
    return told


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked.add_argument("--out", type=Path)
    words = asked.parse_args()
    if words.out and words.device == "cpu":
        asked.error("--out needs an NVIDIA GPU: torch sees no CUDA device")
    found = measure(SMALL if words.device == "cpu" else Sizes(words.device))
    told = summary(found, words.device)
    if words.out:
        write_json(words.out / "benchmark.json", {**told, "all": found, "where": environment()})
    print(json.dumps(told))


if __name__ == "__main__":
    main()
