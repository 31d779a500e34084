"""How little a model misses a unit, by each criterion of criteria.py; the lowest goes first.

Each function yields a row for every unit and calibration picture (and question, where it asks):
`unit`, `item`, `value`. Units are those of the model at hand.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.method.importance.calibration import Calibration
from derm_compress.model import anatomy, devices, removal
from derm_compress.model.reading import Reading, logits
from derm_compress.model.units import SUBLAYERS, Unit


def output_similarity(c: Calibration, units: Sequence[Unit]) -> Iterator[dict]:
    """1 - cosine of the answers with and without the unit (paper, Eqs. 2-5); by answer."""
    whole = dict(c.original)
    for answer, text in c.answers(units):
        asked = answer.item, answer.question
        if answer.unit is None:
            whole.setdefault(asked, text)  # y_i = M(x_i)
            continue
        before = whole[asked]  # and text: y_i without block l (Eq. 2)
        value = 0.0
        if text != before:
            value = 1 - float(c.embed(text) @ c.embed(before))  # e_i = S(y_i), cosine (Eqs. 3, 4)
        yield {
            "unit": answer.unit,
            "item": answer.item,
            "question": answer.question,
            "value": value,  # importance_scores has the mean over pictures (Eq. 5)
            "answer": text,
            "original": before,
            "accepted": answer.accepted,
            "tokens": len(answer.tokens),
            "near_ties": answer.near_ties,
        }


@torch.inference_mode()
def perplexity(c: Calibration, units: Sequence[Unit]) -> Iterator[dict]:
    """Mean negative log-likelihood of the reference answers without the unit (Kim et al. 2024)."""
    reading = c.reading(units)
    for unit in sorted(units, reverse=True):
        yield from losses(c, reading, unit)
        reading.forget(unit)


@torch.inference_mode()
def losses(c: Calibration, reading: Reading, unit: Unit | None = None) -> Iterator[dict]:
    """Mean negative log-likelihood of each reference answer that was read, without the unit."""
    scores = reading.predictions(reading.without(unit)[0])
    asked = itertools.product(c.items, dialogue.QUESTIONS)
    for (item, kind), row, told in zip(asked, scores, reading.told, strict=True):
        wanted = torch.tensor(told, device=row.device)
        value = F.cross_entropy(row[:-1].float(), wanted).item()
        yield {"unit": unit, "item": item.id, "question": kind, "value": value}


@torch.inference_mode()
def block_influence(c: Calibration, units: Sequence[Unit]) -> Iterator[dict]:
    """1 - mean cosine over all tokens of what enters and leaves the unit (Men et al. 2024)."""
    entering, cosines = {}, {}

    def watch(part, sublayer, x, y):
        cosines[part, sublayer, sublayer + 1] = F.cosine_similarity(x.float(), y.float(), dim=-1)
        if sublayer % 2:  # the block's second
            x = entering[part]
            cosines[part, sublayer - 1, sublayer + 1] = F.cosine_similarity(
                x.float(), y.float(), dim=-1
            )
        else:
            entering[part] = x

    reading = c.reading(watch=watch)
    places = torch.arange(len(reading.places.rest[0]))
    real = (places <= last_token(reading)[:, None]).to(c.device)  # [rows, tokens]: no padding
    for unit, (i, item) in itertools.product(units, enumerate(c.items)):
        beginning, rest = cosines[0, *unit.span][i], cosines[1, *unit.span] * real
        rows = reading.picture == i
        total = beginning.sum() + rest[rows].sum()
        value = 1 - (total / (len(beginning) + real[rows].sum())).item()
        yield {"unit": unit, "item": item.id, "value": value}


@torch.inference_mode()
def angular(c: Calibration, units: Sequence[Unit]) -> Iterator[dict]:
    """Angle / pi at the last token of what enters and leaves the unit (Gromov et al. 2024).

    `runs` has the same for the runs of 1, 2, … blocks from a block on.
    """
    seen = {}

    def watch(part, sublayer, x, y):
        if part:
            seen[sublayer], seen[sublayer + 1] = x, y

    reading = c.reading(watch=watch)
    last = last_token(reading)
    states = torch.stack([seen[s][torch.arange(len(last)), last] for s in sorted(seen)])
    states = F.normalize(states.double(), dim=-1)  # [sublayers + 1, rows, width]
    for unit in units:
        first, after = unit.span
        ends = [after] if unit.part else range(after, len(states), 2)
        cosines = torch.stack([(states[first] * states[end]).sum(-1) for end in ends])
        angles = cosines.clamp(-1, 1).arccos() / torch.pi  # [runs, rows]
        for i, item in enumerate(c.items):
            runs = angles[:, reading.picture == i].mean(1).tolist()
            yield {"unit": unit, "item": item.id, "value": runs[0], "runs": runs}


def last_token(reading: Reading) -> torch.Tensor:
    """Place of each row's last token, behind the prompts' common beginning: [rows]."""
    ends = [asked + len(told) for asked, told in zip(reading.asked, reading.told, strict=True)]
    return torch.tensor(ends) - 1


def taylor(c: Calibration, units: Sequence[Unit]) -> Iterator[dict]:
    """Sum of |w * gradient| over the unit's weights, of the references' loss (Kim et al. 2024).

    One backward pass an item. Blocks are read again when their turn comes, and a gradient is used
    and dropped as soon as it is there: beside the weights there are what enters every block,
    the inner values of one block and the gradient of one weight, about 1 GiB at 7B.
    """
    scale = devices.loss_scale(c.model.dtype)
    moved = defaultdict(float)  # by sublayer
    owners = {
        weight: sublayer
        for sublayer, weights in enumerate(sublayer_weights(c.model))
        for weight in weights
    }

    def use(weight):
        moved[owners[weight]] += weight.grad.float().mul_(weight).abs_().sum().item() / scale
        weight.grad = None

    with gradients(c.model, list(owners), use):
        for item in c.items:
            moved.clear()
            with devices.attention_with_gradients():
                (scale * answer_loss(c, item)).backward()
            for unit in units:
                value = sum(moved[s] for s in unit.sublayers)
                yield {"unit": unit, "item": item.id, "value": value}


@contextmanager
def gradients(model, weights: list[torch.nn.Parameter], use) -> Iterator[None]:
    """Only these weights get gradients; use(weight) is called as soon as one has its own."""
    before = {weight: weight.requires_grad for weight in model.parameters()}
    for weight in before:
        weight.requires_grad_(False)
    hooks = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(use))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, wanted in before.items():
            weight.requires_grad_(wanted)


def answer_loss(c: Calibration, item: Item) -> torch.Tensor:
    """Mean negative log-likelihood of one item's reference answers, over all their tokens.

    Each question is a row with the picture in it: a shared beginning would have every weight
    used twice, and the gradients of all blocks wait for its turn.
    """
    prompts, model = c.prompts(), c.model
    told = c.told(prompts, item)
    rest = [
        torch.tensor(prompts.rest[kind] + more)
        for kind, more in zip(dialogue.QUESTIONS, told, strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True).to(c.device)
    picture = prompts.embedded(model, c.images[[item.row]]).expand(len(ids), -1, -1)
    x = torch.cat([picture, model.get_input_embeddings()(ids)], 1)  # [rows, tokens, width]
    places = torch.arange(x.shape[1], device=x.device)[None]
    rope = anatomy.decoder(model).rotary_emb(x, position_ids=places)
    causal = (places <= places.T)[None, None]
    for block in anatomy.blocks(model):
        x = checkpoint(
            block, x, use_reentrant=False, position_embeddings=rope, attention_mask=causal
        )
    before = []  # states from which the answers' tokens are predicted
    for row, ids, more in zip(x, rest, told, strict=True):
        end = len(prompts.prefix) + len(ids)
        before.append(row[end - 1 - len(more) : end - 1])
    wanted = torch.tensor([token for more in told for token in more], device=x.device)
    return F.cross_entropy(logits(model, torch.cat(before)).float(), wanted)


def sublayer_weights(model) -> list[list[torch.nn.Parameter]]:
    """Weights of every sublayer, a norm and an attention or MLP, in the order of their use."""
    return [
        [p for name in removal.PARTS[part] for p in block.get_submodule(name).parameters()]
        for block in anatomy.blocks(model)
        for part in SUBLAYERS
    ]


@torch.no_grad()
def magnitude(c: Calibration, units: Sequence[Unit]) -> Iterator[dict]:
    """Sum of absolute weights (Han et al. 2015; the baseline of Kim et al. 2024)."""
    held = sublayer_weights(c.model)
    for unit, item in itertools.product(units, c.items):
        weights = [weight for s in unit.sublayers for weight in held[s]]
        value = sum(weight.abs().float().sum().item() for weight in weights)
        yield {"unit": unit, "item": item.id, "value": value}


def last(c: Calibration, units: Sequence[Unit]) -> Iterator[dict]:
    """The deepest go first (the simple variant of Gromov et al. 2024)."""
    for unit, item in itertools.product(units, c.items):
        yield {"unit": unit, "item": item.id, "value": float(-unit.span[0])}


def random(c: Calibration, units: Sequence[Unit]) -> Iterator[dict]:
    """A random number, what any criterion has to beat."""
    drawn = np.random.default_rng([c.seed, 97]).random(2 * len(anatomy.blocks(c.model)))
    for unit, item in itertools.product(units, c.items):
        place = unit.span[0] if unit.part else unit.block
        yield {"unit": unit, "item": item.id, "value": float(drawn[place])}
