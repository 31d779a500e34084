"""Criteria in pairs: which pruned models answer better.

Only unhealed 16-bit models count here; all random orders count as one rival, their mean.
"""

from __future__ import annotations

import json

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.model.variants import MENDED
from derm_compress.report import rule
from derm_compress.report.results import ANSWER, Results, removes_parts
from derm_compress.report.tables import joins


def pruned_only(results: Results) -> pd.DataFrame:
    """The original and what removal alone made of it; `whole`: only blocks ever go."""
    table = results.models
    alone = ~table.healed.astype(bool) & table.criterion.ne(MENDED)
    table = table[alone & (table.bits == 16)]
    return table.assign(whole=~table.criterion.map(removes_parts).astype(bool))


def criteria(results: Results) -> pd.DataFrame:
    """Every criterion at every depth, before SFT; whole blocks only."""
    table = pruned_only(results).query("whole and blocks_removed > 0")
    table = table.sort_values(["blocks_removed", "criterion"])
    return joins.scored(table, results, results.answers)


def curves(results: Results) -> dict[str, list[pd.DataFrame]]:
    """{criterion: [its marks, [answers, depths]]} of whole blocks, depth 0 being the original; all
    random orders stand under one name."""
    table = pruned_only(results)
    asked = results.answers[results.answers.variant.isin(table.variant)].drop_duplicates(ANSWER)
    wide = asked.pivot(index=["item", "question"], columns="variant", values="score").astype(float)
    original = results.variant(0)
    start = wide[[original]].set_axis([0], axis=1) if original in wide else wide[[]]
    found, random = {}, []
    whole = table[table.variant.isin(wide)].query("whole and blocks_removed > 0")
    for name, rows in whole.sort_values("blocks_removed").groupby("criterion", sort=False):
        curve = start.join(wide[list(rows.variant)].set_axis(list(rows.blocks_removed), axis=1))
        if name.startswith("random-"):
            random.append(curve)
        else:
            found[name] = [curve]
    if random:
        found[random_name(len(random))] = random
    return found


def random_name(draws: int) -> str:
    return "random-0" if draws == 1 else f"random (mean of {draws})"


def criteria_tests(results: Results) -> pd.DataFrame:
    """The study's own criterion minus each rival in points, at the operating point and over all
    depths that both have.

    Over all depths an answer's marks are averaged first. p by sign flips, and from the interval
    where this is of random orders, too; p_holm: corrected over the rivals, those that leave the
    same blocks counted once. same_as, same_as_all: the own criterion or the rival before that
    leaves the same blocks, here and at all depths. ahead: at how many of the `depths` the own one
    scores more.
    """
    known, rows, places = curves(results), [], {}
    (ours,) = known.pop(results.criterion, [pd.DataFrame()])
    for name, theirs in known.items():
        shared = sorted(set(ours).intersection(*theirs) - {0})
        if not shared:
            continue
        places[name] = [n for n in shared if n == results.operating], shared
        mean = sum(curve[shared] for curve in theirs) / len(theirs)
        here = _change(ours, theirs, places[name][0])
        over = _change(ours, theirs, shared)
        rows.append(
            {
                "criterion": name,
                "blocks_removed": results.operating,
                **joins.interval("difference", here),
                "p": here.p,
                "depths": len(shared),
                "ahead": (ours[shared].mean() > mean.mean()).sum(),
                **joins.interval("difference_all", over),
                "p_all": over.p,
                "n": over.n,
            }
        )
    if not rows:
        return pd.DataFrame()
    table, left = pd.DataFrame(rows), kept_blocks(results)
    for i, end in enumerate(("", "_all")):
        depths = {name: each[i] for name, each in places.items()}
        table[f"same_as{end}"] = twins(left, results.criterion, depths)
        table[f"p{end}_holm"] = counted_once(table, f"p{end}", f"same_as{end}")
    return table


def kept_blocks(results: Results) -> dict[tuple[str, int], tuple]:
    """{(criterion, blocks removed): the blocks that are left}, as far as recipes tell."""
    found = {}
    for row in pruned_only(results).query("whole and blocks_removed > 0").itertuples():
        for step in json.loads(row.recipe).get("steps", ()):
            if step["step"] == "prune":
                found[row.criterion, row.blocks_removed] = tuple(step["kept"])
    return found


def twins(left: dict, own: str, depths: dict[str, list[int]]) -> list[str]:
    """For each ranking the own one, or the first before it, if that leaves the same blocks at all
    of its depths; empty for none."""
    found, first = [], {}
    for name, at in depths.items():
        theirs, ours = ([left.get((one, n)) for n in at] for one in (name, own))
        if not at or None in theirs:
            found.append("")
        elif theirs == ours:
            found.append(own)
        else:
            before = first.setdefault((*at, *theirs), name)
            found.append("" if before == name else before)
    return found


def counted_once(table: pd.DataFrame, p: str, twin: str) -> pd.Series:
    """Holm's correction over the rivals without a twin; the others have that of their twin."""
    corrected = pd.Series(metrics.holm(table[p].where(table[twin] == "")), table.index)
    by_name = dict(zip(table.criterion, corrected, strict=True))
    return corrected.where(table[twin] == "", table[twin].map(by_name).fillna(table[p]))


def _change(
    ours: pd.DataFrame, theirs: list[pd.DataFrame], depths: list[int]
) -> metrics.Difference:
    """Paired difference of the mean marks over these depths, where both have them all; to several
    random orders, interval and p also tell what other orders would give."""
    one, *others = (_over(curve, depths) for curve in (ours, *theirs))
    both = (marks.rename("score").reset_index() for marks in (one, sum(others) / len(others)))
    found = metrics.paired_difference(*both)
    if len(others) == 1 or not found.n:
        return found
    apart = pd.concat([one - other for other in others], axis=1).dropna()  # [answers, orders]
    by_image = metrics.percent(apart.groupby(level="item").mean())
    lo, hi = metrics.crossed_interval(by_image.to_numpy())
    return found._replace(lo=lo, hi=hi, p=rule.p_value(found.difference, lo, hi, at=0))


def _over(curve: pd.DataFrame, depths: list[int]) -> pd.Series:
    return curve.reindex(columns=depths).mean(axis=1, skipna=False)
