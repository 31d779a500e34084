"""What reports say beside each other: the same sign, opposite ones, or an interval over 0."""

from pathlib import Path

import pandas as pd
import pytest

from derm_compress.report import signs

ROOT = Path(__file__).parents[2]


def interval(name, value, apart=1.0):
    return {name: value, f"{name}_lo": value - apart, f"{name}_hi": value + apart}


def report(root, name, tables):
    folder = root / "reports" / name / "tables"
    folder.mkdir(parents=True)
    for stem, rows in tables.items():
        pd.DataFrame(rows).to_csv(folder / f"{stem}.csv", index=False)
    return folder.parent


def study(operating, random, *, magnitude, gain, cost, holds):
    """The tables of a run whose operating point is `operating` blocks."""
    rivals = {"magnitude": magnitude, random: 5}
    tests = [{"criterion": name} | interval("difference", by) for name, by in rivals.items()]
    gains = {0: 0.5, operating: gain, operating + 3: 9}
    form = {"method": "awq-clip", "bits": 3}
    costs = [{"blocks_removed": 0, "healed": False} | form | interval("cost", cost)]
    costs += [{"blocks_removed": operating, "healed": True} | form | interval("cost", 0.1)]
    return {
        "extra_controls": [
            {"control": "a", "question": "Does it see?", "holds": holds},
            {"control": "b", "question": "Was it tested?", "holds": None},
        ],
        "table5_ablation": [{"blocks_removed": operating}],
        "extra_criteria_tests": [row | interval("difference_all", 2) for row in tests],
        "table2_sft": [{"blocks_removed": n} | interval("gain", by) for n, by in gains.items()],
        "extra_quantization_tests": [row | interval("difference", float("nan")) for row in costs],
    }


@pytest.fixture
def two(tmp_path):
    """Reports of models of different depths, which differ in four answers."""
    first = study(16, "random-0", magnitude=3, gain=8, cost=-2, holds=True)
    second = study(7, "random (mean of 5)", magnitude=-3, gain=4, cost=0.5, holds=False)
    second["extra_equal_bytes"] = [{"budget": 3} | interval("difference", 1)]
    return report(tmp_path, "one", first), report(tmp_path, "other", second)


def test_each_question_of_both_has_one_row_and_says_whether_signs_agree(two):
    table = signs.signs(two)
    assert table.question.is_unique
    assert table.set_index("question")["same sign"].to_dict() == {
        "Does it see?": "no",
        "Is the criterion ahead of magnitude before SFT?": "no",
        "Is the criterion ahead of a random order before SFT?": "yes",
        "Is the criterion ahead of magnitude over all depths?": "yes",
        "Is the criterion ahead of a random order over all depths?": "yes",
        "Does SFT raise the score of the unpruned model?": "clear in none",
        "Does SFT raise the score of the pruned model?": "yes",
        "Does the unpruned model gain by AWQ (clip) at 3 bits?": "clear in one only",
        "Does the pruned model after SFT gain by AWQ (clip) at 3 bits?": "clear in none",
    }
    assert table.iloc[1][["one", "other"]].tolist() == ["+3.0 (2.0 to 4.0)", "-3.0 (-4.0 to -2.0)"]


def test_of_three_reports_all_must_answer_and_agree(two):
    third = study(9, "random-0", magnitude=3, gain=5, cost=-2, holds=True)
    del third["table2_sft"]
    table = signs.signs([*two, report(two[0].parents[1], "third", third)])
    same = table.set_index("question")["same sign"]
    assert not any("SFT raise" in question for question in same.index)
    assert same["Does it see?"] == "no"
    assert same["Does the unpruned model gain by AWQ (clip) at 3 bits?"] == (
        "clear in one and third only"
    )
    said = signs.counted(table)
    assert said.startswith("Of 7 questions") and "answer in all runs and 2 have" in said


def test_a_committed_report_agrees_with_itself():
    table = signs.signs([ROOT / "reports/tiny"] * 2)
    assert len(table) > 30 and "no" not in set(table["same sign"])
