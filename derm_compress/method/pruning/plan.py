"""Depth pruning: which blocks go, and in what order, is data. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.files import read_json
from derm_compress.model.units import Unit, left


@dataclass(frozen=True)
class Plan:
    """Which units of one model go, least important first; protected blocks are never among them.

    `order` nests: n units are its first n. A plan of runs has `starts` instead: n blocks go from
    starts[n - 1] on. `scores` belong to the order's units when each was chosen; no fingerprint: for
    any model of as many blocks.
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
        try:
            object.__setattr__(self, "order", tuple(Unit.of(unit) for unit in self.order))
            self._check()
        except ValueError as error:
            raise DermError(f"pruning plan {self.criterion}: {error}") from error

    def _check(self) -> None:
        runs = [range(start, start + n) for n, start in enumerate(self.starts, 1)]
        named = {unit.block for unit in self.order}.union(*runs)
        free = set(range(self.blocks)) - set(self.protected)
        if wrong := sorted(named - free):
            raise ValueError(f"blocks {wrong} are to go, but protected or beyond {self.blocks - 1}")
        gone = set()
        for unit in self.order:
            if gone.intersection(unit.sublayers):
                raise ValueError(f"{unit} stands there twice")
            gone.update(unit.sublayers)

    @property
    def most(self) -> int:
        """How many units can go."""
        return len(self.starts or self.order)

    def removed(self, n: int) -> tuple[Unit, ...]:
        if not 0 <= n <= self.most:
            raise DermError(
                f"pruning plan {self.criterion}: {n} units cannot be removed; of {self.blocks} "
                f"blocks, {len(self.protected)} protected, it names 0 to {self.most} units to go"
            )
        if self.starts and n:
            start = self.starts[n - 1]
            return tuple(Unit(block) for block in range(start, start + n))
        return tuple(sorted(self.order[:n]))

    def kept(self, n: int) -> tuple[int, ...]:
        """Original indices of the blocks of which something stays when n units go."""
        return left(self.blocks, self.removed(n))[0]

    def absent(self, n: int) -> tuple[Unit, ...]:
        """Sublayers that the kept blocks lack."""
        return left(self.blocks, self.removed(n))[1]

    def check(self, *, blocks: int, fingerprint: str) -> None:
        """Refuse a model that the plan was not made for."""
        if blocks != self.blocks or (self.fingerprint and fingerprint != self.fingerprint):
            raise DermError(
                f"pruning plan {self.criterion}: made for a model of {self.blocks} blocks and "
                f"fingerprint {self.fingerprint or 'of any kind'}, not for this one "
                f"({blocks} blocks, {fingerprint}); rank its blocks first"
            )

    def to_dict(self) -> dict:
        return asdict(self) | {"order": [unit.plain for unit in self.order]}

    @staticmethod
    def from_dict(value: dict) -> Plan:
        tuples = {name: tuple(part) for name, part in value.items() if isinstance(part, list)}
        return Plan(**value | tuples)


def published_plan() -> Plan:
    """The order of the paper's published code, for LLaVA-1.5-7B: 14 blocks."""
    return Plan.from_dict(read_json(Path(__file__).with_name("published_plan.json")))


def read_plan(name: str) -> Plan:
    """`published`, a plan's JSON file, or FILE:RANKING for one of stage 03's plans.json."""
    if name == "published":
        return published_plan()
    file, ranking = name, ""
    if not Path(name).is_file() and ":" in name:
        file, _, ranking = name.rpartition(":")
    try:
        told = read_json(Path(file))
        if ranking:
            told = told[ranking]
        if "order" not in told:
            raise DermError(
                f"pruning plan {name}: holds several; "
                f"name one as {name}:RANKING, of {', '.join(told)}"
            )
        return Plan.from_dict(told)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise DermError(
            f"pruning plan {name}: neither `published` nor a plan's JSON file, nor FILE:RANKING "
            f"of plans.json ({type(error).__name__}: {error})"
        ) from error


def read_plans(folder: Path, criteria: Sequence[str]) -> list[Plan]:
    """The plans of these criteria, as stage 03 left them in plans.json."""
    known = read_json(Path(folder) / "plans.json")
    if unknown := [name for name in criteria if name not in known]:
        raise DermError(f"criteria {unknown}: stage 03 has plans for {', '.join(sorted(known))}")
    return [Plan.from_dict(known[name]) for name in criteria]


def read_control(folder: Path) -> Plan | None:
    """The run of blocks that stage 03 left as control_plan.json; None of a model without values."""
    told = read_json(Path(folder) / "control_plan.json")
    return Plan.from_dict(told) if told else None
