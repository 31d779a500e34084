"""Answers of a model to the study's questions: greedy, batched, kept item by item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch

from derm_compress import dialogue, models, oom
from derm_compress.data import Item
from derm_compress.progress import track

COLUMNS = [
    "variant", "item", "split", "disease", "question", "prompt", "answer", "reference", "tokens", "stopped",
]  # fmt: skip


def prompt(processor, kind: str, *, text_only: bool = False) -> str:
    """The prompt of one question, the image before it unless `text_only`, by the processor's own chat template."""
    return ask(processor, dialogue.question(kind), text_only=text_only)


def ask(processor, question: str, *, text_only: bool = False) -> str:
    """The prompt of any question, as `prompt`."""
    content = [{"type": "image"}] * (not text_only) + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True)


def prepare(processor, texts: Sequence[str], images: np.ndarray | None, device) -> dict[str, torch.Tensor]:
    """Model inputs of a batch, padded on the left so that new tokens follow the prompt; images [n, S, S, 3] or None."""
    processor.tokenizer.padding_side = "left"
    pictures = None if images is None else list(images)
    return processor(text=list(texts), images=pictures, return_tensors="pt", padding=True).to(device)


@torch.inference_mode()
def generate(model, processor, inputs, *, max_new_tokens: int) -> tuple[list[str], list[int], list[bool]]:
    """Greedy answers of a batch: texts, new tokens, and whether end-of-sequence was reached."""
    tokenizer = processor.tokenizer
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )[:, inputs["input_ids"].shape[1] :]
    ended = ids == tokenizer.eos_token_id
    stopped = ended.any(1)
    lengths = torch.where(stopped, ended.int().argmax(1) + 1, ids.shape[1])
    kept = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return [t.strip() for t in texts], lengths.tolist(), stopped.tolist()


def calibration_batches(
    processor, items: Sequence[Item], images: np.ndarray, *, batch_size: int, device, answered: bool = True,
    text_only: bool = False, answer_weight: float = 1.0,
) -> Iterator[dict]:  # fmt: skip
    """Prompts with image, and with the reference answer after them: what statistics are collected on.

    text_only leaves the image out. An answer_weight other than 1 adds `token_weights`: that for the answers' tokens.
    """
    asked = [(item, kind) for item in items for kind in dialogue.QUESTIONS]
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        told = [f" {dialogue.reference(i.disease, i.facts, k)}" if answered else "" for i, k in part]
        texts = [prompt(processor, k, text_only=text_only) + t for (_, k), t in zip(part, told, strict=True)]
        pictures = None if text_only else images[[i.row for i, _ in part]]
        batch = prepare(processor, texts, pictures, device)
        if answer_weight != 1:
            batch["token_weights"] = _token_weights(processor, batch["input_ids"], texts, told, answer_weight)
        yield batch


def _token_weights(processor, ids, texts: Sequence[str], told: Sequence[str], weight: float):
    """1 for every token [rows, tokens], `weight` for those of the answers `told`, which end the texts."""
    weights = torch.ones(ids.shape, device=ids.device)
    for row, text, answered in zip(weights, texts, told, strict=True):
        places = processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        length = sum(end > len(text) - len(answered) for _, end in places)
        row[len(row) - length :] = weight
    return weights


def answer(
    model,
    processor,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    variant: str,
    batch_size: int,
    max_new_tokens: int,
    questions: Sequence[str] = dialogue.QUESTIONS,
    journal=None,
    what: str | None = None,
) -> pd.DataFrame:
    """One row per item and question (COLUMNS); answers already in the journal are not generated again.

    A model without values says nothing: no row.
    """
    if not models.has_values(model):
        return pd.DataFrame(columns=COLUMNS)
    models.spread(model)
    done = dict(journal.done) if journal else {}
    asked = [(item, kind) for kind in questions for item in items]
    batches = []  # of one kind of question each: a batch goes on until its longest answer ends
    for kind in questions:
        todo = [(i, kind) for i in items if f"{variant} {i.id} {kind}" not in done]
        batches += [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    what = what or f"answers of {variant}"

    def replies(part):
        texts = [prompt(processor, kind) for _, kind in part]
        inputs = prepare(processor, texts, images[[item.row for item, _ in part]], model.device)
        return zip(*generate(model, processor, inputs, max_new_tokens=max_new_tokens), strict=True)

    for part, told in oom.in_parts(replies, track(batches, what), what):
        for (item, kind), (text, tokens, stopped) in zip(part, told, strict=True):
            row = _row(variant, item, kind, text, tokens, stopped)
            done[f"{variant} {item.id} {kind}"] = row
            if journal:
                journal.add(f"{variant} {item.id} {kind}", row)
    return pd.DataFrame([done[f"{variant} {i.id} {k}"] for i, k in asked], columns=COLUMNS)


def _row(variant: str, item: Item, kind: str, text: str, tokens: int, stopped: bool) -> dict:
    told = dialogue.reference(item.disease, item.facts, kind)
    values = (
        variant,
        item.id,
        item.split,
        item.disease,
        kind,
        dialogue.question(kind),
        text,
        told,
        tokens,
        stopped,
    )
    return dict(zip(COLUMNS, values, strict=True))
