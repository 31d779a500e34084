"""Is what the paper claims true of a run? One row a claim, its verdict by the rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.method.quantization.methods import METHODS
from derm_compress.model.variants import paper_depth
from derm_compress.report.paper import model, numbers
from derm_compress.report.paper.numbers import SAVED, SPEEDUP
from derm_compress.report.results import Results, answers_of
from derm_compress.report.tables import joins, specimen, verdicts
from derm_compress.report.tables.verdicts import LIMIT, NOT, REPRODUCED, UNTESTED, Tested, Verdict

ALIKE = 0.1  # two sizes that differ by less are one compression ratio
PRUNED, HEALED = "Pruning Only", "Pruning and SFT"
UNHEALED, FULL_4 = "Prune + Quant", "Prune + SFT + Quant"
FULL, NF4 = "Full pipeline (ours)", "Bitsandbytes quantization"
MAGNITUDE, ROUNDED = "Pruning Based on Magnitude Baseline", "Round to neighbour Quantization"
DEPTH = model.blocks_gone(numbers.table(4).paper_params_b.iloc[-1])  # of the paper's pipeline
FREE = [name for name, m in METHODS.items() if not m.scaling and 4 in m.widths]  # see no data


def within(results: Results, what: str) -> Tested:
    gib = getattr(model, f"{what}_gib")(DEPTH, "awq")
    told = verdicts.verdict(gib < LIMIT, _in_both(gib))
    return Tested(LIMIT, f"7B plan, GiB: {what}, {DEPTH} of 32 blocks", told, [gib])


def own_peak(results: Results) -> Tested | None:
    """The peak at the run's own depth, which the paper claims nothing of."""
    depth, gib = joins.values(results.memory, results.full, ["blocks_removed_7b", "peak_gib_7b"])
    if gib is None:
        return None
    tested_as = f"7B plan, GiB: peak, {depth:.0f} of 32 blocks"
    return Tested(None, tested_as, Verdict(verdicts.OURS, _in_both(gib)), [gib])


def _in_both(gib: float) -> str:
    """4.01 GiB are 4.31 GB, and whether either is within the limit."""
    both = {"GiB": gib, "GB": gib * model.GB}
    units = " and ".join(unit for unit, size in both.items() if size < LIMIT) or "neither unit"
    return f"{both['GiB']:.2f} GiB are {both['GB']:.2f} GB: below {LIMIT:g} in {units}"


def saves(results: Results, claimed: float) -> Tested:
    small, whole = model.weights_gib(DEPTH, "awq"), model.weights_gib(0)
    saved = 100 * (1 - small / whole)
    told = verdicts.verdict(saved >= claimed, f"{small:.2f} instead of {whole:.2f} GiB")
    return Tested(claimed, f"7B plan, %: weights, {DEPTH} of 32 blocks", told, [saved])


def faster(results: Results, claimed: float) -> Tested:
    """Testable on a T4 with the paper's model alone."""
    names = results.variant(0), results.full
    whole, full = (
        joins.values(results.one_prompt, name, ["total_ms_per_token"])[0] for name in names
    )
    kind, told = "ratio of ms/token", Verdict(UNTESTED, "needs the 7B model on a T4")
    if whole is None or full is None:
        return Tested(claimed, kind, told)
    of = "another model"
    if verdicts.at_papers_size(results):
        of = verdicts.machine(results) or "a CPU"
    told = Verdict(UNTESTED, f"{told.why}; ours is the ratio of {of}")
    if verdicts.on_papers_machine(results):
        told = verdicts.verdict(whole / full >= claimed, "on this run's T4")
    return Tested(claimed, kind, told, [whole / full])


def beats(results: Results, points: float, name: str) -> Tested:
    """The pipeline against the smallest model of pruning or quantization alone that is no smaller
    than itself."""
    table, sizes = results.variants, pd.Series(dtype=float)
    pruned = (table.blocks_removed > 0) & (table.bits == 16)
    packed = (table.blocks_removed == 0) & (table.bits < 16) & (table.method == "awq")
    alone = pruned & (table.criterion == results.criterion) if name == "pruning" else packed
    if results.memory is not None:
        sizes = results.memory.drop_duplicates("variant").set_index("variant").vram_gib_7b
    own = sizes.get(results.full, float("inf"))
    rivals = sizes[sizes.index.isin(table.variant[alone & ~table.healed.astype(bool)])]
    rivals = rivals[rivals >= own]
    if rivals.empty:
        why = f"no {name}-only model of this size or more"
        return Tested(points, "direction", Verdict(UNTESTED, why))
    rival, size = rivals.idxmin(), rivals.min()
    change = verdicts.difference(results.together, results.full, rival)
    told = _direction_and_points(results, points, change)
    if size / own - 1 > ALIKE and told.verdict == NOT:
        told = Verdict(UNTESTED, "no rival of the same size was run")
    why = f"{told.why}; rival {rival}, {size:.2f} GiB at 7B against {own:.2f}"
    return _paired(results, points, change, Verdict(told.verdict, why))


def differs(results: Results, number: int, one: str, other: str) -> Tested:
    """Two settings of a paper's table: is one above the other as it is there?"""
    rows = joins.of_paper(results, number).set_index("setting")
    points = rows.paper_score[one] - rows.paper_score[other]
    change = verdicts.difference(results.together, rows.variant[one], rows.variant[other])
    return _paired(results, points, change, _direction_and_points(results, points, change))


def needs_calibration(results: Results) -> Tested:
    """Methods that look at no data fail: every one that was run must lie clearly below AWQ."""
    changes = {}
    for method in FREE:
        rival = results.variant(results.operating, healed=True, quantizer=method)
        change = verdicts.difference(results.together, results.full, rival)
        if change.n:
            changes[method] = change
    if not changes:
        why = "no such method was scored in this run"
        return Tested(None, "direction", Verdict(UNTESTED, why))
    closest = min(changes, key=lambda method: changes[method].lo)
    five = numbers.table(5).set_index("setting").paper_score
    told = verdicts.points_to(five[FULL] - max(five[NF4], five[ROUNDED]), changes[closest])
    best = f"AWQ minus {METHODS[closest].words}, the one that does best of {len(changes)}"
    return _paired(results, None, changes[closest], Verdict(told.verdict, f"{told.why}; {best}"))


def stays(results: Results, blocks: int) -> Tested:
    """No depth up to so many of 32 blocks may score clearly below the unpruned model."""
    scores = numbers.table(1).set_index("blocks_removed").paper_score
    scores[6] = numbers.table(4).set_index("setting").paper_score[PRUNED]
    drop, changes = scores[blocks] - scores[0], {}
    for n in sorted(set(results.models.units_removed) - {0}):
        if n <= paper_depth(blocks, results.blocks):
            change = verdicts.difference(results.answers, results.variant(n), results.variant(0))
            changes |= {n: change} if change.n else {}
    if not changes:
        return Tested(drop, "direction", Verdict(UNTESTED, "no scores at such a depth"))
    lost = {n: change for n, change in changes.items() if change.hi < 0}
    worst = min(lost or changes, key=lambda n: changes[n].lo)
    return _paired(results, drop, changes[worst], verdicts.stable(worst, changes[worst]))


def unusable(results: Results, number: int, setting: str) -> Tested:
    """A setting of a paper's table: does its score end near the floor?"""
    row = joins.of_paper(results, number).set_index("setting").loc[setting]
    return _at_floor(results, row.paper_score, answers_of(results.together, row.variant))


def collapses(results: Results, blocks: int) -> Tested:
    """So many of 32 blocks removed: does the score end near the floor?"""
    printed = numbers.table(1).set_index("blocks_removed").paper_score[blocks]
    own = results.variant(paper_depth(blocks, results.blocks))
    return _at_floor(results, printed, answers_of(results.answers, own))


def _at_floor(results: Results, printed: float, answers: pd.DataFrame) -> Tested:
    score, kind = metrics.score_interval(answers), _kind(results, "score")
    if not score.n:
        return Tested(printed, kind, Verdict(UNTESTED, verdicts.UNSCORED))
    above = score.hi - metrics.FLOOR
    why = f"the interval ends {above:.1f} above the floor"
    return Tested(printed, kind, verdicts.verdict(above <= verdicts.NEAR, why), score[:3])


def _paired(results: Results, points, change: metrics.Difference, told: Verdict) -> Tested:
    return Tested(points, _kind(results, "points"), told, change[:3] if change.n else ())


def _direction_and_points(results: Results, points: float, change) -> Verdict:
    """The direction and, on the paper's model, also the points."""
    told = verdicts.points_to(points, change)
    if told.verdict == REPRODUCED and verdicts.at_papers_size(results):
        return verdicts.lies_in(points, change.lo, change.hi)
    return told


def _kind(results: Results, what: str) -> str:
    if verdicts.at_papers_size(results):
        return f"value, {what}"
    return f"direction, {what}, this run's model"


@dataclass(frozen=True)
class Claim:
    """What is claimed, where, its test and what that is told beside the results, and the controls
    that it rests on, without which the test would say nothing."""

    claim: str
    where: str
    test: Callable[..., Tested | None]
    given: tuple = ()
    rests_on: tuple[str, ...] = ()


SCORES = (specimen.BLANK, specimen.OTHER, specimen.JUDGE)  # they tell who sees and who does not
REMOVAL = (*SCORES, specimen.PROTECTED, specimen.RUN, specimen.CHANCE)
TRAINED = (*SCORES, specimen.TRAINING)
WHOLE = (*REMOVAL, specimen.TRAINING)
ACTIVATIONS = (*SCORES, specimen.OUTLIERS, specimen.OWN_GRID, specimen.THREE_BITS)
CLAIMS = (
    Claim("a 7B model runs within 4 GB", "Abstract", within, ("weights",)),
    Claim("a 7B model runs within 4 GB", "Abstract", within, ("peak",)),
    Claim("ours, beside it: this run's depth within 4 GB", "this run", own_peak),
    *(Claim(f"{share} % less memory", where, saves, (share,)) for where, share in SAVED.items()),
    Claim(f"{SPEEDUP:g} times faster inference on a T4", "Discussion", faster, (SPEEDUP,)),
    Claim(
        "better than pruning alone at the same compression, by 4 points",
        "Abstract, Discussion",
        beats,
        (4, "pruning"),
        WHOLE,
    ),
    Claim(
        "better than quantization alone at the same compression, by 4 points",
        "Abstract, Discussion",
        beats,
        (4, "quantization"),
        WHOLE,
    ),
    Claim("SFT heals the pruned model", "4.4, Table 2", differs, (4, HEALED, PRUNED), TRAINED),
    Claim(
        "SFT before quantizing raises the score", "4.6.1", differs, (4, FULL_4, UNHEALED), TRAINED
    ),
    Claim(
        "AWQ scores 7 points above bitsandbytes",
        "4.6.2, Table 5",
        differs,
        (5, FULL, NF4),
        ACTIVATIONS,
    ),
    Claim(
        "the criterion scores 4 points above magnitude",
        "4.6.2, Table 5",
        differs,
        (5, FULL, MAGNITUDE),
        (*SCORES, specimen.DRAWS, specimen.CHANCE),
    ),
    Claim(
        "without SFT the quantized model is unusable",
        "4.6.1",
        unusable,
        (4, UNHEALED),
        (*REMOVAL, specimen.OUTLIERS),
    ),
    Claim(
        "quantization without calibration fails on the pruned model",
        "Introduction",
        needs_calibration,
        (),
        ACTIVATIONS,
    ),
    Claim(
        "round-to-nearest gives unintelligible output",
        "4.6.2, Table 5",
        unusable,
        (5, ROUNDED),
        ACTIVATIONS,
    ),
    Claim("stable with up to 6 of 32 blocks removed", "3.3", stays, (6,), REMOVAL),
    Claim("stable with up to 4 of 32 blocks removed", "4.3", stays, (4,), REMOVAL),
    Claim("collapse with 10 of 32 blocks removed", "4.3", collapses, (10,), REMOVAL),
)


def claims(results: Results) -> pd.DataFrame:
    """One row a claim of the abstract, the text or the discussion."""
    failed, rows = specimen.failed(results), []
    for claim in CLAIMS:
        if found := claim.test(results, *claim.given):
            lacking = [name for name in claim.rests_on if name in failed]
            if lacking:
                found = found._replace(told=Verdict(UNTESTED, found.told.why))
            told = {"where": claim.where, "rests_on": ", ".join(claim.rests_on) or None}
            told["failed"] = ", ".join(lacking) or None
            rows.append({"claim": claim.claim, **found.columns(), **told})
    return pd.DataFrame(rows)


def controls_beside(results: Results) -> pd.DataFrame:
    """Every control, and how many of the claims rest on it; empty where none was tested."""
    table = specimen.controls(results)
    resting = [sum(name in claim.rests_on for claim in CLAIMS) for name in table.control]
    return table.assign(claims=resting) if table.holds.notna().any() else pd.DataFrame()
