"""Depth pruning: which blocks go is data (a plan), and applying it leaves an ordinary, smaller model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.model.removal import SUBLAYERS, Unit, left, span


def _is_unit(unit, blocks: int) -> bool:
    """Whether it names a block of the model, or the attention or MLP of one."""
    block, dot, part = str(unit).partition(".")
    written = isinstance(unit, str) == bool(dot) and not isinstance(unit, bool | float)
    return written and block.isdecimal() and int(block) < blocks and (not dot or part in SUBLAYERS)


def _repeated(order: Sequence[Unit]) -> list[Unit]:
    """Units whose sublayers an earlier one has already."""
    spans = [set(range(*span(unit))) for unit in order]
    return [unit for i, unit in enumerate(order) if spans[i] & set().union(*spans[:i])]


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
        if wrong := [
            unit for unit in (*self.order, *self.starts) if not _is_unit(unit, self.blocks)
        ]:
            raise DermError(f"pruning plan {self.criterion}: {wrong[0]!r} is no unit; {known}")
        if wrong := _repeated(self.order):
            raise DermError(
                f"pruning plan {self.criterion}: {wrong[0]!r} stands there twice; {known}"
            )
        runs = [set(range(start, start + n)) for n, start in enumerate(self.starts, 1)]
        named = {span(unit)[0] // 2 for unit in self.order}.union(*runs)
        if wrong := sorted(
            named & set(self.protected) | {block for block in named if block >= self.blocks}
        ):
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


def published_plan() -> Plan:
    """The removal order of the paper's published code for its fine-tuned LLaVA-1.5-7B; it names 14 blocks."""
    return Plan.from_dict(
        json.loads((Path(__file__).parent / "published_plan.json").read_text("utf-8"))
    )


def read_plan(name: str) -> Plan:
    """`published`, a plan's JSON file, or FILE:RANKING for one of stage 03's plans.json."""
    if name == "published":
        return published_plan()
    file, _, ranking = (name, "", "") if Path(name).is_file() else name.rpartition(":")
    try:
        told = json.loads(Path(file or name).read_text("utf-8"))
        told = told[ranking] if ranking else told
        if "order" not in told:
            raise DermError(
                f"pruning plan {name}: holds several; name one as {name}:RANKING, of {', '.join(told)}"
            )
        return Plan.from_dict(told)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        told = "neither `published` nor a plan's JSON file, nor FILE:RANKING of plans.json"
        raise DermError(f"pruning plan {name}: {told} ({type(error).__name__}: {error})") from error


def read_plans(folder: Path, criteria: Sequence[str]) -> list[Plan]:
    """The plans of these criteria, as stage 03 left them in plans.json."""
    known = json.loads((Path(folder) / "plans.json").read_text("utf-8"))
    if unknown := [name for name in criteria if name not in known]:
        raise DermError(f"criteria {unknown}: stage 03 has plans for {', '.join(sorted(known))}")
    return [Plan.from_dict(known[name]) for name in criteria]
