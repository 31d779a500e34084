"""Depth pruning: which blocks go is data (a plan), and applying it leaves an ordinary, smaller model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from torch import nn

from derm_compress import models
from derm_compress.errors import DermError

PAPER_DEPTHS = {"operating": 6, "deeper": 9}  # of 32 blocks
SUBLAYERS = ("attention", "mlp")  # of a block, in the order of their use

Unit = int | str  # what can be removed: block 12, "12.attention" or "12.mlp"


def span(unit: Unit) -> tuple[int, int]:
    """First sublayer of a unit and the one after its last, counted over all blocks, two a block."""
    block, _, part = str(unit).partition(".")
    first = 2 * int(block) + (SUBLAYERS.index(part) if part else 0)
    return first, first + (1 if part else 2)


@dataclass(frozen=True)
class Plan:
    """Removal order, least important block first, for one model; protected blocks are never in it."""

    criterion: str
    order: tuple[int, ...]
    protected: tuple[int, ...]
    blocks: int
    fingerprint: str

    def removed(self, n: int) -> tuple[int, ...]:
        if not 0 <= n <= len(self.order):
            raise DermError(
                f"pruning plan {self.criterion}: {n} blocks cannot be removed; {self.blocks} blocks less "
                f"{len(self.protected)} protected leave 0 to {len(self.order)}"
            )
        return tuple(sorted(self.order[:n]))

    def kept(self, n: int) -> tuple[int, ...]:
        """Original indices of the blocks that stay when the n least important go."""
        gone = set(self.removed(n))
        return tuple(b for b in range(self.blocks) if b not in gone)

    def check(self, *, blocks: int, fingerprint: str) -> None:
        """Refuse a model that the plan was not made for."""
        if (blocks, fingerprint) != (self.blocks, self.fingerprint):
            raise DermError(
                f"pruning plan {self.criterion}: made for a model of {self.blocks} blocks and fingerprint "
                f"{self.fingerprint}, not for this one ({blocks} blocks, {fingerprint}); rank its blocks first"
            )

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(value: dict) -> Plan:
        return Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def apply(model, kept: Sequence[int]) -> None:
    """Keep the blocks at these current positions, in place; config, `layer_idx` and weights agree afterwards.

    Without the renumbering cached generation fails, without the config a reload gets random blocks.
    """
    layers = models.blocks(model)
    if sorted(set(kept)) != list(kept) or not kept or kept[-1] >= len(layers):
        raise DermError(f"pruning: kept blocks {list(kept)} are not rising positions among {len(layers)} blocks")
    _set_blocks(model, [layers[i] for i in kept])


def _set_blocks(model, layers: Sequence[nn.Module]) -> None:
    models.decoder(model).layers = nn.ModuleList(layers)
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    for config in {id(c): c for c in (model.config.text_config, models.decoder(model).config)}.values():
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: len(layers)]


@contextmanager
def without(model, removed: Sequence[int]) -> Iterator[None]:
    """The model with these blocks taken out, put back at the end."""
    layers = list(models.blocks(model))
    types = getattr(models.decoder(model).config, "layer_types", None)
    try:
        apply(model, [i for i in range(len(layers)) if i not in set(removed)])
        yield
    finally:
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
    """Depths of the paper's 32 blocks as the same fractions of this model's, as far as the plan reaches."""
    return sorted({d for n in of_32 if (d := paper_depth(n, plan.blocks)) <= len(plan.order)})


def paper_depth(of_32: int, blocks: int) -> int:
    """The same fraction of another model's blocks, at least one."""
    return max(1, int(of_32 / 32 * blocks + 0.5))


def choose(scores: pd.DataFrame, plan: Plan, fixed: int = 0, *, floor: float = 25.0, share: float = 1 / 3) -> dict:
    """Operating depth, where about a third of the score above the floor is gone, and one half as deep again.

    `scores` has blocks_removed and score (percent) on development items. As in the paper, where 80.12 -> 62.50 over a
    floor of 25 at 6 of 32. `fixed` (of 32) overrules; where no depth loses between half and one and a half times that
    share, the paper's fractions are taken.
    """
    most = len(plan.order)
    paper = {name: min(paper_depth(n, plan.blocks), most) for name, n in PAPER_DEPTHS.items()}
    paper["deeper"] = min(max(paper["deeper"], paper["operating"] + 1), most)
    known = scores.dropna(subset="score").set_index("blocks_removed").score
    if fixed:
        depth, why = min(paper_depth(fixed, plan.blocks), most), "set by the parameter operating_blocks"
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
