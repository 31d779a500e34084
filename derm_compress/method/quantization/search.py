"""Searches of scales, clipping and codes: one calibration pass serves every form asked for.

The result of a form is a dict of tensors ("block.group": s [in]; "block.name": clip indices [out,
in / g]; what gptq.py adds) and rows (block, group, alpha, loss, loss_rtn). With a scratch folder a
killed search goes on at its block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.files import atomic, digest
from derm_compress.method.iterate import Turn, each_model, joined
from derm_compress.method.quantization import autoawq, calibration, gptq, scaling
from derm_compress.method.quantization.methods import Form, check_groups
from derm_compress.method.quantization.quantize import targets
from derm_compress.method.quantization.wanted import calibrations
from derm_compress.model import anatomy, oom, prompts
from derm_compress.model import variants as variants_of

ROWS = {"block": int, "group": object, "alpha": float, "loss": float, "loss_rtn": float}
KINDS = len(dialogue.QUESTIONS)  # prompts about one picture, which share most of their tokens


def search_forms(model, batches, forms, *, device=None, scratch=None):
    """{name: (tensors, rows)} of forms {name: Form}; the model is left as it was.

    device: where blocks run, one at a time, if not where the model is. scratch: a folder for
    finished blocks. Forms of method `autoawq` are searched by AutoAWQ's own quantizer. One pass
    serves all others but those of GPTQ, whose blocks read what their quantized ones leave.
    """
    theirs = {name: form for name, form in forms.items() if form.kind.scaling == "autoawq"}
    coded = {name: form for name, form in forms.items() if form.coded}
    shared = {name: form for name, form in forms.items() if name not in theirs | coded}
    batches = list(batches) if theirs or coded else batches  # read again for each of them
    for form in forms.values():  # refuses before anything is computed
        targets(model, form)
    for form in theirs.values():
        autoawq.check(model, batches, form)
    found = _one_pass(model, batches, shared, device, scratch) if shared else {}
    for name, form in coded.items():
        own = scratch and Path(scratch) / name
        found |= _one_pass(model, batches, {name: form}, device, own)
    return found | {name: autoawq.search(model, batches, form) for name, form in theirs.items()}


def _one_pass(model, batches, forms, device, scratch):
    """search_forms() of forms that one pass serves, or of one whose codes are searched."""
    found, (form, *_) = {name: ({}, []) for name in forms}, forms.values()
    done = {int(file.stem): file for file in Path(scratch).glob("*.safetensors")} if scratch else {}
    how = {"device": device, "skip": done}
    if form.coded:
        how["instead"] = partial(gptq.quantized_copy, model, form, next(iter(found.values()))[0])
    search_block = gptq.search_block if form.coded else scaling.search_block
    for block, statistics in calibration.collect(model, batches, **how):
        if block not in done:
            made = {name: search_block(model, block, statistics, forms[name]) for name in found}
            if scratch:
                _write(Path(scratch) / f"{block}.safetensors", made)
        else:
            made = _read(done[block])
        for name, (tensors, rows) in made.items():
            found[name][0].update({key: t.cpu().contiguous() for key, t in tensors.items()})
            found[name][1].extend(rows)
    return found


def _write(path, made):
    rows = json.dumps({name: rows for name, (_, rows) in made.items()})
    held = {
        f"{name}/{key}": tensor.contiguous()
        for name, (tensors, _) in made.items()
        for key, tensor in tensors.items()
    }
    with atomic(path) as part:
        save_file(held, part, metadata={"rows": rows})


def _read(path):
    with safe_open(path, "pt") as file:
        made = {name: ({}, rows) for name, rows in json.loads(file.metadata()["rows"]).items()}
    for key, tensor in load_file(path).items():
        name, _, inner = key.partition("/")
        made[name][0][inner] = tensor
    return made


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
) -> None:
    """The scales of wanted_forms(): <form>/<source>.safetensors, and all rows as search.parquet.

    A calibration pass of a source serves all forms, and another one those without pictures;
    answer_weight weighs the answers' tokens. scratch: a folder in which a killed search goes on at
    its block. On a GPU fp16 models stay on the CPU, and one block at a time goes to `device`. All
    questions about a picture are read together.
    """
    offload = device != "cpu"
    home = {"device": "cpu", "dtype": torch.float16} if offload else {"device": device}
    every = [Form.of(json.loads(step)) for step in wanted.step]
    needed = {}
    for name in wanted.source.unique() if device != anatomy.META else ():
        if asked := calibrations(wanted, name):
            needed[name] = asked
    frames = []
    rows = variants_of.named(sources, needed)
    for turn in each_model(rows, store, what="scales searched", **home):
        check_groups(every, anatomy.inputs(turn.model))
        for text_only, forms in needed[turn.variant].items():
            how = {"text_only": text_only, "answer_weight": answer_weight}
            steps = {name: form.step for name, form in forms.items()}
            key = [turn.recipe.to_json(), steps, how, batch_size, [item.id for item in items]]
            found = _searched(
                turn,
                partial(prompts.calibration_batches, turn.processor, items, images, **how),
                forms,
                batch_size=batch_size,
                device=device if offload else None,
                scratch=Path(scratch) / digest(key)[:16] if scratch else None,
            )
            for name, (tensors, rows) in found.items():
                (folder / name).mkdir(exist_ok=True)
                save_file(tensors, folder / name / f"{turn.variant}.safetensors")
                told = pd.DataFrame(rows, columns=ROWS).astype(ROWS)
                frames.append(turn.original_blocks(told).assign(form=name))
    columns = [*ROWS, "variant", "form"]
    joined(frames, columns).to_parquet(folder / "search.parquet", index=False)


def _searched(turn: Turn, batches, forms: dict[str, Form], *, batch_size: int, **where) -> dict:
    """search_forms() with fewer pictures at once where memory is exceeded."""

    def by_picture(pictures: int):
        read = batches(batch_size=KINDS * pictures, device=turn.model.device)
        return search_forms(turn.model, read, forms, **where)

    pictures = max(1, batch_size // KINDS)
    return oom.halved(by_picture, pictures, f"scales of {turn.variant}, by picture")
