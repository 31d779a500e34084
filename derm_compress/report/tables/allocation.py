"""Ways to spend one budget of memory on blocks and bits, side by side. No torch."""

from __future__ import annotations

import json

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.method.allocation.allocation import CANDIDATE, JOINT, PROBE, RUNNING
from derm_compress.model.variants import HEALED
from derm_compress.report.results import Results, answers_of
from derm_compress.report.tables import joins

RANKS = {"method": "spearman", "min_periods": 3}


def at_equal_bytes(results: Results) -> pd.DataFrame:
    """A row for every way within every budget; of random ones the nearest to the whole model.

    difference: the joint allocation above it, paired over pictures.
    """
    table = results.allocations[~results.allocations.way.isin([CANDIDATE, PROBE])]
    table = table.sort_values(["budget_gib", "kl"]).drop_duplicates(["budget_gib", "way"])
    table = table.rename(columns={"way": "method", "units_removed": "blocks_removed"})
    running = table.allocation.map(lambda told: running_bytes(json.loads(told)))
    table["bytes_exact"] = table.variant.map(results.held.set_index("variant").held) + running
    answers = results.allocation_answers
    for end, suffix in (("before", ""), ("after", HEALED)):
        asked = table[["variant"]].assign(variant=table.variant + suffix).drop_duplicates()
        known = metrics.score_table(answers[answers.variant.isin(asked.variant)], ["variant"])
        known["variant"] = known.variant.str.removesuffix(HEALED)
        named = {f"score{part}": f"score_{end}{part}" for part in ("", "_lo", "_hi")}
        columns = ["variant", *named, *(["n"] if end == "before" else [])]
        table = table.merge(known[columns].rename(columns=named), on="variant", how="left")
    best = table[table.method == JOINT].set_index("budget_gib").variant
    rows = [
        metrics.paired_difference(answers_of(answers, one), answers_of(answers, other))[:4]
        for one, other in zip(table.budget_gib.map(best), table.variant, strict=True)
    ]
    table[joins.CHANGE] = pd.DataFrame(rows, table.index, dtype=float)
    same = table.variant == table.budget_gib.map(best)
    table.loc[same, joins.CHANGE] = None
    return table.assign(p_holm=metrics.holm(table.p))


def running_bytes(allocation: dict) -> int:
    return sum(allocation["bytes"][part] for part in RUNNING)


def agreement(results: Results) -> dict[str, float]:
    """Spearman's rank correlations: divergence foretold and real, over the programme's candidates
    and over all; scores before and after healing. nan where fewer than three are known."""
    tried = results.allocations[results.allocations.way != PROBE].drop_duplicates("variant")
    table = at_equal_bytes(results).drop_duplicates("variant")
    pairs = {"candidates": results.allocations[results.allocations.way == CANDIDATE], "all": tried}
    found = {name: frame.predicted.corr(frame.kl, **RANKS) for name, frame in pairs.items()}
    return found | {"healing": table.score_before.corr(table.score_after, **RANKS)}
