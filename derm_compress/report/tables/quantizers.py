"""Quantized models in pairs: each method with AWQ and with 16 bits, and models of equal bytes."""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.method.quantization.methods import quantizers
from derm_compress.report.results import Results
from derm_compress.report.tables import joins

COST = {"difference": "cost", "difference_lo": "cost_lo", "difference_hi": "cost_hi", "p": "p_cost"}


def quantized(results: Results) -> pd.DataFrame:
    """The study's own models at one width each; the quantizer's name as `method`."""
    table = results.models
    own = table[(table.bits == 16) & (table.sft_seed == 0)]
    own = own[own.criterion.isin(["", results.criterion])]
    table = table[(table.bits < 16) & ~table.mixed & table.source.isin(own.variant)]
    return table.assign(bits=table.bits.astype(int), method=table.quantizer)


def calibrated(quantizer: str) -> bool:
    """Whether a quantizer looks at what flows through the model."""
    (form,) = quantizers([quantizer])
    return form.searched


def plain_awq(search: pd.DataFrame) -> str | None:
    """The first form of AWQ without options that scales were searched for."""
    forms = search.form.astype(str)
    return next(iter(forms[forms.str.fullmatch(r"awq\d")]), None)


def method_tests(results: Results) -> pd.DataFrame:
    """Every quantized model minus AWQ's of the same model and width (difference), and minus the
    16-bit model (cost).

    Points, paired, p by sign flips; p_holm, p_cost_holm: corrected over all of one width (Holm).
    """
    table = quantized(results).reset_index(drop=True)
    awq = table[table.method == "awq"].set_index(["source", "bits"]).variant
    beside = [awq.get(key) for key in zip(table.source, table.bits, strict=True)]
    against_awq = joins.changes(results, results.answers, table.variant, beside)
    against_16 = joins.changes(results, results.answers, table.variant, table.source)
    table["calibrated"] = [calibrated(name) for name in table.method]
    table = table.join([against_awq[joins.CHANGE], against_16.rename(columns=COST)])
    for p in ("p", "p_cost"):
        table[f"{p}_holm"] = table.groupby("bits")[p].transform(metrics.holm)
    order = ["bits", "blocks_removed", "healed", "method"]
    return table.sort_values(order, ascending=[False, True, True, True])


def equal_bytes(results: Results) -> pd.DataFrame:
    """What is worth most at the same bytes: fewer blocks, fewer bits, or both; each minus all
    blocks at the budget's width, healed alike."""
    wanted = results.equal_bytes
    table = wanted.assign(
        variant=wanted.source + "|" + wanted.form,
        budget=wanted.budget.astype(int),
        method=wanted.quantizer,
    )[["variant", "budget", "method"]]
    known = results.models[["variant", "blocks_removed", "healed", "bits", "mixed"]]
    table = table.merge(known.rename(columns={"bits": "mean_bits"}), on="variant")
    beside = [
        results.variant(0, healed=healed, quantizer="awq", bits=budget)
        for healed, budget in zip(table.healed, table.budget, strict=True)
    ]
    table = table.join(joins.changes(results, results.answers, table.variant, beside)[joins.CHANGE])
    table["p_holm"] = metrics.holm(table.p)
    order = ["budget", "healed", "blocks_removed"]
    table = table.sort_values(order, ascending=[False, True, True], kind="stable")
    return joins.scored(table, results, results.answers)
