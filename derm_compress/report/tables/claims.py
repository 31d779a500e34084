"""Is what the paper claims true of a run? One row a claim, its verdict by the one rule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from derm_compress.method.quantization.methods import METHODS
from derm_compress.model.variants import paper_depth
from derm_compress.report import rule, trainings
from derm_compress.report.paper import model, numbers
from derm_compress.report.results import Results
from derm_compress.report.tables import answer, joins, specimen, statistics

FILE = Path(__file__).parents[1] / "paper" / "claims.yaml"
TOLD = yaml.safe_load(FILE.read_text("utf-8"))
MS = numbers.table(4).paper_ms_per_token
DEPTH = model.blocks_gone(numbers.table(4).paper_params_b.iloc[-1])  # of the paper's pipeline
FREE = [name for name, m in METHODS.items() if not m.scaling and 4 in m.widths]  # see no data
AHEAD = rule.bound(4, rule.POINTS)  # of what the paper says either technique alone lies below


class Found(NamedTuple):
    """What a run has: a value with its interval, or why it has none."""

    ours: float | None = None
    lo: float | None = None
    hi: float | None = None
    because: str = ""
    untestable: bool = False


UNSCORED = Found(because="no scores of these models", untestable=True)


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
    share = 100 * (1 - model.weights_gib(DEPTH, "awq") / model.weights_gib(0))
    of_peak = 100 * (1 - model.peak_gib(DEPTH, "awq") / model.peak_gib(0))
    said = f"{share:.0f} % of the weights, {of_peak:.0f} % of the peak"
    return Found(share, *sorted((of_peak, share)), said)


def faster(results: Results) -> Found:
    """Testable on a T4 with the paper's model alone."""
    names = results.variant(0), results.full
    columns = [f"decode_ms_per_token{end}" for end in ("", "_lo", "_hi")]
    whole, full = (joins.values(results.one_prompt, name, columns) for name in names)
    said = f"the paper's own Table 4 gives {MS.iloc[0] / MS.iloc[-1]:.2f}"
    if not on_papers_machine(results) or None in (whole[0], full[0]):
        return Found(because=f"needs the 7B model on a T4; {said}", untestable=True)
    return Found(whole[0] / full[0], whole[1] / full[2], whole[2] / full[1], said)


def difference(results: Results, number: int, one: str, other: str) -> Found:
    """One row of the paper's Table 4 or 5 above another, in points."""
    names = joins.of_paper(results, number).set_index("setting").variant
    change = trainings.apart(results, results.together, names[one], names[other])
    return Found(*change[:3]) if change.n else UNSCORED


def beats(results: Results, technique: str) -> Found:
    """The full pipeline against the best model of one technique alone, of the same bytes."""
    rival = answer.single(results, technique)
    if rival is None:
        return Found(because=f"no {technique} alone of these bytes or more", untestable=True)
    change = trainings.apart(results, results.together, results.full, rival.variant)
    larger = rival.larger > rule.PERCENT
    said = f"; it takes {rival.larger:.0f} % more bytes" if larger else ""
    lost = bool(larger and change.lo <= AHEAD)
    said += ", so to lose against it says nothing" if lost else ""
    return Found(*change[:3], because=f"against {rival.called}{said}", untestable=lost)


def recovered(results: Results) -> Found:
    """Of what pruning took, net of what the same SFT gives the unpruned model, in percent."""
    back = statistics.recovery(results)
    if pd.isna(back.lo):
        return Found(because="pruning took too little to tell", untestable=True)
    variance = 2 * trainings.variance(results) * (100 / back.loss) ** 2
    said = f"{back.net:.1f} of {back.loss:.1f} points, net of the control's gain"
    return Found(back.share, *rule.widened(back.share, back.lo, back.hi, variance), said)


def without_calibration(results: Results) -> Found:
    """What the best of these methods costs the healed model, against its 16 bits."""
    costs = {}
    for method in FREE:
        name = results.variant(results.operating, healed=True, quantizer=method)
        cost = trainings.apart(results, results.together, name, results.main[2])
        if cost.n:
            costs[METHODS[method].words] = cost
    if not costs:
        return UNSCORED
    best = max(costs, key=lambda name: costs[name].difference)
    return Found(*costs[best][:3], because=f"{best}, the best of {len(costs)}")


def worst_until(results: Results, blocks: int) -> Found:
    """The largest loss at any depth up to so many of 32 blocks."""
    most, found = paper_depth(blocks, results.blocks), {}
    for n in set(results.models.units_removed) & set(range(1, most + 1)):
        pair = results.variant(n), results.variant(0)
        change = trainings.apart(results, results.answers, *pair)
        if change.n:
            found[n] = change
    if not found:
        return UNSCORED
    worst = min(found, key=lambda n: found[n].difference)
    return Found(*found[worst][:3], because=f"with {worst} of {results.blocks} removed")


def score(results: Results, number: int, setting: str) -> Found:
    return _score(results, joins.of_paper(results, number).set_index("setting").variant[setting])


def score_without(results: Results, blocks: int) -> Found:
    return _score(results, results.variant(paper_depth(blocks, results.blocks)))


def _score(results: Results, variant: str | None) -> Found:
    found = trainings.score(results, results.together, variant)
    return Found(*found[:3]) if found.n else UNSCORED


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


ASKED = (weights, peak, saved, faster, difference, beats, recovered, without_calibration)
ASKED = {function.__name__: function for function in (*ASKED, worst_until, score, score_without)}


def bound(claim: dict) -> float:
    """What a run's value must lie beyond."""
    if "bound" in claim:
        return claim["bound"]
    margins = {"points": rule.POINTS, "percent": abs(claim["paper"]) * rule.PERCENT / 100}
    return rule.bound(claim["paper"], margins[claim["margin"]])


def controls_of(claim: dict) -> list[str]:
    """Those that a claim rests on, each once."""
    groups = (TOLD["controls"][group] for group in claim.get("rests_on", ()))
    return list(dict.fromkeys(name for group in groups for name in group))


def claims(results: Results, wanted: list[dict] = TOLD["claims"]) -> pd.DataFrame:
    """One row a claim of the abstract, the text or the discussion."""
    failed, rows = specimen.failed(results), []
    for claim in wanted:
        name, *told = claim["ask"]
        found, resting = ASKED[name](results, *told), controls_of(claim)
        lacking = [control for control in resting if control in failed]
        row = {key: claim[key] for key in ("claim", "where", "unit", "paper")} | found._asdict()
        row |= {"because": claim.get("told", found.because)}
        row |= {"bound": bound(claim), "above": not claim.get("below", False)}
        row |= {"counted": claim.get("counted", True), "rests_on": ", ".join(resting)}
        row |= {"failed": ", ".join(lacking), "untestable": found.untestable or bool(lacking)}
        rows.append(row)
    numeric = dict.fromkeys(("ours", "lo", "hi", "paper", "bound"), float)
    frame = rule.judge(pd.DataFrame(rows).astype(numeric))
    return frame.assign(because=[why(row) for row in frame.to_dict("records")])


def why(row: dict) -> str:
    """What a verdict rests on, in a few words."""
    if row["failed"]:
        worth = "" if pd.isna(row["ours"]) else "true here alone; "
        return f"{worth}fails: {row['failed']}"
    if row["untestable"] or not row["counted"]:
        return row["because"]
    said = f"needs {'more' if row['above'] else 'less'} than {row['bound']:.3g}"
    if row["verdict"] == rule.OPEN and row["p"] < rule.SURE:
        said += ", unsure among so many claims"
    return f"{said}; {row['because']}" if row["because"] else said


def controls_beside(results: Results) -> pd.DataFrame:
    """Every control, and how many of the claims rest on it; empty where none was tested."""
    table = specimen.controls(results)
    resting = [name for claim in TOLD["claims"] for name in controls_of(claim)]
    counts = [resting.count(name) for name in table.control]
    return table.assign(claims=counts) if table.holds.notna().any() else pd.DataFrame()
