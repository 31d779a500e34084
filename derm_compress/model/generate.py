"""Answers of a model to the study's questions: greedy, batched, kept item by item."""

from __future__ import annotations

import torch


@torch.inference_mode()
def generate(
    model, processor, inputs, *, max_new_tokens: int
) -> tuple[list[str], list[int], list[bool]]:
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
