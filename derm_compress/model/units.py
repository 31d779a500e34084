"""What can be removed from a decoder: a block, or the attention or MLP of one. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

SUBLAYERS = ("attention", "mlp")  # of a block, in the order of their use
TEXT = re.compile(r"(?P<block>[0-9]+)(\.(?P<part>attention|mlp))?")


@dataclass(frozen=True)
class Unit:
    """A block, or with `part` its attention or MLP alone.

    Units sort by their first sublayer, the shorter first. Written "12" and "12.attention"; `plain`
    is what JSON files hold.
    """

    block: int
    part: str = ""

    @classmethod
    def of(cls, told: Unit | int | str) -> Unit:
        """The unit of 12, "12" or "12.attention"; ValueError for anything else."""
        if isinstance(told, Unit):
            return told
        found = TEXT.fullmatch(str(told))
        if not found:
            raise ValueError(f"{told!r} is no unit; units are N, N.attention and N.mlp")
        return cls(int(found["block"]), found["part"] or "")

    @property
    def span(self) -> tuple[int, int]:
        """Its first sublayer and the one after its last, counted over all blocks, two a block."""
        if not self.part:
            return 2 * self.block, 2 * self.block + 2
        first = 2 * self.block + SUBLAYERS.index(self.part)
        return first, first + 1

    @property
    def sublayers(self) -> range:
        return range(*self.span)

    @property
    def plain(self) -> int | str:
        """12 or "12.attention"."""
        return str(self) if self.part else self.block

    def at(self, block: int) -> Unit:
        """The same part of another block."""
        return replace(self, block=block)

    def __str__(self) -> str:
        return f"{self.block}.{self.part}" if self.part else str(self.block)

    def __lt__(self, other: Unit) -> bool:
        return self.span < other.span


def left(blocks: int, removed: Iterable[Unit]) -> tuple[tuple[int, ...], tuple[Unit, ...]]:
    """Blocks of which something is left without these units, and the sublayers that those lack."""
    gone = {s for unit in removed for s in unit.sublayers}
    kept = tuple(b for b in range(blocks) if not {2 * b, 2 * b + 1} <= gone)
    lacking = [Unit(s // 2, SUBLAYERS[s % 2]) for s in sorted(gone)]
    return kept, tuple(unit for unit in lacking if unit.block in kept)
