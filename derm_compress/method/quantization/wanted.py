"""What stage 07 quantizes how, and the variants that come of it; budgets of equal bytes. No torch.

A budget is what all blocks' linears take in AWQ at some width: fewer blocks at 4 bits, all blocks
at fewer bits, or blocks of two widths. Which blocks get the wider codes is told by the plan of
stage 03, made on training pictures: those that it would remove last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization.methods import IN_PAPER, METHODS, Form, forms
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import ORIGINAL, find, named, paper_depth, recipe_of, variant

COLUMNS = ["source", "form", "quantizer", "text", "step"]
METHOD, WIDEST, NARROWEST = "awq", 4, 2  # of budgets
CONTROL = ["awq", "rtn"], 3  # on the original, where AWQ must beat rounding (Lin et al. 2024)
NEAR = 0.15  # of a bit: a mean so near to the widest width counts as that width


def wanted_forms(
    main: Iterable[str],
    further: Iterable[str],
    names: Iterable[str],
    bits: Sequence[int],
    group_size: int,
    shared: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """What stage 07 quantizes: source, form, quantizer, text, step (JSON), each pair once.

    Every quantizer at every width for the main models; for further ones those of the paper's tables
    at the first width; and what equal_bytes() wants, `shared`.
    """
    common = [name for name in names if name in IN_PAPER]
    frames = [asked(main, names, bits, group_size), asked(further, common, bits[:1], group_size)]
    if shared is not None:
        frames.append(shared[COLUMNS])
    return pd.concat(frames).drop_duplicates(["source", "form"], ignore_index=True)


def control_forms(group_size: int) -> pd.DataFrame:
    """What shows whether AWQ has a use on the original model at all, as wanted_forms()."""
    names, bits = CONTROL
    return asked([ORIGINAL], names, [bits], group_size)


def asked(
    sources: Iterable[str], names: Iterable[str], bits: Sequence[int], group_size: int
) -> pd.DataFrame:
    """Every quantizer at every width, for every source."""
    every = forms(names, bits, group_size)
    return frame((source, form) for source in sources for form in every)


def frame(pairs: Iterable[tuple[str, Form]]) -> pd.DataFrame:
    """Sources and what each is quantized to, as wanted_forms() has them."""
    rows = [
        (source, form.name, form.quantizer, form.text, json.dumps(form.step))
        for source, form in pairs
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def calibrations(wanted: pd.DataFrame, source: str) -> dict[bool, dict[str, Form]]:
    """{calibrated without pictures: {name: form}} of what a source needs a search for."""
    found: dict[bool, dict[str, Form]] = {}
    for row in wanted[wanted.source == source].itertuples():
        form = Form.of(json.loads(row.step))
        if form.searched:
            found.setdefault(bool(row.text), {})[row.form] = form
    return found


def quantized_variants(sources: pd.DataFrame, wanted: pd.DataFrame, ref: str) -> pd.DataFrame:
    """The variants of what is wanted, each with its `source`.

    What needs a search takes its scales from `ref/<form>/<source>.safetensors`, as
    search_scales() leaves them.
    """
    known = sources.drop_duplicates("variant").set_index("variant")
    rows = []
    for row in wanted.itertuples():
        source, form = known.loc[row.source], Form.of(json.loads(row.step))
        step = dict(form.step)
        if form.searched:
            step["ref"] = f"{ref}/{row.form}/{row.source}.safetensors"
        recipe = Recipe.from_json(source.recipe).then("quantize", **step)
        told = {
            "source": row.source,
            "criterion": source.criterion,
            "healed": bool(source.healed),
            "method": form.method,
            "quantizer": row.quantizer,
        }
        told |= asdict(form.format(len(recipe.kept())))
        rows.append(variant(f"{row.source}|{row.form}", recipe, **told))
    return pd.DataFrame(rows)


def equal_bytes(
    known: pd.DataFrame,
    plan: Plan,
    depths: Sequence[int],
    budgets: Sequence[int],
    *,
    group_size: int,
) -> pd.DataFrame:
    """What the table of equal bytes quantizes: wanted_forms() rows with their `budget`.

    depths: blocks removed, of 32, by the study's own plan, whose order says what matters least.
    """
    check_budgets(depths, budgets)
    blocks = recipe_of(known, ORIGINAL).blocks
    removed = sorted({paper_depth(n, blocks) for n in depths})
    order = [unit.plain for unit in plan.order]  # blocks by their number
    frames = [frame(()).assign(budget=None)]
    for budget in budgets:
        for n in [0, *removed] if removed else []:
            for source in _sources(known, n, plan.criterion):
                kept = Recipe.from_json(source.recipe).kept()
                forms = []
                for wide, narrow, count in widths(budget, blocks, len(kept), group_size):
                    wider = important(kept, order, count) if wide > narrow else []
                    mixed = dict.fromkeys(wider, wide)
                    forms.append(Form(METHOD, narrow, group_size, block_bits=mixed))
                rows = frame((source.variant, form) for form in forms)
                frames.append(rows.assign(budget=budget))
    return pd.concat(frames, ignore_index=True)[["budget", *COLUMNS]]


def check_budgets(depths: Sequence[int], budgets: Sequence[int]) -> None:
    """DermError where there are depths and no budget that fewer blocks could share."""
    if depths and not any(budget < WIDEST for budget in budgets):
        said = "no narrower width sets a budget; set bits to several, as [4, 3, 2], or no depths"
        raise DermError(f"equal_bytes: {said}")


def _sources(known: pd.DataFrame, n: int, criterion: str) -> list:
    """The model without n blocks, before and (where the original is known after it) after SFT."""
    found = {"depths": find(known, n, criterion)}
    if find(known, 0, criterion, healed=True):
        found["sft_depths"] = find(known, n, criterion, healed=True)
    for parameter, name in found.items():
        if name is None:
            said = f"there is no model without {n} blocks; add its depth to {parameter}"
            raise DermError(f"equal_bytes: {said}, or leave it out here")
    return list(named(known, found.values()).itertuples())


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


def mean_bits(budget: int, blocks: int, kept: int, group_size: int) -> float:
    """Bits a weight at which `kept` blocks take the bytes of all `blocks` at `budget` bits.

    Those of a group cost (16 + bits) / group bits a weight, so bytes are linear in bits.
    """
    fixed = 8 * METHODS[METHOD].format(0, group_size).overhead
    each = 1 + 8 * METHODS[METHOD].format(1, group_size).overhead - fixed
    return ((budget * each + fixed) * blocks / kept - fixed) / each


def important(kept: Sequence[int], order: Sequence[int], count: int) -> list[int]:
    """Positions of the `count` most important of the kept blocks, by a plan's order of removal."""
    if not order:
        said = "the study's own ranking takes runs of blocks and orders none; name another first"
        raise DermError(f"equal_bytes: {said}")
    rank = {block: i for i, block in enumerate(order)}
    by_rank = sorted(range(len(kept)), key=lambda i: rank.get(kept[i], len(rank) + i))
    return sorted(by_rank[len(kept) - count :])
