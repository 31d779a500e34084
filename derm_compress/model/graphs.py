"""Work that a GPU records once, as a CUDA graph, and replays: a small model waits for launches."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import torch

from derm_compress.errors import first_line
from derm_compress.progress import say

Tensors = tuple[torch.Tensor, ...]


class Recorded:
    """A function of tensors, on a GPU recorded when it meets inputs of the same shapes again.

    It must not look at values on the CPU, nor keep anything but in tensors that are there before.
    What it returns is overwritten by its next call. On a CPU, where recording fails, and from where
    memory is exceeded on, it is called as it is.
    """

    def __init__(self, function: Callable[..., Tensors], what: str):
        self.function, self.what = function, what
        self.ways: dict[tuple, Callable] = {}
        self.pool = None  # of memory, for the recordings of all shapes: one runs at a time
        self.given_up = False

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        if self.given_up or inputs[0].device.type != "cuda":
            return self.function(*inputs)
        shapes = tuple((tuple(each.shape), each.dtype) for each in inputs)
        first = shapes not in self.ways  # as it is, which also makes what later ones find
        self.ways.setdefault(shapes)
        if first and not self.pool:
            return self.function(*inputs)
        # suppressed rather than caught: its traceback would keep the tensors alive
        with contextlib.suppress(torch.OutOfMemoryError):
            return self.function(*inputs) if first else self._replayed(shapes, inputs)
        self.ways, self.pool, self.given_up = {}, None, True  # recordings hold memory of their own
        gc.collect()
        torch.cuda.empty_cache()
        say(f"{self.what}: without CUDA graphs from here on, for want of memory")
        return self.function(*inputs)

    def _replayed(self, shapes: tuple, inputs: Tensors) -> Tensors:
        if self.ways[shapes] is None:
            self.ways[shapes] = self._recorded(inputs)
        return self.ways[shapes](*inputs)

    def _recorded(self, inputs: Tensors) -> Callable:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            return Recording(self.function, inputs, self.pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            say(f"{self.what}: without a CUDA graph ({first_line(error)})")
            return self.function


class Recording:
    """A function's work for inputs of these shapes, as a CUDA graph."""

    def __init__(self, function: Callable[..., Tensors], inputs: Tensors, pool):
        self.inputs = [each.clone() for each in inputs]
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # once where it is recorded, which makes work space there
            function(*self.inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=beside):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.outputs
