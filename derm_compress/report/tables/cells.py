"""The paper's Tables 1 to 5 cell by cell: its value, the run's or the plan's, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.model.variants import paper_depth
from derm_compress.report.paper import model, numbers
from derm_compress.report.results import Results, answers_of
from derm_compress.report.tables import joins, verdicts
from derm_compress.report.tables.verdicts import UNSCORED, UNTESTED, Tested, Verdict

Cells = Iterator[tuple[str, str, Tested]]  # row, column, what its test found
SCORE, VRAM, PARAMETERS = "score, %", "VRAM, GB", "parameters, B"
UNKNOWN = "the paper does not say with what batch, length and precision it trained"
TIMES = "milliseconds of the paper's T4; ours are this machine's, with quartiles"


def cells(results: Results) -> pd.DataFrame:
    """One row a cell of the paper's tables."""
    return pd.DataFrame(
        {"table": number, "row": row, "cell": name, **tested.columns()}
        for number, make in enumerate((table1, table2, table3, table4, table5), 1)
        for row, name, tested in make(results)
    )


def table1(results: Results) -> Cells:
    one = numbers.table(1)
    whole = one.paper_score[0], results.variant(0)
    for row in one.itertuples():
        n, label = row.blocks_removed, f"{row.blocks_removed} blocks removed"
        share = 100 * n * model.BLOCK / model.TOTAL
        own = row.paper_score, results.variant(paper_depth(n, results.blocks))
        yield label, "compression, %", planned(row.paper_compression, share)
        yield label, PARAMETERS, planned(row.paper_params_b, model.params_b(n))
        yield label, VRAM, weights(row.paper_vram, n)
        yield label, SCORE, scored(results, results.answers, own, whole)


def table2(results: Results) -> Cells:
    """Training time and memory, whose settings are unknown, and scores before and after SFT."""
    whole = numbers.table(1).paper_score[0], results.variant(0)
    depths = (results.operating, results.deeper)
    for row, n in zip(joins.of_paper(results, 2).itertuples(), depths, strict=True):
        label, told = row.paper_model, Verdict(UNTESTED, UNKNOWN)
        before = row.paper_score_before, results.variant(n)
        after = row.paper_score_after, row.variant
        ours = joins.values(results.training, row.variant, ["seconds", "train_peak_gib"])
        yield label, "time, s", Tested(row.paper_seconds, "", told, ours[:1])
        yield label, "training VRAM, GB", Tested(row.paper_vram, "", told, ours[1:])
        for name, one, other in (("before", before, whole), ("after", after, before)):
            yield label, f"score {name} SFT, %", scored(results, results.answers, one, other)


def table3(results: Results) -> Cells:
    """Each quantized model beside what it was made of."""
    three, variants = numbers.table(3), joins.of_paper(results, 3).variant
    printed = numbers.table(2).set_index("role").paper_score_after.to_dict()
    printed["unpruned"] = numbers.table(1).paper_score[0]
    for row, variant in zip(three.itertuples(), variants, strict=True):
        label = f"{row.paper_model}, {row.quantizer}"
        source = printed[row.role], results.variant(results.depth(row.role), healed=row.healed)
        n = model.blocks_gone(model.billions(row.paper_model))
        yield label, VRAM, weights(row.paper_vram, n, row.quantizer)
        yield label, SCORE, scored(results, results.answers, (row.paper_score, variant), source)


def table4(results: Results) -> Cells:
    """Latency, too, which the paper's machine alone can show."""
    four, variants = numbers.table(4), joins.of_paper(results, 4).variant
    whole = four.paper_score[0], variants[0]
    for row, variant in zip(four.itertuples(), variants, strict=True):
        n, label = model.blocks_gone(row.paper_params_b), row.setting
        own = row.paper_score, variant
        yield label, PARAMETERS, planned(row.paper_params_b, model.params_b(n))
        yield label, VRAM, weights(row.paper_vram, n, row.quantizer)
        yield label, "latency, ms/token", timed(results, row.paper_ms_per_token, variant)
        yield label, SCORE, scored(results, results.evaluation, own, whole)


def table5(results: Results) -> Cells:
    five = joins.of_paper(results, 5).dropna(subset=["paper_score"])
    full = five.paper_score[0], five.variant[0]
    for row in five.itertuples():
        own = row.paper_score, row.variant
        yield row.setting, SCORE, scored(results, results.evaluation, own, full)


def planned(printed: float, ours: float) -> Tested:
    """Parameters and compression at the paper's own depth, whatever the run's is."""
    return Tested(printed, "7B plan", verdicts.rounds_to(printed, ours), [ours])


def weights(printed: float, blocks_gone: int, quantizer: str = "") -> Tested:
    gib = model.weights_gib(blocks_gone, quantizer)
    told = verdicts.fits(printed, gib, bits=4 if quantizer else 16)
    return Tested(printed, f"7B plan, GiB at {blocks_gone} of 32 blocks", told, [gib])


def timed(results: Results, printed: float, variant: str | None) -> Tested:
    columns = [f"total_ms_per_token{end}" for end in ("", "_lo", "_hi")]
    ours = joins.values(results.one_prompt, variant, columns)
    if ours[0] is None or not verdicts.on_papers_machine(results):
        return Tested(printed, "", Verdict(UNTESTED, TIMES), ours)
    return Tested(printed, "value", verdicts.near(printed, ours[0]), ours)


def scored(results: Results, answers, own: tuple, other: tuple) -> Tested:
    """A score with its interval; where the model is not the paper's size, the change from another
    row is tested. own, other: what the paper prints, and the run's variant."""
    (printed, variant), (printed_other, beside) = own, other
    score = metrics.score_interval(answers_of(answers, variant))
    if not score.n:
        return Tested(printed, "", Verdict(UNTESTED, UNSCORED))
    if verdicts.at_papers_size(results):
        return Tested(printed, "value", verdicts.lies_in(printed, score.lo, score.hi), score[:3])
    if variant == beside:
        told = Verdict(UNTESTED, "a 7B model's score; other rows are compared with this one")
        return Tested(printed, "", told, score[:3])
    change, claimed = verdicts.difference(answers, variant, beside), printed - printed_other
    told = verdicts.points_to(claimed, change)
    why = (
        f"{claimed:+.2f} to {printed_other:g} in the paper, {change.difference:+.1f} "
        f"({change.lo:.1f} to {change.hi:.1f}) to {beside} here: {told.why}"
    )
    return Tested(printed, "direction", Verdict(told.verdict, why), score[:3])
