"""The paper's model, LLaVA-1.5-7B, as shapes: what it takes at any depth and in any format."""

import re

from derm_compress.method.quantization.methods import forms
from derm_compress.model import memory, shapes

_ATTENTION = {f"self_attn.{name}_proj": [4096, 4096] for name in "qkvo"}
_MLP = {
    "mlp.gate_proj": [11008, 4096],
    "mlp.up_proj": [11008, 4096],
    "mlp.down_proj": [4096, 11008],
}
LLAVA_7B = shapes.Architecture(  # shapes.llava_7b() counts the same, with torch
    blocks=32,
    linears=_ATTENTION | _MLP,
    block_norms=8192,
    hidden=4096,
    intermediate=11008,
    cache_width=4096,
    outside={
        "vision_tower": 303507456,
        "projector": 20979712,
        "head": 131334144,
        "embedding": 131334144,
        "final_norm": 4096,
    },
    vocabulary=32064,
    image_tokens=576,
    tower_values=22452224,
)
TOTAL = LLAVA_7B.parameters()
BLOCK = TOTAL - LLAVA_7B.parameters(1)
GB = memory.GIB / 1e9  # units of 10^9 bytes in a GiB
T4_GB_S = 320  # that a T4's memory gives at most, by its data sheet


def params_b(blocks_removed: int) -> float:
    """Parameters left, in billions."""
    return LLAVA_7B.parameters(blocks_removed) / 1e9


def blocks_gone(billions: float) -> int:
    """How many blocks a model of about so many billions has lost; `7B` has lost none."""
    return max(0, round((TOTAL / 1e9 - billions) / (BLOCK / 1e9)))


def billions(name: str) -> float:
    """5.6 from Pruned LLaVA (5.6 B)."""
    return float(re.search(r"([\d.]+) ?B\)", name)[1])


def weights_gib(blocks_removed: int, quantizer: str = "") -> float:
    """Planned weights, at 16 bits or at 4 in groups of 64."""
    return sum(memory.plan_weights(LLAVA_7B, **_form(blocks_removed, quantizer)).values())


def read_ms(blocks_removed: int, quantizer: str = "") -> float:
    """Milliseconds in which a T4 can read these weights once, as a token needs them."""
    return 1000 * weights_gib(blocks_removed, quantizer) * GB / T4_GB_S


def peak_gib(blocks_removed: int, quantizer: str = "") -> float:
    """Planned peak of one question and its longest answer."""
    return sum(memory.plan_peak(LLAVA_7B, **_form(blocks_removed, quantizer)).values())


def _form(blocks_removed, quantizer):
    form = memory.Format()
    if quantizer:
        form = forms([quantizer], [4], memory.GROUP)[0].format()
    return {"blocks_removed": blocks_removed, "form": form}
