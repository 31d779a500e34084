"""One token through a 4-bit linear (torch's int4 kernel) against fp32, at LLaVA-7B's shapes.

One thread, the two sides by turns, medians of wall time; both go round as many copies of their
layer as it takes for the 4-bit ones to outgrow the caches, as in a model. Last line: one JSON
object; `ratio` is the smallest of the decoder's shapes (the head, which stays unquantized, is for
information), `error` the relative difference from the decoded weights in fp32. A status of 1 if the
ratio is below LEAST.
"""

import copy
import json
import os
import statistics
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn

from derm_compress.method.quantization.grids import IntegerGrid

SHAPES = {
    "4096x4096": (4096, 4096),
    "11008x4096": (11008, 4096),
    "4096x11008": (4096, 11008),
    "head": (32064, 4096),
}
GROUP, ROUNDS = 64, 3
LEAST = 2
CACHES = 2**27  # bytes that all copies of a 4-bit layer take, at least


def seconds(module, x):
    begun = time.perf_counter()
    module(x)
    return time.perf_counter() - begun


@torch.inference_mode()
def compare(out, into):
    """ratio, milliseconds and error of one shape."""
    linear = nn.Linear(into, out, bias=False)
    packed, x = IntegerGrid(4, GROUP).packed(linear), torch.randn(1, 1, into)
    expected = nn.functional.linear(x, packed.dequantized())
    error = ((packed(x) - expected).norm() / expected.norm()).item()
    copies = range(max(2, CACHES // packed.codes.nbytes))
    pairs = [(copy.deepcopy(linear), copy.deepcopy(packed)) for _ in copies]
    runs = [[seconds(module, x) for module in pair] for pair in pairs * (1 + ROUNDS)]
    timed = zip(*runs[len(pairs) :], strict=True)  # the first round warms up
    full, four = (statistics.median(column) * 1000 for column in timed)
    return {"ratio": full / four, "fp32_ms": full, "w4_ms": four, "error": error}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: compare(*shape) for name, shape in SHAPES.items()}
    for name, told in found.items():
        times = f"fp32 {told['fp32_ms']:.2f} ms, 4 bits {told['w4_ms']:.2f} ms"
        print(f"{name}: {times}, error {told['error']:.4f}")
    smallest = min(told["ratio"] for name, told in found.items() if name != "head")
    print(json.dumps({"ratio": smallest, "shapes": found}))
    sys.exit(smallest < LEAST)
