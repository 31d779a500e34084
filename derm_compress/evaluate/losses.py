"""How well models foretell the reference answers, for which they need not say anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from derm_compress.data.items import Item
from derm_compress.method.importance import scoring
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.iterate import each_model, joined
from derm_compress.model import oom

COLUMNS = ["variant", "method", "item", "question", "loss"]


def answer_losses(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batch_size: int,
    quantize: Callable | None = None,
) -> pd.DataFrame:
    """Mean negative log-likelihood of each reference answer under every variant (COLUMNS).

    quantize: as assemble.materialize takes it, for quantized ones.
    """
    frames, methods = [], dict(zip(variants.variant, variants.method, strict=True))
    for turn in each_model(variants, store, device, "losses", quantize=quantize):
        asked = Calibration(turn.model, turn.processor, items, images)
        told = oom.halved(partial(_losses, asked), batch_size, f"losses of {turn.variant}")
        known = {"variant": turn.variant, "method": methods[turn.variant]}
        frames.append(pd.DataFrame(told).assign(**known))
    return joined(frames, COLUMNS)[COLUMNS]


@torch.inference_mode()
def _losses(asked: Calibration, batch_size: int) -> list[dict]:
    rows = []
    for batch in asked.batches(batch_size):
        for row in scoring.losses(batch, batch.reading()):
            rows.append({"item": row["item"], "question": row["question"], "loss": row["value"]})
    return rows
