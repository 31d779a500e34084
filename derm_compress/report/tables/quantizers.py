"""Quantized models in pairs: each method with AWQ and with 16 bits, and models of equal bytes."""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.method.quantization.methods import MIXED, quantizers
from derm_compress.report.results import ANSWER, Results
from derm_compress.report.tables import joins

CHANGE = ["difference", "difference_lo", "difference_hi", "p"]
COST = ["cost", "cost_lo", "cost_hi", "p_cost"]
BLOCK = ["blocks_removed", "healed", "bits", "block"]
ERROR = "error_"  # before a method's name, a column each


def quantized(results: Results) -> pd.DataFrame:
    """The study's own models at one width each; the quantizer's name as `method`."""
    table = results.variants
    own = table[(table.bits == 16) & (table.sft_seed == 0)]
    own = own[own.criterion.isin(["", results.criterion])]
    table = table[(table.bits < 16) & table.source.isin(own.variant)]
    table = table[~table.quantizer.str.endswith(f"-{MIXED}")]
    return table.assign(bits=table.bits.astype(int), method=table.quantizer)


def calibrated(quantizer: str) -> bool:
    """Whether a quantizer looks at what flows through the model."""
    (form,) = quantizers([quantizer])
    return form.searched


def changes(
    results: Results, pairs: list[tuple[str | None, str | None]], names: list[str]
) -> pd.DataFrame:
    """One minus the other of each pair of variants, as metrics.paired_difference() has it: `names`
    and n, a row a pair.

    All pairs share the draws of images; a pair that was not answered by both is empty, and so is a
    variant beside itself.
    """
    frame = pd.DataFrame(index=range(len(pairs)), columns=[*names, "n"], dtype=float)
    if results.answers is None:
        return frame.assign(n=0)
    asked = results.answers.drop_duplicates(ANSWER, keep="last")
    asked = asked[asked.variant.isin({name for pair in pairs for name in pair})]
    wide = asked.pivot(index=["item", "question"], columns="variant", values="score").astype(float)
    marks = {
        i: wide[one] - wide[other]
        for i, (one, other) in enumerate(pairs)
        if one != other and {one, other} <= set(wide)
    }
    marks = pd.DataFrame(marks, index=wide.index).dropna(axis=1, how="all")
    if len(marks.columns):
        sums = {i: marks[i].dropna().groupby(level=0).sum().to_numpy() for i in marks}
        frame.loc[marks.columns, names[:3]] = metrics.mean_intervals(marks).to_numpy()
        frame.loc[marks.columns, names[3]] = [metrics.sign_flip_p(sums[i]) for i in marks]
    return frame.assign(n=marks.count().reindex(frame.index).fillna(0).astype(int))


def method_tests(results: Results) -> pd.DataFrame:
    """Every quantized model minus AWQ's of the same model and width (difference), and minus the
    16-bit model (cost).

    Points, paired, p by sign flips; p_holm, p_cost_holm: corrected over all of one width (Holm).
    """
    table = quantized(results).reset_index(drop=True)
    awq = table[table.method == "awq"].set_index(["source", "bits"]).variant
    beside = [awq.get(key) for key in zip(table.source, table.bits, strict=True)]
    against_awq = changes(results, list(zip(table.variant, beside, strict=True)), CHANGE)
    against_16 = changes(results, list(zip(table.variant, table.source, strict=True)), COST)
    table["calibrated"] = [calibrated(name) for name in table.method]
    table = table.join([against_awq[CHANGE], against_16])
    for p in ("p", "p_cost"):
        table[f"{p}_holm"] = table.groupby("bits")[p].transform(metrics.holm).astype(float)
    order = ["bits", "blocks_removed", "healed", "method"]
    return table.sort_values(order, ascending=[False, True, True, True])


def equal_bytes(results: Results) -> pd.DataFrame:
    """What is worth most at the same bytes: fewer blocks, fewer bits, or both; each minus all
    blocks at the budget's width, healed alike."""
    wanted = results.equal_bytes
    table = pd.DataFrame(
        {
            "variant": wanted.source + "|" + wanted.form,
            "budget": wanted.budget.astype(int),
            "method": wanted.quantizer,
        }
    )
    known = results.variants[["variant", "blocks_removed", "healed", "bits"]]
    table = table.merge(known.rename(columns={"bits": "mean_bits"}), on="variant")
    table["reference"] = [
        results.variant(0, healed=healed, quantizer="awq", bits=budget)
        for healed, budget in zip(table.healed, table.budget, strict=True)
    ]
    pairs = list(zip(table.variant, table.reference, strict=True))
    table = table.join(changes(results, pairs, CHANGE).drop(columns="n"))
    table["p_holm"] = metrics.holm(table.p)
    order = ["budget", "healed", "blocks_removed"]
    table = table.sort_values(order, ascending=[False, True, True], kind="stable")
    return joins.scored(table, results, results.answers)


def block_errors(results: Results) -> pd.DataFrame:
    """Output errors of the own models' blocks, by original indices, the methods side by side."""
    table = quantized(results).merge(results.errors, on="variant")
    wide = table.pivot(index=BLOCK, columns="method", values="relative_error")
    wide = wide[list(dict.fromkeys(table.method))].add_prefix(ERROR).reset_index()
    return wide.sort_values(BLOCK, ascending=[True, True, False, True])
