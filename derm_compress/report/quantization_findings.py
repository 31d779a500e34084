"""What activations and quantized models say, as sentences: every number is computed. No torch.

Each `findings_*` takes Results and returns the sentences that its frames suffice for.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from derm_compress.report import precision, tables
from derm_compress.report.ranking_findings import SIGNIFICANT
from derm_compress.report.results import Results, variant_id
from derm_compress.report.wording import joined, p_value, verdict, words

OUTLIER_FACTOR = 6.0  # as notebook 06 counts them: peaks over so many times the median channel's


def findings_activations(results: Results) -> list[str]:
    """Where each variant's outliers sit, whether they are the first variant's, and whom Figure 4 leaves out."""
    if results.statistics is None or results.statistics.empty:
        return [] if results.statistics is None else ["Activations need weights."]
    said, told, moved = [], [], 0
    first, *others = [table for _, table in results.statistics.groupby("variant", sort=False)]
    for table in (first, *others):
        peak, loud = table.loc[table["max"].idxmax()], (table.outlier_channels > 0).sum()
        said.append(
            f"{peak.variant}: the largest output is {peak['max']:.1f}, of {peak.projection} in block {peak.block}; "
            f"{loud} of {len(table)} projections ({100 * loud / len(table):.0f} %) have outlier channels."
        )
    for name, other in ((table.variant.iloc[0], table) for table in others):
        both = first.merge(other, on=["block", "projection"])
        differ = ((both.outlier_channels_x > 0) != (both.outlier_channels_y > 0)).sum()
        higher = f"their median peak is {(both.max_y / both.max_x).median():.2f} times as high"
        told.append(
            f"{name} differs from {first.variant.iloc[0]} in {differ} of {len(both)}, {higher}"
        )
        moved += differ
    whether = "change" if moved else "do not change"
    closing = (
        f"So pruning and healing {whether} which of the shared projections have outlier channels: "
    )
    return (
        said + ([closing + "; ".join(told) + "."] if told else []) + left_out_of_figure_4(results)
    )


def left_out_of_figure_4(results: Results) -> list[str]:
    """Which of stage 06's variants lack the block that Figure 4 shows."""
    names, shown = list(dict.fromkeys(results.statistics.variant)), results.figure4
    if shown is None or not (gone := [name for name in names if name not in set(shown.variant)]):
        return []
    block = (
        f"Block {shown.block.iloc[0]} ({shown.block.iloc[0] + 1} counted from 1)"
        if len(shown)
        else "The block"
    )
    them = "it" if len(gone) == 1 else "them"
    return [f"{block} of Figure 4 is gone in {joined(gone)}: the figure leaves {them} out."]


def findings_outliers(results: Results) -> list[str]:
    """Which projections are loudest relative to their own channels, and how heavy their tails are, by model."""
    if results.statistics is None:
        return []
    said = []
    for name, table in results.statistics.groupby("variant", sort=False):
        most, tails = (
            table.groupby("projection")[column].mean()
            for column in ("outlier_channels", "kurtosis")
        )
        peak = table.loc[table["kurtosis"].idxmax()]
        loud = f"{most.idxmax()} has most outlier channels, {most.max():.1f} a block on average"
        said.append(
            f"{name}: {loud if most.max() else 'no projection has outlier channels'}; the median "
            f"kurtosis is {table['kurtosis'].median():.1f} (3 for a normal distribution), the largest "
            f"{peak['kurtosis']:.1f}, of {peak.projection} in block {peak.block}; on average "
            f"{tails.idxmax()} has most, {tails.max():.1f}."
        )
    return said


def findings_quantization(results: Results) -> list[str]:
    """Table 3 in words: what AWQ costs, whether methods without calibration fail, fewer bits, errors beside scores."""
    if results.variants is None or results.answers is None:
        return ["Scores need weights."]
    every = precision.method_tests(results.answers, results.variants)
    tests = every[every.variant.str.split("|").str[0].isin(main_models(results))]
    if not tests.n.sum():
        return ["Scores need weights."]
    width = max(tests.bits[tests.method == "awq"], default=int(tests.bits.iloc[0]))
    parts = costs(tests, width) + without_calibration(tests, width) + narrower(tests, width)
    parts += other_calibration(tests) + scaled_nf4(results) + reference(tests, results)
    return parts + errors_beside_scores(every, results)


def main_models(results: Results) -> list[str]:
    """The three that the question is about: unpruned, pruned, pruned and healed."""
    n = results.operating
    return [variant_id(0), variant_id(n), variant_id(n, healed=True)]


def model(row) -> str:
    if not row.blocks_removed:
        return "the unpruned model" + " after SFT" * bool(row.healed)
    return f"the model without {row.blocks_removed} blocks" + (
        " after SFT" if row.healed else " before SFT"
    )


def quantizer(name: str) -> str:
    """AWQ (clip) of awq-clip."""
    method, *options = name.split("-")
    return words(method) + (f" ({', '.join(options)})" if options else "")


def change(row, name: str):
    """A row's change as verdict() takes it."""
    return pd.Series({"difference": row[name], "lo": row[f"{name}_lo"], "hi": row[f"{name}_hi"]})


def costs(tests: pd.DataFrame, width: int) -> list[str]:
    """What AWQ takes from each model."""
    rows = tests[(tests.method == "awq") & (tests.bits == width)]
    return [
        f"{model(row)}: {verdict(change(row, 'cost'), f'AWQ at {width} bits', '16 bits')}."
        for _, row in rows.iterrows()
    ]


def without_calibration(tests: pd.DataFrame, width: int) -> list[str]:
    """The paper's claim, in pairs: do methods that see no activations fail where AWQ does not, once blocks are gone?"""
    free = tests[~tests.calibrated & (tests.bits == width)]
    if free.empty:
        return []
    said = []
    for _, group in free.groupby(free.variant.str.split("|").str[0], sort=False):
        paired = group.dropna(subset=["p"])
        worst = paired.loc[paired.difference.idxmin()] if len(paired) else None
        said.append(
            f"{model(group.iloc[0])}: of {len(paired)} methods without calibration at {width} bits {below(paired, '')} "
            f"score below AWQ and {above(paired, '')} above (Holm)"
            + (
                ""
                if worst is None
                else f"; the least is {quantizer(worst.method)}, {worst.difference:+.1f} points "
                f"({worst.difference_lo:.1f} to {worst.difference_hi:.1f}), {p_value(worst.p_holm)} after Holm"
            )
            + "."
        )
    pruned = free[free.blocks_removed > 0]
    if pruned.empty:
        return said
    failed = fails(free)
    seen = (
        "is seen here"
        if failed.all()
        else "is seen for some"
        if failed.any()
        else "is not seen here"
    )
    return said + [
        f"That quantization without calibration fails on a pruned model, as the paper has it, {seen}: on models with "
        f"blocks removed {failed.sum()} of {len(failed)} lose against 16 bits, against AWQ (Holm), and more than the "
        "same method takes from the unpruned model."
    ]


def fails(free: pd.DataFrame) -> pd.Series:
    """Of the pruned models: does a method clearly lose against 16 bits and AWQ, and more than on the unpruned one?"""
    whole = free[free.blocks_removed == 0].groupby("method").cost.min()
    rows = free[free.blocks_removed > 0]
    lost = (
        (rows.p_cost_holm < SIGNIFICANT)
        & (rows.cost < 0)
        & (rows.p_holm < SIGNIFICANT)
        & (rows.difference < 0)
    )
    return lost & ~(
        rows.cost_hi >= rows.method.map(whole)
    )  # its whole interval lies below what the unpruned one loses


def below(rows: pd.DataFrame, which: str) -> int:
    return clear(rows, which, -1)


def above(rows: pd.DataFrame, which: str) -> int:
    return clear(rows, which, 1)


def clear(rows: pd.DataFrame, which: str, sign: int) -> int:
    """How many differ on this side, corrected for their number."""
    points = rows["cost" if which else "difference"]
    return int(((rows[f"p{which}_holm"] < SIGNIFICANT) & (np.sign(points) == sign)).sum())


def narrower(tests: pd.DataFrame, width: int) -> list[str]:
    """What fewer bits cost each model, by the best and the worst method."""
    said = []
    for bits in sorted({b for b in tests.bits if b < width}, reverse=True):
        for _, group in tests[tests.bits == bits].groupby(
            tests.variant.str.split("|").str[0], sort=False
        ):
            best, worst = group.loc[group.cost.idxmax()], group.loc[group.cost.idxmin()]
            each = [f"{row.cost:+.1f} points ({quantizer(row.method)})" for row in (best, worst)]
            said.append(
                f"{bits} bits change {model(best)} by {each[0]} to {each[1]}; {below(group, '_cost')} of {len(group)} "
                "methods lose (Holm)."
            )
    return said


def other_calibration(tests: pd.DataFrame) -> list[str]:
    """Calibration without pictures against calibration with them, and the other forms of the search."""
    rows = tests[tests.method.str.startswith("awq-") & tests.difference.notna()]
    said = []
    for method, group in rows.groupby("method", sort=False):
        name = "AWQ calibrated on text alone" if method == "awq-text" else quantizer(method)
        best, worst = group.loc[group.difference.idxmax()], group.loc[group.difference.idxmin()]
        ends = [
            f"{row.difference:+.1f} points ({model(row)}, {row.bits} bits)" for row in (worst, best)
        ]
        said.append(
            f"{name} against plain AWQ, {len(group)} pairs: {ends[0]} to {ends[1]}; {below(group, '')} clearly worse, "
            f"{above(group, '')} clearly better (Holm)."
        )
    return said


def scaled_nf4(results: Results) -> list[str]:
    """What AWQ's scales are worth on bitsandbytes' grid, in pairs."""
    rows = precision.nf4_pairs(results.answers, results.variants)
    rows = rows[
        rows.variant.str.split("|").str[0].isin(main_models(results)) & rows.difference.notna()
    ]
    told = [
        f"{verdict(change(r, 'difference'), 'NF4 with AWQ scales', 'NF4 alone')} ({model(r)})"
        for _, r in rows.iterrows()
    ]
    counts = (
        f"{below(rows, '')} clearly worse, {above(rows, '')} clearly better of {len(rows)} (Holm)"
    )
    return [f"AWQ's scales on the NF4 grid: {'; '.join(told)}; {counts}."] if told else []


def reference(tests: pd.DataFrame, results: Results) -> list[str]:
    """AutoAWQ's own choice of scales beside this package's."""
    rows, said = tests[tests.method == "autoawq"], []
    errors = (
        None if results.errors is None else results.errors.groupby("variant").relative_error.mean()
    )
    for _, row in rows.iterrows():
        told = verdict(change(row, "difference"), "scales chosen by AutoAWQ", "this package's")
        ours = row.variant.replace("|autoawq", "|awq")
        known = errors is not None and {ours, row.variant} <= set(errors.index)
        told += f"; output errors {errors[row.variant]:.4f} and {errors[ours]:.4f}" if known else ""
        said.append(f"{model(row)}: {told}.")
    return said


def errors_beside_scores(tests: pd.DataFrame, results: Results) -> list[str]:
    """Whether a larger output error goes with a larger loss."""
    if results.errors is None:
        return []
    errors = results.errors.groupby("variant").relative_error.mean()
    table = tests.assign(error=tests.variant.map(errors)).dropna(subset=["error", "cost"])
    said = awq_beside_rounding(tests.assign(error=tests.variant.map(errors)))
    rank = -table.error.rank().corr(table.cost.rank()) if len(table) > 2 else np.nan
    if np.isnan(rank):
        return said
    least, most = table.loc[table.error.idxmin()], table.loc[table.error.idxmax()]
    ends = [f"{row.error:.3f} ({quantizer(row.method)}, {row.bits} bits)" for row in (least, most)]
    return said + [
        f"Relative error of a block's output, mean over blocks: {ends[0]} to {ends[1]}; over {len(table)} quantized "
        f"models it correlates in rank with the score lost at {rank:.2f}."
    ]


def awq_beside_rounding(table: pd.DataFrame) -> list[str]:
    """Whether AWQ's output error lies below plain rounding's, model by model, at the widest width of both."""
    table = table.dropna(subset=["error"]).assign(source=table.variant.str.split("|").str[0])
    awq, plain = (table[table.method == name] for name in ("awq", "rtn"))
    both = awq.merge(
        plain[["source", "bits", "error"]], on=["source", "bits"], suffixes=("", "_rtn")
    )
    both = both.sort_values("bits", ascending=False, kind="stable").drop_duplicates("source")
    told = [
        f"{'below' if row.error < row.error_rtn else 'above' if row.error > row.error_rtn else 'at'} it for "
        f"{model(row)} ({row.error:.4f} and {row.error_rtn:.4f}, {row.bits} bits)"
        for row in both.itertuples()
    ]
    return [f"AWQ's mean output error beside plain rounding's lies {joined(told)}."] if told else []


def findings_scales(results: Results) -> list[str]:
    """How far AWQ's exponents go from plain rounding, by depth, and what the scales do to outlier channels."""
    return findings_alpha(results) + findings_channels(results)


def findings_alpha(results: Results) -> list[str]:
    if results.search is None:
        return []
    said = []
    for name in plain_awq(results.search):
        table = results.search[
            (results.search.form == name) & results.search.variant.isin(main_models(results))
        ]
        for source, rows in table.dropna(subset=["alpha"]).groupby("variant", sort=False):
            third = pd.qcut(rows.block.rank(method="first"), 3, labels=False)
            each = ", ".join(f"{a:.2f}" for a in rows.alpha.groupby(third).median())
            better = 1 - rows.loss.sum() / rows.loss_rtn.sum()
            said.append(
                f"{source}|{name}: the median exponent is {each} over the first, middle and last third of the blocks, "
                f"0 for {(rows.alpha == 0).mean():.0%} of the groups; the loss of Eq. 7 falls by {better:.0%} in all."
            )
    return said


def plain_awq(search: pd.DataFrame) -> list[str]:
    """The search's first AWQ form without options, and the same on text alone; none where none was searched."""
    first = next((form for form in search.form if re.fullmatch(r"awq\d", str(form))), None)
    return [first, f"{first}-text"] if first else []


def findings_channels(results: Results) -> list[str]:
    """Scales of the inputs whose peak is over OUTLIER_FACTOR times the median channel's, and of the others."""
    said = []
    for source, table in (
        [] if results.channels is None else results.channels.groupby("variant", sort=False)
    ):
        place = table.groupby(["block", "group"])
        loud = table.peak > OUTLIER_FACTOR * place.peak.transform("median")
        size = np.log(table.scale) - np.log(table.scale).groupby(
            [table.block, table.group]
        ).transform("mean")
        rank = place.peak.rank().corr(place.scale.rank())
        told = f"{source}: of {len(table)} input channels {loud.sum()} are outliers"
        if loud.any():
            told += f"; AWQ multiplies their weights by {np.exp(size[loud].mean()):.2f}, all others' by "
            told += f"{np.exp(size[~loud].mean()):.2f} (geometric means, 1 for the mean channel of a group)"
        said.append(
            f"{told}; peak and scale of a channel correlate in rank at {rank:.2f} within a group."
        )
    return said


def findings_equal_bytes(results: Results) -> list[str]:
    """What is worth most at the same bytes: fewer blocks at 4 bits, fewer bits, or two widths."""
    if results.equal_bytes is None or not len(results.equal_bytes) or results.variants is None:
        return []
    table, said, sides = tables.equal_bytes(results), [], []
    for (budget, healed), group in table.groupby(["budget", "healed"], sort=False):
        all_blocks = group[group.variant == group.reference]
        others = group[(group.variant != group.reference) & group.difference.notna()]
        if all_blocks.empty or others.empty:
            continue
        size = all_blocks.vram_gib_7b.iloc[0]
        at = f"At the bytes of all blocks at {budget} bits" + (
            "" if pd.isna(size) else f" ({size:.2f} GiB at 7B)"
        )
        each = [
            f"{verdict(change(row, 'difference'), way(row), 'all blocks')}"
            for _, row in others.iterrows()
        ]
        said.append(f"{at}, {'after' if healed else 'before'} SFT: {'; '.join(each)}.")
        cut = others[(others.blocks_removed > 0) & (others.mean_bits == 4)]
        if len(cut):
            sides.append((budget, healed, clear(cut, "", 1), clear(cut, "", -1), len(cut)))
    return said + ([equal_bytes_verdict(sides)] if sides else [])


def way(row) -> str:
    n = row.blocks_removed
    removed = f"{n} block{'s' * (n > 1)} removed" if n else "no block removed"
    return (
        f"{removed} and {'' if row.mean_bits == int(row.mean_bits) else 'on average '}{row.mean_bits:.3g} bits"
        + (" in two widths" if "mixed" in row.variant else "")
    )


def equal_bytes_verdict(sides) -> str:
    """One sentence over all budgets, before and after SFT."""
    told = []
    for budget, healed, better, worse, n in sides:
        which = (
            "better"
            if better and not worse
            else "worse"
            if worse and not better
            else "better in some pairs and worse in others"
            if better
            else "neither clearly better nor worse"
        )
        told.append(
            f"{which} than {budget} bits {'after' if healed else 'before'} SFT ({better} above, {worse} below, of {n})"
        )
    how = "at equal bytes and corrected for all comparisons (Holm)"
    return f"So removing blocks and keeping 4 bits is, {how}, {joined(told)}."
