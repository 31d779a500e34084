"""Answers of a model to the study's questions: greedy, batched, kept item by item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from derm_compress.data import dialogue
from derm_compress.data.items import Item

if TYPE_CHECKING:  # data needs scipy and pandas, which a machine that only rehearses may lack
    from derm_compress.data.items import Item


def prompt(processor, kind: str, *, text_only: bool = False) -> str:
    """The prompt of one question, the image before it unless `text_only`, by the processor's own chat template."""
    return ask(processor, dialogue.question(kind), text_only=text_only)


def ask(processor, question: str, *, text_only: bool = False) -> str:
    """The prompt of any question, as `prompt`."""
    content = [{"type": "image"}] * (not text_only) + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True)


def prepare(
    processor, texts: Sequence[str], images: np.ndarray | None, device
) -> dict[str, torch.Tensor]:
    """Model inputs of a batch, padded on the left so that new tokens follow the prompt; images [n, S, S, 3] or None."""
    processor.tokenizer.padding_side = "left"
    pictures = None if images is None else list(images)
    return processor(text=list(texts), images=pictures, return_tensors="pt", padding=True).to(
        device
    )


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
        told = [
            f" {dialogue.reference(i.disease, i.facts, k)}" if answered else "" for i, k in part
        ]
        texts = [
            prompt(processor, k, text_only=text_only) + t
            for (_, k), t in zip(part, told, strict=True)
        ]
        pictures = None if text_only else images[[i.row for i, _ in part]]
        batch = prepare(processor, texts, pictures, device)
        if answer_weight != 1:
            batch["token_weights"] = _token_weights(
                processor, batch["input_ids"], texts, told, answer_weight
            )
        yield batch


def _token_weights(processor, ids, texts: Sequence[str], told: Sequence[str], weight: float):
    """1 for every token [rows, tokens], `weight` for those of the answers `told`, which end the texts."""
    weights = torch.ones(ids.shape, device=ids.device)
    for row, text, answered in zip(weights, texts, told, strict=True):
        places = processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        length = sum(end > len(text) - len(answered) for _, end in places)
        row[len(row) - length :] = weight
    return weights


IGNORED = -100  # the label that the loss leaves out


def encode(
    tokenizer, turns: Sequence[tuple[str, str]], image_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of one conversation; labels are kept on answers and their end-of-sequence alone.

    The published template never ends an answer; here every answer does, or the model would never learn to stop.
    """
    text, spans = "", []
    for i, (question, answer) in enumerate(turns):
        image = tokenizer.image_token * image_tokens + "\n" if i == 0 and image_tokens else ""
        text += f"USER: {image}{question} ASSISTANT:"
        spans.append((len(text), len(text) + 1 + len(answer) + len(tokenizer.eos_token)))
        text += f" {answer}{tokenizer.eos_token}"
    coded = tokenizer(text, return_offsets_mapping=True)
    answered = [any(a <= s < e <= b for a, b in spans) for s, e in coded["offset_mapping"]]
    ids = torch.tensor(coded["input_ids"])
    return ids, torch.where(torch.tensor(answered), ids, IGNORED)


def collate(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], *, pad: int
) -> dict[str, torch.Tensor]:
    """Right-padded batch: input_ids, labels and attention_mask, each [batch, longest]."""
    pad_sequence = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad_sequence([i for i, _ in pieces], batch_first=True, padding_value=pad),
        "labels": pad_sequence([x for _, x in pieces], batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(i) for i, _ in pieces], batch_first=True),
    }


def image_tokens(model) -> int:
    """Tokens that one image takes in the prompt: patches of the tower, without its class token."""
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2
