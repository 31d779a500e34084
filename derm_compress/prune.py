"""Depth pruning: which blocks go is data (a plan), and applying it leaves an ordinary, smaller model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from derm_compress import models
from derm_compress.errors import DermError
from derm_compress.recipes import paper_depth

if TYPE_CHECKING:
    import pandas as pd

PAPER_DEPTHS = {"operating": 6, "deeper": 9}  # of 32 blocks
SUBLAYERS = ("attention", "mlp")  # of a block, in the order of their use
PARTS = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}

Unit = int | str  # what can be removed: block 12, "12.attention" or "12.mlp"


def span(unit: Unit) -> tuple[int, int]:
    """First sublayer of a unit and the one after its last, counted over all blocks, two a block."""
    block, _, part = str(unit).partition(".")
    first = 2 * int(block) + (SUBLAYERS.index(part) if part else 0)
    return first, first + (1 if part else 2)


def _is_unit(unit, blocks: int) -> bool:
    """Whether it names a block of the model, or the attention or MLP of one."""
    block, dot, part = str(unit).partition(".")
    written = isinstance(unit, str) == bool(dot) and not isinstance(unit, bool | float)
    return written and block.isdecimal() and int(block) < blocks and (not dot or part in SUBLAYERS)


def _repeated(order: Sequence[Unit]) -> list[Unit]:
    """Units whose sublayers an earlier one has already."""
    spans = [set(range(*span(unit))) for unit in order]
    return [unit for i, unit in enumerate(order) if spans[i] & set().union(*spans[:i])]


def name_of(sublayer: int) -> str:
    """The unit of one sublayer."""
    return f"{sublayer // 2}.{SUBLAYERS[sublayer % 2]}"


@dataclass(frozen=True)
class Plan:
    """Which units of one model go, least important first; protected blocks are never among them.

    `order` nests: n units are its first n. A plan of runs has `starts` instead: n blocks go from starts[n - 1] on.
    `scores` belong to the order's units when each was chosen; no fingerprint: for any model of as many blocks.
    """

    criterion: str
    order: tuple[Unit, ...]
    protected: tuple[int, ...]
    blocks: int
    fingerprint: str = ""
    starts: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        known = f"blocks are 0 to {self.blocks - 1}, their parts N.attention and N.mlp"
        if wrong := [unit for unit in (*self.order, *self.starts) if not _is_unit(unit, self.blocks)]:
            raise DermError(f"pruning plan {self.criterion}: {wrong[0]!r} is no unit; {known}")
        if wrong := _repeated(self.order):
            raise DermError(f"pruning plan {self.criterion}: {wrong[0]!r} stands there twice; {known}")
        runs = [set(range(start, start + n)) for n, start in enumerate(self.starts, 1)]
        named = {span(unit)[0] // 2 for unit in self.order}.union(*runs)
        if wrong := sorted(named & set(self.protected) | {block for block in named if block >= self.blocks}):
            raise DermError(
                f"pruning plan {self.criterion}: blocks {wrong} are to go, but protected or beyond the last"
            )

    @property
    def most(self) -> int:
        """How many units can go."""
        return len(self.starts or self.order)

    def removed(self, n: int) -> tuple[Unit, ...]:
        if not 0 <= n <= self.most:
            raise DermError(
                f"pruning plan {self.criterion}: {n} units cannot be removed; of {self.blocks} blocks, "
                f"{len(self.protected)} protected, it names {self.most} units to go: 0 to {self.most}"
            )
        if self.starts:
            return tuple(range(self.starts[n - 1], self.starts[n - 1] + n)) if n else ()
        return tuple(sorted(self.order[:n], key=span))

    def kept(self, n: int) -> tuple[int, ...]:
        """Original indices of the blocks of which something stays when n units go."""
        return left(self.blocks, self.removed(n))[0]

    def absent(self, n: int) -> tuple[str, ...]:
        """Sublayers that the kept blocks lack."""
        return left(self.blocks, self.removed(n))[1]

    def check(self, *, blocks: int, fingerprint: str) -> None:
        """Refuse a model that the plan was not made for."""
        if blocks != self.blocks or (self.fingerprint and fingerprint != self.fingerprint):
            raise DermError(
                f"pruning plan {self.criterion}: made for a model of {self.blocks} blocks and fingerprint "
                f"{self.fingerprint or 'of any kind'}, not for this one ({blocks} blocks, {fingerprint}); "
                "rank its blocks first"
            )

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(value: dict) -> Plan:
        return Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def published() -> Plan:
    """The removal order of the paper's published code for its fine-tuned LLaVA-1.5-7B; it names 14 blocks."""
    return Plan.from_dict(json.loads((Path(__file__).parent / "published_plan.json").read_text("utf-8")))


def read_plan(name: str) -> Plan:
    """`published`, a plan's JSON file, or FILE:RANKING for one of stage 03's plans.json."""
    if name == "published":
        return published()
    file, _, ranking = (name, "", "") if Path(name).is_file() else name.rpartition(":")
    try:
        told = json.loads(Path(file or name).read_text("utf-8"))
        told = told[ranking] if ranking else told
        if "order" not in told:
            raise DermError(f"pruning plan {name}: holds several; name one as {name}:RANKING, of {', '.join(told)}")
        return Plan.from_dict(told)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        told = "neither `published` nor a plan's JSON file, nor FILE:RANKING of plans.json"
        raise DermError(f"pruning plan {name}: {told} ({type(error).__name__}: {error})") from error


def left(blocks: int, removed: Iterable[Unit]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Blocks of which something is left without these units, and the sublayers that those lack."""
    gone = {s for unit in removed for s in range(*span(unit))}
    kept = tuple(b for b in range(blocks) if not {2 * b, 2 * b + 1} <= gone)
    return kept, tuple(name_of(s) for s in sorted(gone) if s // 2 in kept)


class Absent(nn.Module):
    """Stands for a removed attention or MLP, which adds nothing to the residual stream; holds no weights."""

    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states)


class AbsentAttention(Absent):
    def forward(self, hidden_states, **_):
        return super().forward(hidden_states), None


def apply(model, kept: Sequence[int], absent: Sequence[str] = ()) -> None:
    """Keep the blocks at these positions, without the `absent` sublayers (by position too), in place.

    Config, `layer_idx` and weights agree afterwards: without the renumbering cached generation fails, without the
    config a reload gets random blocks.
    """
    layers = models.blocks(model)
    if sorted(set(kept)) != list(kept) or not kept or kept[-1] >= len(layers):
        raise DermError(f"pruning: kept blocks {list(kept)} are not rising positions among {len(layers)} blocks")
    for unit in absent:
        block = layers[span(unit)[0] // 2]
        module, norm = PARTS[unit.partition(".")[2]]
        block.set_submodule(module, AbsentAttention() if module == "self_attn" else Absent())
        block.set_submodule(norm, nn.Identity())
    _set_blocks(model, [layers[i] for i in kept])


def _set_blocks(model, layers: Sequence[nn.Module]) -> None:
    attentions = [layer.self_attn for layer in layers if not isinstance(layer.self_attn, Absent)]
    if not attentions:
        raise DermError("pruning: a model without any attention cannot generate; keep one")
    for i, attention in enumerate(attentions):  # a cache counts attentions, and asks the first for its length
        attention.layer_idx = i
    models.decoder(model).layers = nn.ModuleList(layers)
    for config in {id(c): c for c in (model.config.text_config, models.decoder(model).config)}.values():
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: len(layers)]


def lacking(model) -> tuple[str, ...]:
    """Sublayers that a model's blocks lack, by position."""
    parts = [block.get_submodule(PARTS[name][0]) for block in models.blocks(model) for name in SUBLAYERS]
    return tuple(name_of(s) for s, part in enumerate(parts) if isinstance(part, Absent))


def apply_step(model, step: dict, kept: Sequence[int]) -> tuple[int, ...]:
    """Apply a recipe's step to a model of these original blocks; returns those that are left."""
    if gone := sorted(set(step["kept"]) - set(kept)):
        raise DermError(f"recipe: blocks {gone} are to be kept but were pruned before")
    before = [name_of(2 * kept[first // 2] + first % 2) for first, _ in map(span, lacking(model))]
    told = set(step.get("absent", ()))
    if gone := [unit for unit in before if unit not in told and span(unit)[0] // 2 in step["kept"]]:
        raise DermError(f"recipe: {gone} were removed before; a later prune step lists them as absent too")
    apply(model, *left(len(kept), step_units(step, kept)))
    return tuple(step["kept"])


def step_units(step: dict, kept: Sequence[int]) -> list[Unit]:
    """What a recipe's step removes from a model of these original blocks, by position."""
    absent = [name_of(2 * kept.index(first // 2) + first % 2) for first, _ in map(span, step.get("absent", ()))]
    return [i for i, block in enumerate(kept) if block not in set(step["kept"])] + absent


@contextmanager
def without(model, removed: Sequence[Unit]) -> Iterator[None]:
    """The model with these units taken out, put back at the end."""
    layers = list(models.blocks(model))
    modules = [dict(layer.named_children()) for layer in layers]
    types = getattr(models.decoder(model).config, "layer_types", None)
    try:
        apply(model, *left(len(layers), removed))
        yield
    finally:
        for layer, held in zip(layers, modules, strict=True):
            for name, module in held.items():
                layer.set_submodule(name, module)
        _set_blocks(model, layers)
        if types:
            model.config.text_config.layer_types = models.decoder(model).config.layer_types = types


def read_plans(folder: Path, criteria: Sequence[str]) -> list[Plan]:
    """The plans of these criteria, as stage 03 left them in plans.json."""
    known = json.loads((Path(folder) / "plans.json").read_text("utf-8"))
    if unknown := [name for name in criteria if name not in known]:
        raise DermError(f"criteria {unknown}: stage 03 has plans for {', '.join(sorted(known))}")
    return [Plan.from_dict(known[name]) for name in criteria]


def depths(of_32: Sequence[int], plan: Plan) -> list[int]:
    """Depths of the paper's 32 blocks as the same fractions of this model's, as far as the plan reaches.

    Says which it does not reach; DermError if it is none.
    """
    asked = sorted({paper_depth(n, plan.blocks) for n in of_32})
    found = [depth for depth in asked if depth <= plan.most]
    if asked and not found:
        advice = "set iterative_blocks higher" if "iterative" in plan.criterion else "set depths lower"
        far = f"pruning plan {plan.criterion} goes as far as {plan.most} units, and depths begin at {asked[0]}"
        raise DermError(f"{far}; {advice}")
    if beyond := asked[len(found) :]:
        print(f"plan {plan.criterion} goes as far as {plan.most} units: depths {beyond} are left out", flush=True)
    return found


def choose(scores: pd.DataFrame, plan: Plan, fixed: int = 0, *, floor: float = 25.0, share: float = 1 / 3) -> dict:
    """Operating depth, where about a third of the score above the floor is gone, and one half as deep again.

    `scores` has blocks_removed and score (percent) on development items. As in the paper, where 80.12 -> 62.50 over a
    floor of 25 at 6 of 32. `fixed` (of 32) overrules; where no depth loses between half and one and a half times that
    share, the paper's fractions are taken.
    """
    most = plan.most
    paper = {name: min(paper_depth(n, plan.blocks), most) for name, n in PAPER_DEPTHS.items()}
    paper["deeper"] = min(max(paper["deeper"], paper["operating"] + 1), most)
    known = scores.dropna(subset="score").set_index("blocks_removed").score
    if known.empty and not fixed:
        return paper | {"why": "there are no scores, so the paper's fractions"}
    if fixed:
        depth, why = min(paper_depth(fixed, plan.blocks), most), "set by the parameter operating_blocks"
        why += ", as far as the plan goes" if paper_depth(fixed, plan.blocks) > most else ""
    elif (above := known.get(0, floor) - floor) <= 0:
        return paper | {"why": "no score above the floor: the paper's fractions"}
    else:
        lost = (known[0] - known.drop(0)) / above
        lost = lost[(lost >= share / 2) & (lost <= 1.5 * share)]
        if lost.empty:
            return paper | {"why": "no depth loses about a third of the score above the floor: the paper's fractions"}
        depth = int((lost - share).abs().idxmin())
        why = f"removing {depth} blocks loses {lost[depth]:.0%} of the development score above the floor"
    return {"operating": depth, "deeper": min(int(1.5 * depth + 0.5), most), "why": why}
