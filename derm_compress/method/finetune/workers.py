"""Work side by side, each piece in a process of its own that ends with its parent. No torch."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from derm_compress.errors import DermError


def side_by_side(work: Callable, pieces: Sequence) -> None:
    """work(piece) for all pieces at once; the first failure ends the others, and is raised."""
    pool = ProcessPoolExecutor(
        len(pieces),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=end_with_parent,
        max_tasks_per_child=1,
    )
    with pool:
        running = [pool.submit(work, piece) for piece in pieces]
        try:
            for piece in as_completed(running):
                piece.result()
        except BrokenProcessPool as error:
            advice = "memory may have run out; free some, or set processes lower, and run again"
            raise DermError(f"a worker process was killed: {advice}") from error
        except BaseException:
            for process in multiprocessing.active_children():  # which may wait for the failed one
                process.terminate()
            raise


def end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing beside the resumed run."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
