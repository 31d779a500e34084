"""What a model needs in memory, planned from its architecture: GiB by component, without torch.

Plans hold tensors only: a GPU's context and its allocator's slack come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from derm_compress.data import dialogue
from derm_compress.model.shapes import Architecture
from derm_compress.model.variants import paper_depth

GIB = 2**30
FP16, FP32 = 2, 4  # bytes
GROUP = 64  # weights that share a scale, where nothing else is said
QUESTION, ANSWER = 32, 200  # tokens of a question and of its longest answer, as plans assume
PROMPT = 24  # tokens beside a picture's of a question, half of them before any question
CONTEXT = 0.54  # GiB of a GPU that CUDA keeps: of the 14.56 that a T4 reports 14.02 are left
CONVERSATION = 200  # tokens of a training conversation of three turns beside its picture's
REMOVED = ("blocks_removed", "attentions_removed", "mlps_removed")  # both from blocks that stay


@dataclass(frozen=True)
class Format:
    """How weights are stored: `bits` each, and `group_bytes` for a group's scale and zero point.

    A mean over blocks may give a fraction of a bit. A group size of 0 makes each row a group.
    """

    bits: float = 16
    group_size: float = GROUP
    group_bytes: float = 0

    @property
    def packed(self) -> bool:
        return self.bits < 16

    @property
    def overhead(self) -> float:
        """Bytes a weight beside its own bits; nothing for rows, whose length this does not know."""
        return self.group_bytes / self.group_size if self.group_size else 0.0


NF4 = Format(4, GROUP, FP32)  # of QLoRA: an fp32 absmax a block
ADAPTED = {"nf4": NF4, "half": Format()}  # what adapters are trained on, on a GPU


def plan_weights(
    arch: Architecture, *, form: Format = Format(), **removed: int
) -> dict[str, float]:
    """GiB of the weights by component; all but the decoder blocks' linears is fp16.

    `removed` are counts by name: blocks_removed, attentions_removed, mlps_removed. Left out: NF4's
    codebook of 64 bytes a linear, padding of odd shapes, and the 4/group that torch's int4 kernel
    adds where it is used.
    """
    weights = arch.over_linears(lambda out, into: out * into, **removed)
    scales = weights * form.overhead
    if not form.group_size:
        scales = form.group_bytes * arch.over_linears(lambda out, into: out, **removed)
    rest = {part: FP16 * count for part, count in arch.outside.items()}
    rest["block_norms"] = FP16 * arch.decoder_norms(**removed)
    return _gib(decoder_linears=weights * form.bits / 8, quantization_scales=scales, **rest)


def plan_peak(
    arch: Architecture,
    *,
    batch: int = 1,
    prompt_tokens: int = QUESTION,
    new_tokens: int = ANSWER,
    int4_kernel: bool = False,
    form: Format = Format(),
    **removed: int,
) -> dict[str, float]:
    """GiB while questions of `prompt_tokens` about one picture each are answered.

    Weights + fp16 KV cache at its final length (2 x width x blocks a token) + the prefill's
    activations + one linear decoded to fp16 where quantized: parts that peak at different times, so
    rather too much. Activations, with fused attention, the last token's logits and an MLP at least
    twice as wide as the residual: four tensors of the residual's width (embeddings, block input,
    residual, normed), three of the MLP's, and the picture's features; or the tower's peak if
    larger. `int4_kernel`: torch's, which holds a bfloat16 scale and offset a group of 4 bits.
    """
    tokens = prompt_tokens + arch.image_tokens
    attentions = arch.kept(removed.get("blocks_removed", 0)) - removed.get("attentions_removed", 0)
    decoder = tokens * (4 * arch.hidden + 3 * arch.intermediate) + arch.image_tokens * arch.hidden
    groups = 0
    if int4_kernel and form.bits == 4:
        groups = arch.over_linears(lambda out, into: out * into // form.group_size, **removed)
    return plan_weights(arch, form=form, **removed) | _gib(
        kernel_steps=2 * FP16 * groups,
        kv_cache=FP16 * 2 * arch.cache_width * attentions * batch * (tokens + new_tokens),
        activations=FP16 * batch * max(decoder, arch.tower_values + tokens * arch.hidden),
        workspace=FP16 * arch.hidden * arch.intermediate * form.packed,
    )


def plan_answers(arch: Architecture, *, batch: int, new_tokens: int, gpus: int = 1) -> float:
    """GiB of the first GPU: `batch` answers under way while the next prompts are read.

    Those about a picture are read together. Keys and values lie in lines of full length; those just
    read are copied there, and one layer of them is joined to its picture's meanwhile. When all is
    read the tower is away. Several GPUs have equal parts of the blocks, the last one the head.
    """
    kinds = len(dialogue.QUESTIONS)
    pictures = max(1, batch // kinds)
    prefix, rows = arch.image_tokens + PROMPT / 2, kinds * pictures
    plan, token = plan_weights(arch), FP16 * 2 * arch.cache_width
    weights = sum(plan.values())
    if gpus > 1:
        inside = plan["decoder_linears"] + plan["block_norms"]
        weights -= inside * (1 - 1 / gpus) + plan["head"]
    lines = token * arch.blocks * batch * (prefix + PROMPT + new_tokens) / gpus
    read = token * arch.blocks * (pictures * prefix + rows * PROMPT) / gpus
    inner = FP16 * (4 * arch.hidden + 3 * arch.intermediate)
    joined = token * rows * (prefix + PROMPT)
    logits = (FP16 + FP32) * max(batch, rows) * arch.vocabulary
    looking = FP16 * pictures * (arch.tower_values + prefix * arch.hidden)
    begin = inner * pictures * prefix
    rest = inner * rows * PROMPT + 2 * joined
    later = read + max(begin, rest, logits) - GIB * (plan["vision_tower"] + plan["projector"])
    return weights + (lines + max(looking, later)) / GIB


def too_small(arch: Architecture, gpus: int, gib: float, *, batch: int, new_tokens: int) -> bool:
    """Whether none of several GPUs of so many GiB holds a model and a batch of its answers.

    At least those about one picture, and the context of the process that starts one a GPU.
    """
    rows = max(batch, len(dialogue.QUESTIONS))
    whole = plan_answers(arch, batch=rows, new_tokens=new_tokens)
    return gpus > 1 and whole + CONTEXT > gib


def plan_training(
    arch: Architecture,
    *,
    blocks_removed: int = 0,
    rank: int = 16,
    batch: int = 1,
    text_tokens: int = CONVERSATION,
    checkpointing: bool = False,
    form: Format = NF4,
    element: int = FP16,
    rest: int = FP16,
    teacher: float = 0.0,
) -> dict[str, float]:
    """GiB of training, a picture a row: base as `form`, fp32 adapters on all decoder linears, Adam.

    Adapters are rank x (in + out) a linear, gradients as much, Adam's state twice that. `element`:
    bytes of the compute type; `rest`: of what is not 4-bit (4 after peft's k-bit preparation). With
    checkpointing a block keeps its input, and one block is alive anew. A wider base is kept in the
    compute type, too. No dropout masks. `teacher`: GiB of a model that is listened to.
    """
    hidden, mlp, linears = arch.hidden, arch.intermediate, arch.linears.values()
    blocks, tokens = arch.kept(blocks_removed), batch * (text_tokens + arch.image_tokens)
    base = plan_weights(arch, form=form, blocks_removed=blocks_removed)
    for part in (*arch.outside, "block_norms"):
        base[part] *= rest / FP16
    adapters = FP32 * rank * blocks * sum(out + into for out, into in linears)
    # A block keeps for backward, in fp32, both norms' inputs, each adapter's input (where computing
    # is in fp32, one for all that read the same) and its middle; in the compute type queries, keys,
    # values, attention's output, gate, activated gate and up.
    inputs = 2 * hidden + mlp if element == FP32 else sum(into for _, into in linears)
    block = FP32 * (2 * hidden + inputs + rank * len(linears))
    block += element * (2 * hidden + 2 * arch.cache_width + 3 * mlp)
    workspace = element * hidden * mlp * form.packed
    if form.bits > 8 * element:  # autocast's copies, which backward reads
        workspace = element * blocks * sum(out * into for out, into in linears)
    # log-softmax and gradient in fp32; logits and gradient in fp16, or fp32 logits
    logits = 12 * arch.vocabulary
    if teacher:  # its logits, both log-softmaxes in fp32 and a gradient
        base["teacher"] = teacher
        logits += (rest + 3 * FP32) * arch.vocabulary
    return base | _gib(
        adapters=adapters,
        gradients=adapters,
        optimiser=2 * adapters,
        workspace=workspace,
        activations=blocks * tokens * (element * hidden if checkpointing else block),
        loss_or_block=tokens * (max(logits, block) if checkpointing else logits),
    )


def plan_variants(
    variants: pd.DataFrame, arch: Architecture, arch_7b: Architecture, **asked
) -> pd.DataFrame:
    """One row a variant: params_b, vram_gib (weights), peak_gib, and with `_7b` those of arch_7b.

    variants: blocks_removed, attentions_removed, mlps_removed (of arch), bits, group_size,
    group_bytes; `blocks_removed_7b` is the same fraction of arch_7b's blocks. asked: batch,
    prompt_tokens, new_tokens as in plan_peak.
    """
    rows = []
    for row in variants.to_dict("records"):
        form = Format(row["bits"], row["group_size"], row["group_bytes"])
        removed = {key: int(row.get(key, 0)) for key in REMOVED}
        of_7b = {key: paper_depth(n, arch_7b.blocks, arch.blocks) for key, n in removed.items()}
        planned = {"variant": row["variant"]}
        for end, of, gone in (("", arch, removed), ("_7b", arch_7b, of_7b)):
            planned[f"params_b{end}"] = of.parameters(*gone.values()) / 1e9
            planned[f"vram_gib{end}"] = sum(plan_weights(of, form=form, **gone).values())
            planned[f"peak_gib{end}"] = sum(plan_peak(of, form=form, **gone, **asked).values())
        rows.append(planned | {"blocks_removed_7b": of_7b["blocks_removed"]})
    return pd.DataFrame(rows)


def _gib(**components: float) -> dict[str, float]:
    return {name: float(size) / GIB for name, size in components.items()}
