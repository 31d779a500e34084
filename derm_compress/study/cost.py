"""What a model's work takes on a device: seconds from floating-point operations and from bytes read. Estimates.

A reading of many tokens is bound by arithmetic, a decoding step by the weights and the cache that it reads; a step
takes the longer of the two. Assumed: 35 % of peak in readings and 60 % of bandwidth in decoding. Left out: kernel
launches, sampling, loading, dequantization, padding. Arithmetic is fp16 whatever the weights' format.

T4: 65 TFLOP/s with fp16 tensor cores, 320 GB/s, 16 GB (NVIDIA T4 Tensor Core GPU datasheet, 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from derm_compress.model.memory import FP16, GIB, plan_weights
from derm_compress.model.shapes import Architecture


@dataclass(frozen=True)
class Device:
    """Peaks of a device, and the share of each that is reached."""

    name: str
    flops: float  # fp16 a second
    bandwidth: float  # bytes a second
    prefill: float = 0.35
    decode: float = 0.6


T4 = Device("T4", flops=65e12, bandwidth=320e9)
DECODED = 34.5  # bytes moved for each weight of a packed linear that is decoded (packed.PackedLinear.dequantized)
UNREAD = (
    "vision_tower",
    "projector",
    "embedding",
)  # by a decoding step, but for a row a token of the last


def reading_flops(
    arch: Architecture, tokens: float, *, before: float = 0, blocks: int | None = None
) -> float:
    """Of `tokens` new tokens after `before` cached ones through so many blocks (None: all).

    2 x weights x tokens, and for attention 4 x width x keys a query; queries see what stands before them.
    """
    pairs = tokens * before + tokens * (tokens + 1) / 2
    width = arch.linears["self_attn.q_proj"][0]
    return (arch.blocks if blocks is None else blocks) * (
        2 * arch.block_linears * tokens + 4 * width * pairs
    )


def picture_flops(arch: Architecture) -> float:
    """Of vision tower and projector, by their weights alone."""
    return 2 * arch.image_tokens * (arch.outside["vision_tower"] + arch.outside["projector"])


def head_flops(arch: Architecture, tokens: float) -> float:
    return 2 * arch.hidden * arch.vocabulary * tokens


def prefill_seconds(
    arch: Architecture,
    device: Device,
    *,
    tokens: int,
    batch: int = 1,
    pictures: int = 1,
    blocks_removed: int = 0,
) -> float:
    """Prompts of `tokens`, those of their pictures included, up to the first new token's logits."""
    row = reading_flops(arch, tokens, blocks=arch.kept(blocks_removed)) + head_flops(arch, 1)
    return batch * (row + pictures * picture_flops(arch)) / (device.flops * device.prefill)


def training_seconds(
    arch: Architecture,
    device: Device,
    *,
    tokens: int,
    blocks_removed: int = 0,
    checkpointing: bool = False,
) -> float:
    """One conversation of `tokens`, its picture's included, forward and backward over frozen weights.

    Backward takes what forward takes, since only inputs have gradients; with checkpointing blocks run forward twice.
    """
    passes, blocks = 2 + checkpointing, arch.kept(blocks_removed)
    flops = (
        passes * reading_flops(arch, tokens, blocks=blocks)
        + 2 * head_flops(arch, tokens)
        + picture_flops(arch)
    )
    return flops / (device.flops * device.prefill)


def decode_bytes(arch: Architecture, *, batch: int, before: float, **weights) -> float:
    """Read in one step behind `before` tokens: weights (formats as in plan_weights), and every row's cache in fp16."""
    planned = plan_weights(arch, **weights)
    attentions = arch.kept(weights.get("blocks_removed", 0)) - weights.get("attentions_removed", 0)
    cache = FP16 * 2 * arch.cache_width * attentions * before
    return GIB * sum(size for part, size in planned.items() if part not in UNREAD) + batch * cache


def decode_seconds(
    arch: Architecture,
    device: Device,
    *,
    batch: int,
    tokens: float,
    before: float,
    width: float = 1,
    **weights,
) -> float:
    """`tokens` steps behind a prompt of `before`, each of `width` tokens a row; a step at the middle, times steps."""
    middle = before + width * tokens / 2
    kept = arch.kept(weights.get("blocks_removed", 0))
    flops = batch * (
        reading_flops(arch, width, before=middle, blocks=kept) + head_flops(arch, width)
    )
    moved = decode_bytes(arch, batch=batch, before=middle, **weights) / (
        device.bandwidth * device.decode
    )
    return tokens * max(moved, flops / (device.flops * device.prefill))


def unpacking_seconds(arch: Architecture, device: Device) -> float:
    """To decode all packed weights once, as every token does where no kernel reads their codes: none on a T4."""
    return DECODED * arch.decoder_linears() / (device.bandwidth * device.decode)


def importance_seconds(
    arch: Architecture,
    device: Device,
    *,
    blocks: Sequence[int],
    items: int,
    prompt_tokens: int,
    answer_tokens: float,
    accepted: float,
    questions: int = 1,
    batch: int = 1,
    lines: int | None = None,
    advance: float = 1,
    image_tokens: int | None = None,
    **weights,
) -> dict[str, float]:
    """Answers without each of `blocks`: by a `loop` of removing and generating, by verifying `drafts`; their ratio.

    `items` pictures have `questions` each, whose common beginning is the picture; both ways write the full model's
    answers. Drafts: what lies above the block is read anew (`reading`), and the share of the draft that was not
    `accepted` is written (`writing`, part of `drafts`) by all blocks, `advance` tokens a step, in `lines` rows at once
    where the loop has `batch`.
    """
    image = arch.image_tokens if image_tokens is None else image_tokens
    answers, gone, rate = (
        items * questions,
        weights.get("blocks_removed", 0),
        device.flops * device.prefill,
    )
    lines, how = lines or batch, {"before": image + prompt_tokens} | weights

    def generated(removed: int, rows: int) -> float:
        less = {"blocks_removed": gone + removed}
        steps = decode_seconds(arch, device, tokens=answer_tokens, batch=rows, **how | less)
        return answers * (
            prefill_seconds(arch, device, tokens=image + prompt_tokens, **less) + steps / rows
        )

    rest = reading_flops(arch, prompt_tokens + answer_tokens, before=image, blocks=1)
    one_block = reading_flops(arch, image, blocks=1) + questions * rest
    passes = [arch.kept(gone), *(arch.kept(gone) - 1 - block for block in blocks)]
    reading = items * (sum(passes) * one_block + picture_flops(arch)) / rate
    reading += len(passes) * answers * head_flops(arch, answer_tokens + 1) / rate
    lost = (1 - accepted) * answer_tokens / advance
    writing = decode_seconds(arch, device, tokens=lost, batch=lines, width=advance, **how)
    writing *= len(blocks) * answers / lines
    loop, drafts = (
        generated(0, batch) + len(blocks) * generated(1, batch),
        generated(0, lines) + reading + writing,
    )
    return {
        "loop": loop,
        "drafts": drafts,
        "reading": reading,
        "writing": writing,
        "ratio": loop / drafts,
    }
