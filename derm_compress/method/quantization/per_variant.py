"""Stage 07, variant by variant: scales searched, errors by block."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.files import Journal, digest
from derm_compress.method import activations
from derm_compress.method.assemble import materialize
from derm_compress.method.iterate import Source, Turn, each_model, joined, without_last
from derm_compress.method.quantization import search
from derm_compress.method.quantization.forms import Form, check_groups
from derm_compress.method.quantization.wanted import calibrations
from derm_compress.model import anatomy, devices, oom, prompts
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe
from derm_compress.progress import track

KINDS = len(dialogue.QUESTIONS)  # prompts about one picture, which share most of their tokens


def search_scales(
    folder: Path,
    wanted: pd.DataFrame,
    sources: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    batch_size: int,
    device: str,
    answer_weight: float = 1.0,
    scratch: Path | None = None,
    offload: bool | None = None,
) -> None:
    """The scales of wanted_forms(): <form>/<source>.safetensors, and all rows as search.parquet.

    A calibration pass of a source serves all forms, and another one those without pictures;
    answer_weight weighs the answers' tokens. scratch: a folder in which a killed search goes on at
    its block. offload (None: on a GPU): fp16 models stay on the CPU, one block at a time goes to
    `device`. All questions about a picture are read together.
    """
    offload = device != "cpu" if offload is None else offload
    home = {"device": "cpu", "dtype": torch.float16} if offload else {"device": device}
    every = [Form.of(json.loads(step)) for step in wanted.step]
    frames = []
    needed = {} if device == anatomy.META else _needed(wanted)
    rows = variants_of.named(sources, needed).itertuples()
    for row in track(list(rows), "scales searched"):
        recipe = Recipe.from_json(row.recipe)
        turn = Turn(row.variant, recipe, *materialize(recipe, store, **home))
        check_groups(every, anatomy.inputs(turn.model))
        for text_only, forms in needed[row.variant].items():
            how = {"text_only": text_only, "answer_weight": answer_weight}
            steps = {name: form.step for name, form in forms.items()}
            key = [row.recipe, steps, how, batch_size, [item.id for item in items]]
            found = _searched(
                turn,
                partial(prompts.calibration_batches, turn.processor, items, images, **how),
                forms,
                batch_size=batch_size,
                device=device if offload else None,
                scratch=Path(scratch) / digest(key)[:16] if scratch else None,
            )
            for name, (tensors, told) in found.items():
                (folder / name).mkdir(exist_ok=True)
                save_file(tensors, folder / name / f"{turn.variant}.safetensors")
                frames.append(turn.original_blocks(_rows(told)).assign(form=name))
        devices.let_go(turn.model)
    columns = [*search.ROWS, "variant", "form"]
    joined(frames, columns).to_parquet(folder / "search.parquet", index=False)


def _needed(wanted: pd.DataFrame) -> dict[str, dict]:
    """{source: calibrations} of the sources that need a search."""
    found = {name: calibrations(wanted, name) for name in wanted.source.unique()}
    return {name: asked for name, asked in found.items() if asked}


def _searched(turn: Turn, batches, forms: dict[str, Form], *, batch_size: int, **where) -> dict:
    """search_forms() with fewer pictures at once where memory is exceeded."""

    def by_picture(pictures: int):
        read = batches(batch_size=KINDS * pictures, device=turn.model.device)
        return search.search_forms(turn.model, read, forms, **where)

    pictures = max(1, batch_size // KINDS)
    return oom.halved(by_picture, pictures, f"scales of {turn.variant}, by picture")


def _rows(told: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(told, columns=search.ROWS).astype(dict.fromkeys(search.ROWS[2:], float))


def quantization_errors(
    variants: pd.DataFrame,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    store,
    device: str,
    batch_size: int,
    journal: Journal | None = None,
) -> pd.DataFrame:
    """Relative error of each block's output against the model before it was quantized.

    Columns: block (index before pruning), relative_error, variant.
    """
    read = {"items": items, "images": images, "batch_size": batch_size}
    journal = journal or Journal()
    todo = variants[~variants.variant.isin(journal.done)]
    whole = Source(store, devices.beside(device))
    for turn in each_model(todo, store, device, "errors by block"):
        source, _ = whole.take(without_last(turn.recipe))
        work = partial(activations.block_errors, source, turn.model)
        found = turn.original_blocks(pd.DataFrame(turn.calibrated(work, "errors", **read)))
        journal.add(turn.variant, found.to_dict("records"))
    whole.let_go()
    frames = [pd.DataFrame(journal.done.get(name, [])) for name in variants.variant]
    return joined(frames, ["block", "relative_error", "variant"])
