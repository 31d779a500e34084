"""Prompts and answers read once, and without a part of the model at the cost of what lies above.

Picture features, the prompts' common beginning and all that lies below the part are computed once
and shared. Every block has two sublayers, attention and MLP, counted over all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from derm_compress.data import dialogue
from derm_compress.model import anatomy, devices
from derm_compress.model.cache import PrefixCache, visible
from derm_compress.model.prompts import IGNORED, ask, encode, ends, specials
from derm_compress.model.units import Unit


def run(
    model, x, cache, mask, positions, *, start: int = 0, gates=MappingProxyType({}), watch=None
) -> torch.Tensor:
    """Hidden states [rows, tokens, width] after all sublayers from `start` on.

    mask: as visible() makes it, or None for causal attention. gates, by sublayer, [rows]: False
    lets a row pass it unchanged. watch(sublayer, x, y) sees all.
    """
    blocks = list(anatomy.blocks(model))
    rope = anatomy.decoder(model).rotary_emb(x, position_ids=positions)
    how = {"position_embeddings": rope, "attention_mask": mask, "past_key_values": cache}
    for s in range(start, 2 * len(blocks)):
        block = blocks[s // 2]
        x, how = devices.beside(block, (x, how))
        if s % 2:
            y = x + block.mlp(block.post_attention_layernorm(x))
        else:
            y = x + block.self_attn(block.input_layernorm(x), **how)[0]
        if s in gates:
            y = torch.where(gates[s][:, None, None], y, x)
        if watch:
            watch(s, x, y)
        x = y
    return x


def logits(model, x) -> torch.Tensor:
    """Of hidden states [..., width] after the last block: [..., vocabulary]."""
    return model.lm_head(anatomy.decoder(model).norm(x))


def picture_features(model, pixels) -> torch.Tensor:
    """What the decoder reads of pictures: [pictures, image tokens, width]."""
    found = model.model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    )
    return torch.stack(list(found.pooler_output))


@contextmanager
def looking(model) -> Iterator[None]:
    """Vision tower and projector beside the decoder; afterwards a GPU's wait on the CPU."""
    home = anatomy.decoder(model).device
    parts = [anatomy.parts(model)[name] for name in ("vision_tower", "projector")]
    for part in parts:
        part.to(home)
    yield
    if home.type == "cuda":  # 0.6 GiB at 7B, which keys and values need
        for part in parts:
            part.to("cpu")


@dataclass(frozen=True)
class Prompts:
    """Token ids of the questions' common beginning, picture included, and of the rest of each.

    `ends` end an answer.
    """

    prefix: torch.Tensor
    rest: dict[str, list[int]]
    ends: list[int]
    processor: object
    device: torch.device

    @staticmethod
    def of(
        processor, image: np.ndarray, questions: dict[str, str], device, *, text_only: bool = False
    ) -> Prompts:
        """Of questions by name; one `image` [S, S, 3] does, as all take as many tokens."""
        images, ids = None if text_only else [image], []
        for question in questions.values():
            text = ask(processor, question, text_only=text_only)
            how = specials(processor, text)
            ids.append(processor(text=text, images=images, **how)["input_ids"][0])
        alike = 0
        while alike < min(map(len, ids)) - 1 and len({row[alike] for row in ids}) == 1:
            alike += 1
        rest = {kind: list(row[alike:]) for kind, row in zip(questions, ids, strict=True)}
        prefix = torch.tensor(ids[0][:alike], device=device)
        return Prompts(prefix, rest, ends(processor), processor, device)

    def told(self, kind: str, answer: str, *, text_only: bool = False) -> list[int]:
        """Token ids of an answer and its end, as they follow the prompt."""
        turns = [(dialogue.question(kind), answer)]
        ids, labels = encode(self.processor, turns, image_tokens=0 if text_only else 1)
        return ids[labels != IGNORED].tolist()

    def embedded(self, model, pictures: np.ndarray) -> torch.Tensor:
        """The prefix with each picture's features in it: [pictures, prefix, width]."""
        x = model.get_input_embeddings()(self.prefix).repeat(len(pictures), 1, 1)
        spots = self.prefix == model.config.image_token_id
        if not spots.any():
            return x
        pixels = self.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        with looking(model):
            features = picture_features(model, pixels.to(self.device, model.dtype))
        x[:, spots] = features.to(x.dtype)
        return x


class Parts(NamedTuple):
    """Something of the prompts' common beginning, and of the rest of each row."""

    begin: object
    rest: object


class Reading:
    """Prompts and continuations read once by the full model, and again from a unit on.

    Row r continues question `kinds[r]` about `pictures[picture[r]]` by the tokens `told[r]`;
    `units` may be left out. watch(part, sublayer, x, y) sees each sublayer at work, part 0 being
    the prompts' common beginning, 1 the rest.
    """

    def __init__(
        self,
        model,
        prompts: Prompts,
        pictures: np.ndarray,
        picture: Sequence[int],
        kinds: Sequence[str],
        told: Sequence[Sequence[int]],
        units: Sequence[Unit] = (),
        watch=None,
    ):
        self.model, self.told = model, told
        device = prompts.device
        self.begin = len(prompts.prefix)
        self.asked = [len(prompts.rest[kind]) for kind in kinds]
        # an index on the CPU serves blocks on any device
        self.picture = torch.tensor(picture, device="cpu" if devices.is_spread(model) else device)
        rows = [prompts.rest[kind] + list(more) for kind, more in zip(kinds, told, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(map(torch.tensor, rows), batch_first=True).to(device)
        places = torch.arange(self.begin + ids.shape[1], device=device)
        self.places = Parts(places[None, : self.begin], places[None, self.begin :])
        self.mask = visible((places <= self.places.rest.T)[None, None], model.dtype)
        wanted = [unit.span[0] for unit in units]
        self.states = Parts(dict.fromkeys(wanted), dict.fromkeys(wanted))  # what sublayers read
        x = Parts(prompts.embedded(model, pictures), model.get_input_embeddings()(ids))
        self.last, self.cache = self._read(x, 0, partial(self._see, watch))

    def _read(self, x, start, watch=None):
        of_begin = partial(watch, 0) if watch else None
        of_rest = partial(watch, 1) if watch else None
        before = PrefixCache()
        run(self.model, x.begin, before, None, self.places.begin, start=start, watch=of_begin)
        cache = PrefixCache(before, self.picture)
        how = {"start": start, "watch": of_rest}
        return run(self.model, x.rest, cache, self.mask, self.places.rest, **how), cache

    def _see(self, watch, part, sublayer, x, y) -> None:
        if sublayer in self.states[part]:
            self.states[part][sublayer] = x
        if watch:
            watch(part, sublayer, x, y)

    def without(self, unit: Unit | None) -> tuple[torch.Tensor, PrefixCache]:
        """Last hidden states [rows, tokens, width] without a unit, and its keys and values."""
        if unit is None:
            return self.last, self.cache
        first, after = unit.span
        return self._read(Parts(*(states[first] for states in self.states)), after)

    def forget(self, unit: Unit) -> None:
        """Gives back what this unit and those above need, for going from the last to the first."""
        for states in self.states:
            for sublayer in [s for s in states if s > unit.span[0]]:
                del states[sublayer]
        # units below have their own keys and values of the blocks above
        for block in anatomy.blocks(self.model)[unit.block + 1 :]:
            layer = getattr(block.self_attn, "layer_idx", None)
            self.cache.held.pop(layer, None)
            self.cache.prefix.held.pop(layer, None)

    def predictions(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Logits [told + 1, vocabulary] of every row: for its tokens told and the one after."""
        counts = [len(tokens) + 1 for tokens in self.told]
        rows = [torch.full((n,), r) for r, n in enumerate(counts)]
        columns = [torch.arange(n) + asked - 1 for n, asked in zip(counts, self.asked, strict=True)]
        return list(logits(self.model, x[torch.cat(rows), torch.cat(columns)]).split(counts))

    def held(self, cache: PrefixCache, rows: torch.Tensor) -> Iterator[tuple[int, tuple]]:
        """(layer, (keys, values)) of these rows; a unit's cache knows what lies above it, the rest
        is shared."""
        for layer in dict.fromkeys([*self.cache.held, *cache.held]):
            owner = cache if layer in cache.held else self.cache
            yield layer, owner.joined(layer, rows)
