"""The integer programme: a width for every linear, least cost within so many bytes.

min sum cost[i, b] x[i, b], where each i has one b and sum bytes[i, b] x[i, b] <= room. No torch.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp

from derm_compress.errors import DermError

TIED = ("q_proj", "k_proj", "v_proj")  # read one input; some kernels want one width for them


def tied_unit(block: int, linear: str, *, tied: bool) -> str:
    """What gets one width: the linear, or the block's queries, keys and values together."""
    name = linear.rpartition(".")[2]
    return f"{block}.qkv" if tied and name in TIED else f"{block}.{linear}"


def best_bits(options: pd.DataFrame, room: int, *, tied: bool = True) -> dict[str, int]:
    """{"block.linear": bits} from a row an option: block, linear, bits, cost, bytes.

    DermError, with the least that is needed, where nothing fits.
    """
    units = [
        tied_unit(block, linear, tied=tied)
        for block, linear in zip(options.block, options.linear, strict=True)
    ]
    table = options.assign(unit=units).groupby(["unit", "bits"], sort=False, as_index=False)
    table = table[["cost", "bytes"]].sum()
    least = int(table.groupby("unit").bytes.min().sum())
    if least > room:
        raise DermError(f"allocation: needs {least} bytes for its linears at the fewest bits")
    chosen = table[solved(table, room)].set_index("unit").bits
    named = options[["block", "linear"]].assign(unit=units).drop_duplicates()
    return {f"{row.block}.{row.linear}": int(chosen[row.unit]) for row in named.itertuples()}


def solved(table: pd.DataFrame, room: int) -> np.ndarray:
    """Which rows (unit, cost, bytes) are taken, one a unit."""
    step = math.gcd(*table.bytes)  # small whole numbers, so that no tolerance hides a byte
    places, _ = pd.factorize(table.unit)
    one_each = np.arange(places.max() + 1)[:, None] == places
    largest = table.cost.max() or 1.0
    found = milp(
        table.cost / largest,
        integrality=np.ones(len(table)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(table.bytes.to_numpy()[None] // step, 0, room // step),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": 60.0},
    )
    if found.x is None:
        raise DermError(f"allocation: the programme has no solution ({found.message})")
    taken = found.x > 0.5
    assert table.bytes[taken].sum() <= room
    return taken
