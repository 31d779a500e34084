"""What a model needs in memory, planned from its architecture; what a process holds, measured.

Plans are GiB by component and need no torch; `architecture` counts on the meta device, so that llava-1.5-7b needs no
weights. They hold tensors only: a GPU's context and its allocator's slack come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from derm_compress.errors import DermError
from derm_compress.model.shapes import Architecture

if TYPE_CHECKING:
    import pandas as pd

GIB = 2**30
FP16, FP32 = 2, 4  # bytes
GROUP = 64  # weights that share a scale, where nothing else is said
QUESTION, ANSWER = (
    32,
    200,
)  # tokens of one question and of its longest answer, beside its picture's, as plans assume
CONVERSATION = (
    200  # tokens of a training conversation of three turns beside its picture's, as plans assume
)
REMOVED = (
    "blocks_removed",
    "attentions_removed",
    "mlps_removed",
)  # the latter two from blocks that stay
# Bytes stored per weight beside its own bits. Integers: an fp16 scale a group and a zero point packed like the weights
# (GEMM layout; hqq's is fp16). NF4: an fp32 absmax a block; doubly quantized, a byte a block and an fp32 constant for
# 256 of them.
OVERHEAD = {
    "fp16": lambda bits, group: 0,
    "awq": lambda bits, group: (FP16 + bits / 8) / group,
    "rtn": lambda bits, group: (FP16 + bits / 8) / group,
    "rtn_symmetric": lambda bits, group: FP16 / group,
    "autoawq": lambda bits, group: (FP16 + bits / 8) / group,
    "hqq": lambda bits, group: 2 * FP16 / group,
    "bitsandbytes": lambda bits, group: FP32 / group,
    "bitsandbytes_double": lambda bits, group: (1 + FP32 / 256) / group,
    "awq_nf4": lambda bits, group: FP32 / group,
    "awq_nf4_double": lambda bits, group: (1 + FP32 / 256) / group,
    "llm_int8": lambda bits, group: 0,  # an fp32 scale a row, which plan_weights adds
}


def plan_weights(
    arch: Architecture,
    *,
    method: str = "fp16",
    bits: int = 16,
    group_size: int = GROUP,
    **removed: int,
) -> dict[str, float]:
    """GiB of the weights by component; only the decoder blocks' linears are quantized, all else is fp16.

    `removed` are counts by name: blocks_removed, attentions_removed, mlps_removed. A quantized weight takes bits/8
    bytes and its format's overhead: (2 + bits/8)/group for awq and rtn, 2/group for rtn_symmetric, 4/group for hqq,
    bitsandbytes and awq_nf4, (1 + 4/256)/group for the _double forms of these two. bits may be a mean over blocks.
    Left out: NF4's codebook of 64 bytes a linear, padding of odd shapes, and the 4/group that torch's int4 kernel adds
    where it is used.
    """
    if method not in OVERHEAD or (method == "fp16") != (bits == 16):
        raise DermError(
            f"memory plan: no format {method!r} of {bits} bits; known: {', '.join(OVERHEAD)}"
        )
    weights = arch.over_linears(lambda out, into: out * into, **removed)
    scales = weights * OVERHEAD[method](bits, group_size)
    if method == "llm_int8":
        scales = FP32 * arch.over_linears(lambda out, into: out, **removed)
    rest = {part: FP16 * count for part, count in arch.outside.items()}
    rest["block_norms"] = FP16 * arch.decoder_norms(**removed)
    return _gib(decoder_linears=weights * bits / 8, quantization_scales=scales, **rest)


def plan_mix(arch: Architecture, mix: Sequence[dict]) -> dict[str, float]:
    """plan_weights of a model whose blocks differ; mix: {blocks: how many of them, method, bits, group_size} each.

    Blocks of no part are gone. Raises DermError where there are more than the architecture has, or none.
    """
    planned = [plan_weights(arch, **form) for form in _apart(arch, mix)]
    removed_by(arch, mix)
    own = ("decoder_linears", "quantization_scales", "block_norms")
    return planned[0] | {name: sum(plan[name] for plan in planned) for name in own}


def _apart(arch: Architecture, mix: Sequence[dict]) -> list[dict]:
    """Each part of a mix as plan_weights' `weights`, as if its blocks were all there are."""
    forms = [{"blocks_removed": arch.blocks - part["blocks"], **part} for part in mix]
    return [{key: value for key, value in form.items() if key != "blocks"} for form in forms]


def _groups(arch: Architecture, form: dict) -> int:
    """Groups of 4-bit weights; form: plan_weights' `weights`."""
    removed = {key: form[key] for key in REMOVED if key in form}
    sizes = arch.over_linears(
        lambda out, into: out * into // form.get("group_size", GROUP), **removed
    )
    return sizes * (form.get("bits") == 4)


def removed_by(arch: Architecture, mix: Sequence[dict]) -> int:
    """How many blocks a mix lacks."""
    removed = arch.blocks - sum(part["blocks"] for part in mix)
    return arch.blocks - arch.kept(removed)


def plan_peak(
    arch: Architecture, *, batch: int = 1, prompt_tokens: int = QUESTION, new_tokens: int = ANSWER,
    int4_kernel: bool = False, mix: Sequence[dict] = (), **weights,
) -> dict[str, float]:  # fmt: skip
    """GiB while questions of `prompt_tokens` about one picture each are answered; `weights` as in plan_weights.

    `mix` as in plan_mix, instead of `weights`.

    Weights + fp16 KV cache at its final length (2 x width x blocks a token) + the prefill's activations + one linear
    decoded to fp16 where quantized: parts that peak at different times, so rather too much. Activations, with fused
    attention, the last token's logits and an MLP at least twice as wide as the residual: four tensors of the
    residual's width (embeddings, block input, residual, normed), three of the MLP's, and the picture's features; or
    the tower's peak if larger. `int4_kernel`: torch's, which holds a bfloat16 scale and offset a group of 4 bits.
    """
    planned = plan_mix(arch, mix) if mix else plan_weights(arch, **weights)
    weights |= {"blocks_removed": removed_by(arch, mix)} if mix else {}
    packed = any(part.get("method", "fp16") != "fp16" for part in mix or [weights])
    tokens = prompt_tokens + arch.image_tokens
    attentions = arch.kept(weights.get("blocks_removed", 0)) - weights.get("attentions_removed", 0)
    decoder = tokens * (4 * arch.hidden + 3 * arch.intermediate) + arch.image_tokens * arch.hidden
    groups = (
        sum(_groups(arch, form) for form in _apart(arch, mix) or [weights]) if int4_kernel else 0
    )
    return planned | _gib(
        kernel_steps=2 * FP16 * groups,
        kv_cache=FP16 * 2 * arch.cache_width * attentions * batch * (tokens + new_tokens),
        activations=FP16 * batch * max(decoder, arch.tower_values + tokens * arch.hidden),
        workspace=FP16 * arch.hidden * arch.intermediate * packed,
    )


def plan_training(
    arch: Architecture, *, blocks_removed: int = 0, rank: int = 16, batch: int = 1, text_tokens: int = CONVERSATION,
    checkpointing: bool = False, method: str = "bitsandbytes", element: int = FP16, rest: int = FP16,
) -> dict[str, float]:  # fmt: skip
    """GiB of QLoRA: base in NF4 blocks of 64 (or fp16), fp32 adapters on all decoder linears, Adam, a picture a row.

    Adapters are rank x (in + out) a linear, gradients as much, Adam twice that. `element`: bytes of the compute type;
    `rest`: of what is not 4-bit (4 after peft's k-bit preparation). A block keeps for backward, in fp32, both norms'
    inputs, each adapter's input (computing in fp32: one for all linears that read the same) and its middle; in the
    compute type queries, keys, values, attention's output, gate, activated gate and up. With checkpointing it keeps
    its input, and one block is alive anew. All tokens' logits take 12 bytes each at the loss. No dropout masks.
    """
    hidden, mlp, linears = arch.hidden, arch.intermediate, arch.linears.values()
    base = plan_weights(
        arch, blocks_removed=blocks_removed, method=method, bits=16 if method == "fp16" else 4
    )
    base |= {part: base[part] * rest / FP16 for part in (*arch.outside, "block_norms")}
    blocks, tokens = arch.kept(blocks_removed), batch * (text_tokens + arch.image_tokens)
    adapters = FP32 * rank * blocks * sum(out + into for out, into in linears)
    inputs = 2 * hidden + mlp if element == FP32 else sum(into for _, into in linears)
    block = FP32 * (2 * hidden + inputs + rank * len(linears)) + element * (
        2 * hidden + 2 * arch.cache_width + 3 * mlp
    )
    logits = (
        12 * arch.vocabulary
    )  # log-softmax and gradient in fp32; logits and gradient in fp16, or fp32 logits
    return base | _gib(
        adapters=adapters, gradients=adapters, optimiser=2 * adapters,
        workspace=element * hidden * mlp * (method != "fp16"),
        activations=blocks * tokens * (element * hidden if checkpointing else block),
        loss_or_block=tokens * (max(logits, block) if checkpointing else logits),
    )  # fmt: skip


def plan_variants(
    variants: pd.DataFrame, arch: Architecture, arch_7b: Architecture, **asked
) -> pd.DataFrame:
    """One row a variant: params_b, vram_gib (weights), peak_gib, and with `_7b` those of arch_7b.

    variants: blocks_removed, attentions_removed, mlps_removed (of arch), method, bits, group_size;
    `blocks_removed_7b` is the same fraction of arch_7b's blocks, rounded.
    asked: batch, prompt_tokens, new_tokens as in plan_peak.
    """
    import pandas as pd

    rows = []
    for row in variants.to_dict("records"):
        planned, removed = (
            {"variant": row["variant"]},
            {key: int(row.get(key, 0)) for key in REMOVED},
        )
        removed_7b = {
            key: int(n * arch_7b.blocks / arch.blocks + 0.5) for key, n in removed.items()
        }
        for end, of, gone in (("", arch, removed), ("_7b", arch_7b, removed_7b)):
            form = gone | {key: row[key] for key in ("method", "bits", "group_size")}
            planned[f"params_b{end}"] = of.parameters(*gone.values()) / 1e9
            planned[f"vram_gib{end}"] = sum(plan_weights(of, **form).values())
            planned[f"peak_gib{end}"] = sum(plan_peak(of, **form, **asked).values())
        rows.append(planned | {"blocks_removed_7b": removed_7b["blocks_removed"]})
    return pd.DataFrame(rows)


def _gib(**components: float) -> dict[str, float]:
    return {name: float(size) / GIB for name, size in components.items()}
