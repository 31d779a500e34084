"""Every variant's model in turn: what recipes share is made once, one model at a time is held."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pandas as pd

from derm_compress.data.items import Item
from derm_compress.method.assemble import materialize
from derm_compress.model import (
    anatomy,
    devices,
    loading,
    memory,
    oom,
    prompts,
    removal,
    shapes,
    usage,
)
from derm_compress.model.recipe import Recipe
from derm_compress.progress import track

COPIED = 1.0  # GiB up to which a model is copied before it is quantized, rather than made again


class Turn(NamedTuple):
    """A variant whose model is at hand until the next turn."""

    variant: str
    recipe: Recipe
    model: object
    processor: object

    def original_blocks(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A frame about this model with its name, and `block` as the index before pruning."""
        kept = self.recipe.kept()
        return frame.assign(variant=self.variant, block=[kept[block] for block in frame.block])

    def calibrated(
        self, work: Callable, what: str, *, items: Sequence[Item], images, batch_size: int
    ):
        """work(batches) of calibration prompts, with half as many where memory is exceeded."""

        def at_once(size: int):
            where = {"batch_size": size, "device": self.model.device}
            return work(prompts.calibration_batches(self.processor, items, images, **where))

        return oom.halved(at_once, batch_size, f"{what} of {self.variant}")


class Source:
    """One model at a time, made anew where another recipe is asked for."""

    def __init__(self, store, device: str, *, wide: bool = False, quantize: Callable | None = None):
        self.store, self.device, self.wide, self.quantize = store, device, wide, quantize
        self.recipe = self.model = self.processor = None

    def take(self, recipe: Recipe):
        """(model, processor) of a recipe."""
        if recipe != self.recipe:
            self.let_go()
            self.model, self.processor = materialize(
                recipe, self.store, self.device, quantize=self.quantize
            )
            self.recipe = recipe
            if self.wide:  # while it has all its blocks
                devices.spread(self.model)
        return self.model, self.processor

    def let_go(self) -> None:
        if self.recipe:
            devices.let_go(self.model)
        self.recipe = self.model = self.processor = None


def each_model(
    variants: pd.DataFrame,
    store,
    device: str,
    what: str,
    *,
    wide: bool = False,
    quantize: Callable | None = None,
) -> Iterator[Turn]:
    """A turn for every row; rows that differ in their last step alone share what is before it.

    A model is empty after its turn, before the next one is made; on a GPU a large one is made anew
    to be quantized. wide: over all GPUs. quantize: as materialize takes it. Models without values
    have nothing to say: none is given.
    """
    if device == anatomy.META:
        return
    source = Source(store, device, wide=wide, quantize=quantize)
    for row in track(list(variants.itertuples()), what):
        recipe = Recipe.from_json(row.recipe)
        last = recipe.steps[-1]["step"] if recipe.steps else ""
        if last == "prune" and recipe.in_order:
            model, processor = source.take(without_last(recipe))
            removed = removal.step_units(recipe.steps[-1], source.recipe.kept())
            with removal.without(model, removed):
                yield Turn(row.variant, recipe, model, processor)
        elif last == "quantize" and quantize and (device == "cpu" or light(recipe)):
            model, processor = source.take(without_last(recipe))
            if device == "cpu" and usage.tensor_gib(model) > COPIED:
                model, _ = materialize(recipe, store, quantize=quantize)
            else:
                model = copy.deepcopy(model)
                quantize(model, recipe.steps[-1], store)
            yield Turn(row.variant, recipe, model, processor)
            devices.let_go(model)
        else:
            yield Turn(row.variant, recipe, *source.take(recipe))
    source.let_go()


def light(recipe: Recipe) -> bool:
    """Whether a GPU holds a model's copy beside it."""
    planned = memory.plan_weights(shapes.architecture(loading.config_of(recipe.base)))
    return sum(planned.values()) <= COPIED


def without_last(recipe: Recipe) -> Recipe:
    """The recipe that another's last step is applied to."""
    return dataclasses.replace(recipe, steps=recipe.steps[:-1])


def joined(frames: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The frames as one; where none has a row, an empty one of these columns."""
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
