"""What the rankings of blocks and the models pruned by them say, as sentences: every number is computed. No torch.

Each `findings_*` takes Results and returns the sentences that its frames suffice for.
"""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report import tables
from derm_compress.report.agreement import ENOUGH, enough, one_picture
from derm_compress.report.results import Results, first_to_go, reaches
from derm_compress.report.wording import criteria_explained, joined, listed, p_value, verdict, words

FEW = 3  # rivals, up to which each gets its own sentence
NAMED = ("magnitude", "block_influence", "random")  # the rivals that are asked for by name
UNMEASURED = ("random", "last", "published")  # orders that look at no block
SIGNIFICANT = 0.05


def base(name: str) -> str:
    """The criterion of a ranking: output_similarity of output_similarity-text, random of random (mean of 5)."""
    return name.split("-")[0].split(" ")[0]


def ours(results: Results) -> str:
    return (
        "the paper's criterion"
        if results.criterion == "output_similarity"
        else words(results.criterion)
    )


def findings_importance(results: Results) -> list[str]:
    """Which blocks go first, whether criteria and draws of pictures agree on it, and whether images change it."""
    parts = (
        findings_order,
        findings_drafts,
        findings_agreement,
        findings_calibration,
        findings_images,
    )
    return [sentence for find in parts for sentence in find(results)]


def findings_order(results: Results) -> list[str]:
    """The blocks to go at the operating point, by the study's own criterion and by the others."""
    own = (results.plans or {}).get(results.criterion)
    if not own:
        return []
    gone = set(first_to_go(own, results.operating))
    said = [
        f"By {words(results.criterion)} blocks {listed(first_to_go(own, results.operating))} go first; "
    ]
    said[0] += f"{listed(own['protected'])} are protected."
    plans = {
        name: plan
        for name, plan in results.plans.items()
        if compared(name, plan) and reaches(plan, len(gone))
    }
    others = {
        name: set(first_to_go(plan, len(gone)))
        for name, plan in plans.items()
        if name != results.criterion
    }
    shared = pd.Series(
        {name: len(gone & blocks) for name, blocks in others.items()}, dtype=int
    ).sort_values()
    if len(shared) > FEW:
        free = own["blocks"] - len(own["protected"])
        fewest, most = (
            f"{shared[name]} ({words(name)})" for name in (shared.index[0], shared.index[-1])
        )
        said.append(
            f"Of these {len(gone)}, the other {len(shared)} plans remove between {fewest} and {most}; a random order "
            f"{len(gone) ** 2 / free:.1f} on average."
        )
        return said
    for name in shared.index:
        first = listed(first_to_go(results.plans[name], len(gone)))
        said.append(
            f"By {words(name)} blocks {first} go first; {shared[name]} of these {len(gone)} would go by "
            f"{words(results.criterion)} too."
        )
    return said


def findings_drafts(results: Results) -> list[str]:
    """How much of the answers without a block was read instead of written, and how often two words came close."""
    told = results.similarity
    if told is None or not told.tokens.sum():
        return []
    tokens, ties = int(told.tokens.sum()), int(told.near_ties.sum())
    return [
        f"Of the {tokens} tokens that the model answers without one block, {told.accepted.sum() / tokens:.0%} were "
        f"read from a draft instead of written; {ties} {'was a near tie' if ties == 1 else 'were near ties'}, where "
        "rounding may choose the word."
    ]


def compared(name: str, plan: dict) -> bool:
    """Whether a plan says which whole blocks matter."""
    return base(name) != "random" and not any(isinstance(unit, str) for unit in plan["order"])


def findings_agreement(results: Results) -> list[str]:
    """The strongest and the weakest rank correlation of the study's own criterion with another one."""
    if results.values is None:
        return []
    own, others = (
        words(results.criterion),
        criteria_beside(tables.agreements(results), results.criterion),
    )
    if others.empty:
        return glossary(results)
    free = results.values.query("part == 'block'").block.nunique() - len(results.protected)
    last, first = others.iloc[-1], others.iloc[0]
    said = f"Over the {free} unprotected blocks {own} correlates in rank with {words(last.other)} at {interval(last)}"
    if len(others) > 1:
        above, below = (others.rho_lo > 0).sum(), (others.rho_hi < 0).sum()
        said += (
            f", the strongest of {len(others)}, and with {words(first.other)} at {interval(first)}, the weakest; "
            f"{above} of the {len(others)} intervals lie above 0, {below} below"
        )
    return [said + ".", *glossary(results)]


def glossary(results: Results) -> list[str]:
    """By what blocks go in the rankings that the run has, and what the endings of their names say."""
    known = [] if results.values is None else results.values.ranking
    tried = [] if results.variants is None else results.variants.criterion
    said = criteria_explained([*known, *tried, *(results.plans or {})])
    return [f"Blocks go by: {said}."] if said else []


def criteria_beside(agreement: pd.DataFrame, own: str) -> pd.DataFrame:
    """The pairs of `own` with every other criterion, the weakest first; orders that look at no block aside."""
    table = with_own(agreement, own)
    return table[~table.other.map(base).isin([base(own), *UNMEASURED])].sort_values(
        "rho", kind="stable"
    )


def with_own(table: pd.DataFrame, own: str) -> pd.DataFrame:
    """The pairs of one ranking, the other one always in `other`."""
    turned = table.rename(columns={"one": "other", "other": "one"})
    both = pd.concat([table, turned[list(table)]], ignore_index=True)
    return both[both.one == own]


def interval(row, name: str = "rho") -> str:
    """0.71 (0.55 to 0.80)."""
    value, lo, hi = (row[f"{name}{end}"] for end in ("", "_lo", "_hi"))
    return f"{value:.2f}" + ("" if pd.isna(lo) else f" ({lo:.2f} to {hi:.2f})")


def findings_calibration(results: Results) -> list[str]:
    """How many calibration pictures are enough for two disjoint draws to agree."""
    if results.values is None:
        return []
    curves = dict(list(tables.calibration_sizes(results).groupby("ranking", sort=False)))
    own = curves.pop(results.criterion, None)
    if own is None:
        return []
    most, need = own.loc[own["items"].idxmax()], enough(own)
    said = f"Two disjoint draws of {most['items']} pictures rank the blocks by {words(results.criterion)} with a "
    said += f"correlation of {interval(most)}, and {interval(most, 'overlap')} of the blocks to go are the same, where "
    said += f"chance gives {most.chance:.2f}. "
    reach = f"{ENOUGH:g} of that correlation"
    said += (
        f"{reach} is first reached with {need} pictures"
        if need
        else f"{reach} is not reached with fewer pictures"
    )
    needs = {words(name): enough(curve) for name, curve in curves.items()}
    known = sorted((need, name) for name, need in needs.items() if need)
    if known:
        said += f"; of {len(needs)} other rankings {len(known)} reach theirs, with {known[0][0]} to {known[-1][0]}"
    return [said + "."]


def findings_images(results: Results) -> list[str]:
    """Whether ranking on text alone changes the order more than other pictures do.

    Halves rank on half the items, so they agree less than whole draws would: a change is claimed late rather than soon.
    A criterion that reads no reference has one prompt a question without pictures: what one picture says is the noise
    that such a ranking has at least.
    """
    rankings = [] if results.values is None else list(dict.fromkeys(results.values.ranking))
    pairs = [(name, f"{name}-text") for name in rankings if f"{name}-text" in rankings]
    if not pairs:
        return []
    table = tables.agreements(results)
    rows = {name: with_own(table, name).set_index("other").loc[text] for name, text in pairs}
    told = results.criterion if results.criterion in rows else pairs[0][0]
    said = [without_images(told, rows.pop(told), spread(results, told))]
    changed = [words(name) for name, row in rows.items() if moved(row, spread(results, name))]
    if rows:
        which = f" ({listed(changed)})" if changed else ""
        said.append(
            f"Of {len(rows)} other rankings, leaving images out so changes {len(changed)}{which}."
        )
    return said


def spread(results: Results, name: str) -> pd.Series | None:
    """How well a ranking agrees with itself by other pictures: `which`, rho, rho_lo, rho_hi; None for too few."""
    own, text = (
        results.values[results.values.ranking == ranking] for ranking in (name, f"{name}-text")
    )
    if own["item"].nunique() > 1 and text["item"].nunique() == 1:
        found = one_picture(results.values, results.protected, name)
        told = dict(zip(("rho", "rho_lo", "rho_hi"), found, strict=True))
        return pd.Series(told | {"which": "one picture and the others"})
    curve = tables.calibration_sizes(results).query("ranking == @name")
    if curve.empty:
        return None
    return pd.Series(dict(curve.iloc[-1]) | {"which": "two disjoint halves of the pictures"})


def moved(row, noise: pd.Series | None) -> bool:
    """Whether a ranking differs more from its image-free one than rankings by other pictures differ."""
    return noise is not None and row.rho < noise.rho_lo


def without_images(name: str, row, noise: pd.Series | None) -> str:
    said = f"Ranked without images, {words(name)} correlates with its ranking with images at {interval(row)}"
    if noise is None:
        return said + "."
    more = "changes the ranking more" if moved(row, noise) else "does not change the ranking more"
    return f"{said}, {noise.which} at {interval(noise)}: leaving images out {more} than other pictures do."


def findings_criteria(results: Results) -> list[str]:
    """The study's own criterion against its rivals; where the score falls; what single sublayers give."""
    return findings_rivals(results) + findings_cliffs(results) + findings_sublayers(results)


def findings_rivals(results: Results) -> list[str]:
    """The study's own criterion against each rival in pairs, at the operating point and over all depths."""
    table = tables.criteria_tests(results)
    table = table if table.empty else table.dropna(subset=["difference_all", "p_all"])
    if table.empty:
        return []
    ranked = comparable(table).sort_values("difference_all")
    asked = table.criterion.map(base).isin(NAMED) & ~table.criterion.str.contains(r"-[a-z]")
    told = table if len(table) <= FEW else table[asked]
    said = [duel(results, row) for row in told.to_dict("records")]
    for row, which in ((ranked.iloc[0], "best"), (ranked.iloc[-1], "worst")):
        if len(ranked) > 1 and row.criterion not in set(told.criterion):
            said.append(
                f"Of the {len(ranked)} rivals with models at the same {row.depths} depths the {which} over all depths "
                f"is {words(row.criterion)}. {duel(results, row)}"
            )
    said += (
        []
        if not asked.any()
        else [answer(results, table[asked], joined(table.criterion[asked].map(words)))]
    )
    return said + ([answer(results, table, "all its rivals")] if len(table) > asked.sum() else [])


def comparable(table: pd.DataFrame) -> pd.DataFrame:
    """The rivals whose means are over the same depths: those that most of them share with the study's criterion."""
    counts = table.shared.value_counts(sort=False)
    return table[
        table.shared == max(counts.index, key=lambda depths: (counts[depths], len(depths)))
    ]


def duel(results: Results, row) -> str:
    """One rival at the operating point, over all depths, and at how many it is behind."""
    us, them, n = ours(results), words(row["criterion"]), results.operating
    said = f"At {n} blocks {them} has no model to compare {us} with"
    if not pd.isna(row["p"]):
        said = (
            f"At {n} blocks {verdict(change(row), us, them)}, {p_value(row['p_holm'])} after Holm"
        )
    over = f"over all {row['depths']} depths {verdict(change(row, '_all'), 'it', them)}, {p_value(row['p_all_holm'])}"
    return f"{said}; {over}; it is ahead at {row['ahead']} of {row['depths']} by point estimate."


def change(row, end: str = "") -> SimpleNamespace:
    parts = ("difference", "lo", "hi")
    columns = (f"difference{end}", f"difference{end}_lo", f"difference{end}_hi")
    return SimpleNamespace(
        **{part: row[column] for part, column in zip(parts, columns, strict=True)}
    )


def answer(results: Results, table: pd.DataFrame, rivals: str) -> str:
    """Does the study's criterion beat these rivals? Significant wins and losses, counted."""
    said = [f"Does {ours(results)} beat {rivals} here? "]
    for where, end in (("Over all depths", "_all"), (f"At {results.operating} blocks", "")):
        sure = table[table[f"p{end}_holm"] < SIGNIFICANT]
        won, lost = (
            sure[sign * sure[f"difference{end}"] > 0].criterion.map(words) for sign in (1, -1)
        )
        known = table[f"p{end}"].notna().sum()
        said.append(
            f"{where} it wins significantly against {counted(won, known)} and loses to {counted(lost, known)}"
        )
    return said[0] + "; ".join([said[1], said[2][0].lower() + said[2][1:]]) + " (Holm, 5 %)."


def counted(names, total: int) -> str:
    return f"{len(names)} of {total}" + (f" ({listed(names)})" if 0 < len(names) <= FEW else "")


def findings_cliffs(results: Results) -> list[str]:
    """Where the score falls steepest, and how far it stays level."""
    table = tables.cliffs(results)
    if table.empty or results.criterion not in set(table.criterion):
        return []
    table = table.set_index("criterion")
    own, others = table.loc[results.criterion], table.drop(results.criterion)
    said = [
        f"By {words(results.criterion)} the score falls steepest from {own.fall_from:.0f} to {own.fall_to:.0f} blocks, "
        f"by {own.fall:.1f} points ({own.fall_lo:.1f} to {own.fall_hi:.1f}); {level(own)}."
    ]
    if len(others):
        until = others.level_until.sort_values(kind="stable")
        first, last = others.loc[[until.index[0]]].iloc[0], until.index[-1]
        said.append(f"By {words(until.index[0])}, {level(first)}")
        said[-1] += (
            f"; by {words(last)}, the longest, up to {until.iloc[-1]}." if len(others) > 1 else "."
        )
    return said


def level(row) -> str:
    if not row.level_until:
        return "already at the first depth the paired interval to the unpruned model lies below 0"
    return (
        f"no paired interval to the unpruned model lies below 0 up to {row.level_until:.0f} blocks"
    )


def findings_sublayers(results: Results) -> list[str]:
    """Single attentions or MLPs against whole blocks of as many parameters."""
    table = tables.sublayers(results)
    close = table[(table.apart <= 0.5) & table.p.notna()] if len(table) else table
    said = []
    for name, rows in close.groupby("criterion", sort=False):
        sure = metrics.holm(rows.p) < SIGNIFICANT
        above, below = ((sure & (sign * rows.difference > 0)).sum() for sign in (1, -1))
        said.append(
            f"{words(name)}: beside whole blocks of as many parameters (within half a block) the score differs by "
            f"{rows.difference.min():+.1f} to {rows.difference.max():+.1f} points at {len(rows)} sizes, significantly "
            f"above at {above} and below at {below} (Holm, 5 %)."
        )
    none = "No model without single attentions or MLPs has nearly as many parameters as one without whole blocks."
    return said or ([none] if len(table) and results.memory is not None else [])
