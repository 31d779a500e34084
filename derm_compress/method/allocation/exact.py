"""What packed models really hold, beside what was planned."""

from __future__ import annotations

from functools import partial

import pandas as pd

from derm_compress.method.iterate import each_model, joined
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model.memory import FP16

COLUMNS = ["variant", "held"]


def held_bytes(variants: pd.DataFrame, *, store, device: str) -> pd.DataFrame:
    """Bytes of every variant's packed weights (COLUMNS), unquantized ones as in half precision."""
    pack = partial(quantize_step, packed=True)
    rows = []
    for turn in each_model(variants, store, device, "models packed", quantize=pack):
        tensors = {t.data_ptr(): t for t in turn.model.state_dict().values()}  # tied ones once
        held = [FP16 * t.numel() if t.is_floating_point() else t.nbytes for t in tensors.values()]
        rows.append({"variant": turn.variant, "held": sum(held)})
    return joined([pd.DataFrame(rows)], COLUMNS)
