"""Is what the paper claims true of a run? One row a claim, its verdict by the one rule.

Sizes at 7B are arithmetic of shapes: they stand in the table and are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.method.quantization.methods import METHODS
from derm_compress.model.variants import paper_depth
from derm_compress.report import rule
from derm_compress.report.paper import model, numbers
from derm_compress.report.results import Results, answers_of
from derm_compress.report.rule import PERCENT, POINTS
from derm_compress.report.tables import answer, joins, specimen, statistics

ONE = numbers.table(1).set_index("blocks_removed").paper_score
FOUR = numbers.table(4).set_index("setting")
FIVE = numbers.table(5).set_index("setting").paper_score
THREE = numbers.table(3).query("role == 'operating'").set_index("quantizer").paper_score
WHOLE, PRUNED, HEALED, PACKED, UNHEALED, FULL = FOUR.index
OURS, NF4, MAGNITUDE, ROUNDED = FIVE.index
DEPTH = model.blocks_gone(FOUR.paper_params_b[FULL])  # of the paper's pipeline
FREE = [name for name, m in METHODS.items() if not m.scaling and 4 in m.widths]  # see no data
NEAR_FLOOR = metrics.FLOOR + POINTS


class Found(NamedTuple):
    """What a run has: a value with its interval, or why it has none."""

    ours: float | None = None
    lo: float | None = None
    hi: float | None = None
    because: str = ""
    untestable: bool = False


UNSCORED = Found(because="no scores of these models", untestable=True)
Measure = Callable[[Results], Found]


def weights(results: Results) -> Found:
    return _in_both_units(model.weights_gib(DEPTH, "awq"))


def peak(results: Results) -> Found:
    return _in_both_units(model.peak_gib(DEPTH, "awq"))


def _in_both_units(gib: float) -> Found:
    """The paper writes GB; as an interval it is what lies between both units."""
    gb = gib * model.GB
    said = f"{gib:.2f} GiB or {gb:.2f} GB, {DEPTH} of 32 blocks removed"
    return Found(gb, gib, gb, said)


def saved(results: Results) -> Found:
    """Of the weights; of the peak it is less."""
    share = 100 * (1 - model.weights_gib(DEPTH, "awq") / model.weights_gib(0))
    of_peak = 100 * (1 - model.peak_gib(DEPTH, "awq") / model.peak_gib(0))
    said = f"{share:.0f} % of the weights, {of_peak:.0f} % of the peak"
    return Found(share, *sorted((of_peak, share)), said)


def faster(results: Results) -> Found:
    """Testable on a T4 with the paper's model alone."""
    names = results.variant(0), results.full
    columns = [f"total_ms_per_token{end}" for end in ("", "_lo", "_hi")]
    whole, full = (joins.values(results.one_prompt, name, columns) for name in names)
    own = FOUR.paper_ms_per_token[WHOLE] / FOUR.paper_ms_per_token[FULL]
    said = f"the paper's own Table 4 gives {own:.2f}"
    if not on_papers_machine(results) or None in (whole[0], full[0]):
        return Found(because=f"needs the 7B model on a T4; {said}", untestable=True)
    ratio, least, most = whole[0] / full[0], whole[1] / full[2], whole[2] / full[1]
    return Found(ratio, least, most, said)


def points(one: Callable, other: Callable) -> Measure:
    """One variant above another, both named by what finds them in a run."""

    def measure(results: Results) -> Found:
        change = statistics.apart(results, results.together, one(results), other(results))
        return Found(*change[:3]) if change.n else UNSCORED

    return measure


def setting(number: int, name: str) -> Callable[[Results], str | None]:
    """What finds the variant of a row of the paper's Table 4 or 5."""
    return lambda results: joins.of_paper(results, number).set_index("setting").variant[name]


def beats(technique: str) -> Measure:
    """The full pipeline against the best model of one technique alone, of the same bytes."""

    def measure(results: Results) -> Found:
        rival = answer.single(results, technique)
        if rival is None:
            return Found(because=f"no {technique} alone of these bytes or more", untestable=True)
        change = statistics.apart(results, results.together, results.full, rival.variant)
        larger = f"; it takes {rival.larger:.0f} % more bytes" if rival.larger > PERCENT else ""
        said = f"against {rival.called}{larger}"
        lost = rival.larger > PERCENT and change.lo <= POINTS_ALONE
        return Found(*change[:3], because=said, untestable=bool(lost))

    return measure


def recovered(results: Results) -> Found:
    """Of what pruning took, net of what the same SFT gives the unpruned model, in percent."""
    four = [*results.main, results.variant(0, healed=True)]
    back = metrics.recovery(*(answers_of(results.answers, name) for name in four))
    if pd.isna(back.lo):
        return Found(because="pruning took too little to tell", untestable=True)
    variance = 2 * statistics.training_variance(results) * (100 / back.loss) ** 2
    said = f"{back.net:.1f} of {back.loss:.1f} points, net of the control's gain"
    return Found(back.share, *rule.widened(back.share, back.lo, back.hi, variance), said)


def without_calibration(results: Results) -> Found:
    """What the best of these methods costs the healed model, against its 16 bits."""
    n = results.operating
    costs = {}
    for method in FREE:
        name = results.variant(n, healed=True, quantizer=method)
        cost = statistics.apart(results, results.together, name, results.main[2])
        if cost.n:
            costs[METHODS[method].words] = cost
    if not costs:
        return UNSCORED
    best = max(costs, key=lambda name: costs[name].difference)
    return Found(*costs[best][:3], because=f"{best}, the best of {len(costs)} methods")


def worst_until(blocks: int) -> Measure:
    """The largest loss at any depth up to so many of 32 blocks."""

    def measure(results: Results) -> Found:
        most, found = paper_depth(blocks, results.blocks), {}
        for n in sorted(set(results.models.units_removed) - {0}):
            if n <= most:
                pair = results.variant(n), results.variant(0)
                found[n] = statistics.apart(results, results.answers, *pair)
        found = {n: change for n, change in found.items() if change.n}
        if not found:
            return UNSCORED
        worst = min(found, key=lambda n: found[n].difference)
        return Found(*found[worst][:3], because=f"with {worst} of {results.blocks} removed")

    return measure


def score(name: Callable) -> Measure:
    def measure(results: Results) -> Found:
        found = statistics.score(results, results.together, name(results))
        return Found(*found[:3]) if found.n else UNSCORED

    return measure


def at_papers_size(results: Results) -> bool:
    """Whether the run's own model is as large as the paper's."""
    if results.memory is None:
        return False
    return abs(results.memory.params_b.max() * 1e9 / model.TOTAL - 1) < 0.01


def on_papers_machine(results: Results) -> bool:
    """Whether times are of the paper's model on its GPU."""
    known = results.one_prompt
    if known is None or "gpu" not in known or not at_papers_size(results):
        return False
    return re.search(r"\bT4\b", str(known.gpu.iloc[0])) is not None


@dataclass(frozen=True)
class Claim:
    """What is claimed and where; the paper's figure and the bound that a run's must lie beyond; how
    a run is asked, and the controls without which the answer would say nothing."""

    claim: str
    where: str
    paper: float
    bound: float
    measure: Measure
    rests_on: tuple[str, ...] = ()
    above: bool = True
    counted: bool = True


def full(results: Results) -> str | None:
    return results.full


def original(results: Results) -> str | None:
    return results.variant(0)


def of_32(blocks: int) -> Callable[[Results], str | None]:
    """What finds the model with so many of 32 blocks removed."""
    return lambda results: results.variant(paper_depth(blocks, results.blocks))


def difference(claim: str, where: str, number: int, one: str, other: str, rests_on) -> Claim:
    """A claim that one row of the paper's Table 4 or 5 scores above another."""
    scores = FOUR.paper_score if number == 4 else FIVE
    paper = scores[one] - scores[other]
    measure = points(setting(number, one), setting(number, other))
    return Claim(claim, where, paper, rule.bound(paper, POINTS), measure, rests_on)


LIMIT = 4.0  # GB that the abstract promises
SAVED = numbers.SAVED["Discussion"]
POINTS_ALONE = rule.bound(4, POINTS)  # of the 4 that either technique alone is said to lie below
SCORES = (specimen.BLANK, specimen.OTHER, specimen.JUDGE)  # they tell who sees and who does not
REMOVAL = (*SCORES, specimen.PROTECTED, specimen.RUN, specimen.CHANCE)
TRAINED = (*SCORES, specimen.TRAINING)
EVERYTHING = (*REMOVAL, specimen.TRAINING)
ACTIVATIONS = (*SCORES, specimen.OUTLIERS, specimen.OWN_GRID, specimen.THREE_BITS)
COST = THREE["bitsandbytes"] - FOUR.paper_score[HEALED]
RECOVERED = FOUR.paper_score[HEALED] - FOUR.paper_score[PRUNED]
RECOVERED = round(100 * RECOVERED / (FOUR.paper_score[WHOLE] - FOUR.paper_score[PRUNED]), 1)
CLAIMS = (
    Claim(
        "Weights of the 7B model fit 4 GB",
        "Abstract",
        LIMIT,
        LIMIT,
        weights,
        above=False,
        counted=False,
    ),
    Claim(
        "Its peak while answering fits 4 GB",
        "Abstract",
        LIMIT,
        LIMIT,
        peak,
        above=False,
        counted=False,
    ),
    Claim(
        "Memory falls by 70 % (71 % in 4.6.1)",
        "Discussion",
        SAVED,
        rule.bound(SAVED, SAVED * PERCENT / 100),
        saved,
        counted=False,
    ),
    Claim(
        "Inference is 4.2 times faster on a T4",
        "Discussion",
        numbers.SPEEDUP,
        rule.bound(numbers.SPEEDUP, numbers.SPEEDUP * PERCENT / 100),
        faster,
    ),
    Claim(
        "4 points above pruning alone at equal compression",
        "Abstract, Discussion",
        4,
        POINTS_ALONE,
        beats(answer.PRUNING),
        EVERYTHING,
    ),
    Claim(
        "4 points above quantization alone at equal compression",
        "Abstract, Discussion",
        4,
        POINTS_ALONE,
        beats(answer.QUANTIZATION),
        EVERYTHING,
    ),
    Claim(
        "SFT gives back two thirds of what pruning took",
        "4.4, Table 2",
        RECOVERED,
        rule.bound(RECOVERED, PERCENT),
        recovered,
        TRAINED,
    ),
    difference(
        "SFT before quantizing gains 29 points", "4.6.1, Table 4", 4, FULL, UNHEALED, TRAINED
    ),
    Claim(
        "AWQ costs the unpruned model next to nothing",
        "Introduction",
        FOUR.paper_score[PACKED] - FOUR.paper_score[WHOLE],
        -POINTS,
        points(setting(4, PACKED), original),
        SCORES,
    ),
    difference(
        "AWQ scores 7 points above bitsandbytes", "4.6.2, Table 5", 5, OURS, NF4, ACTIVATIONS
    ),
    Claim(
        "Without calibration, quantizing costs a pruned model 27 points",
        "Introduction, Table 3",
        COST,
        rule.bound(COST, POINTS),
        without_calibration,
        ACTIVATIONS,
        above=False,
    ),
    Claim(
        "Rounding to nearest gives unintelligible answers",
        "4.6.2, Table 5",
        FIVE[ROUNDED],
        NEAR_FLOOR,
        score(setting(5, ROUNDED)),
        ACTIVATIONS,
        above=False,
    ),
    Claim(
        "Without SFT the quantized model is unusable",
        "4.6.1, Table 4",
        FOUR.paper_score[UNHEALED],
        NEAR_FLOOR,
        score(setting(4, UNHEALED)),
        (*REMOVAL, specimen.OUTLIERS),
        above=False,
    ),
    difference(
        "The criterion scores 4 points above magnitude",
        "4.6.2, Table 5",
        5,
        OURS,
        MAGNITUDE,
        (*SCORES, specimen.DRAWS, specimen.CHANCE),
    ),
    Claim(
        "Scores are stable with up to 4 of 32 blocks removed",
        "4.3",
        ONE[4] - ONE[0],
        -POINTS,
        worst_until(4),
        REMOVAL,
    ),
    Claim(
        "Scores are stable with up to 6 of 32 blocks removed",
        "3.3",
        FOUR.paper_score[PRUNED] - ONE[0],
        -POINTS,
        worst_until(6),
        REMOVAL,
    ),
    Claim(
        "Without 10 of 32 blocks the model collapses",
        "4.3, Table 1",
        ONE[10],
        NEAR_FLOOR,
        score(of_32(10)),
        REMOVAL,
        above=False,
    ),
)


def claims(results: Results, wanted: Iterable[Claim] = CLAIMS) -> pd.DataFrame:
    """One row a claim of the abstract, the text or the discussion."""
    failed, rows = specimen.failed(results), []
    for claim in wanted:
        found = claim.measure(results)
        lacking = [name for name in claim.rests_on if name in failed]
        told = {name: getattr(claim, name) for name in ("claim", "where", "paper")}
        told |= found._asdict() | {"bound": claim.bound, "above": claim.above}
        told |= {"counted": claim.counted, "rests_on": ", ".join(claim.rests_on)}
        told["failed"] = ", ".join(lacking)
        told["untestable"] = found.untestable or bool(lacking)
        rows.append(told)
    frame = pd.DataFrame(rows).astype({"ours": float, "lo": float, "hi": float, "paper": float})
    frame = rule.judge(frame)
    return frame.assign(because=[why(row) for row in frame.to_dict("records")])


def why(row: dict) -> str:
    """What a verdict rests on, in a few words."""
    if row["failed"]:
        return f"fails: {row['failed']}"
    if row["untestable"] or not row["counted"]:
        return row["because"]
    said = f"holds {'above' if row['above'] else 'below'} {row['bound']:.3g}"
    return f"{said}; {row['because']}" if row["because"] else said


def controls_beside(results: Results) -> pd.DataFrame:
    """Every control, and how many of the claims rest on it; empty where none was tested."""
    table = specimen.controls(results)
    resting = [sum(name in claim.rests_on for claim in CLAIMS) for name in table.control]
    return table.assign(claims=resting) if table.holds.notna().any() else pd.DataFrame()
