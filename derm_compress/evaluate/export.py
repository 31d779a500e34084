"""Ordinary model folders: of a recipe, or of a model without some of its blocks."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_model

from derm_compress.errors import DermError
from derm_compress.evaluate import cards
from derm_compress.files import atomic, check_new
from derm_compress.method.assemble import materialize
from derm_compress.method.quantization import checkpoint
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model import removal
from derm_compress.model.anatomy import blocks, fingerprint
from derm_compress.model.loading import LICENCE, PARTIAL, config_of, licence_of, load_base
from derm_compress.model.recipe import Recipe


def export_model(
    recipe_json: str,
    store,
    path: Path,
    *,
    packed: bool = True,
    known: cards.Facts = cards.NOTHING,
    half: bool = False,
) -> Path:
    """Write a model folder and its card (`known`: what it says beside the recipe).

    Plain `from_pretrained` opens it, but for integer grids, which checkpoint.load opens (and, of 4
    bits, readers of AWQ), and for absent sublayers, which load_base opens (Transformers would fill
    them with random weights). packed=False writes a quantized variant with its dequantized weights
    instead. half: what is not quantized in fp16, as readers of AWQ expect it; by default it stays
    as it was computed with.
    """
    check_new(path, "export")
    recipe = Recipe.from_json(recipe_json)
    model, processor = materialize(recipe, store, quantize=partial(quantize_step, packed=packed))
    if half:
        to_half(model)
    packed = packed and recipe.quantized
    return write_folder(path, model, processor, recipe, packed=packed, known=known, half=half)


def prune_folder(name: str, plan, count: int, path: Path) -> Path:
    """Write a model without the first `count` units of a plan, in the format it is stored in."""
    check_new(path, "prune")
    config = config_of(name)
    if getattr(config, "quantization_config", None):
        raise DermError(
            f"prune: {name} is quantized; prune the model that it was made of, and quantize anew"
        )
    model, processor = load_base(name, dtype=getattr(config, "dtype", None))
    whole = Recipe(name, fingerprint(model), len(blocks(model)))
    plan.check(blocks=whole.blocks, fingerprint=whole.fingerprint)
    removal.apply(model, plan.kept(count), plan.absent(count))
    recipe = whole.pruned(plan.kept(count), plan.absent(count))
    return write_folder(path, model, processor, recipe)


def to_half(model) -> None:
    """Make what is not quantized fp16, in place; DermError where a weight overflows."""
    model.half()
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = torch.float16
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise DermError(f"export: {name} overflows torch.float16; export without --half")


def write_folder(
    path: Path, model, processor, recipe: Recipe, *, packed: bool = False, **card
) -> Path:
    """A model folder of what a recipe has made, with its card and its base's licence; whole or not
    at all.

    card: as of cards.model_card.
    """
    with atomic(Path(path)) as draft:
        draft.mkdir()
        layout = _save(model, draft, packed)
        processor.save_pretrained(draft)
        text = cards.model_card(recipe, len(blocks(model)), layout=layout, **card)
        (draft / "README.md").write_text(text, encoding="utf-8")
        if licence := licence_of(recipe.base):
            shutil.copyfile(licence, draft / LICENCE)
        for inner in draft.rglob("*"):  # safetensors are written for their owner alone
            inner.chmod(0o755 if inner.is_dir() else 0o644)
    return Path(path)


def _save(model, draft: Path, packed: bool) -> str:
    """Writes weights and config; the layout of packed ones, else ""."""
    absent = removal.lacking(model)
    if absent and packed:
        raise DermError(
            "export: a quantized model without some sublayers has no packed layout; "
            "export the model that it was made of"
        )
    if packed:
        return checkpoint.save(model, draft)
    if absent:
        model.config.absent_sublayers = [str(unit) for unit in absent]
        model.config.save_pretrained(draft)
        model.generation_config.save_pretrained(draft)
        save_model(model, str(draft / PARTIAL))
    else:
        model.save_pretrained(draft)
    return ""
