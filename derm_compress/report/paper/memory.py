"""The memory plan beside every VRAM figure of the paper's Tables 1, 3 and 4, in both units.

The paper writes GB and does not say what of a process it counts; its figures follow the weights.
Which depth a row means is told by its printed number of parameters, since its texts disagree.
"""

from __future__ import annotations

import pandas as pd

from derm_compress.report.paper import model, numbers

LARGE, PACKED = 3.0, 0.30  # bounds of the 16-bit rows in percent, of the 4-bit ones in GiB
DIGIT = 0.1  # the last that the paper prints


def printed() -> pd.DataFrame:
    """The figures as printed: table, setting, quantizer, paper_params_b, paper_vram, the depth that
    the parameters mean, and all `depths` that the paper gives the row's model."""
    one, three, four = (numbers.table(number).assign(table=number) for number in (1, 3, 4))
    one["setting"] = [f"{n} blocks removed" for n in one.blocks_removed]
    three["setting"] = three.paper_model
    three["paper_params_b"] = three.paper_model.map(model.billions)
    rows = pd.concat([one, three, four], ignore_index=True).fillna({"quantizer": ""})
    rows["blocks_removed"] = rows.paper_params_b.map(model.blocks_gone)
    rows["depths"] = rows.role.map(rows.groupby("role").blocks_removed.agg(set))
    return rows


def beside_plan() -> pd.DataFrame:
    """One row a printed figure: the planned weights in both units, how far apart they are, what the
    figure can be, and the planned peak of one question."""
    rows = printed()
    keys = list(zip(rows.blocks_removed, rows.quantizer, strict=True))
    rows["plan_gib"] = [model.weights_gib(*key) for key in keys]
    rows["peak_gib"] = [model.peak_gib(*key) for key in keys]
    rows["plan_gb"] = rows.plan_gib * model.GB
    rows["apart_gib"] = rows.paper_vram - rows.plan_gib
    rows["apart_percent"] = 100 * rows.apart_gib / rows.paper_vram
    rows["packed"] = rows.quantizer != ""
    near = rows.apart_gib.abs() <= PACKED
    rows["within"] = near.where(rows.packed, rows.apart_percent.abs() <= LARGE)
    rows["explanation"] = [explain(row) for row in rows.itertuples()]
    return rows


def explain(row) -> str:
    """What a printed figure can be: the weights, another unit or depth, or part of a peak."""
    if abs(row.apart_gib) < DIGIT:
        return "the weights, to the last digit printed"
    if abs(row.paper_vram - row.plan_gb) < DIGIT:
        return "the weights, in GB of 10^9 bytes"
    others = row.depths - {row.blocks_removed} if isinstance(row.depths, set) else ()
    for removed in others:
        gib = model.weights_gib(removed, row.quantizer)
        for unit, size in (("GiB", gib), ("GB", gib * model.GB)):
            if abs(row.paper_vram - size) < DIGIT:
                return f"the weights with {removed} blocks removed, in {unit}"
    share = row.apart_gib / (row.peak_gib - row.plan_gib)
    if share <= 0:
        return "less than the weights in either unit"
    return f"the weights and {share:.0%} of the cache and activations of one question"


def worst(rows: pd.DataFrame) -> dict[str, float]:
    """The largest distances, read as GiB and as GB: at 16 bits in percent, at 4 in GiB."""
    large, packed = rows[~rows.packed], rows[rows.packed]
    return {
        "fp16_gib": large.apart_percent.abs().max(),
        "fp16_gb": (100 * (1 - large.plan_gb / large.paper_vram)).abs().max(),
        "packed_gib": packed.apart_gib.abs().max(),
        "packed_gb": (packed.paper_vram - packed.plan_gb).abs().max() / model.GB,
    }
