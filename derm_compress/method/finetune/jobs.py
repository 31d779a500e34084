"""Fine-tunes of one or many models: what is finished is kept, what was cut off goes on."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file

from derm_compress import progress
from derm_compress.data.items import load_dataset
from derm_compress.files import atomic, read_json, write_json
from derm_compress.method.assemble import materialize
from derm_compress.method.finetune import parallel
from derm_compress.method.finetune.distill import Teacher
from derm_compress.method.finetune.train import AMPLE, Training, planned, train
from derm_compress.method.finetune.workers import side_by_side
from derm_compress.model import anatomy, devices, loading, memory, shapes, usage
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import DISTILLED, ORIGINAL, REINITIALIZED, recipe_of

CONTEXT = 1.0  # GiB of a GPU that a process takes beside its tensors: CUDA, its work space


@dataclass(frozen=True)
class Job:
    """One fine-tune: its adapter's folder, the variant that it makes, what of, and the settings.

    teacher: the recipe of what it also listens to, if anything.
    """

    adapter: str
    makes: str
    recipe: str
    training: Training
    device: str = "cpu"
    teacher: str = ""


def fine_tune_jobs(
    sources: pd.DataFrame, training: Training, device: str, *, distillation: float = 0.0
) -> list[Job]:
    """A job for each row of variants.to_heal(); further seeds count on from the training's, and a
    model with random weights is trained at full rank, since a few ranks could not teach it.

    distillation: the weight of the unpruned model's words where they are heard.
    """
    jobs = []
    for row in sources.itertuples():
        told, teacher = replace(training, seed=training.seed + row.sft_seed), ""
        if row.criterion == DISTILLED:
            told = replace(told, distillation=distillation)
            teacher = recipe_of(sources, ORIGINAL).to_json()
        if row.criterion == REINITIALIZED:
            told = at_full_rank(told, Recipe.from_json(row.recipe))
        jobs.append(Job(row.adapter, row.healed_variant, row.recipe, told, device, teacher))
    return jobs


def at_full_rank(training: Training, recipe: Recipe) -> Training:
    """With adapters as wide as the model, which reach any weights, scaled as before."""
    width = shapes.architecture(loading.config_of(recipe.base)).hidden
    return replace(training, rank=width, alpha=training.alpha * width // training.rank)


@dataclass(frozen=True)
class Worker:
    """Fine-tunes of one process, on its device; `ranks` meet by a file to share batches."""

    jobs: Sequence[Job]
    device: str
    rank: int
    ranks: int
    meeting: Path


def fine_tune_all(
    folder: Path, jobs: Sequence[Job], *, data: Path, store, scratch: Path, processes: int = 1
) -> None:
    """Runs jobs into folder/<adapter>, one thread each; finished ones wait in `scratch`.

    Up to `processes` at once, on GPUs as far as their memory holds them; with fewer fine-tunes than
    GPUs each has several, which share its batches.
    """
    if jobs[0].device == anatomy.META:
        for job in jobs:
            plan_only(folder / job.adapter, job, scratch=scratch)
        return
    todo = [job for job in jobs if not (scratch / job.adapter).exists()]
    work = partial(fine_tune_here, data=data, store=store, scratch=scratch)
    with tempfile.TemporaryDirectory() as meeting:
        workers = divided(todo, processes=processes, meeting=Path(meeting))
        if len(workers) > 1:
            usage.reset_peak(jobs[0].device)  # else this process keeps a GPU's memory from them
            side_by_side(work, workers)
        elif workers:
            work(workers[0])
    for job in jobs:
        shutil.copytree(scratch / job.adapter, folder / job.adapter)


def divided(jobs: Sequence[Job], *, processes: int, meeting: Path) -> list[Worker]:
    """Jobs in turn to as many as run at once, and the GPUs among these."""
    if not jobs:
        return []
    rooms = devices.rooms() if jobs[0].device == "cuda" else []
    places = [f"cuda:{gpu}" for gpu in range(len(rooms))] or [jobs[0].device]
    lanes = max(1, min(processes, len(jobs), fitting(jobs, rooms)))
    ranks = max(1, min(len(places) // lanes, jobs[0].training.batch_size))
    workers = []
    for lane, rank in itertools.product(range(lanes), range(ranks)):
        place = places[(lane * ranks + rank) % len(places)]
        workers.append(Worker(jobs[lane::lanes], place, rank, ranks, meeting / str(lane)))
    return workers


def fitting(jobs: Sequence[Job], rooms: Sequence[float]) -> float:
    """How many fit GPUs with so much room at once, without checkpointing; on a CPU any number."""
    if not rooms:
        return math.inf
    needed = max(CONTEXT + sum(plan_of(job, checkpointing=False).values()) for job in jobs)
    return len(rooms) * int(AMPLE * min(rooms) / needed)


def fine_tune_here(worker: Worker, *, data: Path, store, scratch: Path) -> None:
    """A worker's fine-tunes, one after another."""
    if worker.device != "cpu":
        torch.cuda.set_device(worker.device)
    if worker.rank:
        progress.mute()
    if worker.ranks > 1:
        torch.distributed.init_process_group(
            init_method=f"file://{worker.meeting}", rank=worker.rank, world_size=worker.ranks
        )
    for job in worker.jobs:
        fine_tune(replace(job, device=worker.device), data=data, store=store, scratch=scratch)
    if worker.ranks > 1:
        torch.distributed.destroy_process_group()


def plan_of(job: Job, *, checkpointing: bool) -> dict[str, float]:
    """memory.plan_training of a job, without its model."""
    recipe = Recipe.from_json(job.recipe)
    arch = shapes.architecture(loading.config_of(recipe.base))
    return memory.plan_training(
        arch,
        blocks_removed=recipe.blocks - len(recipe.kept()),
        rank=job.training.rank,
        batch=job.training.batch_size,
        checkpointing=checkpointing,
        form=memory.ADAPTED[job.training.base],
        teacher=sum(memory.plan_weights(arch).values()) if job.teacher else 0.0,
    )


def fine_tune(job: Job, *, data: Path, store, scratch: Path) -> None:
    """Leaves scratch/<adapter>, adapter and curve.parquet, and <adapter>.json, its costs."""
    torch.set_num_threads(1)
    dataset, recipe = load_dataset(data), Recipe.from_json(job.recipe)
    teacher, held = None, 0.0
    if job.teacher:
        listened, _ = materialize(Recipe.from_json(job.teacher), store, job.device)
        teacher = Teacher(listened, job.training.distillation)
        held = usage.tensor_gib(listened)
    model, processor = materialize(recipe, store, job.device)
    asked = dataset.of("train"), dataset.images, job.training
    what = f"fine-tuning {job.adapter}"
    peak, checkpointing = planned(model, processor, *asked, what=what, teacher=held)
    how = {"checkpoint": scratch / f"{job.adapter}.safetensors", "checkpointing": checkpointing}
    tuned, curve, told = train(model, processor, *asked, what=what, teacher=teacher, **how)
    if parallel.rank():  # another keeps the same
        return
    with atomic(scratch / job.adapter) as draft:
        tuned.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)  # peft's card; the export writes ours
        config = draft / "adapter_config.json"  # where peft wrote a path of this machine
        write_json(config, read_json(config) | {"base_model_name_or_path": recipe.base})
        curve.to_parquet(draft / "curve.parquet", index=False)
        told |= {"train_peak_gib": peak, "measured_peak_gib": usage.peak_gib(job.device)}
        (scratch / f"{job.adapter}.json").write_text(json.dumps(told))


def plan_only(folder: Path, job: Job, *, scratch: Path) -> None:
    """What `fine_tune` leaves of a model without values: no tensors, no curve, the planned peak."""
    folder.mkdir()
    save_file({}, folder / "adapter_model.safetensors")
    no_steps = pd.DataFrame(columns=["step", "loss"], dtype=float)
    no_steps.to_parquet(folder / "curve.parquet", index=False)
    planned = sum(plan_of(job, checkpointing=True).values())
    told = {"seconds": None, "train_peak_gib": planned}
    (scratch / f"{job.adapter}.json").write_text(json.dumps(told))


def loss_curves(folder: Path, jobs: Sequence[Job]) -> pd.DataFrame:
    """Loss curves of fine-tunes kept as folder/<adapter>: variant (the adapter's), step, loss."""
    frames = [
        pd.read_parquet(Path(folder) / job.adapter / "curve.parquet").assign(variant=job.adapter)
        for job in jobs
    ]
    return pd.concat(frames, ignore_index=True)[["variant", "step", "loss"]]


def training_costs(scratch: Path, jobs: Sequence[Job]) -> pd.DataFrame:
    """variant (that it makes), seconds, skipped, train_peak_gib (planned), measured_peak_gib."""
    rows = []
    for job in jobs:
        rows.append({"variant": job.makes} | read_json(scratch / f"{job.adapter}.json"))
    return pd.DataFrame(rows).astype({"seconds": float})
