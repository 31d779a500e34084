"""The paper's Tables 1 to 5 cell by cell: its value, the run's or the plan's, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report.paper import model, numbers
from derm_compress.report.results import Results, answers_of
from derm_compress.report.tables import joins, verdicts
from derm_compress.report.tables.verdicts import UNTESTED, Verdict

SCORE, VRAM = "score, %", "VRAM, GB"
UNKNOWN = "the paper does not say with what batch, length and precision it trained"


def cells(results: Results) -> pd.DataFrame:
    """One row a cell of the paper's tables."""
    makers = (table1, table2, table3, table4, table5)
    rows = [
        {"table": number, **cell} for number, make in enumerate(makers, 1) for cell in make(results)
    ]
    return pd.DataFrame(rows)


def table1(results: Results) -> Iterator[dict]:
    one = numbers.table(1)
    whole = one.paper_score[0], results.variant(0)
    for row in one.itertuples():
        n, label = row.blocks_removed, f"{row.blocks_removed} blocks removed"
        share = 100 * n * model.BLOCK / model.TOTAL
        own = results.variant(n * results.blocks / numbers.BLOCKS)
        yield planned(label, "compression, %", row.paper_compression, share)
        yield planned(label, "parameters, B", row.paper_params_b, model.params_b(n))
        yield weights(label, row.paper_vram, n)
        yield scored(results, results.answers, label, SCORE, (row.paper_score, own), whole)


def table2(results: Results) -> Iterator[dict]:
    """Training time and memory, whose settings are unknown, and scores before and after SFT."""
    whole = numbers.table(1).paper_score[0], results.variant(0)
    depths = (results.operating, results.deeper)
    for row, n in zip(joins.of_paper(results, 2).itertuples(), depths, strict=True):
        label, told = row.paper_model, Verdict(UNTESTED, UNKNOWN)
        before = row.paper_score_before, results.variant(n)
        after = row.paper_score_after, row.variant
        ours = _of(results.training, row.variant, ["seconds", "train_peak_gib"])
        yield cell(label, "time, s", row.paper_seconds, ours[:1], "", told)
        yield cell(label, "training VRAM, GB", row.paper_vram, ours[1:], "", told)
        for name, one, other in (("before", before, whole), ("after", after, before)):
            yield scored(results, results.answers, label, f"score {name} SFT, %", one, other)


def table3(results: Results) -> Iterator[dict]:
    """Each quantized model beside what it was made of."""
    three, variants = numbers.table(3), joins.of_paper(results, 3).variant
    depths = {"unpruned": 0, "operating": results.operating, "deeper": results.deeper}
    printed = numbers.table(2).set_index("role").paper_score_after.to_dict()
    printed["unpruned"] = numbers.table(1).paper_score[0]
    for row, variant in zip(three.itertuples(), variants, strict=True):
        label = f"{row.paper_model}, {row.quantizer}"
        source = printed[row.role], results.variant(depths[row.role], healed=row.healed)
        n = model.blocks_gone(model.billions(row.paper_model))
        yield weights(label, row.paper_vram, n, row.quantizer)
        yield scored(results, results.answers, label, SCORE, (row.paper_score, variant), source)


def table4(results: Results) -> Iterator[dict]:
    """Latency, too, which the paper's machine alone can show."""
    four, variants = numbers.table(4), joins.of_paper(results, 4).variant
    whole = four.paper_score[0], variants[0]
    times = [f"total_ms_per_token{end}" for end in ("", "_lo", "_hi")]
    why = "milliseconds of the paper's T4; ours are this machine's, with quartiles"
    for row, variant in zip(four.itertuples(), variants, strict=True):
        n, label = model.blocks_gone(row.paper_params_b), row.setting
        ours = _of(results.one_prompt, variant, times)
        tested, told = "", Verdict(UNTESTED, why)
        if ours[0] is not None and verdicts.on_papers_machine(results):
            tested, told = "value", verdicts.near(row.paper_ms_per_token, ours[0])
        yield planned(label, "parameters, B", row.paper_params_b, model.params_b(n))
        yield weights(label, row.paper_vram, n, row.quantizer)
        yield cell(label, "latency, ms/token", row.paper_ms_per_token, ours, tested, told)
        yield scored(results, results.evaluation, label, SCORE, (row.paper_score, variant), whole)


def table5(results: Results) -> Iterator[dict]:
    five = joins.of_paper(results, 5).dropna(subset=["paper_score"])
    full = five.paper_score[0], five.variant[0]
    for row in five.itertuples():
        own = row.paper_score, row.variant
        yield scored(results, results.evaluation, row.setting, SCORE, own, full)


def cell(row: str, name: str, printed, ours, tested_as: str, told: Verdict) -> dict:
    """ours: value, or value, lower and upper end."""
    value, lo, hi = [*ours, None, None, None][:3]
    return {
        "row": row,
        "cell": name,
        "verdict": told.verdict,
        "paper": printed,
        "ours": value,
        "ours_lo": lo,
        "ours_hi": hi,
        "tested_as": tested_as,
        "why": told.why,
    }


def planned(row: str, name: str, printed: float, ours: float) -> dict:
    """Parameters and compression at the paper's own depth, whatever the run's is."""
    return cell(row, name, printed, [ours], "7B plan", verdicts.rounds_to(printed, ours))


def weights(row: str, printed: float, blocks_gone: int, quantizer: str = "") -> dict:
    gib = model.weights_gib(blocks_gone, quantizer)
    told = verdicts.fits(printed, gib, bits=4 if quantizer else 16)
    return cell(row, VRAM, printed, [gib], f"7B plan, GiB at {blocks_gone} of 32 blocks", told)


def scored(results: Results, answers, row: str, name: str, own: tuple, other: tuple) -> dict:
    """A score with its interval; where the model is not the paper's size, the change from another
    row is tested. own, other: what the paper prints, and the run's variant."""
    (printed, variant), (printed_other, beside) = own, other
    score = metrics.score_interval(answers_of(answers, variant))
    if not score.n:
        told = Verdict(UNTESTED, "no scores of this model in this run")
        return cell(row, name, printed, [None], "", told)
    if verdicts.at_papers_size(results):
        told = verdicts.lies_in(printed, score.lo, score.hi)
        return cell(row, name, printed, score[:3], "value", told)
    if variant == beside:
        told = Verdict(UNTESTED, "a 7B model's score; other rows are compared with this one")
        return cell(row, name, printed, score[:3], "", told)
    change, claimed = verdicts.difference(answers, variant, beside), printed - printed_other
    told = verdicts.points_to(claimed, change)
    why = (
        f"{claimed:+.2f} to {printed_other:g} in the paper, {change.difference:+.1f} "
        f"({change.lo:.1f} to {change.hi:.1f}) to {beside} here: {told.why}"
    )
    return cell(row, name, printed, score[:3], "direction", Verdict(told.verdict, why))


def _of(frame: pd.DataFrame | None, variant: str | None, columns: list[str]) -> list:
    """A variant's last values in these columns, None where there are none."""
    if frame is None or not (frame.variant == variant).any():
        return [None] * len(columns)
    return frame[frame.variant == variant].reindex(columns=columns).iloc[-1].tolist()
