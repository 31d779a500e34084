"""What a model says without a block, by drafts and by the plain loop: equal texts, and how soon?

drafts.ablated_answers and the loop over removal.without and model.generate, at its fastest batch,
take turns, each of as many answers as a block has. By default the model is the embedded base on one
thread, which first learns one long question (name, treatment and features, these in two wordings),
so that answers have 48 tokens or more and end by themselves. `--model` names another, or what a
run has made: small, or small/02_finetune; it is asked the study's questions about `--items`
pictures. The last line is JSON; an item is one (block, answer), `ratio` the loop's wall seconds
over the drafts', `accepted` the share of drafts' tokens that stand, `near_ties` those within
rounding of another, `equal` the share of equal answers. A status of 1 if the ratio is below 3 or,
but in half precision, where near ties decide, texts differ. Not yet run on a GPU. There logits in
fp32 would settle nothing: the states that they are made of are rounded to fp16 as coarsely.
"""

import argparse
import ctypes
import json
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from derm_compress.data import dialogue, synthetic
from derm_compress.method.assemble import materialize
from derm_compress.method.importance.drafts import ablated_answers
from derm_compress.model import anatomy, loading, prompts, removal, usage
from derm_compress.model.prompts import collate, encode
from derm_compress.model.reading import Prompts, looking
from derm_compress.model.recipe import Recipe
from derm_compress.model.units import Unit
from derm_compress.study import batches as sizes
from derm_compress.study.plan import find_recipe

AIM = 3
STUDY = 80  # tokens of an answer at most, where the study's questions are asked
ITEMS, LEAST, MOST = 32, 48, 96  # LEAST and MOST: tokens of an answer
BLOCKS = [Unit(block) for block in range(2, 31)]
LONG = {"all": " ".join(map(dialogue.question, dialogue.QUESTIONS))}
SHORT = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}


def teach(model, processor, items, images, *, steps: int, batch: int, lr: float) -> None:
    """The blocks learn to answer LONG: name, treatment, and the features twice in other words."""
    pixels = processor.image_processor(list(images[[i.row for i in items]]), return_tensors="pt")[
        "pixel_values"
    ]
    pieces, image_tokens = [], anatomy.image_tokens(model.config)
    for item in items:
        name, treatment, features = (
            dialogue.answers(item.disease, item.facts, k) for k in dialogue.QUESTIONS
        )
        told = " ".join((name[0], treatment[0], features[0], features[-1]))
        pieces.append(encode(processor, [(LONG["all"], told)], image_tokens=image_tokens))
    weights = list(anatomy.blocks(model).parameters())
    optimizer, rng = torch.optim.AdamW(weights, lr=lr), np.random.default_rng(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for _ in range(steps):
        rows = rng.choice(len(items), batch, replace=False)
        inputs = collate([pieces[r] for r in rows], pad=processor.tokenizer.pad_token_id)
        optimizer.zero_grad()
        model(**inputs, pixel_values=pixels[rows], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def loop(model, processor, asked, images, units, *, batch: int, most: int):
    """The plain way: remove a unit, generate, put it back; tokens of each answer by key."""
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    device = anatomy.decoder(model).device
    for unit in units:
        answers = {}
        with removal.without(model, [] if unit is None else [unit]), looking(model):
            for part in (asked[start : start + batch] for start in range(0, len(asked), batch)):
                texts = [prompts.ask(processor, question) for _, _, question in part]
                inputs = prompts.prepare(
                    processor, texts, images[[i.row for i, _, _ in part]], device
                )
                ids = model.generate(
                    **inputs,
                    max_new_tokens=most,
                    do_sample=False,
                    eos_token_id=eos,
                    pad_token_id=pad,
                )
                for (item, name, _), row in zip(
                    part, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True
                ):
                    answers[unit, item.id, name] = row[: row.index(eos) + 1] if eos in row else row
        yield answers


class Meter:
    """Seconds and peak MiB of one side's turns, from each turn's own start if it keeps nothing.

    MiB are a GPU's where it is used, else the process's.
    """

    def __init__(self, keeps: bool, device: str = "cpu"):
        self.wall = self.cpu = self.mib = 0.0
        self.base, self.keeps, self.gpu = None, keeps, device != "cpu"

    def __enter__(self):
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        try:  # give back what was freed, and let the peak start anew; Linux alone can
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            self.mib = 0.0 if self.gpu else float("nan")
        if self.base is None or not self.keeps:
            self.base = usage.resident_gib()["rss_gib"]
            if self.gpu:
                self.base = torch.cuda.memory_allocated() / 2**30
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *_):
        if self.gpu:
            torch.cuda.synchronize()
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else usage.peak_gib()
        self.mib = float(np.maximum(self.mib, 1024 * (peak - self.base)))

    @property
    def seconds(self) -> float:
        """What a batch size is chosen by: on a shared CPU its own time is steadier."""
        return self.wall if self.gpu else self.cpu


def race(
    model, processor, items, images, questions, *, blocks, lines: int, batches, most: int = MOST
) -> dict:
    """Both ways in turns, the loop at the best of `batches`: what they took, and equal or not."""
    asked = [(item, *question) for question in questions.items() for item in items]
    home = anatomy.decoder(model).device
    device = home.type
    tried = {batch: Meter(keeps=False, device=device) for batch in batches}
    plain = {"most": most}
    for batch, meter in tried.items():
        with meter:
            list(loop(model, processor, asked, images, blocks[:1], batch=batch, **plain))
    seconds = {batch: round(meter.seconds, 2) for batch, meter in tried.items()}
    print("the loop's seconds a block by batch:", seconds, flush=True)
    batch, units = min(seconds, key=seconds.get), [None, *blocks]
    prompts = Prompts.of(processor, images[0], questions, home)
    how = {"batch_size": lines, "max_new_tokens": most}
    drafts = ablated_answers(model, prompts, items, images, blocks, **how)
    straight = loop(model, processor, asked, images, units, batch=batch, **plain)
    fast, slow = Meter(keeps=True, device=device), Meter(keeps=False, device=device)
    rows, told = {}, {}
    for n in range(1, 1 + len(units)):
        with slow:
            told |= next(straight)
        with fast:
            rows |= {row.key: row for row in islice(drafts, n * len(asked) - len(rows))}
    same = [row.tokens == told[key] for key, row in rows.items()]
    found = {"texts_equal": all(same), "equal": round(float(np.mean(same)), 4)}
    return found | {"loop_batch": batch, "batch": lines} | compared(rows, fast, slow)


def compared(rows: dict, fast: Meter, slow: Meter) -> dict:
    """The figures of one race."""
    ablated = [row for row in rows.values() if row.unit]
    drafts = [rows[None, row.item, row.question].tokens for row in ablated]
    drafted, count = sum(map(len, drafts)), len(ablated)
    values = {
        "ratio": slow.wall / fast.wall,
        "ratio_of_cpu_seconds": slow.cpu / fast.cpu,
        "items": count,
        "items_per_s": count / fast.wall,
        "loop_items_per_s": count / slow.wall,
        "accepted": sum(row.accepted for row in ablated) / drafted,
        "unchanged": np.mean([row.tokens == d for row, d in zip(ablated, drafts, strict=True)]),
        "near_ties": sum(row.near_ties for row in rows.values()),
        "answer_tokens": drafted / count,
        "seconds": fast.wall,
        "loop_seconds": slow.wall,
        "peak_mib": fast.mib,
        "loop_peak_mib": slow.mib,
    }
    return {name: round(float(v), 4) for name, v in values.items()}


def load(name: str, device: str) -> tuple:
    """(model, processor) of a base, or of what a run has made: RUN/STAGE[/NAME]."""
    if loading.is_here(name):
        return loading.load_base(name, device)
    recipe, store = find_recipe(name)
    return materialize(Recipe.from_json(recipe), store, device)


def of_model(name: str, device: str, count: int, every: int) -> bool:
    """Races a model on the study's questions about `count` pictures, without each free block."""
    model, processor = load(name, device)
    size = model.config.vision_config.image_size
    dataset = synthetic.make(n_train=8 * count, n_test=8, n_heldout=8, size=size, seed=3)
    blocks = [Unit(block) for block in range(2, len(anatomy.blocks(model)) - 1, every)]
    asked = count * len(SHORT)
    tried = {min(batch, asked) for batch in (8, 32, 96, 192, 384, asked)}
    how = {"blocks": blocks, "batches": sorted(tried), "most": STUDY}
    how["lines"] = sizes.ON_CPU["importance_batch"] if device == "cpu" else sizes.SIZES[-1]
    found = race(model, processor, dataset.of("train")[:count], dataset.images, SHORT, **how)
    card = "cpu, one thread" if device == "cpu" else torch.cuda.get_device_name()
    print(json.dumps({"model": name, "on": card, "blocks": len(blocks)} | found))
    return found["ratio"] >= AIM and (found["texts_equal"] or device != "cpu")


def of_tiny() -> bool:
    """Races the embedded base, taught long answers, and as it is."""
    model, processor = loading.load_base("tiny")
    size = model.config.vision_config.image_size
    dataset = synthetic.make(n_train=240, n_test=8, n_heldout=8, size=size, seed=3)
    items, images, eos = dataset.of("train"), dataset.images, processor.tokenizer.eos_token_id
    began = time.perf_counter()
    teach(model, processor, items, images, steps=40, batch=16, lr=3e-3)
    asked = [(item, "all", LONG["all"]) for item in items[:48]]
    (said,) = loop(model, processor, asked, images, [None], batch=len(asked), most=MOST)
    ended = {key[1] for key, tokens in said.items() if len(tokens) >= LEAST and tokens[-1] == eos}
    chosen = [item for item in items if item.id in ended][:ITEMS]
    assert len(chosen) == ITEMS, (
        f"only {len(chosen)} answers have {LEAST} tokens or more and end by themselves"
    )
    print(f"taught in {time.perf_counter() - began:.0f} s", flush=True)
    how = {"blocks": BLOCKS, "lines": ITEMS, "batches": (8, 16, 32)}
    found = race(model, processor, chosen, images, LONG, **how)
    print("one long question:", found, flush=True)
    base = loading.load_base("tiny")[0]
    how = {"blocks": BLOCKS[::6], "lines": 3 * ITEMS, "batches": (32, 96)}
    short = race(base, processor, chosen, images, SHORT, **how)
    print(json.dumps(found | {"short_questions_of_the_base": short}))
    return found["texts_equal"] and short["texts_equal"] and found["ratio"] >= AIM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--items", type=int, default=14, help="pictures, three questions each")
    parser.add_argument("--every", type=int, default=1, help="of so many free blocks one goes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    told = parser.parse_args()
    torch.set_num_threads(1)
    tiny_itself = told.model == "tiny" and told.device == "cpu"
    held = of_tiny() if tiny_itself else of_model(told.model, told.device, told.items, told.every)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
