"""Quantized models compared in pairs: each method with AWQ and with 16 bits, and models of equal bytes. No torch.

An `answers` frame has variant, item, question, score; a `variants` frame says how each variant is quantized.
"""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.method.quantization.forms import MIXED
from derm_compress.method.quantization.methods import quantizers
from derm_compress.report.results import variant_id

CHANGE = ["difference", "difference_lo", "difference_hi", "p"]
COST = ["cost", "cost_lo", "cost_hi", "p_cost"]
MODEL = ["variant", "blocks_removed", "healed"]
TESTS = [*MODEL, "method", "bits", "calibrated", *CHANGE, "p_holm", *COST, "p_cost_holm", "n"]
EQUAL = [*MODEL, "budget", "method", "mean_bits", "reference", *CHANGE, "p_holm", "n"]


def quantized(variants: pd.DataFrame) -> pd.DataFrame:
    """The study's own models at one width each, with `source`, and the quantizer's name as `method`."""
    table = variants[variants.bits < 16].drop_duplicates("variant")
    table = table[~table.quantizer.str.endswith(f"-{MIXED}")]
    table = table.assign(source=table.variant.str.split("|").str[0], bits=table.bits.astype(int))
    plain = [
        variant_id(n, healed=h) for n, h in zip(table.blocks_removed, table.healed, strict=True)
    ]
    return table[table.source == plain].assign(method=lambda frame: frame.quantizer)


def calibrated(quantizer: str) -> bool:
    """Whether a quantizer looks at what flows through the model."""
    ((method, options),) = quantizers([quantizer])
    return method.searched(options)


def changes(
    answers: pd.DataFrame | None, pairs: list[tuple[str, str]], names: list[str]
) -> pd.DataFrame:
    """One minus the other of each pair of variants, as metrics.paired_difference() has it: `names` and n, a row a pair.

    All pairs share the draws of images; what was not answered by both is left out, a variant beside itself is empty.
    """
    empty = pd.DataFrame({"variant": [], "item": [], "question": [], "score": []})
    asked = (empty if answers is None else answers).drop_duplicates(
        ["variant", "item", "question"], keep="last"
    )
    asked = asked[asked.variant.isin({name for pair in pairs for name in pair})]
    wide = asked.pivot(index=["item", "question"], columns="variant", values="score").astype(float)
    known = [
        (i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1] and {*pair} <= set(wide)
    ]
    marks = pd.DataFrame({i: wide[one] - wide[other] for i, (one, other) in known}).dropna(
        axis=1, how="all"
    )
    frame = pd.DataFrame(index=range(len(pairs)), columns=[*names, "n"], dtype=float)
    if len(marks.columns):
        frame.loc[marks.columns, names[:3]] = metrics.mean_intervals(marks).to_numpy()
        sums = {i: marks[i].dropna().groupby(level=0).sum().to_numpy() for i in marks}
        frame.loc[marks.columns, names[3]] = [metrics.sign_flip_p(sums[i]) for i in marks]
    return frame.assign(n=marks.count().reindex(frame.index).fillna(0).astype(int))


def method_tests(answers: pd.DataFrame | None, variants: pd.DataFrame) -> pd.DataFrame:
    """Every quantized model minus AWQ's of the same model and width (difference), and minus the 16-bit model (cost).

    Points, paired, p by sign flips over images; p_holm, p_cost_holm: corrected over all of one width (Holm).
    """
    table = quantized(variants).reset_index(drop=True)
    awq = [f"{source}|awq{bits}" for source, bits in zip(table.source, table.bits, strict=True)]
    against_awq = changes(answers, list(zip(table.variant, awq, strict=True)), CHANGE).drop(
        columns="n"
    )
    against_16 = changes(answers, list(zip(table.variant, table.source, strict=True)), COST)
    table = table.assign(calibrated=[calibrated(name) for name in table.method]).join(
        [against_awq, against_16]
    )
    for p in ("p", "p_cost"):
        table[f"{p}_holm"] = table.groupby("bits")[p].transform(metrics.holm).astype(float)
    order = ["bits", "blocks_removed", "healed", "method"]
    return table.sort_values(order, ascending=[False, True, True, True])[TESTS]


def nf4_pairs(answers: pd.DataFrame | None, variants: pd.DataFrame) -> pd.DataFrame:
    """Every model rounded to NF4 with AWQ's scales minus the same in NF4 alone: MODEL, CHANGE, p_holm, n."""
    table = quantized(variants)
    table = table[
        (table.method == "awq_nf4") & (table.source + "|bitsandbytes4").isin(table.variant)
    ]
    pairs = list(zip(table.variant, table.source + "|bitsandbytes4", strict=True))
    table = table.reset_index(drop=True)[MODEL].join(changes(answers, pairs, CHANGE))
    return table.assign(p_holm=metrics.holm(table.p))


def equal_bytes(
    answers: pd.DataFrame | None, variants: pd.DataFrame, wanted: pd.DataFrame
) -> pd.DataFrame:
    """Models of each budget's bytes (budgets.wanted) minus all blocks at the budget's width, healed alike."""
    table = wanted.assign(
        variant=wanted.source + "|" + wanted.form,
        method=wanted.quantizer,
        budget=wanted.budget.astype(int),
    )
    known = (
        variants[[*MODEL, "bits"]].drop_duplicates("variant").rename(columns={"bits": "mean_bits"})
    )
    table = table.merge(known, on="variant")
    told = zip(table.healed, table.budget, strict=True)
    table["reference"] = [
        variant_id(0, healed=healed, method="awq", bits=budget) for healed, budget in told
    ]
    table = table.join(
        changes(answers, list(zip(table.variant, table.reference, strict=True)), CHANGE)
    )
    table["p_holm"] = metrics.holm(table.p)
    order = ["budget", "healed", "blocks_removed"]
    return table.sort_values(order, ascending=[False, True, True], kind="stable")[EQUAL]
