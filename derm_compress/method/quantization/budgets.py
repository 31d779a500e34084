"""Equal bytes: fewer blocks at 4 bits, all blocks at fewer bits, or blocks of two widths. No torch.

A budget is what all blocks' linears take in AWQ at some width. Which blocks get the wider codes is
told by the plan of stage 03, made on training pictures: those that it would remove last.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.method.quantization import wanted
from derm_compress.method.quantization.forms import Form
from derm_compress.method.quantization.methods import METHODS
from derm_compress.model.recipe import Recipe
from derm_compress.model.units import Unit
from derm_compress.model.variants import HEALED, ORIGINAL, named, paper_depth, recipe_of

METHOD, WIDEST, NARROWEST = "awq", 4, 2
NEAR = 0.15  # of a bit: a mean so near to the widest width counts as that width
COLUMNS = ["budget", *wanted.COLUMNS]


def mean_bits(budget: int, blocks: int, kept: int, group_size: int) -> float:
    """Bits a weight at which `kept` blocks take the bytes of all `blocks` at `budget` bits.

    Those of a group cost (16 + bits) / group bits a weight, so bytes are linear in bits.
    """
    fixed = 8 * METHODS[METHOD].format(0, group_size).overhead
    each = 1 + 8 * METHODS[METHOD].format(1, group_size).overhead - fixed
    return ((budget * each + fixed) * blocks / kept - fixed) / each


def widths(budget: int, blocks: int, kept: int, group_size: int) -> list[tuple[int, int, int]]:
    """(wide, narrow, number of blocks at the wide one) of what is tried within a budget at a depth.

    All blocks: at the budget's width, and at the widths above and below it. Fewer: at 4 bits where
    that is as near as NEAR, else at the two widths around what the bytes allow; nothing where 4
    bits leave bytes over or 2 are too many.
    """
    if kept == blocks:
        mixed = [(budget + 1, budget - 1, kept // 2)] if NARROWEST < budget < WIDEST else []
        return [(budget, budget, kept), *mixed]
    mean = mean_bits(budget, blocks, kept, group_size)
    if abs(mean - WIDEST) <= NEAR:
        return [(WIDEST, WIDEST, kept)]
    if not NARROWEST <= mean < WIDEST:
        return []
    narrow = int(mean)
    return [(narrow + 1, narrow, int((mean - narrow) * kept))]


def important(kept: Sequence[int], order: Sequence[int], count: int) -> list[int]:
    """Positions of the `count` most important of the kept blocks, by a plan's order of removal."""
    if not order:
        said = "the study's own ranking takes runs of blocks and orders none; name another first"
        raise DermError(f"equal_bytes: {said}")
    rank = {block: i for i, block in enumerate(order)}
    by_rank = sorted(range(len(kept)), key=lambda i: rank.get(kept[i], len(rank) + i))
    return sorted(by_rank[len(kept) - count :])


def check(depths: Sequence[int], budgets: Sequence[int]) -> None:
    """DermError where there are depths and no budget that fewer blocks could share."""
    if depths and not any(budget < WIDEST for budget in budgets):
        said = "no narrower width sets a budget; set bits to several, as [4, 3, 2], or no depths"
        raise DermError(f"equal_bytes: {said}")


def _sources(known: pd.DataFrame, n: int) -> list:
    """The model without n blocks, before and (where the original is known after it) after SFT."""
    plain, there = f"pruned-{n}" if n else ORIGINAL, set(known.variant)
    asked = [plain, plain + HEALED] if ORIGINAL + HEALED in there else [plain]
    for name, parameter in zip(asked, ("depths", "sft_depths"), strict=False):
        if name not in there:
            said = f"there is no {name}; add its depth to {parameter}, or leave it out here"
            raise DermError(f"equal_bytes: {said}")
    return list(named(known, asked).itertuples())


def equal_bytes(
    known: pd.DataFrame,
    order: Sequence[Unit | int],
    depths: Sequence[int],
    budgets: Sequence[int],
    *,
    group_size: int,
) -> pd.DataFrame:
    """What the table of equal bytes quantizes: wanted_forms() rows with their `budget`.

    depths: blocks removed, of 32, by the study's own plan, whose `order` says what matters least.
    """
    check(depths, budgets)
    blocks = recipe_of(known, ORIGINAL).blocks
    removed = sorted({paper_depth(n, blocks) for n in depths})
    order = [Unit.of(unit).plain for unit in order]  # blocks by their number
    frames = [pd.DataFrame(columns=COLUMNS)]
    for budget in budgets:
        for n in [0, *removed] if removed else []:
            for source in _sources(known, n):
                kept = Recipe.from_json(source.recipe).kept()
                tried = widths(budget, blocks, len(kept), group_size)
                forms = [_form(kept, order, one, group_size) for one in tried]
                rows = wanted.frame((source.variant, form) for form in forms)
                frames.append(rows.assign(budget=budget))
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def _form(kept, order, one, group_size) -> Form:
    wide, narrow, count = one
    wider = important(kept, order, count) if wide > narrow else []
    return Form(METHOD, narrow, group_size, block_bits=dict.fromkeys(wider, wide))
