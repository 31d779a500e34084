"""Work side by side, each piece in a process of its own that ends with its parent. No torch."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from derm_compress.errors import DermError


def side_by_side(work: Callable, pieces: Sequence, *, processes: int) -> None:
    """work(piece) for all pieces; the first failure is raised when all have ended."""
    pool = ProcessPoolExecutor(
        min(processes, len(pieces)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=end_with_parent,
        max_tasks_per_child=1,
    )
    with pool:
        running = [pool.submit(work, piece) for piece in pieces]
    for piece in running:
        try:
            piece.result()
        except BrokenProcessPool as error:
            advice = "memory may have run out; set processes lower and run again"
            raise DermError(f"a worker process was killed: {advice}") from error


def end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing beside the resumed run."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
