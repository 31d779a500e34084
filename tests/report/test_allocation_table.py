"""The table of allocations, its figures and sentences, from made-up answers."""

import json

import pandas as pd
import pytest

from derm_compress.method.allocation.allocation import RUNNING
from derm_compress.report import figures, tables
from derm_compress.report.results import Results
from derm_compress.report.sentences import Facts
from derm_compress.report.tables.allocation import agreement


def row(way, variant, kl, budget=3.0, gone=1, **known):
    bits = {f"{block}.mlp.{name}_proj": 3 for block in range(gone, 4) for name in ("up", "down")}
    told = {"blocks": 4, "bits": bits, "bytes": dict.fromkeys(RUNNING, 5) | {"head": 70}}
    sizes = {"budget_gib": budget, "budget_bytes": 100, "bytes_planned": 90}
    found = {"way": way, "variant": variant, "units_removed": gone, "mean_bits": 3.0, "kl": kl}
    return found | sizes | {"allocation": json.dumps(told), "predicted": 2 * kl, **known}


@pytest.fixture(scope="module")
def results():
    allocations = pd.DataFrame(
        [
            row("probe", "p", 0.5),
            row("joint", "a", 0.1),
            *(row("candidate", name, kl) for name, kl in (("a", 0.1), ("b", 0.2), ("c", 0.4))),
            row("uniform", "u", 0.3, gone=0, predicted=0.01),
            *(row("random", f"r{i}", 0.7 + i) for i in range(3)),
        ]
    )
    scores = {"a": 4, "u": 2, "a+sft": 3, "original": 4}
    answers = pd.DataFrame(
        [
            {"variant": name, "item": str(i), "question": "name", "score": float(score)}
            for name, score in scores.items()
            for i in range(12)
        ]
    )
    held = pd.DataFrame({"variant": ["a", "u", "a+sft"], "held": [70, 71, 70]})
    return Results(allocations=allocations, allocation_answers=answers, held=held)


def test_ways_of_one_budget_stand_side_by_side(results):
    table = tables.make("extra_allocation", results).set_index("method")
    assert set(table.index) == {"joint", "uniform", "random"}
    assert table.loc["random", "kl"] == 0.7  # the nearest of the draws
    assert table.loc["joint", ["score_before", "score_after"]].tolist() == [100, 75]
    assert table.loc["uniform", "difference"] == 50 and pd.isna(table.loc["joint", "difference"])
    assert table.loc[["joint", "uniform"], "bytes_exact"].tolist() == [90, 91]


def test_prices_are_held_against_what_happened(results):
    found = agreement(results)
    assert found["candidates"] == pytest.approx(1) and found["all"] < 1
    assert pd.isna(found["healing"])  # one pair alone


def test_it_is_drawn_and_said(results):
    drawn = {stem: figures.figure(stem, results) for stem in ("extra_allocation", "allocation_map")}
    assert drawn["allocation_map"].data.bits.eq(3).all()
    assert "3 GiB" in drawn["extra_allocation"].finding
    said = " ".join(Facts(results).said("extra_allocation"))
    assert "1 blocks removed at 3.00 bits stay nearest" in said and "Next comes uniform" in said
    assert "clearly beats uniform at 1 of 1 budgets" in said and "correlation of 1.00" in said
