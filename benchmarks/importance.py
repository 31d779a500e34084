"""What a model says without a block, by drafts and by the plain loop: are the texts equal, and how much faster?

The embedded base first learns one long question (name, treatment and features, these in two wordings), so that answers
have 48 tokens or more and end by themselves. Then drafts.ablated_answers and the loop over removal.without and
model.generate, at its fastest batch, take turns in one thread, each of as many answers as a block has. The last line
is JSON; an item is one (block, answer), `ratio` the loop's wall seconds over the drafts'. A status of 1 if the texts differ or the ratio is below 3.
"""

import ctypes
import json
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from derm_compress.data import dialogue, synthetic
from derm_compress.method.importance.drafts import ablated_answers
from derm_compress.model import anatomy, loading, prompts, reading, removal, tiny, usage
from derm_compress.model.prompts import collate, encode

AIM = 3
ITEMS, BLOCKS, LEAST, MOST = 32, list(range(2, 31)), 48, 96
LONG = {"all": " ".join(map(dialogue.question, dialogue.QUESTIONS))}
SHORT = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}


def teach(model, processor, items, images, *, steps: int, batch: int, lr: float) -> None:
    """The blocks learn to answer LONG about these items: name, treatment, and the features twice in other words."""
    pixels = processor.image_processor(list(images[[i.row for i in items]]), return_tensors="pt")[
        "pixel_values"
    ]
    pieces = []
    for item in items:
        name, treatment, features = (
            dialogue.answers(item.disease, item.facts, k) for k in dialogue.QUESTIONS
        )
        told = " ".join((name[0], treatment[0], features[0], features[-1]))
        pieces.append(encode(processor.tokenizer, [(LONG["all"], told)], tiny.IMAGE_TOKENS))
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
    """The straightforward way: remove a unit, generate, put it back; tokens up to the end of sequence by key."""
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
    """Seconds and peak MiB of one side's turns; a side that keeps nothing between them is measured from each anew."""

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


def watch(seen: Counter) -> None:
    """Counts block-tokens, seconds and rows of what `reading.run` does, by kind."""
    run = reading.run

    def counted(model, x, *args, start=0, gates=None, **more):
        kind = "reading" if gates is None else "full" if gates.all() else "writing"
        began = time.perf_counter()
        y = run(model, x, *args, start=start, gates=gates, **more)
        seen[f"{kind} s"] += time.perf_counter() - began
        seen[f"{kind} rows"] += len(x)
        seen[kind] += x.shape[0] * x.shape[1] * (len(anatomy.blocks(model)) - start / 2)
        return y

    reading.run = reading.run = counted


def race(
    model, processor, items, images, questions, *, blocks, lines: int, batches, seen: Counter
) -> dict:
    """Both ways in turns, the loop at the best of `batches`; what they took, and whether their tokens are the same."""
    asked = [(item, *question) for question in questions.items() for item in items]
    tried = {batch: Meter(keeps=False) for batch in batches}
    for batch, meter in tried.items():
        with meter:
            list(loop(model, processor, asked, images, blocks[:1], batch=batch))
    print(
        "the loop's seconds a block by batch:",
        {b: round(m.cpu, 2) for b, m in tried.items()},
        flush=True,
    )
    batch, units, rows, plain = min(tried, key=lambda b: tried[b].cpu), [None, *blocks], {}, {}
    count = len(anatomy.blocks(model))  # of blocks; while one is away, one less
    watched = anatomy.blocks(model)[0].register_forward_pre_hook(
        lambda _, args: seen.update(
            loop=args[0].shape[0] * args[0].shape[1] * (count - (len(plain) > 0))
        )
    )
    seen.clear()
    drafts = ablated_answers(
        model, processor, items, images, blocks, questions, batch_size=lines, max_new_tokens=MOST
    )
    straight, fast, slow = (
        loop(model, processor, asked, images, units, batch=batch),
        Meter(True),
        Meter(False),
    )
    for n in range(len(units)):
        with slow:
            plain |= next(straight)
        with fast:
            rows |= {row.key: row for row in islice(drafts, (n + 1) * len(asked) - len(rows))}
    watched.remove()
    same = {key: row.tokens for key, row in rows.items()} == plain
    return {"texts_equal": same, "loop_batch": batch, "batch": lines} | compared(
        rows, fast, slow, seen
    )


def compared(rows: dict, fast: Meter, slow: Meter, seen: Counter) -> dict:
    """The figures of one race."""
    ablated = [
        (row, rows[None, *key[1:]].tokens) for key, row in rows.items() if key[0] is not None
    ]
    gained = sum(
        len(row.tokens) - row.accepted - 1 for row, draft in ablated if row.accepted < len(draft)
    )
    kinds, count = ("reading", "full", "writing"), len(ablated)
    values = {
        "ratio": slow.wall / fast.wall, "ratio_of_cpu_seconds": slow.cpu / fast.cpu, "items": count,
        "items_per_s": count / fast.wall, "loop_items_per_s": count / slow.wall,
        "accepted": sum(row.accepted for row, _ in ablated) / sum(len(draft) for _, draft in ablated),
        "unchanged": sum(row.tokens == draft for row, draft in ablated) / count,
        "near_ties": sum(row.near_ties for row in rows.values()),
        "answer_tokens": sum(len(draft) for _, draft in ablated) / count,
        "seconds": fast.wall, "loop_seconds": slow.wall, "peak_mib": fast.mib, "loop_peak_mib": slow.mib,
        "block_tokens_of_loop": sum(seen[kind] for kind in kinds) / seen["loop"],
        "tokens_a_step": gained / max(1, seen["writing rows"]),
    }  # fmt: skip
    values |= {f"{kind}_of_seconds": seen[f"{kind} s"] / fast.wall for kind in kinds}
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()}


def bounds(found: dict) -> str:
    """What keeps the drafts from being faster still, in words."""
    kinds = {
        "reading": "reading drafts",
        "full": "the whole model's own answers",
        "writing": "writing what differs",
    }
    shares = {told: found[f"{kind}_of_seconds"] for kind, told in kinds.items()}
    told = ", ".join(
        f"{share:.0%} {what}" for what, share in sorted(shares.items(), key=lambda pair: -pair[1])
    )
    floor = 1 / found["block_tokens_of_loop"]
    computed = f"they compute {found['block_tokens_of_loop']:.0%} of the loop's block-tokens"
    peaks = f"peak {found['peak_mib']:.0f} MiB, the loop's {found['loop_peak_mib']:.0f}"
    return f"the drafts' seconds are {told}; {computed}, so {floor:.1f}x is the most at equal speed a token; {peaks}"


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
    watch(seen := Counter())
    how = {"blocks": BLOCKS, "lines": ITEMS, "batches": (8, 16, 32), "seen": seen}
    found = race(model, processor, chosen, images, LONG, **how)
    print("one long question:", found, flush=True)
    how |= {"blocks": BLOCKS[::6], "lines": 3 * ITEMS, "batches": (32, 96)}
    found["short_questions_of_the_base"] = race(
        loading.load_base("tiny")[0], processor, chosen, images, SHORT, **how
    )
    print(bounds(found))
    print(json.dumps(found))
    equal = found["texts_equal"] and found["short_questions_of_the_base"]["texts_equal"]
    sys.exit(0 if equal and found["ratio"] >= AIM else 1)


if __name__ == "__main__":
    main()
