"""Adapters, on an NF4 base (QLoRA) or the base as it is, trained on answers only.

transformers' Trainer with accelerate was tried: the same adapters, byte by byte, and no line fewer.
Its checkpoints are pickled, DDP does not see the gradients of a recorded step, and a resume to the
bit, steps that overflow and cuDNN's attention (whose gradients of padded rows are not numbers)
would be ours to look after all the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from derm_compress.data import dialogue
from derm_compress.errors import DermError
from derm_compress.method.finetune import parallel
from derm_compress.method.finetune.distill import Teacher
from derm_compress.method.quantization import nf4
from derm_compress.model import anatomy, devices, memory, oom, shapes
from derm_compress.model.graphs import Recorded
from derm_compress.model.prompts import IGNORED, collate, encode
from derm_compress.model.reading import picture_features
from derm_compress.progress import say, track

if TYPE_CHECKING:
    import pandas as pd

    from derm_compress.data.items import Item

TARGETS = anatomy.ADAPTED  # plain name lists would also hit the tower
WARMUP = 0.05  # of the steps
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's
WIDTHS = 32  # a GPU's batches are multiples of so many tokens wide: few shapes to record
AMPLE = 0.7  # of a GPU's memory: the plan has the length of the first batch


@dataclass(frozen=True)
class Training:
    """Settings of one fine-tune; the paper's SFT has rank 16 and alpha 8.

    base: nf4 (QLoRA) or half, the unquantized base, computed in half precision. distillation: the
    weight of a Teacher's words.
    """

    rank: int
    alpha: int
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    checkpoint_every: int = 50
    base: str = "nf4"
    distillation: float = 0.0

    @classmethod
    def of(cls, parameters, prefix: str, *, seed: int) -> Training:
        """Of parameters named sft_rank, sft_steps and so on, where `prefix` is sft."""
        names = ("rank", "alpha", "learning_rate", "steps")
        known = {name: getattr(parameters, f"{prefix}_{name}") for name in names}
        known |= {"batch_size": getattr(parameters, f"{prefix}_batch")}
        return cls(**known, seed=seed, base=parameters.adapter_base)


def training_batch(
    model, processor, items: Sequence[Item], images: np.ndarray, rng: np.random.Generator
) -> dict:
    """This process's rows of a batch: conversations, each with its picture and turns at random."""
    expanded = anatomy.image_tokens(model.config)
    told = [dialogue.conversation(item.disease, item.facts, rng) for item in items]
    pieces = [encode(processor, turns, image_tokens=expanded) for turns in parallel.own(told)]
    multiple = WIDTHS if model.device.type == "cuda" else 1
    batch = collate(pieces, pad=processor.tokenizer.pad_token_id, multiple=multiple)
    pictures = list(images[[item.row for item in parallel.own(items)]])
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    batch["pixel_values"] = pixels.to(model.dtype)
    return {name: part.to(model.device) for name, part in batch.items()}


def planned_peak(
    model,
    processor,
    items: Sequence[Item],
    images: np.ndarray,
    training: Training,
    *,
    checkpointing: bool = False,
    teacher: float = 0.0,
) -> float:
    """GiB that memory.plan_training gives, with the length of the first batch."""
    first = items[: training.batch_size]
    rng = np.random.default_rng(training.seed)
    rows, width = training_batch(model, processor, first, images, rng)["input_ids"].shape
    element = rest = model.get_input_embeddings().weight.element_size()
    form = memory.ADAPTED[training.base]
    if training.base == "half":
        form, element = memory.Format(8 * rest), memory.FP16
    plan = memory.plan_training(
        shapes.architecture(model.config),
        rank=training.rank,
        batch=rows,
        text_tokens=width - anatomy.image_tokens(model.config),
        form=form,
        element=element,
        rest=rest,
        checkpointing=checkpointing,
        teacher=teacher,
    )
    return sum(plan.values())


def planned(model, *asked, what: str, **how) -> tuple[float, bool]:
    """planned_peak, and whether blocks are computed twice: on a GPU without ample memory."""
    peak = planned_peak(model, *asked, **how)
    if model.device.type != "cuda":
        return peak, False
    room = devices.room(model.device)
    if peak <= AMPLE * room:
        say(f"{what}: no gradient checkpointing, {peak:.1f} of {room:.1f} GiB planned")
        return peak, False
    return planned_peak(model, *asked, checkpointing=True, **how), True


def attach(model, training: Training):
    """fp32 adapters on the decoder's linears and nowhere else; those in NF4, or as they are."""
    from peft import LoraConfig, get_peft_model  # three seconds that only training needs
    from peft.tuners.lora import Linear

    config = LoraConfig(
        r=training.rank, lora_alpha=training.alpha, target_modules=TARGETS, lora_dropout=0.0
    )
    # else peft asks torchao, too, and refuses the one that Kaggle's image has
    if training.base == "nf4":
        nf4.freeze(model)
        model.is_loaded_in_4bit = True
    else:
        config._register_custom_module({torch.nn.Linear: Linear})
    torch.manual_seed(training.seed)
    try:
        tuned = get_peft_model(model, config)
    finally:
        vars(model).pop("is_loaded_in_4bit", None)
    for name, weight in tuned.named_parameters():
        if weight.requires_grad and "language_model" not in name:
            raise DermError(f"finetune: {name} is an adapter outside the decoder")
    return tuned


def autocast(kind: str, base: str) -> torch.autocast:
    """Half precision around fp32 adapters: fp16 on a GPU; on a CPU bf16, for NF4 none."""
    half = torch.float16 if kind == "cuda" else torch.bfloat16
    return torch.autocast(kind, half, enabled=kind == "cuda" or base == "half")


def save_memory(model) -> None:
    """Gradient checkpointing: blocks keep what they read alone; half as much time again."""
    anatomy.decoder(model).gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )


def train(
    model,
    processor,
    items: Sequence[Item],
    images: np.ndarray,
    training: Training,
    *,
    checkpoint: Path,
    what: str,
    checkpointing: bool = False,
    teacher: Teacher | None = None,
) -> tuple[object, pd.DataFrame, dict]:
    """Steps from the checkpoint on: the peft model, the curve, {seconds, skipped}.

    skipped: steps whose gradients were not finite; DermError for more than a tenth, or for all.
    """
    import pandas as pd

    tuned = attach(model, training)
    if checkpointing:
        save_memory(model)
    weights = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=training.learning_rate, weight_decay=0.0)
    curve, told = resume(checkpoint, weights, optimizer)
    done, batch_size = len(curve), min(training.batch_size, len(items))
    how = {"base": training.base, "teacher": teacher}
    gradients = gradients_of(tuned, optimizer, recorded=not (checkpointing or teacher), **how)
    tuned.train()

    def batch_of(step: int) -> dict:
        rng = np.random.default_rng([training.seed, step])
        chosen = [items[i] for i in rng.choice(len(items), batch_size, replace=False)]
        return training_batch(model, processor, chosen, images, rng)

    batch = batch_of(done)
    for step in track(range(done, training.steps), what, total=training.steps - done):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * schedule(step, training.steps)
        with oom.naming("finetune_batch or sft_batch", what):
            found = forward_backward(tuned, batch, gradients, base=training.base)
            if step + 1 < training.steps:  # made while a GPU computes
                batch = batch_of(step + 1)
            loss, taken = update(optimizer, *found)
        curve.append((step, loss))
        told["skipped"] += not taken
        check_skipped(told["skipped"], step + 1, training.steps, what)
        told["seconds"] += time.perf_counter() - began
        due = (step + 1) % training.checkpoint_every == 0 and step + 1 < training.steps
        if due and parallel.rank() == 0:
            keep(checkpoint, weights, optimizer, curve, told)
    return tuned.eval(), pd.DataFrame(curve, columns=["step", "loss"]), told


def one_step(tuned, batch: dict, optimizer, *, base: str = "nf4") -> tuple[float, bool]:
    """The loss, and whether a step was taken: in half precision gradients may overflow."""
    gradients = gradients_of(tuned, optimizer, base=base)
    return update(optimizer, *forward_backward(tuned, batch, gradients, base=base))


def forward_backward(
    tuned, batch: dict, gradients: Callable, *, base: str
) -> tuple[torch.Tensor, ...]:
    """Loss and gradients of a batch, the whole of which all processes read, by gradients_of().

    A GPU may still be computing them.
    """
    with torch.no_grad(), autocast(tuned.device.type, base):
        x = embedded(tuned.get_base_model(), batch)
    found = gradients(x, batch["attention_mask"], batch["labels"])
    return parallel.averaged(found, weight=(batch["labels"] != IGNORED).sum())


def update(optimizer, loss: torch.Tensor, *gradients: torch.Tensor) -> tuple[float, bool]:
    """One clipped optimiser step by what forward_backward() gives; returns as one_step()."""
    weights = optimizer.param_groups[0]["params"]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    finite = bool(torch.nn.utils.clip_grad_norm_(weights, 1.0).isfinite())
    if finite:
        optimizer.step()
    return loss.item(), finite


def gradients_of(
    tuned, optimizer, *, base: str, recorded: bool = False, teacher: Teacher | None = None
) -> Callable:
    """(x, attention_mask, labels) -> the loss and the gradient of each of the optimizer's weights.

    x: what embedded() gives. recorded: as a CUDA graph, which needs all memory twice for a moment;
    none of a loss with a teacher.
    """
    from peft.helpers import disable_input_dtype_casting

    scale = devices.loss_scale(tuned.dtype)
    weights = optimizer.param_groups[0]["params"]

    def loss_of(read):
        told = tuned(**read, use_cache=False)
        return teacher.corrected(told, read) if teacher else told.loss

    def work(x, attention_mask, labels):
        read = {"inputs_embeds": x, "attention_mask": attention_mask, "labels": labels}
        casting = disable_input_dtype_casting(tuned, active=base == "half")  # autocast does it
        with devices.attention_with_gradients(), casting:
            with autocast(tuned.device.type, base):
                loss = loss_of(read)
            found = torch.autograd.grad(scale * loss, weights)
        return loss.detach(), *(gradient.div_(scale) for gradient in found)

    return Recorded(work, "training") if recorded else work


def embedded(model, batch: dict) -> torch.Tensor:
    """What the decoder reads of a batch: [batch, tokens, width], the pictures' features in it."""
    x = model.get_input_embeddings()(batch["input_ids"])
    spots = batch["input_ids"] == model.config.image_token_id
    features = picture_features(model, batch["pixel_values"])
    return x.masked_scatter(spots[..., None], features.to(x.dtype))


def check_skipped(skipped: int, done: int, steps: int, what: str) -> None:
    if skipped > max(9, steps / 10) or skipped == steps:
        raise DermError(
            f"{what}: gradients of {skipped} of {done} steps were not finite; "
            "set the learning rate lower and run again"
        )


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to a tenth."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + np.cos(np.pi * (step - rise) / max(1, steps - rise)))


def keep(path: Path, weights: dict, optimizer, curve: list, told: dict) -> None:
    """Adapters and Adam's moments, if a step was taken, as safetensors, replaced at once."""
    tensors = {}
    for name, weight in weights.items():
        tensors[f"w.{name}"] = weight.detach()
        state = optimizer.state[weight]
        tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if state}
    draft = path.with_suffix(".part")
    save_file(tensors, draft, metadata={"curve": json.dumps(curve), "told": json.dumps(told)})
    draft.replace(path)


def resume(path: Path, weights: dict, optimizer) -> tuple[list, dict]:
    """The curve so far and {seconds, skipped}, with weights and moments put back."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            curve, told = (json.loads(file.metadata()[name]) for name in ("curve", "told"))
    except (FileNotFoundError, SafetensorError):  # none yet, or cut short by a power failure
        return [], {"seconds": 0.0, "skipped": 0}
    taken = len(curve) - told["skipped"]
    for name, weight in weights.items():
        weight.data.copy_(tensors[f"w.{name}"])
        if taken:
            moments = {moment: tensors[f"{moment}.{name}"].to(weight.device) for moment in MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(float(taken)), **moments}
    return curve, told
