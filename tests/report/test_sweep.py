"""The runs of a sweep beside each other: over seeds, in pairs, on the page that compare writes."""

import json

import pandas as pd
import pytest

from derm_compress.__main__ import main
from derm_compress.errors import DermError
from derm_compress.report import comparison, sweep

HIGHER = 4.0  # what steps=20 adds to every score
SETTINGS = {"Original LLaVA": 80.0, "Prune + SFT + Quant": 60.0}


def report(root, seed, steps, noise):
    """A report of one point of a sweep over seeds and steps."""
    folder = root / "reports" / f"grid-seed{seed}-steps{steps}"
    (folder / "tables").mkdir(parents=True)
    rows = [(name, score + noise + HIGHER * (steps == 20)) for name, score in SETTINGS.items()]
    table = pd.DataFrame(rows, columns=["setting", "score"]).assign(score_lo=0, score_hi=99)
    table.to_csv(folder / "tables/table4_efficiency.csv", index=False)
    overrides = {"seed": str(seed), "steps": str(steps)}  # as an emitted job is run
    info = {"params_file": "params/grid.yaml", "overrides": overrides, "headline": "It works."}
    info["sweep"] = {"seed": seed, "steps": steps}
    (folder / "run.json").write_text(json.dumps({"run_info": info}))
    return folder


@pytest.fixture
def grid(tmp_path):
    for seed, noise in enumerate((-1.0, 0.0, 1.0)):
        for steps in (9, 20):
            report(tmp_path, seed, steps, noise)
    (tmp_path / "reports/plain").mkdir()
    (tmp_path / "reports/plain/run.json").write_text('{"run_info": {}}')
    return tmp_path


def of(root):
    folders = [path.parent for path in sorted(root.glob("reports/*/run.json"))]
    (one,) = sweep.sweeps({folder: comparison.info_of(folder) for folder in folders})
    return one


def test_a_point_has_the_mean_of_its_seeds_with_students_interval(grid):
    one = of(grid)
    assert (one.file, one.axes, one.shown) == ("params/grid.yaml", ("seed", "steps"), ["steps"])
    assert one.scores.steps.unique().tolist() == [9, 20]  # as numbers, whatever folders come first
    row = sweep.over_seeds(one).set_index(["steps", "setting"]).loc[20, "Original LLaVA"]
    assert row.score == 84 and row.runs == 3
    assert row.score_hi - 84 == pytest.approx(4.302653 / 3**0.5)  # t of two degrees of freedom
    assert row.score_hi + row.score_lo == pytest.approx(168)


def test_pairs_leave_the_seeds_out_of_a_difference(grid):
    table = sweep.differences(of(grid), "steps")
    assert set(table.steps) == {"20 instead of 9"} and len(table) == len(SETTINGS)
    for end in ("difference", "difference_lo", "difference_hi"):
        assert table[end].tolist() == [HIGHER] * 2
    assert table.runs.tolist() == [3, 3]
    lost = grid / "reports/grid-seed2-steps9/tables/table4_efficiency.csv"
    lost.unlink()
    assert sweep.differences(of(grid), "steps").runs.tolist() == [2, 2]


def test_one_run_a_point_has_no_interval_and_one_value_no_difference(tmp_path):
    report(tmp_path, 0, 10, 0.0)
    one = of(tmp_path)
    assert sweep.over_seeds(one).score_lo.isna().all()
    assert sweep.differences(one, "steps").empty
    assert [part.heading for part in comparison.swept(one)][1] == "By steps"


def test_compare_writes_the_page(grid, monkeypatch):
    monkeypatch.setenv("DERM_COMPRESS_ROOT", str(grid))
    assert main(["compare"]) == 0
    page = (grid / "reports/index.html").read_text("utf-8")
    assert "<h2>params/grid.yaml: seed, steps</h2>" in page and "20 instead of 9" in page
    assert "4.0 (4.0 to 4.0)" in page and page.count("data:image/png") == 1


def test_compare_names_a_run_without_report(grid, monkeypatch, capsys):
    monkeypatch.setenv("DERM_COMPRESS_ROOT", str(grid))
    assert main(["compare", "none"]) == 2
    assert "reports/none is not there" in capsys.readouterr().err
    with pytest.raises(DermError, match="run params/none.yaml makes it"):
        comparison.sections(grid, ["none"])
    names = ["grid-seed1-steps9", "grid-seed0-steps9"]
    (every, *_) = comparison.sections(grid, names)
    assert [str(link).count(name) for link, name in zip(every.frame.run, names, strict=True)] == [
        2,
        2,
    ]
