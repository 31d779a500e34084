"""Criteria in pairs: which pruned models answer better, where the score falls, what sublayers give.

Only unhealed 16-bit models count here; all random orders count as one rival, their mean.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report.results import ANSWER, Results, answers_of
from derm_compress.report.tables import joins


def pruned_only(variants: pd.DataFrame) -> pd.DataFrame:
    """The original and what removal alone made of it; `whole`: only blocks ever go.

    A plan of sublayers may take both of one block, which then counts as a block, so `whole` is told
    by all that its criterion removes.
    """
    table = variants[~variants.healed.astype(bool) & (variants.bits == 16)]
    table = table.assign(sublayers_removed=table.attentions_removed + table.mlps_removed)
    table["whole"] = table.groupby("criterion").sublayers_removed.transform("max") == 0
    return table


def criteria(results: Results) -> pd.DataFrame:
    """Every criterion at every depth, before SFT; whole blocks only."""
    table = pruned_only(results.variants)
    table = table[table.whole & (table.blocks_removed > 0)]
    table = table.sort_values(["blocks_removed", "criterion"])
    return joins.scored(table, results, results.answers)


def curves(results: Results) -> dict[str, pd.DataFrame]:
    """{criterion: marks, [answers, depths]} of whole blocks, depth 0 being the original."""
    table = pruned_only(results.variants)
    asked = results.answers[results.answers.variant.isin(table.variant)].drop_duplicates(ANSWER)
    wide = asked.pivot(index=["item", "question"], columns="variant", values="score").astype(float)
    original = results.variant(0)
    start = wide[[original]].set_axis([0], axis=1) if original in wide else wide[[]]
    whole = table[table.whole & (table.blocks_removed > 0) & table.variant.isin(wide.columns)]
    found, random = {}, []
    for name, rows in whole.sort_values("blocks_removed").groupby("criterion", sort=False):
        curve = start.join(wide[list(rows.variant)].set_axis(list(rows.blocks_removed), axis=1))
        if name.startswith("random-"):
            random.append(curve)
        else:
            found[name] = curve
    if random:
        shared = sorted(set.intersection(*(set(curve) for curve in random)))
        found[random_name(len(random))] = sum(curve[shared] for curve in random) / len(random)
    return found


def random_name(draws: int) -> str:
    return "random-0" if draws == 1 else f"random (mean of {draws})"


def criteria_tests(results: Results) -> pd.DataFrame:
    """The study's own criterion minus each rival in points, at the operating point and over all
    depths that both have (`shared`).

    Over all depths an answer's marks are averaged first. p by sign flips; p_holm: corrected over
    the rivals. ahead: at how many of the `depths` the own one scores more.
    """
    known, rows = curves(results), []
    ours = known.pop(results.criterion, pd.DataFrame())
    for name, theirs in known.items():
        shared = sorted((set(ours) & set(theirs)) - {0})
        if not shared:
            continue
        here = _change(ours, theirs, [n for n in shared if n == results.operating])
        over = _change(ours, theirs, shared)
        rows.append(
            {
                "criterion": name,
                "blocks_removed": results.operating,
                "depths": len(shared),
                "ahead": (ours[shared].mean() > theirs[shared].mean()).sum(),
                "n": over.n,
                "shared": tuple(shared),
                **_named(here, ""),
                **_named(over, "_all"),
            }
        )
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows)
    return table.assign(p_holm=metrics.holm(table.p), p_all_holm=metrics.holm(table.p_all))


def _change(one: pd.DataFrame, other: pd.DataFrame, depths: list[int]) -> metrics.Difference:
    """Paired difference of the mean marks over these depths, where both have them all."""
    means = [curve.reindex(columns=depths).mean(axis=1, skipna=False) for curve in (one, other)]
    return metrics.paired_difference(*(mean.rename("score").reset_index() for mean in means))


def _named(change: metrics.Difference, end: str) -> dict[str, float]:
    return joins.interval(f"difference{end}", change) | {f"p{end}": change.p}


def cliffs(results: Results) -> pd.DataFrame:
    """Each criterion's steepest fall, per block, between neighbouring depths, and how far it stays
    level.

    fall: points lost from fall_from to fall_to blocks, with the paired interval of that pair, which
    was chosen for its fall; level_until: the last depth before the first whose paired interval to
    the unpruned one lies below 0.
    """
    rows = []
    for name, curve in curves(results).items():
        depths = np.array(sorted(curve))
        if depths[0] != 0 or len(depths) == 1:
            continue
        falls = metrics.mean_intervals(-curve[depths].diff(axis=1).iloc[:, 1:])
        steps = falls["mean"].to_numpy() / np.diff(depths)
        at = int(np.nanargmax(steps)) if np.isfinite(steps).any() else 0
        change = metrics.mean_intervals(curve[depths].sub(curve[0], axis=0))
        clear = change.index[change.hi < 0].min()  # nan where none is
        level = change.index[(change.hi >= 0) & ~(change.index >= clear)]
        rows.append(
            {
                "criterion": name,
                "depths": len(depths) - 1,
                "fall_from": depths[at],
                "fall_to": depths[at + 1],
                **joins.interval("fall", falls.iloc[at]),
                "fall_per_block": steps[at],
                "level_until": level.max(),
            }
        )
    return pd.DataFrame(rows)


def sublayers(results: Results) -> pd.DataFrame:
    """Models without single attentions or MLPs, each beside the own whole-block model of the
    nearest parameter count.

    apart: parameter counts' difference in the own model's blocks; the difference in points is
    sublayers minus blocks.
    """
    table = joins.scored(pruned_only(results.variants), results, results.answers)
    cut = table[~table.whole].sort_values(["criterion", "blocks_removed", "sublayers_removed"])
    blocks = table[table.criterion == results.criterion].dropna(subset=["params_b"])
    whole = table.params_b[table.variant == results.variant(0)].max()
    a_block = ((whole - blocks.params_b) / blocks.blocks_removed).median()
    rows = []
    for row in cut.itertuples():
        near = (blocks.params_b - row.params_b).abs()
        beside = {"variant": row.variant}
        if near.notna().any():
            nearest = blocks.loc[near.idxmin()]
            pair = (answers_of(results.answers, v) for v in (row.variant, nearest.variant))
            beside |= {"nearest": nearest.variant, "apart": near.min() / a_block}
            beside |= nearest[["params_b", *joins.SCORE[:3]]].add_prefix("nearest_").to_dict()
            beside |= _named(metrics.paired_difference(*pair), "")
        rows.append(beside)
    return cut.merge(pd.DataFrame(rows), on="variant") if rows else cut
