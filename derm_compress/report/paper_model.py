"""The paper's model as shapes, LLaVA-1.5-7B: what it takes at any depth and in any format. No torch."""

from derm_compress.method.quantization.forms import forms
from derm_compress.model import memory, shapes

_ATTENTION = {f"self_attn.{name}_proj": [4096, 4096] for name in "qkvo"}
_MLP = {
    "mlp.gate_proj": [11008, 4096],
    "mlp.up_proj": [11008, 4096],
    "mlp.down_proj": [4096, 11008],
}
LLAVA_7B = shapes.Architecture(  # memory.llava_7b() counts the same, with torch
    blocks=32, linears=_ATTENTION | _MLP, block_norms=8192, hidden=4096, intermediate=11008, cache_width=4096,
    outside={"vision_tower": 303507456, "projector": 20979712, "head": 131334144, "embedding": 131334144,
             "final_norm": 4096},
    vocabulary=32064, image_tokens=576, tower_values=22452224,
)  # fmt: skip
TOTAL, BLOCK = LLAVA_7B.parameters(), LLAVA_7B.parameters(0) - LLAVA_7B.parameters(1)


def params_b(blocks_removed: int) -> float:
    """Parameters left, in billions."""
    return LLAVA_7B.parameters(blocks_removed) / 1e9


def blocks_gone(billions: float) -> int:
    """How many blocks a model of about so many billions has lost; `7B` has lost none."""
    return max(0, round((TOTAL / 1e9 - billions) / (BLOCK / 1e9)))


def weights_gib(blocks_removed: int, method: str = "fp16") -> float:
    """Planned weights, at 16 bits or at 4 in groups of 64."""
    return sum(memory.plan_weights(LLAVA_7B, **_form(blocks_removed, method)).values())


def weights_gb(blocks_removed: int, method: str = "fp16") -> float:
    """The same in units of 10^9 bytes."""
    return weights_gib(blocks_removed, method) * memory.GIB / 1e9


def peak_gib(blocks_removed: int, method: str = "fp16") -> float:
    """Planned peak of one question and its longest answer."""
    return sum(memory.plan_peak(LLAVA_7B, **_form(blocks_removed, method)).values())


def format_of(quantizer: str) -> memory.Format:
    """fp16, or a quantizer's at 4 bits in groups of 64."""
    return memory.Format() if quantizer == "fp16" else forms([quantizer], [4], 64)[0].format()


def _form(blocks_removed, method):
    return {"form": format_of(method), "blocks_removed": blocks_removed}
