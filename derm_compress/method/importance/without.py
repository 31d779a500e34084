"""What a model says without one of its parts: by reading, not by writing.

Greedy decoding makes the full model's answer a draft. One reading of prompt and draft without the part tells where it
first disagrees: nowhere, and the answer is the same; else it is written from there on, rows of all parts in one batch
with a gate for each row and sublayer. In fp32 the answers are those of removing the part and generating anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.model import anatomy, removal
from derm_compress.model.cache import visible
from derm_compress.model.reading import Prompts, Reading, logits, run


class Slots:
    """A cache for rows of different lengths: keys and values [lines, width, heads, head size] a layer."""

    def __init__(self, lines: int, width: int):
        self.lines, self.width, self.held = lines, width, {}

    def fill(self, lines: list[int], parts: Iterable[tuple[int, list]]) -> None:
        """Copies (layer, Memory.parts) of as many rows to these lines."""
        for layer, pairs in parts:
            if layer not in self.held:
                _, heads, _, size = pairs[0][0].shape
                self.held[layer] = tuple(
                    part.new_zeros(self.lines, self.width, heads, size) for part in pairs[0]
                )
            start = 0
            for pair in pairs:
                end = start + pair[0].shape[2]
                for place, part in zip(self.held[layer], pair, strict=True):
                    place[lines, start:end] = part.transpose(1, 2)
                start = end

    def aim(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Where the next tokens go [rows, tokens]; returns visible() [rows, 1, tokens, seen] of what they may see."""
        self.rows, self.seen = len(positions), int(positions.max()) + 1
        first = self.width * torch.arange(self.rows, device=positions.device)[:, None]
        self.spots = (first + positions).flatten()
        there = torch.arange(self.seen, device=positions.device) <= positions[..., None]
        return visible(there[:, None], dtype)

    def update(self, keys, values, layer, *_):
        for place, new in zip(self.held[layer], (keys, values), strict=True):
            place.flatten(0, 1).index_copy_(0, self.spots, new.transpose(1, 2).flatten(0, 1))
        return tuple(part[: self.rows, : self.seen].transpose(1, 2) for part in self.held[layer])

    def move(self, lines: list[int], to: list[int]) -> None:
        """Copies lines over others."""
        for pair in self.held.values():
            for part in pair:
                part[to] = part[lines]


@dataclass
class Row:
    """An answer under way; `position` is where its last token goes, which has not been read yet."""

    key: tuple
    gates: torch.Tensor
    tokens: list[int]
    accepted: int
    near_ties: int
    position: int


class Guesses:
    """What may come next: what followed the same run of tokens, in this picture's answers or else in any."""

    def __init__(self, longest: int = 4):
        self.longest, self.known, self.learnt = longest, {}, set()

    def learn(self, key: tuple, tokens: list[int]) -> None:
        if (key[1:], *tokens) in self.learnt:
            return
        self.learnt.add((key[1:], *tokens))
        for end in range(1, len(tokens)):
            for start in range(max(0, end - self.longest), end):
                run = tuple(tokens[start:end])
                self.known[key[1:], run] = self.known[key[2:], run] = tokens, end

    def after(self, key: tuple, tokens: list[int], count: int) -> list[int]:
        for start in range(max(0, len(tokens) - self.longest), len(tokens)):
            for scope in (key[1:], key[2:]):
                if found := self.known.get((scope, tuple(tokens[start:]))):
                    return found[0][found[1] : found[1] + count]
        return []


def choose(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens of logits [..., vocabulary], and whether the best two lie within rounding of each other."""
    best = scores.float().topk(2)
    near = (
        best.values[..., 0] - best.values[..., 1]
        <= 4 * torch.finfo(scores.dtype).eps * best.values[..., 0].abs()
    )
    return best.indices[..., 0], near


class Writer:
    """Decodes up to `lines` rows at once, whatever part each of them lacks; a freed line takes the next row.

    Each row is read with AHEAD guesses behind its last token, of which those stand that greedy decoding agrees with.
    """

    AHEAD = 7

    def __init__(self, model, *, lines: int, width: int, max_new_tokens: int, eos: int):
        self.model, self.most, self.eos = model, max_new_tokens, eos
        self.slots, self.rows = Slots(lines, width + self.AHEAD), []
        self.guesses, self.lines = Guesses(), lines

    def ended(self, row: Row) -> bool:
        return len(row.tokens) >= self.most or row.tokens[-1] == self.eos

    def add(
        self, rows: list[tuple[int, Row]], parts_of: Callable[[torch.Tensor], Iterable]
    ) -> Iterator[Row]:
        """Takes (number, row) of answers to go on with; gives back rows that were finished meanwhile.

        parts_of: (layer, Memory.parts) of the rows with these numbers.
        """
        while rows:
            free = [line for line, row in enumerate(self.rows) if row is None]
            free = (free + list(range(len(self.rows), self.lines)))[: len(rows)]
            if free:
                self.rows += [None] * (free[-1] + 1 - len(self.rows))
                numbers = torch.tensor(
                    [r for r, _ in rows[: len(free)]], device=anatomy.decoder(self.model).device
                )
                self.slots.fill(free, parts_of(numbers))
                for line, (_, row) in zip(free, rows, strict=False):
                    self.rows[line] = row
                rows = rows[len(free) :]
            else:
                yield from self.step()

    def flush(self) -> Iterator[Row]:
        """Finishes whatever is under way."""
        while any(self.rows):
            yield from self.step()

    def step(self) -> Iterator[Row]:
        """One more reading of every row under way."""
        self._close_ranks()
        device = anatomy.decoder(self.model).device
        guessed = [self.guesses.after(row.key, row.tokens, self.AHEAD) for row in self.rows]
        most = max(map(len, guessed))
        ids = [
            [row.tokens[-1], *more, *[0] * (most - len(more))]
            for row, more in zip(self.rows, guessed, strict=True)
        ]
        places = torch.tensor([row.position for row in self.rows], device=device)
        positions = places[:, None] + torch.arange(most + 1, device=device)
        gates = torch.stack([row.gates for row in self.rows]).to(device)
        x = self.model.get_input_embeddings()(torch.tensor(ids, device=device))
        x = run(
            self.model, x, self.slots, self.slots.aim(positions, x.dtype), positions, gates=gates
        )
        tokens, near = (part.tolist() for part in choose(logits(self.model, x)))
        for line, row in enumerate(self.rows):
            self._take(row, tokens[line], near[line], guessed[line])
            if self.ended(row):
                self.rows[line] = None
                self.guesses.learn(row.key, row.tokens)
                yield row

    def _close_ranks(self) -> None:
        """Fills the gaps with the last rows."""
        count = sum(row is not None for row in self.rows)
        gaps = [line for line, row in enumerate(self.rows[:count]) if row is None]
        last = [line for line, row in enumerate(self.rows) if row and line >= count]
        if gaps:
            self.slots.move(last, gaps)
            for gap, line in zip(gaps, last, strict=True):
                self.rows[gap] = self.rows[line]
        del self.rows[count:]

    def _take(self, row: Row, tokens, near, guessed) -> None:
        for i, token in enumerate(tokens):
            row.tokens.append(token)
            row.near_ties += near[i]
            row.position += 1
            if self.ended(row) or i >= len(guessed) or guessed[i] != token:
                return


def verify(reading: Reading, unit, keys, writer: Writer) -> Iterator[Row]:
    """Rows that are finished after one pass without the unit; the others go to the writer."""
    x, memory = reading.without(unit)
    gates = torch.ones(2 * len(anatomy.blocks(reading.model)), dtype=torch.bool)
    if unit is not None:
        gates[slice(*removal.span(unit))] = False
    going = []
    for r, scores in enumerate(reading.predictions(x)):
        draft = reading.told[r]
        chosen, near = (part.tolist() for part in choose(scores))
        agree = next(
            (i for i, (one, other) in enumerate(zip(draft, chosen, strict=False)) if one != other),
            len(draft),
        )
        ended = (
            agree == len(draft) and draft and (len(draft) >= writer.most or draft[-1] == writer.eos)
        )
        tokens = list(draft) if ended else [*draft[:agree], chosen[agree]]
        place = reading.begin + reading.asked[r] + agree
        row = Row(keys[r], gates, tokens, agree, sum(near[: len(tokens)]), place)
        if writer.ended(row):
            writer.guesses.learn(row.key, row.tokens)
            yield row
        else:
            going.append((r, row))
    yield from writer.add(going, partial(reading.parts, memory))


@torch.inference_mode()
def written(
    model,
    processor,
    items: Sequence[Item],
    images: np.ndarray,
    units: Sequence[removal.Unit],
    questions: Sequence[str] | dict[str, str],
    *,
    batch_size: int,
    max_new_tokens: int,
    text_only: bool = False,
    eos: int | None = None,
) -> Iterator[Row]:
    """Greedy answers of the full model (unit None) and of the model without each unit, as they are finished.

    `questions` are the study's kinds, or any by name. Row.key is (unit, item id, question); `accepted` counts the
    draft's tokens that stand. Up to `batch_size` answers are written at once; without a unit half as many are read, but
    all about at least one picture.
    """
    if not isinstance(questions, dict):
        questions = {kind: dialogue.question(kind) for kind in questions}
    eos = processor.tokenizer.eos_token_id if eos is None else eos
    prompts = Prompts.of(
        processor, images[0], questions, anatomy.decoder(model).device, text_only=text_only
    )
    width = len(prompts.prefix) + max(map(len, prompts.rest.values())) + max_new_tokens
    writer = Writer(model, lines=batch_size, width=width, max_new_tokens=max_new_tokens, eos=eos)
    some = max(1, batch_size // len(questions))
    for start in range(0, len(items), some):
        part, drafts = items[start : start + some], {}
        for row in chain(_read(prompts, part, images, drafts, (), writer), writer.flush()):
            drafts[row.key[1:]] = row.tokens
            yield row
        half = (
            len(part) + 1
        ) // 2  # a reading leaves about half of its rows to write, and holds most of the memory
        for few in filter(len, (part[:half], part[half:])) if units else ():
            yield from _read(prompts, few, images, drafts, units, writer)
        yield from writer.flush()


def _read(prompts: Prompts, items, images, drafts: dict, units, writer: Writer) -> Iterator[Row]:
    """Rows of items' answers without each unit, or of the whole model, as far as drafts tell; the writer has the rest.

    Units go from the last to the first, so that the reading holds ever less; it lives no longer than this.
    """
    asked = [(i, kind) for i in range(len(items)) for kind in prompts.rest]
    keys = [(items[i].id, kind) for i, kind in asked]
    picture, kinds = zip(*asked, strict=True)
    pictures, told = images[[item.row for item in items]], [drafts.get(key, []) for key in keys]
    reading = Reading(writer.model, prompts, pictures, picture, kinds, told, units)
    for unit in sorted(units, key=removal.span, reverse=True) or [None]:
        yield from verify(reading, unit, [(unit, *key) for key in keys], writer)
        if units:
            reading.forget(unit)
