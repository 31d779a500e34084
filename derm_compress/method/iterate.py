"""Every variant's model in turn: one model is loaded, and becomes each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import pandas as pd

from derm_compress.data.items import Item
from derm_compress.method.assemble import apply_steps, check_order, materialize
from derm_compress.model import anatomy, devices, oom, prompts, removal, usage, weights
from derm_compress.model.recipe import Recipe, shared
from derm_compress.progress import track


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
    """One model, which becomes every recipe that is taken, in place: each begins as `begin` does.

    Removed blocks are put back, and weights from a copy on the host. Where the host has no room for
    that, `begin` is loaded anew, once the last model is let go: it never holds two large ones.
    wide: spread over all GPUs. processes: as many do the same beside each other.
    """

    def __init__(
        self,
        begin: Recipe,
        store,
        device: str,
        *,
        dtype=None,
        wide: bool = False,
        processes: int = 1,
        quantize: Callable | None = None,
    ):
        self.begin, self.store, self.device, self.dtype = begin, store, device, dtype
        self.wide, self.processes, self.quantize = wide, processes, quantize
        self.recipe = self.model = self.processor = self.copy = None
        self.removed = ExitStack()

    def take(self, recipe: Recipe):
        """(model, processor) of a recipe, until the next is taken."""
        check_order(recipe)
        if self.model is None:
            self._load()
        self.removed.close()
        anew = recipe.weights != self.recipe.weights
        if anew:
            self._begin_again()
        self.removed.enter_context(removal.put_back(self.model))
        how = {"since": len(self.begin.steps), "weights": anew, "quantize": self.quantize}
        apply_steps(self.model, recipe, self.store, **how)
        self.recipe = recipe
        return self.model, self.processor

    def _load(self) -> None:
        how = {"dtype": self.dtype, "quantize": self.quantize}
        self.model, self.processor = materialize(self.begin, self.store, self.device, **how)
        self.recipe = self.begin
        if self.wide:  # while it has all its blocks
            devices.spread(self.model)

    def _begin_again(self) -> None:
        """The weights as they were loaded, and a copy of them before they change."""
        usage.reset_peak(self.device)
        if self.recipe.weights == self.begin.weights:
            if not self.copy and weights.fit(self.model, self.processes):
                self.copy = weights.Weights(self.model)
        elif self.copy:
            self.copy.put_back(self.model)
        else:
            self.let_go()
            self._load()

    def let_go(self) -> None:
        """An empty model, whatever names still hold it, and no copy."""
        self.removed.close()
        if self.model is not None:
            devices.let_go(self.model)
        self.recipe = self.model = self.processor = self.copy = None


def each_model(variants: pd.DataFrame, store, device: str, what: str, **how) -> Iterator[Turn]:
    """A turn for every row, of one base; how: dtype, quantize, wide, processes as in Source.

    Models without values have nothing to say: none is given.
    """
    recipes = [Recipe.from_json(recipe) for recipe in variants.recipe]
    if device == anatomy.META or not recipes:
        return
    source = Source(shared(recipes), store, device, **how)
    try:
        for name, recipe in track(list(zip(variants.variant, recipes, strict=True)), what):
            yield Turn(name, recipe, *source.take(recipe))
    finally:
        source.let_go()


def joined(frames: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """The frames as one; where none has a row, an empty one of these columns."""
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
