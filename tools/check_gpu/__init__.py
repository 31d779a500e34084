"""Checks of what tests on a CPU cannot see: `make check-gpu`.

A check is a function of (device, folder) with @check in one of MODULES. It asserts facts, gives
back in a line what else is worth knowing, and raises Skip where it cannot be tried.

What no check is for: plans of the run files and a T4 that reports 14.56 GiB (tests on a CPU do),
masks (answers in fp32 by a T4's kernels see them), a block's errors at 7B (measured in the pass
that answers, with one model), and what is how fast (benchmarks/gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

MODULES = ("answering", "training", "quantizing", "shapes_7b", "studies")
CHECKS: dict[str, Check] = {}


class Skip(Exception):
    """Why a check cannot be tried here."""


@dataclass(frozen=True)
class Check:
    """seconds: its limit. alone: it may take all of a T4's memory, so one such goes at a time."""

    work: Callable[[str, Path], str]
    seconds: int
    alone: bool

    @property
    def name(self) -> str:
        return self.work.__name__


def check(seconds: int, *, alone: bool = False):
    """Makes a function one of CHECKS."""

    def keep(work):
        CHECKS[work.__name__] = Check(work, seconds, alone)
        return work

    return keep


def read_checks() -> dict[str, Check]:
    for module in MODULES:
        import_module(f"{__name__}.{module}")
    return CHECKS
