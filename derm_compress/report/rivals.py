"""Criteria compared in pairs: which pruned models answer better, where the score falls, what sublayers give. No torch.

An `answers` frame has variant, item, question, score; a `variants` frame says what each variant lacks. Only unhealed
16-bit models count here.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics

CHANGE = ["difference", "difference_lo", "difference_hi", "p"]
OVER_ALL = ["difference_all", "difference_all_lo", "difference_all_hi", "p_all"]
TESTS = ["criterion", "blocks_removed", *CHANGE, "depths", "ahead", *OVER_ALL, "n", "shared"]
CLIFF = [
    "criterion",
    "depths",
    "fall_from",
    "fall_to",
    "fall",
    "fall_lo",
    "fall_hi",
    "fall_per_block",
    "level_until",
]
RANDOM = re.compile(r"random-\d+")


def pruned_only(variants: pd.DataFrame) -> pd.DataFrame:
    """The original and what removal alone made of it, with `sublayers_removed` and `whole`: only blocks ever go.

    A plan of sublayers may take both of one block, which then counts as a block, so `whole` is told by its criterion.
    """
    table = variants[~variants.healed.astype(bool) & (variants.bits == 16)].drop_duplicates(
        "variant"
    )
    parts = table.reindex(columns=["attentions_removed", "mlps_removed"]).fillna(0).astype(int)
    table = table.assign(**parts, sublayers_removed=parts.sum(axis=1))
    table["whole"] = table.groupby("criterion").sublayers_removed.transform("max") == 0
    return table[
        (table.variant == "original") | (table.blocks_removed + table.sublayers_removed > 0)
    ]


def random_name(draws: int) -> str:
    return "random-0" if draws == 1 else f"random (mean of {draws})"


def curves(answers: pd.DataFrame, variants: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{criterion: marks, [answers, depths]} of whole blocks, depth 0 the original; random orders as their mean."""
    table = pruned_only(variants)
    asked = answers[answers.variant.isin(table.variant)].drop_duplicates(
        ["variant", "item", "question"]
    )
    wide = asked.pivot(index=["item", "question"], columns="variant", values="score").astype(float)
    whole = table[table.whole & (table.blocks_removed > 0) & table.variant.isin(wide.columns)]
    original = wide[["original"]].set_axis([0], axis=1) if "original" in wide else wide[[]]
    found = {}
    for name, rows in whole.sort_values("blocks_removed").groupby("criterion", sort=False):
        found[name] = original.join(
            wide[list(rows.variant)].set_axis(list(rows.blocks_removed), axis=1)
        )
    return merged(found)


def merged(found: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """All random orders as one curve, over the depths that each of them has."""
    random = [curve for name, curve in found.items() if RANDOM.fullmatch(name)]
    rest = {name: curve for name, curve in found.items() if not RANDOM.fullmatch(name)}
    if not random:
        return rest
    shared = sorted(set.intersection(*(set(curve) for curve in random)))
    return rest | {random_name(len(random)): sum(curve[shared] for curve in random) / len(random)}


def criteria_tests(
    answers: pd.DataFrame, variants: pd.DataFrame, own: str, *, operating: int
) -> pd.DataFrame:
    """The study's own criterion against each rival: own minus rival in points, at one depth and over all shared ones.

    Over all depths an answer's marks are averaged first. p: sign-flip over images; p_holm: corrected over the rivals
    (Holm). ahead: at how many of the `depths` that both have (`shared`: which) own scores more. Random orders count
    as one rival.
    """
    known, rows = curves(answers, variants), []
    ours = known.pop(own, pd.DataFrame())
    for name, theirs in known.items():
        shared = sorted((set(ours) & set(theirs)) - {0})
        if shared:
            here, all_ = (
                _change(ours, theirs, depths) for depths in ({operating} & set(shared), shared)
            )
            ahead = (ours[shared].mean() > theirs[shared].mean()).sum()
            rows.append(
                (name, operating, *here[:4], len(shared), ahead, *all_[:4], all_.n, tuple(shared))
            )
    table = pd.DataFrame(rows, columns=TESTS)
    return table.assign(p_holm=metrics.holm(table.p), p_all_holm=metrics.holm(table.p_all))


def _change(one: pd.DataFrame, other: pd.DataFrame, depths) -> metrics.Difference:
    """Paired difference of the mean marks over these depths, of questions that both have scored at each."""
    means = [
        curve.reindex(columns=list(depths)).mean(axis=1, skipna=False) for curve in (one, other)
    ]
    return metrics.paired_difference(*(mean.rename("score").reset_index() for mean in means))


def cliffs(answers: pd.DataFrame, variants: pd.DataFrame) -> pd.DataFrame:
    """Each criterion's steepest fall, per block, between neighbouring depths, and how far it stays level.

    fall: points lost from fall_from to fall_to blocks, with the paired interval of that pair, which was chosen for its
    fall; level_until: the last depth before the first whose paired interval to the unpruned one lies below 0.
    """
    rows = []
    for name, curve in curves(answers, variants).items():
        depths = np.array(sorted(curve))
        if depths[0] == 0 and len(depths) > 1:
            falls = metrics.mean_intervals(-curve[depths].diff(axis=1).iloc[:, 1:])
            steps = falls["mean"].to_numpy() / np.diff(depths)
            at = int(np.nanargmax(steps)) if np.isfinite(steps).any() else 0
            change = metrics.mean_intervals(curve[depths].sub(curve[0], axis=0))
            clear = change.index[change.hi < 0]
            level = change.index[
                (change.hi >= 0) & (change.index < clear.min() if len(clear) else True)
            ].max()
            rows.append(
                (
                    name,
                    len(depths) - 1,
                    depths[at],
                    depths[at + 1],
                    *falls.iloc[at],
                    steps[at],
                    level,
                )
            )
    return pd.DataFrame(rows, columns=CLIFF)


def sublayers(
    answers: pd.DataFrame | None, variants: pd.DataFrame, sizes: pd.DataFrame, own: str
) -> pd.DataFrame:
    """Models without single attentions or MLPs, each beside own's whole-block model of the nearest parameter count.

    sizes: variant, params_b. Adds `nearest`, `apart` (parameter counts' difference in own's blocks) and the paired
    difference in points, sublayers minus blocks.
    """
    size = sizes.drop_duplicates("variant").set_index("variant").params_b
    table = pruned_only(variants).assign(params_b=lambda frame: frame.variant.map(size))
    cut = table[~table.whole].sort_values(["criterion", "blocks_removed", "sublayers_removed"])
    blocks = table[table.criterion == own].dropna(subset=["params_b"])
    of_original = size.get("original", np.nan)
    a_block = ((of_original - blocks.params_b) / blocks.blocks_removed).median()
    asked = answers if answers is None else answers.drop_duplicates(["variant", "item", "question"])
    rows = []
    for row in cut.itertuples():
        near = (blocks.params_b - row.params_b).abs()
        name = blocks.variant[near.idxmin()] if near.notna().any() else None
        rows.append((row.variant, name, near.min() / a_block, *_between(asked, row.variant, name)))
    beside = pd.DataFrame(rows, columns=["variant", "nearest", "apart", *CHANGE])
    return cut.drop(columns="params_b").merge(beside, on="variant")


def _between(answers, one, other):
    if answers is None or other is None:
        return [np.nan] * 4
    return metrics.paired_difference(
        answers[answers.variant == one], answers[answers.variant == other]
    )[:4]
