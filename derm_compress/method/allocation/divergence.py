"""How far a model's answers have moved: KL divergence from the whole model's, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from derm_compress.data.items import Item
from derm_compress.errors import DermError
from derm_compress.files import Journal
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.iterate import each_model, joined
from derm_compress.model import oom

COLUMNS = ["variant", "item", "kl"]


def divergences(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batch_size: int,
    quantize: Callable | None = None,
    journal: Journal | None = None,
) -> pd.DataFrame:
    """KL(first variant || each) in nats, the mean over a picture's reference answers' tokens.

    Columns: variant, item, kl. quantize: as assemble.materialize takes it, for quantized ones.
    """
    if not items:
        raise DermError("allocation: there are no development pictures to decide by; set n_dev")
    journal, whole = journal or Journal(), {}
    first = variants.index == variants.index[0]
    todo = variants[first | ~variants.variant.isin(journal.done)]
    for turn in each_model(todo, store, device, "divergences", quantize=quantize):
        c = Calibration(turn.model, turn.processor, items, images)
        what = f"divergence of {turn.variant}"
        found = oom.halved(partial(log_probabilities, c), batch_size, what)
        whole = whole or found
        rows = [{"item": item, "kl": divergence(whole[item], found[item])} for item in whole]
        if turn.variant not in journal.done:
            journal.add(turn.variant, rows)
    frames = [
        pd.DataFrame(journal.done[name]).assign(variant=name)
        for name in variants.variant
        if name in journal.done
    ]
    return joined(frames, COLUMNS)[COLUMNS]


@torch.inference_mode()
def log_probabilities(c: Calibration, batch_size: int) -> dict[str, torch.Tensor]:
    """{item: log p [its reference answers' tokens, vocabulary]}, each after what is before it."""
    found = {}
    for batch in c.batches(batch_size):
        reading = batch.reading()
        told = zip(reading.picture.tolist(), reading.predictions(reading.last), strict=True)
        for picture, scores in told:
            rows = found.setdefault(batch.items[picture].id, [])
            rows.append(scores[:-1].float().log_softmax(-1).cpu())
    return {item: torch.cat(rows) for item, rows in found.items()}


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) of log-probabilities [tokens, vocabulary], the mean over tokens."""
    return (p.exp() * (p - q)).sum(-1).mean().item()
