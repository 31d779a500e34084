"""Variants at work: each recipe is materialised, asked, judged, measured, and let go."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.evaluate import rubric
from derm_compress.evaluate.answers import COLUMNS, answer
from derm_compress.files import digest
from derm_compress.method import activations
from derm_compress.method.assemble import materialize
from derm_compress.method.quantization import folding, quantize, search
from derm_compress.method.quantization.forms import Form, check_groups
from derm_compress.method.quantization.wanted import calibrations
from derm_compress.model import anatomy, devices, oom, prompts, removal, shapes, usage
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import ORIGINAL, paper_depth
from derm_compress.progress import track

COPIED = 2**30  # bytes up to which a model is copied before it is quantized, rather than made again


def each_model(
    variants: pd.DataFrame, store, device: str, what: str, *, wide: bool = False
) -> Iterator[tuple[str, object, object]]:
    """(variant, model, processor) for every row; rows that differ in their last step alone share what is before it.

    A model is empty after its turn, before the next one is made; on a GPU it is made anew to be quantized. wide: over
    all GPUs. Models without values have nothing to say: none is given.
    """
    if device == anatomy.META:
        return
    held: tuple[Recipe | None, tuple] = (None, ())
    for row in track(list(variants.itertuples()), what):
        recipe = Recipe.from_json(row.recipe)
        last = recipe.steps[-1] if recipe.steps else {"step": ""}
        shared = last["step"] == "prune" or (last["step"] == "quantize" and device == "cpu")
        prefix = dataclasses.replace(recipe, steps=recipe.steps[:-1]) if shared else recipe
        if held[0] != prefix:
            if held[0]:
                devices.let_go(held[1][0])
            held = (None, ())
            held = (prefix, materialize(prefix, store, device))
            if wide:  # while it has all its blocks
                devices.spread(held[1][0])
        model, processor = held[1]
        if shared and last["step"] == "quantize":
            model = _quantized(model, last, recipe, store, device)
        removed = removal.step_units(last, prefix.kept()) if last["step"] == "prune" else []
        with removal.without(model, removed):
            yield row.variant, model, processor
        if model is not held[1][0]:
            devices.let_go(model)
    if held[0]:
        devices.let_go(held[1][0])


def _quantized(model, step: dict, recipe: Recipe, store, device: str):
    if usage.tensor_gib(model) * 2**30 > COPIED:
        return materialize(recipe, store, device)[0]
    return quantize.apply_step(copy.deepcopy(model), step, store)


def _joined(frames: list[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The frames as one; where there is none, one of these columns without a row."""
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def answer_variants(
    variants: pd.DataFrame,
    *,
    items: Sequence[Item],
    images: np.ndarray,
    store,
    device: str,
    journal=None,
    **how,
) -> pd.DataFrame:
    """Judged answers of every variant to all questions about the items."""
    frames = [
        answer(model, processor, items, images, variant=name, journal=journal, **how)
        for name, model, processor in each_model(
            variants, store, device, "variants answered", wide=True
        )
    ]
    return rubric.rubric(_joined(frames, COLUMNS))


def scores(answers: pd.DataFrame, variants: pd.DataFrame) -> pd.DataFrame:
    """Score in percent of each variant with its number of removed blocks: what a depth is chosen from."""
    mean = answers.groupby("variant").score.mean() / 4 * 100
    return variants[["variant", "blocks_removed"]].assign(score=variants.variant.map(mean))


def answer_controls(
    variants: pd.DataFrame, *, items: Sequence[Item], images: np.ndarray, seed: int, **how
) -> pd.DataFrame:
    """The original model on blank pictures and on those of other diseases: what is left is not seeing."""
    original = variants_of.named(variants, [ORIGINAL])
    other = shuffled_rows(items, seed)
    blank = np.full_like(images[:1], int(images.mean()))
    frames = []
    for name, rows, pictures in (("blank", [0] * len(items), blank), ("shuffled", other, images)):
        moved = [dataclasses.replace(item, row=row) for item, row in zip(items, rows, strict=True)]
        row = original.assign(variant=name)
        frames.append(answer_variants(row, items=moved, images=pictures, **how))
    return pd.concat(frames, ignore_index=True)


def shuffled_rows(items: Sequence[Item], seed: int) -> list[int]:
    """For each item the picture of another one, of another disease where there is one."""
    rng = np.random.default_rng([seed, 11])
    rows = []
    for item in items:
        others = [i for i in items if i.disease != item.disease] or [
            i for i in items if i.row != item.row
        ]
        rows.append(others[rng.integers(len(others))].row if others else item.row)
    return rows


def table_variants(variants: pd.DataFrame, choice: dict) -> pd.DataFrame:
    """The variants of Tables 4 and 5, and the healed control beside them."""
    role = variants_of.roles(choice)
    pruned, full = role["operating"], role["operating"] + variants_of.HEALED
    names = [ORIGINAL, pruned, full, ORIGINAL + variants_of.HEALED]
    names += [f"{source}|awq4" for source in (ORIGINAL, pruned, full)]
    names += [f"{full}|{method}4" for method in ("bitsandbytes", "rtn", "rtn_symmetric")]
    names += [f"{role['rival']}{variants_of.HEALED}|awq4"]
    return variants_of.named(variants, [name for name in names if name in set(variants.variant)])


def architecture(variants: pd.DataFrame, store, device: str) -> dict:
    """Shapes of the original model, as memory.Architecture takes them."""
    (recipe,) = variants_of.named(variants, [ORIGINAL]).recipe
    model, _ = materialize(Recipe.from_json(recipe), store, device)
    return dataclasses.asdict(shapes.architecture(model.config))


def _batches(processor, model, items, images, batch_size: int, **asked) -> Iterable[dict]:
    where = {"batch_size": batch_size, "device": model.device} | asked
    return prompts.calibration_batches(processor, items, images, **where)


def activation_statistics(
    variants: pd.DataFrame, store, *, items, images, batch_size, device
) -> pd.DataFrame:
    """activations.activation_statistics of every variant; `block` is the original index."""
    frames = []
    for name, model, processor in each_model(variants, store, device, "activations"):
        told = oom.halved(
            lambda size, on=(processor, model): activations.projection_statistics(
                on[1], _batches(*on, items, images, size)
            ),
            batch_size, f"activations of {name}",
        )  # fmt: skip
        frames.append(_original_blocks(told, variants, name))
    return _joined(frames, ["block", "projection", *activations.STATISTICS, "variant"])


def _original_blocks(frame: pd.DataFrame, variants: pd.DataFrame, name: str) -> pd.DataFrame:
    kept = Recipe.from_json(variants.set_index("variant").recipe[name]).kept()
    return frame.assign(variant=name, block=[kept[b] for b in frame.block])


def activation_surface(
    variants: pd.DataFrame,
    store,
    *,
    block: int,
    projection: str,
    items,
    images,
    device,
    batch_size: int = 1,
) -> pd.DataFrame:
    """Figure 4's data: |x| of one prompt at a projection's output in a block (of 32, counted from 1 as the paper does).

    Columns: variant, block (original index), projection, token, channel, value. A variant without it is left out.
    """
    frames = []
    for name, model, processor in each_model(variants, store, device, "Figure 4"):
        recipe = Recipe.from_json(variants.set_index("variant").recipe[name])
        index = paper_depth(block, recipe.blocks) - 1
        if index not in recipe.kept():
            continue
        position = recipe.kept().index(index)
        values = oom.halved(
            lambda size, on=(processor, model), at=position: activations.projection_output(
                on[1], next(iter(_batches(*on, items[:1], images, size))), at, projection
            ),
            batch_size, f"Figure 4 of {name}",
        )  # fmt: skip
        values = np.abs(values)
        token, channel = np.indices(values.shape)
        told = {
            "token": token.ravel(),
            "channel": channel.ravel(),
            "value": values.ravel().astype(np.float32),
        }
        frames.append(
            pd.DataFrame({"variant": name, "block": index, "projection": projection, **told})
        )
    return _joined(frames, ["variant", "block", "projection", "token", "channel", "value"])


def search_scales(
    folder: Path, wanted: pd.DataFrame, sources: pd.DataFrame, store, *, items, images, batch_size, device,
    answer_weight: float = 1.0, scratch=None, offload: bool | None = None,
) -> None:  # fmt: skip
    """What wanted_forms() needs to be quantized: <form>/<source>.safetensors, and all rows as search.parquet.

    A calibration pass of a source serves all forms, and another one those without pictures; answer_weight weighs the
    answers' tokens. scratch: a folder in which a killed search goes on at its block. offload (None: on a GPU): fp16
    models stay on the CPU, one block at a time goes to `device`. All questions about a picture are read together, as
    they share most of their tokens.
    """
    frames, offload, kinds = (
        [],
        device != "cpu" if offload is None else offload,
        len(dialogue.QUESTIONS),
    )
    home = {"device": "cpu", "dtype": torch.float16} if offload else {"device": device}
    needed = {
        name: found
        for name in wanted.source.unique()
        if (found := calibrations(wanted, name))
    }
    needed = {} if device == anatomy.META else needed
    every = [Form.of(json.loads(step)) for step in wanted.step]
    for name, row in track(
        list(variants_of.named(sources, needed).set_index("variant").iterrows()), "scales searched"
    ):
        model, processor = materialize(Recipe.from_json(row.recipe), store, **home)
        check_groups(every, anatomy.inputs(model))
        for text_only, asked in needed[name].items():
            how = {"text_only": text_only, "answer_weight": answer_weight}
            steps = {form: asked[form].step for form in asked}
            kept = (
                scratch
                and Path(scratch)
                / digest([row.recipe, steps, how, batch_size, [i.id for i in items]])[:16]
            )
            where = {"device": device if offload else None, "scratch": kept}
            found = oom.halved(
                lambda pictures, on=(processor, model), asked=asked, how=how, where=where: search.search_forms(
                    on[1], _batches(*on, items, images, kinds * pictures, **how), asked, **where
                ),
                max(1, batch_size // kinds), f"scales of {name}, by picture",
            )  # fmt: skip
            frames += [_keep(folder, form, sources, name, *told) for form, told in found.items()]
        devices.let_go(model)
    _joined(frames, [*search.ROWS, "variant", "form"]).to_parquet(
        folder / "search.parquet", index=False
    )


def _keep(
    folder: Path, form: str, sources: pd.DataFrame, name: str, tensors: dict, rows: list[dict]
) -> pd.DataFrame:
    """Writes what a form's search found; its rows with original blocks."""
    (folder / form).mkdir(exist_ok=True)
    save_file(tensors, folder / form / f"{name}.safetensors")
    told = pd.DataFrame(rows, columns=search.ROWS).astype(dict.fromkeys(search.ROWS[2:], float))
    return _original_blocks(told, sources, name).assign(form=form)


def scaled_channels(
    scales: Path, form: str, sources: pd.DataFrame, store, *, items, images, batch_size, device
) -> pd.DataFrame:
    """Every input channel of each group of linears: its peak |x|, and the scale that a form's search gave it.

    Columns: variant, block (original index), group, channel, peak, scale. What has no scale is left out.
    """
    frames = []
    sources = sources[
        [(Path(scales) / form / f"{name}.safetensors").exists() for name in sources.variant]
    ]
    for name, model, processor in each_model(sources, store, device, "channels"):
        found = load_file(Path(scales) / form / f"{name}.safetensors")
        groups = {
            key: linears[0]
            for key, (_, linears) in folding.scale_groups(model).items()
            if key in found
        }
        peaks = oom.halved(
            lambda size, on=(processor, model), groups=groups: activations.input_peaks(
                on[1], _batches(*on, items, images, size), groups
            ),
            batch_size, f"channels of {name}",
        )  # fmt: skip
        for key, peak in peaks.items():
            block, group = key.split(".")
            told = {
                "peak": peak.numpy(),
                "scale": found[key].numpy(),
                "channel": np.arange(len(peak)),
            }
            frames.append(
                _original_blocks(
                    pd.DataFrame({"block": int(block), "group": group, **told}), sources, name
                )
            )
    return _joined(frames, ["block", "group", "peak", "scale", "channel", "variant"])


def quantization_errors(
    variants: pd.DataFrame,
    sources: pd.DataFrame,
    store,
    *,
    items,
    images,
    batch_size,
    device,
    journal=None,
) -> pd.DataFrame:
    """Relative error of each block's output against the unquantized source, for every quantized variant."""
    recipe_of, held = dict(zip(sources.variant, sources.recipe, strict=True)), (None, None)
    done = dict(journal.done) if journal else {}
    todo = variants[~variants.variant.isin(done)]
    for name, model, processor in each_model(todo, store, device, "errors by block"):
        source = name.rpartition("|")[0]
        if held[0] != source:
            if held[0]:
                devices.let_go(held[1])
            held = (
                source,
                materialize(Recipe.from_json(recipe_of[source]), store, devices.beside(device))[0],
            )
        both = processor, model, held[1]
        done[name] = oom.halved(
            lambda size, on=both: activations.block_errors(on[2], on[1], _batches(*on[:2], items, images, size)),
            batch_size, f"errors of {name}",
        )  # fmt: skip
        if journal:
            journal.add(name, done[name])
    frames = [
        _original_blocks(pd.DataFrame(done[name]), variants, name)
        for name in variants.variant
        if name in done
    ]
    return _joined(frames, ["block", "relative_error", "variant"])
