"""The study's questions as a model reads them: to answer, to calibrate on, to be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from derm_compress.data import dialogue
from derm_compress.data.items import Item

IGNORED = -100  # the label that the loss leaves out


def prompt(processor, kind: str, *, text_only: bool = False) -> str:
    """The prompt of one of the study's questions, as `ask`."""
    return ask(processor, dialogue.question(kind), text_only=text_only)


def ask(processor, question: str, *, text_only: bool = False) -> str:
    """A question, the image before it unless `text_only`, by the processor's own chat template."""
    content = [{"type": "text", "text": question}]
    if not text_only:
        content.insert(0, {"type": "image"})
    turns = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True)


def prepare(
    processor, texts: Sequence[str], images: np.ndarray | None, device
) -> dict[str, torch.Tensor]:
    """Model inputs of a batch, padded on the left for new tokens to follow; images [n, S, S, 3]."""
    processor.tokenizer.padding_side = "left"
    pictures = None if images is None else list(images)
    made = processor(text=list(texts), images=pictures, return_tensors="pt", padding=True)
    return made.to(device)


def calibration_batches(
    processor,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    batch_size: int,
    device,
    answered: bool = True,
    text_only: bool = False,
    answer_weight: float = 1.0,
) -> Iterator[dict]:
    """Prompts with image and reference answer: what statistics are collected on.

    text_only leaves the image out. An answer_weight other than 1 adds `token_weights`: that for the
    answers' tokens.
    """
    asked = [(item, kind) for item in items for kind in dialogue.QUESTIONS]
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        texts = [prompt(processor, kind, text_only=text_only) for _, kind in part]
        told = [""] * len(part)
        if answered:
            told = [f" {dialogue.reference(i.disease, i.facts, kind)}" for i, kind in part]
        texts = [text + answer for text, answer in zip(texts, told, strict=True)]
        pictures = None if text_only else images[[item.row for item, _ in part]]
        batch = prepare(processor, texts, pictures, device)
        if answer_weight != 1:
            shape = batch["input_ids"].shape
            batch["token_weights"] = torch.ones(shape, device=device)
            for weights, text, answer in zip(batch["token_weights"], texts, told, strict=True):
                places = processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
                length = sum(end > len(text) - len(answer) for _, end in places)
                weights[len(weights) - length :] = answer_weight
        yield batch


def encode(
    tokenizer, turns: Sequence[tuple[str, str]], image_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of one conversation, and labels on its answers and their end-of-sequence alone.

    The published template never ends an answer; here every answer does, or the model would never
    learn to stop.
    """
    text, spans = "", []
    for i, (question, answer) in enumerate(turns):
        image = tokenizer.image_token * image_tokens + "\n" if i == 0 and image_tokens else ""
        text += f"USER: {image}{question} ASSISTANT:"
        start = len(text)
        text += f" {answer}{tokenizer.eos_token}"
        spans.append((start, len(text)))
    coded = tokenizer(text, return_offsets_mapping=True)
    answered = [any(a <= s < e <= b for a, b in spans) for s, e in coded["offset_mapping"]]
    ids = torch.tensor(coded["input_ids"])
    return ids, torch.where(torch.tensor(answered), ids, IGNORED)


def collate(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], *, pad: int
) -> dict[str, torch.Tensor]:
    """Right-padded batch: input_ids, labels and attention_mask, each [batch, longest]."""
    ids, labels = zip(*pieces, strict=True)
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def image_tokens(model) -> int:
    """Tokens that one image takes in the prompt: patches of the tower, without its class token."""
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2
