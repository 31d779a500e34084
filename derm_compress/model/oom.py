"""When a GPU's memory is exceeded: half as many at once, and on; or which parameter to set."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

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
        if batch_size == 1:
            advice = "free the GPU, or take a smaller model"
            raise DermError(f"{what}: out of GPU memory with a batch of one; {advice}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        fewer = batch_size // 2
        say(f"{what}: out of GPU memory with {batch_size} at once; going on with {fewer}")
        batch_size = fewer


@contextlib.contextmanager
def naming(parameters: str, what: str) -> Iterator[None]:
    """DermError that names the parameters to lower, where halving a step would change it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DermError(
            f"{what}: out of GPU memory; set {parameters} lower and run again"
        ) from error
