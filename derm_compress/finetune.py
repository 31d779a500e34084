"""QLoRA: adapters on an NF4 base, trained on answers only, merged into the unquantized base and never into 4 bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from derm_compress import dialogue, memory, models, oom, quantize
from derm_compress.errors import DermError
from derm_compress.progress import track
from derm_compress.recipes import Recipe, adapter_digest, healed_name

if TYPE_CHECKING:  # data needs scipy and pandas, which a machine that only rehearses may lack
    import pandas as pd

    from derm_compress.data import Item

FP16_SCALE = 2**10  # keeps half-precision gradients from vanishing; a power of two changes no digit
IGNORED = -100  # the label that the loss leaves out
TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # plain name lists would also hit CLIP


@dataclass(frozen=True)
class Training:
    """Settings of one QLoRA run; the paper's SFT has rank 16 and alpha 8."""

    rank: int
    alpha: int
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    checkpoint_every: int = 50


def encode(tokenizer, turns: Sequence[tuple[str, str]], image_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of one conversation; labels are kept on answers and their end-of-sequence alone.

    The published template never ends an answer; here every answer does, or the model would never learn to stop.
    """
    text, spans = "", []
    for i, (question, answer) in enumerate(turns):
        image = tokenizer.image_token * image_tokens + "\n" if i == 0 and image_tokens else ""
        text += f"USER: {image}{question} ASSISTANT:"
        spans.append((len(text), len(text) + 1 + len(answer) + len(tokenizer.eos_token)))
        text += f" {answer}{tokenizer.eos_token}"
    coded = tokenizer(text, return_offsets_mapping=True)
    answered = [any(a <= s < e <= b for a, b in spans) for s, e in coded["offset_mapping"]]
    ids = torch.tensor(coded["input_ids"])
    return ids, torch.where(torch.tensor(answered), ids, IGNORED)


def collate(pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], *, pad: int) -> dict[str, torch.Tensor]:
    """Right-padded batch: input_ids, labels and attention_mask, each [batch, longest]."""
    pad_sequence = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad_sequence([i for i, _ in pieces], batch_first=True, padding_value=pad),
        "labels": pad_sequence([x for _, x in pieces], batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(i) for i, _ in pieces], batch_first=True),
    }


def image_tokens(model) -> int:
    """Tokens that one image takes in the prompt: patches of the tower, without its class token."""
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def training_batch(model, processor, items: Sequence[Item], images: np.ndarray, rng: np.random.Generator) -> dict:
    """One batch of conversations, each with its picture and its turns in random order and words."""
    tokenizer, expanded = processor.tokenizer, image_tokens(model)
    told = [dialogue.conversation(i.disease, i.facts, rng) for i in items]
    batch = collate([encode(tokenizer, t, expanded) for t in told], pad=tokenizer.pad_token_id)
    pixels = processor.image_processor(list(images[[i.row for i in items]]), return_tensors="pt")["pixel_values"]
    return {k: v.to(model.device) for k, v in (batch | {"pixel_values": pixels.to(model.dtype)}).items()}


def planned_peak(model, processor, items: Sequence[Item], images: np.ndarray, training: Training) -> float:
    """GiB that memory.plan_training gives for this model and these settings, with the first batch's length."""
    first = [items[i] for i in range(min(training.batch_size, len(items)))]
    width = training_batch(model, processor, first, images, np.random.default_rng(training.seed))["input_ids"].shape[1]
    element = model.get_input_embeddings().weight.element_size()
    return sum(
        memory.plan_training(
            memory.architecture(model.config), rank=training.rank, batch=len(first),
            text_tokens=width - image_tokens(model), element=element, rest=element,
            checkpointing=model.device.type == "cuda",
        ).values()
    )  # fmt: skip


def attach(model, training: Training):
    """NF4 for the decoder's linears, fp32 adapters on them and nowhere else."""
    from peft import LoraConfig, get_peft_model  # three seconds that only training needs

    quantize.quantize(model, method="bitsandbytes", bits=4, group_size=64, packed=True)
    config = LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules=TARGETS, lora_dropout=0.0)
    torch.manual_seed(training.seed)
    model.is_loaded_in_4bit = True  # else peft asks torchao, too, and refuses the one that Kaggle's image has
    try:
        tuned = get_peft_model(model, config)
    finally:
        del model.is_loaded_in_4bit
    astray = [n for n, p in tuned.named_parameters() if p.requires_grad and "language_model" not in n]
    if astray:
        raise DermError(f"finetune: adapters outside the decoder, first {astray[0]}; check the target names")
    return tuned


def save_memory(model) -> None:
    """Gradient checkpointing: blocks keep what they read, not what they computed; half as much time again."""
    models.decoder(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def train(
    model, processor, items: Sequence[Item], images: np.ndarray, training: Training, *, checkpoint: Path, what: str
):
    """QLoRA steps, going on from the checkpoint if there is one; the peft model, the curve, and {seconds, skipped}.

    skipped: steps not taken since gradients were not finite; DermError for more than a tenth of all, or for all.
    """
    import pandas as pd

    tuned = attach(model, training)
    if model.device.type == "cuda":
        save_memory(model)
    weights = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=training.learning_rate, weight_decay=0.0)
    done, curve, told = _resume(checkpoint, weights, optimizer)
    scale = FP16_SCALE if model.dtype == torch.float16 else 1
    tuned.train()
    for step in track(range(done, training.steps), what, total=training.steps - done):
        began = time.perf_counter()
        rng = np.random.default_rng([training.seed, step])
        chosen = [items[i] for i in rng.choice(len(items), min(training.batch_size, len(items)), replace=False)]
        batch = training_batch(model, processor, chosen, images, rng)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _schedule(step, training.steps)
        optimizer.zero_grad()
        with oom.naming("finetune_batch or sft_batch", what):
            loss = tuned(**batch, use_cache=False).loss
            (scale * loss).backward()
            for weight in weights.values():
                weight.grad.div_(scale)
            finite = bool(torch.nn.utils.clip_grad_norm_(weights.values(), 1.0).isfinite())
            if finite:  # half precision may overflow now and then
                optimizer.step()
        curve.append((step, loss.item()))
        told["skipped"] += not finite
        _check_skipped(told["skipped"], step + 1, training.steps, what)
        told["seconds"] += time.perf_counter() - began
        if (step + 1) % training.checkpoint_every == 0 and step + 1 < training.steps:
            _checkpoint(checkpoint, weights, optimizer, curve, told)
    return tuned.eval(), pd.DataFrame(curve, columns=["step", "loss"]), told


def _check_skipped(skipped: int, done: int, steps: int, what: str) -> None:
    if skipped > max(9, steps / 10) or skipped == steps:
        raise DermError(
            f"{what}: gradients of {skipped} of {done} steps were not finite; set the learning rate lower and run again"
        )


def _schedule(step: int, steps: int, warmup: float = 0.05) -> float:
    """Linear warm-up, then cosine to a tenth."""
    if step < (rise := max(1, round(warmup * steps))):
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + np.cos(np.pi * (step - rise) / max(1, steps - rise)))


def _checkpoint(path: Path, weights: dict, optimizer, curve: list, told: dict) -> None:
    """Adapters and Adam's moments, if a step was taken, as safetensors, replaced at once."""
    tensors = {}
    for name, weight in weights.items():
        tensors[f"w.{name}"] = weight.detach()
        for moment in ("exp_avg", "exp_avg_sq") if optimizer.state[weight] else ():
            tensors[f"{moment}.{name}"] = optimizer.state[weight][moment]
    draft = path.with_suffix(".part")
    save_file(tensors, draft, metadata={"curve": json.dumps(curve), "told": json.dumps(told)})
    draft.replace(path)


def _resume(path: Path, weights: dict, optimizer) -> tuple[int, list, dict]:
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            kept = {name: json.loads(text) for name, text in file.metadata().items()}
    except (FileNotFoundError, SafetensorError):  # none yet, or cut short by a power failure
        return 0, [], {"seconds": 0.0, "skipped": 0}
    curve, told = [tuple(pair) for pair in kept["curve"]], kept["told"]
    for name, weight in weights.items():
        weight.data.copy_(tensors[f"w.{name}"])
        if taken := len(curve) - told["skipped"]:
            moments = {m: tensors[f"{m}.{name}"].to(weight.device) for m in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.tensor(float(taken)), **moments}
    return len(curve), curve, told


def merge_adapter(model, folder: Path, step: dict, *, kept: tuple[int, ...], absent: tuple[str, ...] = ()) -> None:
    """W + alpha / r * B A for every adapted linear, in place, on unquantized weights.

    Refused where the adapter's bytes or blocks are not those of the recipe's step: peft loads an adapter of N blocks
    into a model of fewer without a word, on the wrong blocks.
    """
    trained, found = [*step["kept"], *step.get("absent", ())], [*kept, *absent]
    if trained != found:
        raise DermError(
            f"adapter {Path(folder).name}: trained on blocks {list(step['kept'])}, the model has {list(kept)}"
            f"{' and other sublayers' * (list(step['kept']) == list(kept))}; "
            "merge it before pruning or train one for these blocks"
        )
    if adapter_digest(folder) != step["sha256"]:
        raise DermError(f"adapter {Path(folder).name}: its bytes are not those that the recipe names; fine-tune again")
    config = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
    weights = load_file(Path(folder) / "adapter_model.safetensors", device=str(model.device))
    for name, down in weights.items():
        if name.endswith(".lora_A.weight"):
            up = weights[name.replace("lora_A", "lora_B")]
            linear = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            update = config["lora_alpha"] / config["r"] * (up @ down)
            linear.weight.data += update.to(linear.weight.dtype)


@dataclass(frozen=True)
class Job:
    """One fine-tune: the variant that is trained on (its adapter's folder), its recipe and the settings."""

    variant: str
    recipe: str
    training: Training
    device: str = "cpu"


def jobs(sources: pd.DataFrame, training: Training, device: str) -> list[Job]:
    """A job for each row of recipes.to_heal(); further seeds count on from the training's."""
    return [
        Job(row.adapter, row.recipe, replace(training, seed=training.seed + row.sft_seed), device)
        for row in sources.itertuples()
    ]


def run(folder: Path, job: Job, *, data: Path, store, scratch: Path) -> None:
    """Materialize, train and write the peft adapter, curve.parquet and told.json; checkpoints live in `scratch`."""
    from derm_compress.data import load_dataset

    torch.set_num_threads(1)
    dataset = load_dataset(data)
    model, processor = models.materialize(Recipe.from_json(job.recipe), store, job.device)
    planned = planned_peak(model, processor, dataset.of("train"), dataset.images, job.training)
    tuned, curve, told = train(
        model, processor, dataset.of("train"), dataset.images, job.training,
        checkpoint=scratch / f"{job.variant}.safetensors", what=f"fine-tuning {job.variant}",
    )  # fmt: skip
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card; the export writes ours
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = Recipe.from_json(job.recipe).base  # not a path of this machine
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")
    curve.to_parquet(folder / "curve.parquet", index=False)
    told |= {"train_peak_gib": planned, "measured_peak_gib": memory.peak_gib(job.device)}
    (scratch / f"{job.variant}.json").write_text(json.dumps(told))


def plan(folder: Path, job: Job, *, scratch: Path) -> None:
    """What `run` leaves of a model without values: an adapter without tensors, no curve, the planned peak."""
    import pandas as pd

    recipe, asked = Recipe.from_json(job.recipe), job.training
    folder.mkdir()
    save_file({}, folder / "adapter_model.safetensors")
    pd.DataFrame(columns=["step", "loss"], dtype=float).to_parquet(folder / "curve.parquet", index=False)
    arch, removed = memory.architecture(models.config_of(recipe.base)), recipe.blocks - len(recipe.kept())
    sizes = {"rank": asked.rank, "batch": asked.batch_size, "checkpointing": True}
    peak = sum(memory.plan_training(arch, blocks_removed=removed, **sizes).values())
    (scratch / f"{job.variant}.json").write_text(json.dumps({"seconds": None, "train_peak_gib": peak}))


def run_all(folder: Path, jobs: Sequence[Job], *, data: Path, store, scratch: Path, processes: int) -> None:
    """Run jobs into folder/<variant>, `processes` at a time, one thread each; finished ones wait in `scratch`."""
    if jobs[0].device == models.META:
        for job in jobs:
            plan(folder / job.variant, job, scratch=scratch)
        return
    todo = [job for job in jobs if not (scratch / job.variant).exists()]
    where = {"data": data, "store": store, "scratch": scratch}
    if processes == 1 or len(todo) < 2 or todo[0].device != "cpu":  # a GPU has room for one
        for job in todo:
            _run_one(job, **where)
    else:
        _run_beside(todo, processes, where)
    for job in jobs:
        shutil.copytree(scratch / job.variant, folder / job.variant)


def _run_beside(todo: Sequence[Job], processes: int, where: dict) -> None:
    context, width = multiprocessing.get_context("spawn"), min(processes, len(todo))
    with ProcessPoolExecutor(
        width, mp_context=context, initializer=_end_with, initargs=(os.getpid(),), max_tasks_per_child=1
    ) as pool:
        for job, result in [(job, pool.submit(_run_one, job, **where)) for job in todo]:
            try:
                result.result()
            except Exception as error:
                raise DermError(f"fine-tuning {job.variant}: {type(error).__name__}: {error}") from error


def _end_with(parent: int) -> None:
    """A worker whose parent was killed ends too, or it would go on writing beside the resumed run."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_one(job: Job, *, scratch: Path, **where) -> None:
    draft = scratch / f".part-{job.variant}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    run(draft, job, scratch=scratch, **where)
    draft.rename(scratch / job.variant)


def read_curves(folder: Path, variants: Sequence[str]) -> pd.DataFrame:
    """Loss curves of fine-tunes kept as folder/<variant>: variant, step, loss."""
    import pandas as pd

    frames = [pd.read_parquet(Path(folder) / v / "curve.parquet").assign(variant=v) for v in variants]
    return pd.concat(frames, ignore_index=True)[["variant", "step", "loss"]]


def measured(scratch: Path, variants: Sequence[str]) -> pd.DataFrame:
    """Of fine-tunes: variant (as healed), seconds, train_peak_gib (planned), measured_peak_gib (CPU: the process's)."""
    import pandas as pd

    rows = [{"variant": healed_name(v)} | json.loads((scratch / f"{v}.json").read_text()) for v in variants]
    return pd.DataFrame(rows).astype({"seconds": float})
