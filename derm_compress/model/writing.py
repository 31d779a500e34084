"""Greedy answers to prompts that are read once: written side by side, and each line used again.

In fp32 they are those of token after token from a forward pass over all before it. transformers'
generate_batch refills rows, too, but takes token ids alone (5.17): neither a picture's features nor
rows without a part of the model can enter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from derm_compress.data.items import Item
from derm_compress.model import anatomy, devices
from derm_compress.model.cache import SlotCache
from derm_compress.model.graphs import Recorded
from derm_compress.model.reading import Prompts, Reading, logits, run
from derm_compress.model.units import Unit


@dataclass
class Answer:
    """A greedy answer, under way or done, of the model without `unit` (None: the whole model)."""

    unit: Unit | None
    item: str
    question: str
    tokens: list[int]
    accepted: int  # tokens of the draft that stand
    near_ties: int  # tokens whose runner-up lay within rounding
    position: int  # where its last token goes, which has not been read yet

    @property
    def key(self) -> tuple[Unit | None, str, str]:
        return self.unit, self.item, self.question


class Guesses:
    """N-gram speculation: what followed the same tokens, in this picture's answers or else any."""

    def __init__(self, longest: int = 4):
        self.longest, self.known, self.learnt = longest, {}, set()

    def learn(self, answer: Answer) -> None:
        item, question, tokens = answer.item, answer.question, answer.tokens
        if (item, question, *tokens) in self.learnt:
            return
        self.learnt.add((item, question, *tokens))
        for end in range(1, len(tokens)):
            for start in range(max(0, end - self.longest), end):
                run = tuple(tokens[start:end])
                self.known[item, question, run] = self.known[question, run] = tokens, end

    def after(self, answer: Answer, count: int) -> list[int]:
        """Up to `count` tokens, by the longest run that is known; of its own picture first."""
        tokens = answer.tokens
        for start in range(max(0, len(tokens) - self.longest), len(tokens)):
            run = tuple(tokens[start:])
            for place in ((answer.item, answer.question, run), (answer.question, run)):
                if place in self.known:
                    told, end = self.known[place]
                    return told[end : end + count]
        return []


def choose(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens of logits [..., vocabulary], and whether the runner-up lies within rounding."""
    best = scores.float().topk(2)
    first, second = best.values.unbind(-1)
    near = first - second <= 4 * torch.finfo(scores.dtype).eps * first.abs()
    return best.indices[..., 0], near


@dataclass
class Step:
    """The reading of a step's tokens, which a GPU records; rows may pass `gated` sublayers by."""

    model: object
    cache: SlotCache
    gated: Sequence[int] = ()

    def __call__(self, ids, places, gates) -> tuple[torch.Tensor, torch.Tensor]:
        """choose() after each of the tokens ids [rows, columns], of which the first go to `places`.

        places [rows, 1]; gates [rows, sublayers]: False where a row passes a sublayer by.
        """
        positions = places + torch.arange(ids.shape[1], device=ids.device)
        x = self.model.get_input_embeddings()(ids)
        mask = self.cache.aim(positions, x.dtype)
        passed = {sublayer: gates[:, sublayer] for sublayer in self.gated}
        x = run(self.model, x, self.cache, mask, positions, gates=passed)
        return choose(logits(self.model, x))


class Writer:
    """Continuous batching: up to `lines` answers at once; a freed line takes the next.

    With `guessing` each is read with AHEAD guesses behind its last token, of which those stand that
    greedy decoding agrees with: a third sooner for long answers, later for those of a few words.
    On a GPU all lines and guesses are read, used or not: a step is then the same work every time,
    which is recorded once.
    """

    AHEAD = 7

    def __init__(
        self, model, prompts: Prompts, *, lines: int, max_new_tokens: int, guessing: bool = True
    ):
        self.model, self.prompts, self.lines = model, prompts, lines
        self.most, self.ends = max_new_tokens, prompts.ends
        width = len(prompts.prefix) + max(map(len, prompts.rest.values())) + max_new_tokens
        self.ahead = self.AHEAD if guessing else 0
        spread = devices.is_spread(model)  # a recording is of one GPU's work
        alike = anatomy.decoder(model).device.type == "cuda" and not spread
        self.cache = SlotCache(lines, width + self.ahead, whole=alike)
        self.guesses, self.forward = Guesses(), Step(model, self.cache)
        if guessing:  # then rows may lack a unit
            self.forward.gated = range(2 * len(anatomy.blocks(model)))
        self.read = self.forward if spread else Recorded(self.forward, "writing answers")
        self.answers: list[Answer] = []  # under way; the first lines are theirs

    def ended(self, tokens: Sequence[int]) -> bool:
        return len(tokens) >= self.most or (bool(tokens) and tokens[-1] in self.ends)

    def add(self, going: list[tuple[int, Answer]], reading: Reading, cache) -> Iterator[Answer]:
        """Goes on with (row of the reading, answer); gives back answers that end meanwhile."""
        while going:
            first = len(self.answers)
            some, going = going[: self.lines - first], going[self.lines - first :]
            if some:
                rows = torch.tensor([row for row, _ in some], device=reading.picture.device)
                self.cache.fill(slice(first, first + len(some)), reading.held(cache, rows))
                self.answers += [answer for _, answer in some]
            if going:
                yield from self.step()

    def flush(self) -> Iterator[Answer]:
        while self.answers:
            yield from self.step()

    def step(self) -> Iterator[Answer]:
        """Reads each answer's last token and guesses behind it; gives back answers that end."""
        guessed = [self.guesses.after(answer, self.ahead) for answer in self.answers]
        tokens, near = self.predict(guessed)
        for line, answer in enumerate(self.answers):
            self.take(answer, guessed[line], tokens[line], near[line])
        for answer in self.free():
            self.guesses.learn(answer)
            yield answer

    def predict(self, guessed: list[list[int]]) -> tuple[list, list]:
        """Greedy tokens [answers, 1 + longest guess] after each token, and their near ties."""
        rows, columns = len(guessed), 1 + max(map(len, guessed))
        if self.cache.whole:
            rows, columns = self.lines, 1 + self.ahead
        ids, places = torch.zeros(rows, columns, dtype=torch.long), torch.zeros(rows, 1).long()
        asked = list(zip(self.answers, guessed, strict=True))
        for row, (answer, guess) in enumerate(asked):
            ids[row, : 1 + len(guess)] = torch.tensor([answer.tokens[-1], *guess])
            places[row] = answer.position
        gates = torch.ones(rows, 2 * len(anatomy.blocks(self.model)), dtype=torch.bool)
        for row, answer in enumerate(self.answers):
            if answer.unit:
                gates[row, slice(*answer.unit.span)] = False
        if not self.cache.whole:
            self.forward.gated = (~gates).any(0).nonzero().flatten().tolist()
        device = anatomy.decoder(self.model).device
        tokens, near = self.read(ids.to(device), places.to(device), gates.to(device))
        return tokens[: len(asked)].tolist(), near[: len(asked)].tolist()

    def take(self, answer: Answer, guess: list[int], tokens: list[int], near: list[bool]) -> None:
        """Adds tokens as far as the guess foresaw them, and one more."""
        for i, token in enumerate(tokens):
            answer.tokens.append(token)
            answer.near_ties += near[i]
            answer.position += 1
            if self.ended(answer.tokens) or i >= len(guess) or guess[i] != token:
                return

    def free(self) -> list[Answer]:
        """Takes out the answers that have ended; the last ones move to their lines."""
        done = [self.ended(answer.tokens) for answer in self.answers]
        ended = [answer for answer, over in zip(self.answers, done, strict=True) if over]
        count = len(self.answers) - len(ended)
        gaps = [line for line in range(count) if done[line]]
        last = [line for line in range(count, len(done)) if not done[line]]
        self.cache.move(last, gaps)
        for line, gap in zip(last, gaps, strict=True):
            self.answers[gap] = self.answers[line]
        del self.answers[count:]
        return ended


@torch.inference_mode()
def greedy_answers(
    model,
    prompts: Prompts,
    items: Sequence[Item],
    images: np.ndarray,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[Answer]:
    """Greedy answers to every prompt about each item, as they are finished.

    Up to `batch_size` prompts are read at once, those about a picture together, and as many answers
    are written; a few words each, so without guesses.
    """
    lines = min(batch_size, len(items) * len(prompts.rest))
    how = {"lines": lines, "max_new_tokens": max_new_tokens, "guessing": False}
    writer = Writer(model, prompts, **how)
    some = max(1, batch_size // len(prompts.rest))
    for start in range(0, len(items), some):
        yield from read_without(items[start : start + some], images, {}, (), writer)
    yield from writer.flush()


def read_without(
    items: Sequence[Item], images, drafts: dict, units, writer: Writer
) -> Iterator[Answer]:
    """Answers without each unit, or of the whole model; the writer goes on where drafts end.

    Units go from the last to the first, so that the reading, which ends here, holds ever less.
    """
    prompts = writer.prompts
    asked = [(item.id, kind) for item in items for kind in prompts.rest]
    picture = [i for i in range(len(items)) for _ in prompts.rest]
    told = [drafts.get(key, []) for key in asked]
    pictures, kinds = images[[item.row for item in items]], [kind for _, kind in asked]
    reading = Reading(writer.model, prompts, pictures, picture, kinds, told, units)
    for unit in units or [None]:
        states, cache = reading.without(unit)
        going = []
        for row, scores in enumerate(reading.predictions(states)):
            tokens, accepted, near_ties = verified(told[row], scores, writer)
            place = reading.begin + reading.asked[row] + accepted
            answer = Answer(unit, *asked[row], tokens, accepted, near_ties, place)
            if writer.ended(tokens):
                writer.guesses.learn(answer)
                yield answer
            else:
                going.append((row, answer))
        yield from writer.add(going, reading, cache)
        if unit:
            reading.forget(unit)


def verified(draft: list[int], scores: torch.Tensor, writer: Writer) -> tuple[list[int], int, int]:
    """What stands of a draft, by logits [tokens + 1, vocabulary], and the token after it.

    (tokens, accepted, near ties)
    """
    chosen, near = (part.tolist() for part in choose(scores))
    accepted = 0
    while accepted < len(draft) and draft[accepted] == chosen[accepted]:
        accepted += 1
    tokens = list(draft[:accepted])
    if not (accepted == len(draft) and writer.ended(draft)):
        tokens.append(chosen[accepted])
    return tokens, accepted, sum(near[: len(tokens)])
