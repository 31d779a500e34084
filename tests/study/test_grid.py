"""A run file that sweeps: its runs and their names, what they share, jobs for a cluster."""

import time

import pytest
import toy

from derm_compress.errors import DermError
from derm_compress.study import emit, grid, jobs, params, plan, run

SWEEP = "run: grid\nsweep: {seed: [0, 1], sizes: [[1, 2], 3], mode: [plain]}\n"
NAMES = ["seed0-sizes1.2", "seed0-sizes3", "seed1-sizes1.2", "seed1-sizes3"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    made = toy.project(tmp_path)
    (made / "params" / "grid.yaml").write_text(SWEEP)
    monkeypatch.setenv("DERM_COMPRESS_ROOT", str(made))
    monkeypatch.chdir(made)
    return made


def planned(root, **sets):
    return run.plan_runs(root / "params/grid.yaml", sets, root, params.read_notebooks(root))


def test_each_combination_is_a_run_that_its_name_and_its_values_find_again(root):
    plans = planned(root)
    assert [one.run for one in plans] == [f"grid-{name}-modeplain" for name in NAMES]
    for one in plans:
        assert plan.find_plan(one.run).keys == one.keys
        pinned = {name: grid.as_text(value) for name, value in one.swept.items()}
        (again,) = planned(root, **pinned)
        assert (again.run, again.values, again.swept) == (one.run, one.values, one.swept)
    assert len(planned(root, seed="7")) == 2
    with pytest.raises(DermError, match="grid is a grid; its runs are grid-seed0-sizes1.2-mode"):
        plan.find_plan("grid")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("sweep: [seed]", r"sweep is \['seed'\]; write lists by name"),
        ("sweep: {seed: 3}", "sweep: seed is 3; write a list of values"),
        ("sweep: {seed: []}", r"sweep: seed is \[\]; write a list"),
        ("sweep: {sed: [1]}", "sweep: sed is no parameter of any notebook; nearest: seed"),
        ("sweep: {seed: [1, x]}", "sweep: seed is 'x'; allowed: int"),
        ("sweep: {run: [a, b]}", "sweep: run is one for the whole grid"),
        ("seed: 1\nsweep: {seed: [0]}", "seed is given twice: swept, and as one value"),
        ("sweep: {seed: [1, 1]}", "sweep: two runs would be named grid-seed1"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(root, lines, words):
    (root / "params/grid.yaml").write_text(f"run: grid\n{lines}\n")
    with pytest.raises(DermError, match=f"grid.yaml: {words}"):
        planned(root)


def test_the_list_says_what_is_shared_and_what_such_a_stage_took(root):
    plans, stages = planned(root), ["01_data", "02_left", "03_right"]
    first, fourth = plans[0], plans[3]
    first.store.begin("01_data", first.keys["01_data"])
    first.store.commit("01_data", first.keys["01_data"], {"seconds": 75.0})
    first.point("01_data", cached=False)
    lines = jobs.listed(plans, stages).splitlines()
    said = {tuple(line.split()[:2]): line.split("  ")[-1] for line in lines[:-1]}
    assert said[first.run, "01_data"] == "cached"
    assert said[plans[1].run, "01_data"] == f"shared with {first.run}"
    assert said[plans[2].run, "01_data"] == "to compute, 1:15 with seed=0"
    assert said[fourth.run, "02_left"] == "to compute"  # none has been measured
    assert lines[-1].startswith("4 runs, 12 stages, 10 results, 9 to compute: 1:15 for 1 of them")
    other = plan.make_plan(root, first.notebooks, {"run": "other", "count": 5})
    assert jobs.listed([other], stages[:1]).endswith("to compute")  # of another count


def test_a_result_is_one_rule_after_those_that_it_reads(root):
    made = emit.rules([(root / "params/grid.yaml", one) for one in planned(root)], {})
    results, reports, last = made[:10], made[10:14], made[14]
    assert len({rule.output for rule in made}) == len({rule.name for rule in made}) == 15
    known = set()
    for rule in made:
        assert {need.output for need in rule.needs} <= known
        known.add(rule.output)
    assert {len(rule.needs) for rule in reports} == {3} and last.needs == tuple(reports)
    left = results[1]
    assert (
        left.words[-2:] == ("--only", "02_left") and "seed=0 sizes=[1, 2] mode=plain" in left.words
    )
    assert left.output.endswith("runs/grid-seed0-sizes1.2-modeplain/02_left.json")


def test_workflows_name_every_job_once(root):
    snakefile = emit.emit("snakemake", [root / "params/grid.yaml"], {"factor": "3"})
    assert snakefile.count("\nrule ") == 16 and "--set 'factor=3 seed=0 sizes=[1, 2]" in snakefile
    compile(snakefile.split("localrules")[0], "Snakefile", "exec")
    script = emit.emit("slurm", [root / "params/grid.yaml"], {})
    assert script.count("$(sbatch ") == 15 and script.count("--dependency=afterok:$") == 13
    with pytest.raises(DermError, match="emit: make is unknown"):
        emit.emit("make", [], {})


def test_many_empty_stages_are_planned_in_seconds(tmp_path, monkeypatch):
    cells = toy.PARAMETERS + 'name: str = "a"  # any\n'
    for number in range(40):
        earlier = f'stage.input("{number - 1:02}_empty")' if number else "pass"
        name = f"{number:02}_empty"
        code = toy.cell(f"{earlier}\nprint({number})")
        toy.notebook(tmp_path / "notebooks" / f"{name}.ipynb", toy.cell(cells, "parameters"), code)
    (tmp_path / "params").mkdir()
    (tmp_path / "params/grid.yaml").write_text(
        "run: grid\nsweep: {seed: [0, 1, 2, 3, 4], name: [a, b, c, d, e]}\n"
    )
    monkeypatch.setenv("DERM_COMPRESS_ROOT", str(tmp_path))
    begun = time.process_time()
    assert run.run([tmp_path / "params/grid.yaml"], list_=True) == 0
    assert emit.emit("snakemake", [tmp_path / "params/grid.yaml"], {}).count("\nrule ") == 1027
    assert time.process_time() - begun < 5
