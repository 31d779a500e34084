"""What criteria look at: a model, training pictures, and how to ask about them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.method.importance.drafts import Answer, ablated_answers
from derm_compress.method.importance.embedder import Embedder
from derm_compress.model import anatomy
from derm_compress.model.reading import Prompts, Reading
from derm_compress.model.units import Unit


@dataclass(frozen=True)
class Calibration:
    """A model, training pictures [n, S, S, 3] and how to ask about them.

    original: the whole model's answers by (item, question) where the one at hand has lost units.
    """

    model: object
    processor: object
    items: Sequence[Item]
    images: np.ndarray
    embed: Embedder | None = None
    batch_size: int = 32
    max_new_tokens: int = 56
    text_only: bool = False
    seed: int = 0
    original: dict = dataclasses.field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The decoder's; a vision tower may wait elsewhere."""
        return anatomy.decoder(self.model).device

    def batches(self, batch_size: int) -> list[Calibration]:
        """The same of a few items each: as many as are asked all questions at once."""
        some = max(1, batch_size // len(dialogue.QUESTIONS))
        starts = range(0, len(self.items), some)
        parts = [self.items[start : start + some] for start in starts]
        return [dataclasses.replace(self, items=part, batch_size=batch_size) for part in parts]

    def prompts(self) -> Prompts:
        questions = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}
        picture = self.images[0]
        return Prompts.of(self.processor, picture, questions, self.device, text_only=self.text_only)

    def told(self, prompts: Prompts, item: Item) -> list[list[int]]:
        """Tokens of an item's reference answers, in the order of the questions."""
        return [
            prompts.told(
                kind, dialogue.reference(item.disease, item.facts, kind), text_only=self.text_only
            )
            for kind in dialogue.QUESTIONS
        ]

    def reading(self, units: Sequence[Unit] = (), watch=None) -> Reading:
        """All items' reference answers read at once: rows are items by questions."""
        prompts = self.prompts()
        rows = itertools.product(range(len(self.items)), dialogue.QUESTIONS)
        picture, kinds = zip(*rows, strict=True)
        told = [tokens for item in self.items for tokens in self.told(prompts, item)]
        pictures = self.images[[item.row for item in self.items]]
        return Reading(self.model, prompts, pictures, picture, kinds, told, units, watch)

    def answers(self, units: Sequence[Unit]) -> Iterator[tuple[Answer, str]]:
        """Answers of the model (unit None) and of the model without each unit, with their texts."""
        how = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
        rows = ablated_answers(self.model, self.prompts(), self.items, self.images, units, **how)
        for row in rows:
            text = self.processor.tokenizer.decode(row.tokens, skip_special_tokens=True)
            yield row, text.strip()
