"""What a model says without a block, by drafts and by the plain loop: equal texts, and how soon?

The embedded base first learns one long question (name, treatment and features, these in two
wordings), so that answers have 48 tokens or more and end by themselves. Then drafts.ablated_answers
and the loop over removal.without and model.generate, at its fastest batch, take turns in a thread,
each of as many answers as a block has. The last line is JSON; an item is one (block, answer),
`ratio` the loop's wall seconds over the drafts'. A status of 1 if the texts differ or the ratio is
below 3.
"""

import ctypes
import json
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from derm_compress.data import dialogue, synthetic
from derm_compress.method.importance.drafts import ablated_answers
from derm_compress.model import anatomy, loading, prompts, removal, tiny, usage
from derm_compress.model.prompts import collate, encode
from derm_compress.model.reading import Prompts
from derm_compress.model.units import Unit

AIM = 3
ITEMS, LEAST, MOST = 32, 48, 96  # LEAST and MOST: tokens of an answer
BLOCKS = [Unit(block) for block in range(2, 31)]
LONG = {"all": " ".join(map(dialogue.question, dialogue.QUESTIONS))}
SHORT = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}


def teach(model, processor, items, images, *, steps: int, batch: int, lr: float) -> None:
    """The blocks learn to answer LONG: name, treatment, and the features twice in other words."""
    pixels = processor.image_processor(list(images[[i.row for i in items]]), return_tensors="pt")[
        "pixel_values"
    ]
    pieces = []
    for item in items:
        name, treatment, features = (
            dialogue.answers(item.disease, item.facts, k) for k in dialogue.QUESTIONS
        )
        told = " ".join((name[0], treatment[0], features[0], features[-1]))
        pieces.append(encode(processor, [(LONG["all"], told)], image_tokens=tiny.IMAGE_TOKENS))
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
def loop(model, processor, asked, images, units, *, batch: int):
    """The plain way: remove a unit, generate, put it back; tokens of each answer by key."""
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    for unit in units:
        answers = {}
        with removal.without(model, [] if unit is None else [unit]):
            for part in (asked[start : start + batch] for start in range(0, len(asked), batch)):
                texts = [prompts.ask(processor, question) for _, _, question in part]
                inputs = prompts.prepare(
                    processor, texts, images[[i.row for i, _, _ in part]], model.device
                )
                ids = model.generate(
                    **inputs,
                    max_new_tokens=MOST,
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
    """Seconds and peak MiB of one side's turns, from each turn's own start if it keeps nothing."""

    def __init__(self, keeps: bool):
        self.wall = self.cpu = self.mib = 0.0
        self.base, self.keeps = None, keeps

    def __enter__(self):
        try:  # give back what was freed, and let the peak start anew; Linux alone can
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            self.mib = float("nan")
        if self.base is None or not self.keeps:
            self.base = usage.resident_gib()["rss_gib"]
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *_):
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]
        self.mib = float(np.maximum(self.mib, 1024 * (usage.peak_gib() - self.base)))


def race(model, processor, items, images, questions, *, blocks, lines: int, batches) -> dict:
    """Both ways in turns, the loop at the best of `batches`: what they took, and equal or not."""
    asked = [(item, *question) for question in questions.items() for item in items]
    tried = {batch: Meter(keeps=False) for batch in batches}
    for batch, meter in tried.items():
        with meter:
            list(loop(model, processor, asked, images, blocks[:1], batch=batch))
    seconds = {batch: round(meter.cpu, 2) for batch, meter in tried.items()}
    print("the loop's seconds a block by batch:", seconds, flush=True)
    batch, units = min(seconds, key=seconds.get), [None, *blocks]
    prompts = Prompts.of(processor, images[0], questions, model.device)
    how = {"batch_size": lines, "max_new_tokens": MOST}
    drafts = ablated_answers(model, prompts, items, images, blocks, **how)
    straight = loop(model, processor, asked, images, units, batch=batch)
    fast, slow, rows, plain = Meter(keeps=True), Meter(keeps=False), {}, {}
    for n in range(1, 1 + len(units)):
        with slow:
            plain |= next(straight)
        with fast:
            rows |= {row.key: row for row in islice(drafts, n * len(asked) - len(rows))}
    same = {key: row.tokens for key, row in rows.items()} == plain
    found = {"texts_equal": same, "loop_batch": batch, "batch": lines}
    return found | compared(rows, fast, slow)


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


def main() -> None:
    torch.set_num_threads(1)
    model, processor = loading.load_base("tiny")
    dataset = synthetic.make(n_train=240, n_test=8, n_heldout=8, size=tiny.SIZE, seed=3)
    items, images, eos = dataset.of("train"), dataset.images, processor.tokenizer.eos_token_id
    began = time.perf_counter()
    teach(model, processor, items, images, steps=40, batch=16, lr=3e-3)
    asked = [(item, "all", LONG["all"]) for item in items[:48]]
    (said,) = loop(model, processor, asked, images, [None], batch=len(asked))
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
    equal = found["texts_equal"] and short["texts_equal"]
    sys.exit(0 if equal and found["ratio"] >= AIM else 1)


if __name__ == "__main__":
    main()
