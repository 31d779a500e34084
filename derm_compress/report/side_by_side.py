"""Tables 1 to 5 cell by cell: the paper's value, the run's or the plan's, and a verdict by verdicts.RULES. No torch."""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report import contradictions, paper, paper_model, verdicts
from derm_compress.report.results import Results, answers_of, variant_id
from derm_compress.report.verdicts import UNTESTED, Verdict

COLUMNS = [
    "table",
    "row",
    "cell",
    "paper",
    "ours",
    "ours_lo",
    "ours_hi",
    "tested_as",
    "verdict",
    "why",
]
SHOWN = [*COLUMNS[:3], "verdict", *COLUMNS[3:8], "why"]  # in this order
SCORE = "score, %"
TRAINING = Verdict(
    UNTESTED, "the paper does not say with what batch, length and precision it trained"
)


def cells(results: Results) -> pd.DataFrame:
    """One row a cell of the paper's tables."""
    frame = pd.DataFrame([*shapes(), *costs(results), *scores(results)], columns=COLUMNS)
    by = {"by": ["table", "row"], "kind": "stable"}
    return frame.sort_values(
        **by, key=lambda column: column if column.name == "table" else _order(column)
    )[SHOWN]


def shapes() -> list[tuple]:
    """Parameters, compression and memory: planned at the paper's own depth, whatever the run's is."""
    rows = []
    for row in paper.table(1).itertuples():
        n, label = row.blocks_removed, _depth(row.blocks_removed)
        rows += [
            _planned(
                1,
                label,
                "compression, %",
                row.paper_compression,
                100 * n * paper_model.BLOCK / _TOTAL,
            )
        ]
        rows += [_planned(1, label, "parameters, B", row.paper_params_b, paper_model.params_b(n))]
        rows += [_memory(1, label, row.paper_vram, n, "fp16")]
    for row in paper.table(3).itertuples():
        n = paper_model.blocks_gone(float(row.paper_model.split("(")[1].rstrip("B )")))
        rows.append(_memory(3, f"{row.paper_model}, {row.method}", row.paper_vram, n, row.method))
    for row in paper.table(4).itertuples():
        n = paper_model.blocks_gone(row.paper_params_b)
        rows += [
            _planned(4, row.setting, "parameters, B", row.paper_params_b, paper_model.params_b(n))
        ]
        rows += [_memory(4, row.setting, row.paper_vram, n, "awq" if row.bits < 16 else "fp16")]
    return rows


def costs(results: Results) -> list[tuple]:
    """Training time and memory, whose settings are unknown, and latency, which the paper's machine alone can show."""
    rows, taken, trained, testable = (
        [],
        results.one_prompt,
        results.training,
        verdicts.on_papers_machine(results),
    )
    for row in paper.table(2, operating=results.operating, deeper=results.deeper).itertuples():
        seconds, gib = (
            _of(trained, row.variant, "seconds"),
            _of(trained, row.variant, "train_peak_gib"),
        )
        rows.append(
            (2, row.paper_model, "time, s", row.paper_seconds, seconds, None, None, "", *TRAINING)
        )
        rows.append(
            (
                2,
                row.paper_model,
                "training VRAM, GB",
                row.paper_vram,
                gib,
                None,
                None,
                "",
                *TRAINING,
            )
        )
    for row in paper.table(4, operating=results.operating, deeper=results.deeper).itertuples():
        ms = [_of(taken, row.variant, f"total_ms_per_token{end}") for end in ("", "_lo", "_hi")]
        told = (
            "",
            UNTESTED,
            "milliseconds of the paper's T4; ours are this machine's, with quartiles",
        )
        if testable and ms[0] is not None:
            told = "value", *verdicts.near(row.paper_ms_per_token, ms[0])
        rows.append((4, row.setting, "latency, ms/token", row.paper_ms_per_token, *ms, *told))
    return rows


def scores(results: Results) -> list[tuple]:
    """Each score with its interval; where the model is not the paper's size, the change from another row is tested."""
    n, at = results.operating, {"operating": results.operating, "deeper": results.deeper}
    one, two, three, four, five = (paper.table(k, **({} if k == 1 else at)) for k in range(1, 6))
    plain = dict(zip(four.variant, four.paper_score, strict=True))
    plain |= dict(zip(two.variant, two.paper_score_after, strict=True))
    asked = []  # table, row, cell, paper's score, paper's score of what it is compared with, both variants
    for row in one.itertuples():
        own = row.blocks_removed * results.blocks / paper.BLOCKS
        name = variant_id(int(own)) if own == int(own) else ""
        asked.append(
            (
                1,
                _depth(row.blocks_removed),
                SCORE,
                row.paper_score,
                one.paper_score[0],
                name,
                "original",
            )
        )
    for row in two.itertuples():
        before, whole = row.variant.removesuffix("+sft"), plain["original"]
        asked.append(
            (
                2,
                row.paper_model,
                "score before SFT, %",
                row.paper_score_before,
                whole,
                before,
                "original",
            )
        )
        pair = row.paper_score_after, row.paper_score_before, row.variant, before
        asked.append((2, row.paper_model, "score after SFT, %", *pair))
    for row in three.itertuples():
        source = row.variant.split("|")[0]
        label = f"{row.paper_model}, {row.method}"
        asked.append((3, label, SCORE, row.paper_score, plain[source], row.variant, source))
    for table, first, frame in (
        (4, "original", four),
        (5, f"{variant_id(n, healed=True)}|awq4", five),
    ):
        whole = frame.set_index("variant").paper_score[first]
        asked += [
            (table, row.setting, SCORE, row.paper_score, whole, row.variant, first)
            for row in frame.itertuples()
        ]
    return [_score(results, *cell) for cell in asked]


def build(results: Results) -> dict[str, pd.DataFrame]:
    """{stem: table} of what is said of the paper: cells, claims, and where it disagrees with itself."""
    made = {"extra_contradictions": contradictions.check()}
    if results.variants is not None:
        made |= {"extra_side_by_side": cells(results), "extra_verdicts": verdicts.claims(results)}
    return made


def findings(frame: pd.DataFrame) -> list[str]:
    """How many cells hold, by kind."""
    scored = frame.cell.str.startswith("score")
    planned = frame.tested_as.str.startswith("7B plan")
    told = {
        "cells": frame,
        "cells of parameters, compression and memory": frame[planned],
        "scores (directions or values)": frame[scored],
    }
    return [verdicts.counted(rows, what) for what, rows in told.items()]


_TOTAL = paper_model.TOTAL


def _order(column: pd.Series) -> pd.Series:
    """Rows in the order in which they first appear."""
    return pd.Series(pd.factorize(column)[0], index=column.index)


def _depth(n: int) -> str:
    return f"{n} blocks removed"


def _planned(table, row, cell, printed, ours):
    return (
        table,
        row,
        cell,
        printed,
        ours,
        None,
        None,
        "7B plan",
        *verdicts.rounds_to(printed, ours),
    )


def _memory(table, row, printed, n, method):
    gib = paper_model.weights_gib(n, method)
    told = verdicts.fits(printed, gib, bits=16 if method == "fp16" else 4)
    return (
        table,
        row,
        "VRAM, GB",
        printed,
        gib,
        None,
        None,
        f"7B plan, GiB at {n} of 32 blocks",
        *told,
    )


def _score(results, table, row, cell, printed, other_printed, variant, other):
    answers = results.evaluation if table in (4, 5) else results.answers
    score = metrics.score_interval(answers_of(answers, variant))
    if not score.n:
        return (
            table,
            row,
            cell,
            printed,
            *[None] * 3,
            "",
            UNTESTED,
            "no scores of this model in this run",
        )
    if verdicts.at_papers_size(results):
        return (
            table,
            row,
            cell,
            printed,
            *score[:3],
            "value",
            *verdicts.lies_in(printed, score.lo, score.hi),
        )
    if variant == other:
        told = Verdict(UNTESTED, "a 7B model's score; other rows are compared with this one")
        return table, row, cell, printed, *score[:3], "", *told
    change = verdicts.difference(answers, variant, other)
    told = verdicts.points_to(printed - other_printed, change)
    against = f"{printed - other_printed:+.2f} to {other_printed:g} in the paper"
    here = f"{change.difference:+.1f} ({change.lo:.1f} to {change.hi:.1f}) to {other} here"
    return (
        table,
        row,
        cell,
        printed,
        *score[:3],
        "direction",
        told.verdict,
        f"{against}, {here}: {told.why}",
    )


def _of(frame: pd.DataFrame | None, variant: str, column: str):
    found = (
        []
        if frame is None or column not in frame
        else frame[column][frame.variant == variant].tolist()
    )
    return found[-1] if found else None
