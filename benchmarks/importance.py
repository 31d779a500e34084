"""Output similarity's answers by drafts and by the plain loop, beside each other: are they equal, how much faster?

The embedded base first learns one long question (name, treatment and features, these in two wordings), so that answers
have 48 tokens or more and end by themselves. Then `ablation.written` and the loop over prune.without and
model.generate take turns, block by block, in one thread. The last line is JSON; an item is one (block, answer).
"""

import json
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from derm_compress import ablation, cost, dialogue, generate, memory, models, prune, reading, synthetic, tiny
from derm_compress.finetune import collate, encode

ITEMS, BLOCKS, LEAST, MOST = 32, list(range(2, 31)), 48, 96
LONG = {"all": " ".join(map(dialogue.question, dialogue.QUESTIONS))}
SHORT = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}
T4_GIB = 14.6  # of 16 GB, once the context has its part


def told(item) -> str:
    """Name, treatment, and the features twice, in other words."""
    name, treatment, features = (dialogue.answers(item.disease, item.facts, kind) for kind in dialogue.QUESTIONS)
    return " ".join((name[0], treatment[0], features[0], features[-1]))


def teach(model, processor, items, images, *, steps: int, batch: int, lr: float) -> None:
    """The blocks learn to answer LONG about these items; picture features are computed once."""
    inner, tokenizer = model.model, processor.tokenizer
    pixels = processor.image_processor(list(images[[i.row for i in items]]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = inner.multi_modal_projector(tiny.image_features(model, pixels))
    pieces = [encode(tokenizer, [(LONG["all"], told(item))], tiny.IMAGE_TOKENS) for item in items]
    weights = list(models.blocks(model).parameters())
    optimizer, rng = torch.optim.AdamW(weights, lr=lr), np.random.default_rng(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for _ in range(steps):
        rows = rng.choice(len(items), batch, replace=False)
        inputs = collate([pieces[r] for r in rows], pad=tokenizer.pad_token_id)
        where = inputs["input_ids"] == model.config.image_token_id
        x = inner.get_input_embeddings()(inputs["input_ids"]).masked_scatter(where[..., None], features[rows])
        x = inner.language_model(inputs_embeds=x, attention_mask=inputs["attention_mask"], use_cache=False)
        scores, labels = model.lm_head(x.last_hidden_state[:, :-1]), inputs["labels"][:, 1:]
        optimizer.zero_grad()
        F.cross_entropy(scores.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()


def written(model, processor, asked, images, *, batch: int) -> dict[tuple, list[int]]:
    """model.generate's tokens of every (item, name, question), up to the end of sequence."""
    eos, pad, answers = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id, {}
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        texts = [generate.ask(processor, question) for _, _, question in part]
        inputs = generate.prepare(processor, texts, images[[item.row for item, _, _ in part]], model.device)
        ids = model.generate(**inputs, max_new_tokens=MOST, do_sample=False, eos_token_id=eos, pad_token_id=pad)
        for (item, name, _), row in zip(part, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[item.id, name] = row[: row.index(eos) + 1] if eos in row else row
    return answers


@torch.inference_mode()
def loop(model, processor, asked, images, units, *, batch: int):
    """The straightforward way, unit by unit: remove, generate, put back."""
    for unit in units:
        with prune.without(model, [] if unit is None else [unit]):
            answers = written(model, processor, asked, images, batch=batch)
        yield {(unit, *key): tokens for key, tokens in answers.items()}


class Meter:
    """Seconds, and MiB on top of what was resident at the beginning, of one side; use as a context, again and again."""

    def __init__(self):
        self.wall = self.cpu = self.mib = 0.0
        self.base = memory.resident_gib()["rss_gib"]

    def __enter__(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        except OSError:
            self.mib = float("nan")
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *_):
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]
        self.mib = float(np.maximum(self.mib, 1024 * (memory.peak_gib() - self.base)))


def watch(model) -> Counter:
    """Counts block-tokens and seconds of whatever is read from now on, by kind."""
    seen, run = Counter(), reading.run

    def counted(model, x, *args, start=0, gates=None, **more):
        kind = "reading" if gates is None else "full" if gates.all() else "writing"
        began = time.perf_counter()
        y = run(model, x, *args, start=start, gates=gates, **more)
        seen[f"{kind}_s"] += time.perf_counter() - began
        seen[kind] += x.shape[0] * x.shape[1] * (len(models.blocks(model)) - start / 2)
        return y

    def looped(_, args):
        seen["loop"] += args[0].shape[0] * args[0].shape[1] * len(models.blocks(model))

    reading.run = ablation.run = counted
    models.blocks(model)[0].register_forward_pre_hook(looped)
    return seen


def best_batch(model, processor, asked, images, sizes) -> int:
    """The loop's fastest batch, tried on one block."""
    seconds = {}
    for size in sizes:
        began = time.process_time()
        list(loop(model, processor, asked, images, [BLOCKS[0]], batch=size))
        seconds[size] = time.process_time() - began
    print("the loop's seconds a block by batch:", {size: round(s, 2) for size, s in seconds.items()}, flush=True)
    return min(seconds, key=seconds.get)


def race(model, processor, items, images, questions, *, blocks, lines: int, batches, seen: Counter) -> dict:
    """Both ways in turns; what they took and whether their tokens are the same."""
    asked = [(item, *question) for question in questions.items() for item in items]
    units, rows, plain = [None, *blocks], {}, {}
    batch = best_batch(model, processor, asked, images, batches)
    seen.clear()
    how = {"batch_size": lines, "max_new_tokens": MOST}
    drafts = ablation.written(model, processor, items, images, blocks, questions, **how)
    straight, sides = loop(model, processor, asked, images, units, batch=batch), (Meter(), Meter())
    for n in range(len(units)):
        with sides[1]:
            plain |= next(straight)
        with sides[0]:
            rows |= {row.key: row for row in islice(drafts, (n + 1) * len(asked) - len(rows))}
    same = {key: row.tokens for key, row in rows.items()} == plain
    return compared(rows, len(blocks) * len(asked), same, *sides, seen) | {"loop_batch": batch, "batch": lines}


def compared(rows: dict, count: int, same: bool, fast: Meter, slow: Meter, seen: Counter) -> dict:
    """The figures of one race."""
    ablated = [(row, rows[None, *key[1:]].tokens) for key, row in rows.items() if key[0] is not None]
    share = sum(seen[kind] for kind in ("reading", "full", "writing")) / seen["loop"]
    values = {
        "ratio": slow.wall / fast.wall, "ratio_of_cpu_seconds": slow.cpu / fast.cpu, "texts_equal": same,
        "items_per_s": count / fast.wall, "loop_items_per_s": count / slow.wall, "items": count,
        "accepted": sum(row.accepted for row, _ in ablated) / sum(len(draft) for _, draft in ablated),
        "unchanged": sum(row.tokens == draft for row, draft in ablated) / count,
        "near_ties": sum(row.near_ties for row in rows.values()),
        "answer_tokens": sum(len(draft) for _, draft in ablated) / count,
        "seconds": fast.wall, "loop_seconds": slow.wall, "peak_mib": fast.mib, "loop_peak_mib": slow.mib,
        "block_tokens_of_loop": share,
    }  # fmt: skip
    for kind in ("reading", "full", "writing"):
        values[f"{kind}_of_seconds"] = seen[f"{kind}_s"] / fast.wall
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}


def t4(found: dict) -> dict:
    """Hours for llava-1.5-7b, 29 blocks x 100 items on a T4, as long and as often accepted as measured here."""
    arch, hours = memory.llava_7b(), {}
    shape = {"prompt_tokens": 40, "answer_tokens": found["answer_tokens"], "accepted": found["accepted"]}
    for name, form in (("fp16", {}), ("nf4", {"method": "bitsandbytes", "bits": 4})):
        asked = {"prompt_tokens": 40, "new_tokens": MOST, **form}
        fits = max(n for n in range(1, 33) if sum(memory.plan_peak(arch, batch=n, **asked).values()) < T4_GIB)
        seconds = cost.importance_seconds(arch, cost.T4, blocks=BLOCKS, items=100, batch=fits, **shape, **form)
        hours[name] = {k: round(v if k == "ratio" else v / 3600, 2) for k, v in seconds.items()} | {"batch": fits}
    return hours


def main() -> None:
    torch.set_num_threads(1)
    model, processor = models.load_base("tiny")
    dataset = synthetic.make(n_train=240, n_test=8, n_heldout=8, size=tiny.SIZE, seed=3)
    items, images = dataset.of("train"), dataset.images
    began = time.perf_counter()
    teach(model, processor, items, images, steps=50, batch=16, lr=3e-3)
    with torch.inference_mode():
        said = written(model, processor, [(i, "all", LONG["all"]) for i in items[:48]], images, batch=48)
    eos = processor.tokenizer.eos_token_id
    chosen = [i for i in items[:48] if len(said[i.id, "all"]) >= LEAST and said[i.id, "all"][-1] == eos][:ITEMS]
    assert len(chosen) == ITEMS, f"{len(chosen)} answers of {LEAST} tokens or more that end by themselves"
    print(f"taught in {time.perf_counter() - began:.0f} s", flush=True)
    seen = watch(model)
    how = {"seen": seen, "lines": ITEMS, "batches": (8, 16, 32)}
    found = race(model, processor, chosen, images, LONG, blocks=BLOCKS, **how)
    print(found, flush=True)
    short, _ = models.load_base("tiny")
    how |= {"seen": watch(short), "lines": 3 * ITEMS, "batches": (32, 96)}
    found["short_questions"] = race(short, processor, chosen, images, SHORT, blocks=BLOCKS[::4], **how)
    found["t4_hours"] = t4(found)
    print(json.dumps(found))
    assert found["texts_equal"] and found["short_questions"]["texts_equal"], "the two ways wrote different texts"


if __name__ == "__main__":
    main()
