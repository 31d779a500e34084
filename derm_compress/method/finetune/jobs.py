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

import torch
from safetensors.torch import save_file

from derm_compress.errors import DermError
from derm_compress.method.finetune.train import Training, planned_peak, train
from derm_compress.method.materialize import materialize
from derm_compress.model import anatomy, loading, memory, shapes, usage
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import healed_name

if TYPE_CHECKING:  # data needs scipy and pandas, which a machine that only rehearses may lack
    import pandas as pd


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
    from derm_compress.data.items import load_dataset

    torch.set_num_threads(1)
    dataset = load_dataset(data)
    model, processor = materialize(Recipe.from_json(job.recipe), store, job.device)
    planned = planned_peak(model, processor, dataset.of("train"), dataset.images, job.training)
    tuned, curve, told = train(
        model, processor, dataset.of("train"), dataset.images, job.training,
        checkpoint=scratch / f"{job.variant}.safetensors", what=f"fine-tuning {job.variant}",
    )  # fmt: skip
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card; the export writes ours
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = Recipe.from_json(
        job.recipe
    ).base  # not a path of this machine
    (folder / "adapter_config.json").write_text(
        json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8"
    )
    curve.to_parquet(folder / "curve.parquet", index=False)
    told |= {"train_peak_gib": planned, "measured_peak_gib": usage.peak_gib(job.device)}
    (scratch / f"{job.variant}.json").write_text(json.dumps(told))


def plan(folder: Path, job: Job, *, scratch: Path) -> None:
    """What `run` leaves of a model without values: an adapter without tensors, no curve, the planned peak."""
    import pandas as pd

    recipe, asked = Recipe.from_json(job.recipe), job.training
    folder.mkdir()
    save_file({}, folder / "adapter_model.safetensors")
    pd.DataFrame(columns=["step", "loss"], dtype=float).to_parquet(
        folder / "curve.parquet", index=False
    )
    arch, removed = (
        shapes.architecture(loading.config_of(recipe.base)),
        recipe.blocks - len(recipe.kept()),
    )
    sizes = {"rank": asked.rank, "batch": asked.batch_size, "checkpointing": True}
    peak = sum(memory.plan_training(arch, blocks_removed=removed, **sizes).values())
    (scratch / f"{job.variant}.json").write_text(
        json.dumps({"seconds": None, "train_peak_gib": peak})
    )


def run_all(
    folder: Path, jobs: Sequence[Job], *, data: Path, store, scratch: Path, processes: int
) -> None:
    """Run jobs into folder/<variant>, `processes` at a time, one thread each; finished ones wait in `scratch`."""
    if jobs[0].device == anatomy.META:
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
        width,
        mp_context=context,
        initializer=_end_with,
        initargs=(os.getpid(),),
        max_tasks_per_child=1,
    ) as pool:
        for job, result in [(job, pool.submit(_run_one, job, **where)) for job in todo]:
            try:
                result.result()
            except Exception as error:
                raise DermError(
                    f"fine-tuning {job.variant}: {type(error).__name__}: {error}"
                ) from error


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

    frames = [
        pd.read_parquet(Path(folder) / v / "curve.parquet").assign(variant=v) for v in variants
    ]
    return pd.concat(frames, ignore_index=True)[["variant", "step", "loss"]]


def measured(scratch: Path, variants: Sequence[str]) -> pd.DataFrame:
    """Of fine-tunes: variant (as healed), seconds, train_peak_gib (planned), measured_peak_gib (CPU: the process's)."""
    import pandas as pd

    rows = [
        {"variant": healed_name(v)} | json.loads((scratch / f"{v}.json").read_text())
        for v in variants
    ]
    return pd.DataFrame(rows).astype({"seconds": float})
