"""Greedy answers of a model to a batch of prompts."""

from __future__ import annotations

import numpy as np
import torch

from derm_compress.model.prompts import ends, prepare, prompt


def say(model, processor, picture: np.ndarray, kind: str, *, max_new_tokens: int = 56) -> str:
    """The answer to one of the study's questions about one picture [S, S, 3]."""
    inputs = prepare(processor, [prompt(processor, kind)], picture[None], model.device)
    (text,), _, _ = generate(model, processor, inputs, max_new_tokens=max_new_tokens)
    return text


@torch.inference_mode()
def generate(
    model, processor, inputs, *, max_new_tokens: int
) -> tuple[list[str], list[int], list[bool]]:
    """Greedy answers of a batch: texts, new tokens, and whether they came to their end."""
    tokenizer, last = processor.tokenizer, ends(processor)
    whole = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=last,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = whole[:, inputs["input_ids"].shape[1] :]
    ended = torch.isin(ids, torch.tensor(last, device=ids.device))
    stopped = ended.any(1)
    lengths = torch.where(stopped, ended.int().argmax(1) + 1, ids.shape[1]).tolist()
    kept = [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return [text.strip() for text in texts], lengths, stopped.tolist()
