"""Is what the paper says true of a run? Verdicts by stated rules, on its claims; on its tables' cells: side_by_side.

Shapes (parameters, memory) are tested on the planned 7B model. Scores are tested on the run's own model: as values
where that is the paper's size, else as directions: the paired interval must lie on the claim's side of 0. No torch.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.method.quantization.methods import METHODS
from derm_compress.report import paper, paper_model
from derm_compress.report.contradictions import SAVED, SPEEDUP
from derm_compress.report.results import Results, answers_of, variant_id
from derm_compress.report.wording import words

REPRODUCED, NOT, UNTESTED = "reproduced", "not reproduced", "cannot be tested at this size"
OURS = "not claimed"  # what is ours alone and stands beside a claim: no verdict on the paper
LOOSE, LOOSE_GIB = 0.03, 0.30  # of planned against printed memory: a share at 16 bits, GiB at 4
NEAR = 5  # points from the floor that still count as unintelligible
ALIKE = 0.1  # two sizes that differ by less are one compression ratio
LIMIT = 4.0  # GB that the abstract promises
TIMELY = 0.10  # of a printed latency, on the paper's model and GPU
COLUMNS = ["claim", "where", "paper", "ours", "ours_lo", "ours_hi", "tested_as", "verdict", "why"]
SHOWN = [
    "claim",
    "verdict",
    "paper",
    "ours",
    "ours_lo",
    "ours_hi",
    "tested_as",
    "why",
    "where",
]  # in this order
FREE = [name for name, m in METHODS.items() if not m.searched() and 4 in m.widths]  # at no data
RULES = (
    "Rule for shapes: parameters and compression must round to what is printed; planned 7B weights must lie within "
    f"{LOOSE:.0%} of the printed VRAM at 16 bits and {LOOSE_GIB:.2f} GiB at 4 bits, at the paper's own depth.",
    "Rule for scores: on a model of the paper's size its value must lie in the run's 95 % interval; on a smaller one "
    "only the direction of a difference is tested, and its paired 95 % interval must lie on the paper's side of 0; one "
    "that holds both 0 and the paper's own difference has too few answers to tell. "
    f"Stable is what cannot have lost {NEAR} points, and not stable what has clearly lost.",
    f"Rule for claimed sizes: within {LIMIT:g} GB is tested in GiB of 2^30 bytes, as the paper's GB of 16-bit weights "
    "are, and GB of 10^9 bytes are said beside; 4-bit weights planned at the paper's depth must be smaller than the "
    f"unpruned 16-bit ones by at least the {' or '.join(f'{x:g}' for x in SAVED.values())} % claimed.",
    f"Rule for times, with the paper's model on a T4 alone: within {TIMELY:.0%} of the latency that is printed, and at "
    f"least {SPEEDUP:g} times faster.",
    f"An answer set counts as unintelligible if its interval ends within {NEAR} points of the floor. What neither a "
    "plan nor this model can show, such as a T4's speed, cannot be tested at this size.",
)


class Verdict(NamedTuple):
    verdict: str
    why: str


def rounds_to(printed: float, ours: float) -> Verdict:
    """Whether ours, rounded like the printed number, is the printed number."""
    digits = len(f"{printed:g}".partition(".")[2])
    same = abs(ours - printed) <= 0.5 * 10**-digits + 1e-9
    return Verdict(REPRODUCED if same else NOT, f"rounds to {ours:.{digits}f}")


def fits(printed: float, gib: float, *, bits: int) -> Verdict:
    """Whether planned weights are near enough to the printed VRAM."""
    apart, allowed = abs(gib - printed), LOOSE * printed if bits == 16 else LOOSE_GIB
    return Verdict(
        REPRODUCED if apart <= allowed else NOT, f"{apart:.2f} GiB apart, {allowed:.2f} allowed"
    )


def lies_in(printed: float, lo: float, hi: float) -> Verdict:
    """Whether the paper's value lies in the run's interval."""
    inside = lo <= printed <= hi
    return Verdict(
        REPRODUCED if inside else NOT,
        f"the paper's {printed:g} lies {'in' if inside else 'outside'} it",
    )


def points_to(claimed: float, change: metrics.Difference) -> Verdict:
    """Whether a paired difference's interval lies on the claim's side of 0; it may be too wide to tell."""
    if not change.n:
        return Verdict(UNTESTED, "no scores of both models in this run")
    if change.lo <= min(0, claimed) and max(0, claimed) <= change.hi:
        return Verdict(
            UNTESTED, f"too few answers: the interval holds 0 and the paper's {claimed:+.4g}"
        )
    if change.lo <= 0 <= change.hi:
        return Verdict(NOT, f"the interval holds 0 and not the paper's {claimed:+.4g}")
    same = (change.lo > 0) == (claimed > 0)
    return Verdict(
        REPRODUCED if same else NOT,
        "the same direction" if same else "the opposite direction, clearly",
    )


def at_papers_size(results: Results) -> bool:
    """Whether the run's own model is as large as the paper's."""
    return (
        results.memory is not None
        and abs(results.memory.params_b.max() * 1e9 / paper_model.TOTAL - 1) < 0.01
    )


def machine(results: Results) -> str:
    """The GPU that times were taken on; empty for a CPU."""
    known = results.one_prompt is not None and "gpu" in results.one_prompt
    return str(results.one_prompt.gpu.iloc[0]) if known else ""


def on_papers_machine(results: Results) -> bool:
    """Whether times are of the paper's model on its GPU."""
    return at_papers_size(results) and re.search(r"\bT4\b", machine(results)) is not None


def near(printed: float, ms: float) -> Verdict:
    """Whether a latency is near enough to the printed one."""
    apart = ms / printed - 1
    return Verdict(
        REPRODUCED if abs(apart) <= TIMELY else NOT,
        f"{apart:+.0%} apart on a T4, {TIMELY:.0%} allowed",
    )


def difference(answers, one: str, other: str) -> metrics.Difference:
    """Paired, for its interval alone."""
    return metrics.paired_difference(
        answers_of(answers, one), answers_of(answers, other), n_permutations=1
    )


def claims(results: Results) -> pd.DataFrame:
    """One row a claim of the abstract, the text or the discussion; COLUMNS."""
    rows = [*memory_claims(results), *speed_claims(results), *same_ratio(results)]
    rows += [*difference_claims(results), *free_claims(results), *depth_claims(results)]
    return pd.DataFrame(rows, columns=COLUMNS)[SHOWN]


def memory_claims(results: Results) -> list[tuple]:
    """Under 4 GB, 70 and 71 % less: planned 7B weights and peak, at the paper's depth and at the run's."""
    pipeline = paper.table(4).iloc[-1]
    depth = paper_model.blocks_gone(pipeline.paper_params_b)
    small, whole = paper_model.weights_gib(depth, "awq"), paper_model.weights_gib(0)
    sizes = {
        f"weights, {depth} of 32 blocks": small,
        f"peak, {depth} of 32 blocks": paper_model.peak_gib(depth, "awq"),
    }
    rows = [
        ("a 7B model runs within 4 GB", "Abstract", LIMIT, gib, None, None, f"7B plan, GiB: {what}",
         REPRODUCED if gib < LIMIT else NOT, _in_both(gib))
        for what, gib in sizes.items()
    ]  # fmt: skip
    saved = 100 * (1 - small / whole)
    return [*rows, *_own_peak(results)] + [
        (f"{claimed} % less memory", where, claimed, saved, None, None, f"7B plan, %: weights, {depth} of 32 blocks",
         REPRODUCED if saved >= claimed else NOT, f"{small:.2f} instead of {whole:.2f} GiB")
        for where, claimed in SAVED.items()
    ]  # fmt: skip


def _own_peak(results: Results) -> list[tuple]:
    """The peak at the run's own depth, which the paper claims nothing of."""
    full = variant_id(results.operating, healed=True, method="awq")
    if results.memory is None or full not in set(results.memory.variant):
        return []
    own = results.memory.drop_duplicates("variant").set_index("variant").loc[full]
    tested = f"7B plan, GiB: peak, {own.blocks_removed_7b:.0f} of 32 blocks"
    text = "ours, beside it: this run's depth within 4 GB"
    return [
        (
            text,
            "this run",
            None,
            own.peak_gib_7b,
            None,
            None,
            tested,
            OURS,
            _in_both(own.peak_gib_7b),
        )
    ]


def _in_both(gib: float) -> str:
    """4.01 GiB are 4.31 GB, and whether either is within the limit."""
    both = {"GiB": gib, "GB": gib * 2**30 / 1e9}
    within = " and ".join(unit for unit, size in both.items() if size < LIMIT) or "neither unit"
    return f"{both['GiB']:.2f} GiB are {both['GB']:.2f} GB: below {LIMIT:g} in {within}"


def speed_claims(results: Results) -> list[tuple]:
    """4.2 times faster on a T4: testable there with the paper's model alone."""
    full, ours = variant_id(results.operating, healed=True, method="awq"), None
    taken = (
        None
        if results.one_prompt is None
        else results.one_prompt.set_index("variant").total_ms_per_token
    )
    if taken is not None and {"original", full} <= set(taken.index):
        ours = taken["original"] / taken[full]
    of = machine(results) or "a CPU" if at_papers_size(results) else "another model"
    told = Verdict(
        UNTESTED,
        "needs the 7B model on a T4" + ("" if ours is None else f"; ours is the ratio of {of}"),
    )
    if ours is not None and on_papers_machine(results):
        told = Verdict(REPRODUCED if ours >= SPEEDUP else NOT, "on this run's T4")
    text = f"{SPEEDUP:g} times faster inference on a T4"
    return [(text, "Discussion", SPEEDUP, ours, None, None, "ratio of ms/token", *told)]


def same_ratio(results: Results) -> list[tuple]:
    """The pipeline against the smallest model that is only pruned by its criterion, or only quantized by AWQ, and no
    smaller."""
    full, rows, table = (
        variant_id(results.operating, healed=True, method="awq"),
        [],
        results.variants,
    )
    plain, pruned = ~table.healed.astype(bool), table.blocks_removed > 0
    kinds = {
        "pruning": plain & pruned & (table.bits == 16) & (table.criterion == results.criterion),
        "quantization": plain & ~pruned & (table.bits < 16) & (table.method == "awq"),
    }
    for name, alone in kinds.items():
        claim = (
            f"better than {name} alone at the same compression, by 4 points",
            "Abstract, Discussion",
            4,
        )
        if results.memory is not None:
            sizes = results.memory.drop_duplicates("variant").set_index("variant").vram_gib_7b
            rivals = sizes[sizes.index.isin(table.variant[alone])]
            rivals = rivals[rivals >= sizes.get(full, float("inf"))]
        if results.memory is None or rivals.empty:
            rows.append(
                (
                    *claim,
                    *[None] * 3,
                    "direction",
                    UNTESTED,
                    f"no {name}-only model of this size or more",
                )
            )
            continue
        rival, size = rivals.idxmin(), rivals.min()
        change = difference(_together(results), full, rival)
        told, larger = _told(results, 4, change), size / sizes[full] - 1
        if larger > ALIKE and told.verdict == NOT:
            told = Verdict(UNTESTED, "no rival of the same size was run")
        why = f"{told.why}; rival {rival}, {size:.2f} GiB at 7B against {sizes[full]:.2f}"
        rows.append((*claim, *_ours(change), _kind(results), told.verdict, why))
    return rows


def difference_claims(results: Results) -> list[tuple]:
    """What the paper says of two models each, with its own points."""
    n = results.operating
    pruned, healed = variant_id(n), variant_id(n, healed=True)
    full, plain = f"{healed}|awq4", f"{pruned}|awq4"
    fourth, fifth = (paper.table(k, operating=n).set_index("variant").paper_score for k in (4, 5))
    magnitude = f"{variant_id(n, criterion='magnitude', healed=True)}|awq4"
    told = [
        ("SFT heals the pruned model", "4.4, Table 2", fourth[healed] - fourth[pruned], healed, pruned),
        ("SFT before quantizing raises the score", "4.6.1", fourth[full] - fourth[plain], full, plain),
        ("AWQ scores 7 points above bitsandbytes", "4.6.2, Table 5", fifth[full] - fifth[f"{healed}|bitsandbytes4"],
         full, f"{healed}|bitsandbytes4"),
        ("the criterion scores 4 points above magnitude", "4.6.2, Table 5", fifth[full] - fifth[magnitude],
         full, magnitude),
    ]  # fmt: skip
    rows = []
    for claim, where, points, one, other in told:
        change = difference(_together(results), one, other)
        rows.append(
            (claim, where, points, *_ours(change), _kind(results), *_told(results, points, change))
        )
    score = metrics.score_interval(answers_of(_together(results), plain))
    return [
        *rows,
        _at_floor(
            "without SFT the quantized model is unusable", "4.6.1", fourth[plain], score, results
        ),
    ]


def free_claims(results: Results) -> list[tuple]:
    """Methods that look at no data fail: every one that was run must lie clearly below AWQ, on the pipeline's model."""
    healed, rows = variant_id(results.operating, healed=True), []
    where, text = "Introduction", "quantization without calibration fails on the pruned model"
    known = set(_together(results).variant)
    changes = {m: difference(_together(results), f"{healed}|awq4", f"{healed}|{m}4")
               for m in FREE if f"{healed}|{m}4" in known}  # fmt: skip
    changes = {method: change for method, change in changes.items() if change.n}
    five = paper.table(5, operating=results.operating).set_index("variant").paper_score
    least = min(
        five[f"{healed}|awq4"] - five[name] for m in FREE if (name := f"{healed}|{m}4") in five
    )
    if not changes:
        rows.append(
            (
                text,
                where,
                *[None] * 4,
                "direction",
                UNTESTED,
                "no such method was scored in this run",
            )
        )
    else:
        closest = min(changes, key=lambda method: changes[method].lo)
        told = points_to(least, changes[closest])
        why = f"{told.why}; AWQ minus {words(closest)}, the one that does best of {len(changes)}"
        rows.append(
            (text, where, None, *_ours(changes[closest]), _kind(results), told.verdict, why)
        )
    score = metrics.score_interval(answers_of(_together(results), f"{healed}|rtn4"))
    low = paper.table(5).paper_score.min()
    rows.append(
        _at_floor(
            "round-to-nearest gives unintelligible output", "4.6.2, Table 5", low, score, results
        )
    )
    return rows


def depth_claims(results: Results) -> list[tuple]:
    """Stable up to 6 or 4 of 32 blocks: no such depth may score clearly below the unpruned model; collapse at 10."""
    rows, table, scores = (
        [],
        results.variants,
        paper.table(1).set_index("blocks_removed").paper_score,
    )
    scores[6] = paper.table(4).set_index("variant").paper_score["pruned-6"]
    depths = sorted(
        {
            int(n)
            for n, v in zip(table.blocks_removed, table.variant, strict=True)
            if v == variant_id(n)
        }
    )
    changes = {n: difference(results.answers, variant_id(n), "original") for n in depths if n}
    for most, where in ((6, "3.3"), (4, "4.3")):
        within = {
            n: c for n, c in changes.items() if n * paper.BLOCKS <= most * results.blocks and c.n
        }
        text, drop = f"stable with up to {most} of 32 blocks removed", scores[most] - scores[0]
        if not within:
            rows.append(
                (text, where, drop, *[None] * 3, "direction", UNTESTED, "no scores at such a depth")
            )
            continue
        lost = {n: change for n, change in within.items() if change.hi < 0}
        worst = min(lost or within, key=lambda n: within[n].lo)
        rows.append(
            (
                text,
                where,
                drop,
                *_ours(within[worst]),
                _kind(results),
                *stable(worst, within[worst]),
            )
        )
    ten = next((n for n in depths if n * paper.BLOCKS == 10 * results.blocks), -1)
    score = metrics.score_interval(answers_of(results.answers, variant_id(ten)))
    return [
        *rows,
        _at_floor("collapse with 10 of 32 blocks removed", "4.3", scores[10], score, results),
    ]


def stable(blocks: int, change: metrics.Difference) -> Verdict:
    """Whether a loss of NEAR points can be excluded; too wide an interval tells nothing."""
    if change.hi < 0:
        return Verdict(NOT, f"{blocks} blocks removed, clearly below the unpruned model")
    if change.lo > -NEAR:
        return Verdict(REPRODUCED, f"{blocks} blocks removed, less than {NEAR} points lost")
    return Verdict(
        UNTESTED, f"{blocks} blocks removed, too few answers to exclude a loss of {NEAR} points"
    )


def findings(frame: pd.DataFrame) -> list[str]:
    """How many claims hold, and the rules."""
    return [counted(frame[frame.verdict != OURS], "claims"), *RULES]


def counted(frame: pd.DataFrame, what: str) -> str:
    """Of 18 claims, 5 are reproduced, ..."""
    counts = (
        frame.verdict.value_counts().reindex([REPRODUCED, NOT, UNTESTED], fill_value=0).tolist()
    )
    return f"Of {len(frame)} {what}, {counts[0]} are reproduced, {counts[1]} are not, {counts[2]} cannot be tested here."


def _at_floor(claim, where, printed, score: metrics.Score, results):
    told = Verdict(UNTESTED, "no scores of this model in this run")
    if score.n:
        near = score.hi <= metrics.FLOOR + NEAR
        told = Verdict(
            REPRODUCED if near else NOT,
            f"the interval ends {score.hi - metrics.FLOOR:.1f} above the floor",
        )
    ours = score[:3] if score.n else [None] * 3
    return claim, where, printed, *ours, _kind(results, "score"), *told


def _together(results: Results) -> pd.DataFrame:
    """Test and held-out answers where there are both, each once."""
    frames = [f for f in (results.answers, results.evaluation) if f is not None]
    empty = pd.DataFrame({"variant": [], "item": [], "question": [], "score": []})
    return pd.concat(frames or [empty]).drop_duplicates(
        ["variant", "item", "question"], keep="last"
    )


def _told(results: Results, points: float, change: metrics.Difference) -> Verdict:
    """The direction and, on the paper's model, also the points."""
    told = points_to(points, change)
    return (
        lies_in(points, change.lo, change.hi)
        if told.verdict == REPRODUCED and at_papers_size(results)
        else told
    )


def _kind(results: Results, what: str = "points") -> str:
    return f"value, {what}" if at_papers_size(results) else f"direction, {what}, this run's model"


def _ours(change: metrics.Difference):
    return change[:3] if change.n else [None] * 3
