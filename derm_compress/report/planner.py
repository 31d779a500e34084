"""The memory plan beside every VRAM figure that the paper prints (Tables 1 to 4), in both units. No torch.

The paper writes GB and does not say what of a process it counts; its figures follow the weights. Which depth a row
means is told by its printed number of parameters, since the paper's own texts disagree.
"""

from __future__ import annotations

import itertools
import re

import pandas as pd

from derm_compress.model import memory, shapes
from derm_compress.report import paper, paper_model

TABLE = [
    "table", "setting", "paper_params_b", "blocks_removed", "method", "bits", "paper_vram", "plan_gib", "plan_gb",
    "apart_gib", "apart_percent", "within", "explanation", "peak_gib",
]  # fmt: skip
LARGE, PACKED = 3.0, 0.30  # bounds of the fp16 rows in percent, of the 4-bit ones in GiB
DIGIT = 0.1  # the last that the paper prints
ANSWERING = {"batch": 1, "prompt_tokens": memory.QUESTION, "new_tokens": memory.ANSWER}
TRAINING = [  # settings tried for Table 2: conversations a step, checkpointing, bytes of what is not 4-bit
    {"batch": batch, "checkpointing": kept, "rest": rest}
    for batch, kept, rest in itertools.product((1, 2, 4, 8, 16), (False, True), (2, 4))
]
GB = memory.GIB / 1e9


def removed_for(arch: shapes.Architecture, params_b: float) -> int:
    """Blocks that a model of so many billion parameters lacks, to the nearest."""
    return round(
        (arch.parameters() / 1e9 - params_b) * 1e9 / (arch.parameters() - arch.parameters(1))
    )


def printed(arch: shapes.Architecture) -> pd.DataFrame:
    """The VRAM figures of Tables 1, 3 and 4: TABLE's first columns, and the depths that the paper gives one model."""
    one, three, four = (paper.table(number) for number in (1, 3, 4))
    one["setting"] = [f"{n} blocks removed" for n in one.blocks_removed]
    three["setting"] = three.paper_model
    three["paper_params_b"] = [
        float(re.search(r"([\d.]+) ?B", name)[1]) for name in three.paper_model
    ]
    four["method"] = four.bits.map({4: "awq"})
    rows = pd.concat(
        [f.assign(table=n) for n, f in ((1, one), (3, three), (4, four))], ignore_index=True
    )
    rows = rows.assign(method=rows.method.fillna("fp16"))
    rows["bits"] = [16 if method == "fp16" else 4 for method in rows.method]
    rows["blocks_removed"] = [removed_for(arch, size) for size in rows.paper_params_b]
    depths = rows.groupby("role").blocks_removed.agg(lambda counts: tuple(sorted(set(counts))))
    rows["depths"] = rows.role.map(depths)
    return rows[[*TABLE[:7], "depths"]]


def weights_gib(arch: shapes.Architecture, row, removed: int) -> float:
    """Planned weights of a row's format with so many blocks removed."""
    form = paper_model.format_of(row.method)
    return sum(memory.plan_weights(arch, blocks_removed=removed, form=form).values())


def explain(arch: shapes.Architecture, row, plan: float, peak: float) -> str:
    """What a printed figure can be: the weights, another unit or depth, or part of what a running model takes."""
    if abs(row.paper_vram - plan) < DIGIT:
        return "the weights, to the last digit printed"
    if abs(row.paper_vram - plan * GB) < DIGIT:
        return "the weights, in GB of 10^9 bytes"
    others = set(row.depths) - {row.blocks_removed} if isinstance(row.depths, tuple) else ()
    for removed, (unit, factor) in itertools.product(others, (("GiB", 1), ("GB", GB))):
        if abs(row.paper_vram - weights_gib(arch, row, removed) * factor) < DIGIT:
            return f"the weights with {removed} blocks removed, in {unit}"
    share = (row.paper_vram - plan) / (peak - plan)
    running = "the cache and activations of one question"
    return (
        f"the weights and {share:.0%} of {running}"
        if share > 0
        else "less than the weights in either unit"
    )


def inference(arch: shapes.Architecture) -> pd.DataFrame:
    """TABLE for Tables 1, 3 and 4: paper minus plan, whether it is within the bound, the peak of one question."""
    rows = []
    for row in printed(arch).itertuples(index=False):
        form = {
            "blocks_removed": row.blocks_removed,
            "form": paper_model.format_of(row.method),
        }
        plan = weights_gib(arch, row, row.blocks_removed)
        peak = sum(memory.plan_peak(arch, **ANSWERING, **form).values())
        apart = row.paper_vram - plan
        percent = 100 * apart / row.paper_vram
        within = abs(percent) <= LARGE if row.bits == 16 else abs(apart) <= PACKED
        told = explain(arch, row, plan, peak)
        rows.append((*row[:7], plan, plan * GB, apart, percent, within, told, peak))
    return pd.DataFrame(rows, columns=TABLE)


def training(arch: shapes.Architecture) -> pd.DataFrame:
    """TABLE for Table 2, whose settings the paper leaves out: of TRAINING, those that fit both of its rows best."""
    theirs = paper.table(2)
    sizes = [float(re.search(r"([\d.]+) ?B", name)[1]) for name in theirs.paper_model]
    removed = [removed_for(arch, size) for size in sizes]
    plans = [[_training_gib(arch, n, **how) for n in removed] for how in TRAINING]
    worst = [
        max(abs(a - b) for a, b in zip(plan, theirs.paper_vram, strict=True)) for plan in plans
    ]
    best = worst.index(min(worst))
    how, rows = TRAINING[best], []
    said = f"QLoRA, {how['batch']} conversations a step, checkpointing {'on' if how['checkpointing'] else 'off'}, "
    said += f"the rest in fp{8 * how['rest']}: of {len(TRAINING)} settings the nearest to both rows"
    for name, size, n, vram, plan in zip(
        theirs.paper_model, sizes, removed, theirs.paper_vram, plans[best], strict=True
    ):
        apart = vram - plan
        row = (
            2,
            name,
            size,
            n,
            "bitsandbytes",
            4,
            vram,
            plan,
            plan * GB,
            apart,
            100 * apart / vram,
            None,
            said,
            plan,
        )
        rows.append(row)
    return pd.DataFrame(rows, columns=TABLE)


def _training_gib(arch: shapes.Architecture, removed: int, **how) -> float:
    return sum(memory.plan_training(arch, blocks_removed=removed, rank=16, **how).values())


def table(arch: shapes.Architecture) -> pd.DataFrame:
    """The whole of it, in the order of the paper's tables."""
    whole = pd.concat(
        [inference(arch).astype({"within": object}), training(arch).astype({"within": object})]
    )
    return whole.sort_values("table", kind="stable", ignore_index=True)


def worst(rows: pd.DataFrame) -> dict[str, float]:
    """Largest distance of Tables 1, 3 and 4, read as GiB and as GB: the fp16 rows in percent, the 4-bit ones in GiB."""
    said = rows[rows.table != 2]
    large, packed = said[said.bits == 16], said[said.bits == 4]
    return {
        "fp16_gib": (100 * large.apart_gib / large.paper_vram).abs().max(),
        "fp16_gb": (100 * (large.paper_vram - large.plan_gb) / large.paper_vram).abs().max(),
        "packed_gib": packed.apart_gib.abs().max(),
        "packed_gb": ((packed.paper_vram - packed.plan_gb) / GB).abs().max(),
    }
