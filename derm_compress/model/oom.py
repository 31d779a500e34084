"""When a GPU's memory is exceeded: half as many at once, and on; or which parameter to set."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from derm_compress.errors import DermError
from derm_compress.progress import say


def halved(work: Callable[[int], object], batch_size: int, what: str):
    """work(batch_size), begun again with half as many at once where memory was exceeded.

    DermError if one is too many. What goes on with another batch size may differ in the last digits
    of half precision.
    """
    while True:
        # suppressed rather than caught: its traceback would keep the tensors alive
        with contextlib.suppress(torch.OutOfMemoryError):
            return work(batch_size)
        batch_size = fewer(batch_size, what)


def in_parts(
    work: Callable[[Sequence], object], batches: Iterable[Sequence], what: str
) -> Iterator[tuple]:
    """(part, work(part)) for all batches, halved where memory is exceeded, and later ones alike."""
    most = None
    for batch in batches:
        start = 0
        while start < len(batch):
            part = batch[start : start + (most or len(batch))]
            done = None
            with contextlib.suppress(torch.OutOfMemoryError):
                done = (work(part),)
            if done:
                yield part, done[0]
                start += len(part)
            else:
                most = fewer(len(part), what)


def fewer(size: int, what: str) -> int:
    """Half of a batch that was too large, with memory given back; DermError for a batch of one."""
    if size == 1:
        raise DermError(
            f"{what}: out of GPU memory with a batch of one; free the GPU, or take a smaller model"
        )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(f"{what}: out of GPU memory with {size} at once; going on with {size // 2}")
    return size // 2


@contextlib.contextmanager
def naming(parameters: str, what: str) -> Iterator[None]:
    """DermError that names the parameters to lower, where halving a step would change it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DermError(
            f"{what}: out of GPU memory; set {parameters} lower and run again"
        ) from error
