"""The answer: the compressed model beside those it must be compared with, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report import rule, trainings
from derm_compress.report.paper import model
from derm_compress.report.results import Results
from derm_compress.report.tables import joins

PRUNING, QUANTIZATION = "pruning", "quantization"
ABOVE = ["compressed_above", "compressed_above_lo", "compressed_above_hi"]
AS_MANY = 1.01  # of bytes: so much more counts as equal
BUDGETS = (4, 6, 8, 12)  # GB of 10^9 bytes: cards that people have


@dataclass(frozen=True)
class Rival:
    """A variant of one technique alone, and by how many percent its weights are larger."""

    variant: str
    called: str
    larger: float


def single(results: Results, technique: str = "") -> Rival | None:
    """The best model of one technique alone (of either, unless one is named) that has the full
    pipeline's bytes; where there is none, the best of the smallest that have more.

    The technique gets the same SFT where the run has such a model. Bytes are the planned weights of
    the run's own model.
    """
    if results.memory is None or results.full is None:
        return None
    table = results.variants.merge(results.memory[["variant", "vram_gib"]], on="variant")
    own = table.vram_gib[table.variant == results.full].max()
    scores = results.together.groupby("variant").score.mean()
    table = table.assign(larger=100 * (table.vram_gib / own - 1), score=table.variant.map(scores))
    pruned, packed = table.blocks_removed > 0, table.bits < 16
    known = table.criterion.isin(["", results.criterion]) & table.sft_seed.eq(0)
    ways = {PRUNING: pruned & ~packed, QUANTIZATION: packed & ~pruned}
    alone = ways[technique] if technique else ways[PRUNING] | ways[QUANTIZATION]
    table = table[alone & known & table.score.notna() & table.larger.ge(-rule.PERCENT)]
    if table.empty:
        return None
    nearest = max(table.larger.min() + rule.PERCENT / 2, rule.PERCENT)
    best = table[table.larger <= nearest].sort_values(["healed", "score"]).iloc[-1]
    return Rival(best.variant, results.names[best.variant], float(best.larger))


def beside(results: Results) -> pd.DataFrame:
    """At most six models, all on stage 08's pictures, and the full pipeline above each."""
    wanted = [results.variant(0), results.variant(0, healed=True), *results.main[1:]]
    wanted += [results.variant(0, quantizer="awq"), results.full]
    rival, asked = single(results), set()
    if results.evaluation is not None:
        asked = set(results.evaluation.variant)
    if rival and rival.variant in asked and rival.variant not in wanted:
        wanted[2] = rival.variant
    table = pd.DataFrame({"variant": [name for name in wanted if name]})
    table = joins.scored(table, results, results.evaluation)
    table["model"] = [results.names[name] for name in table.variant]
    ours = [results.full] * len(table)
    changes = joins.changes(results, results.evaluation, ours, table.variant)
    table[ABOVE] = changes[joins.CHANGE[:3]]
    four = joins.of_paper(results, 4)[["variant", "paper_score"]].dropna()
    return table.merge(four, on="variant", how="left")


def decisions(results: Results) -> pd.DataFrame:
    """What to take for a card of so many GB, peak included, as planned at 7B; what a narrower width
    asks for; and how far pruning alone is safe."""
    if results.memory is None or results.answers is None:
        return pd.DataFrame()
    rows = []
    for gb in BUDGETS:
        found = for_budget(results, gb)
        if not rows or found["take"] != rows[-1]["take"]:
            rows.append(found)
    one_width = results.models.bits[~results.models.mixed]
    rows += [for_width(results, bits) for bits in sorted(set(one_width)) if bits < 4]
    rows.append(without_training(results))
    return pd.DataFrame([row for row in rows if row])


def for_budget(results: Results, gb: float) -> dict:
    """The best scored model whose planned peak at 7B fits so many GB."""
    peaks = results.memory.drop_duplicates("variant").set_index("variant").peak_gib_7b * model.GB
    return the_best(
        results, f"{gb} GB, peak included", peaks[peaks <= gb], "planned peak {:.1f} GB"
    )


def for_width(results: Results, bits: int) -> dict:
    """The best scored model of the bytes that the unpruned one takes at a narrow width."""
    table = results.models[results.models.bits.eq(bits) & ~results.models.mixed]
    sizes = results.memory.drop_duplicates("variant").set_index("variant").vram_gib
    room = AS_MANY * sizes.reindex(table.variant[table.blocks_removed == 0]).max()
    return the_best(results, f"the bytes of {bits:g} bits in all blocks", sizes[sizes <= room])


def the_best(results: Results, situation: str, fit: pd.Series, size: str = "") -> dict:
    """A line of the table: of the models that fit, with their sizes, the one that scores most on
    the test pictures, which all were asked about; further seeds of a training do not count."""
    again = results.variants.variant[results.variants.sft_seed > 0]
    scores = results.answers.groupby("variant").score.mean().dropna()
    scores = scores[scores.index.isin(fit.index) & ~scores.index.isin(again)]
    if scores.empty:
        return row(situation, "nothing that was scored fits")
    best = scores.idxmax()
    if metrics.percent(scores[best]) <= metrics.FLOOR + 1:
        return row(situation, "nothing: all that fit get the lowest mark")
    said = ", ".join(filter(None, [f"best of {len(scores)} that fit", size.format(fit[best])]))
    return against_control(results, situation, best, said)


def without_training(results: Results) -> dict | None:
    """The most blocks whose removal costs less than the margin, surely, at every depth until it."""
    last, change, said = 0, None, ""
    for n in sorted(set(results.models.units_removed) - {0}):
        pair = results.variant(n), results.variant(0)
        found = trainings.apart(results, results.answers, *pair)
        if not found.n:
            break
        if found.lo <= -rule.POINTS:
            said = f"without {n}, {-found.difference:.1f} points are lost"
            break
        last, change = n, found
    do = f"remove at most {last} of {results.blocks} blocks" if last else "remove no block"
    whole = results.names.get(results.variant(0), "")
    return row("no training after pruning", do, said, change, whole)


def against_control(results: Results, situation: str, best: str, said: str) -> dict:
    """A line of the table: a model against the unpruned one with the same SFT; where no such one
    is, against the unpruned one."""
    whole = results.variant(0, healed=True) or results.variant(0)
    change = trainings.apart(results, results.answers, best, whole)
    return row(situation, results.names[best], said, change, results.names.get(whole, ""))


def row(
    situation: str,
    do: str,
    said: str = "",
    change: metrics.Difference | None = None,
    beside: str = "",
) -> dict:
    """A line of the table; how sure it is, in words, and beside which model."""
    found = {"situation": situation, "take": do}
    if change is not None and change.n:
        if rule.alike(change.lo, change.hi):
            sure = f"no more than {rule.POINTS} points are lost"
        elif change.hi < -rule.POINTS:
            sure = f"more than {rule.POINTS} points are lost"
        else:
            sure = f"{rule.POINTS} points may be lost"
        found |= {"beside": beside, **joins.interval("to_unpruned", change)}
        said = f"{sure}; {said}"
    return found | {"sure": said}
