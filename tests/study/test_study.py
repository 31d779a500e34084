"""Keys, stages and the runner, on a toy project with real kernels."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import toy

from derm_compress import files, progress
from derm_compress.errors import DermError
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import variant
from derm_compress.study import execution, jobs, params, plan, run
from derm_compress.study.stage import resolve, start_stage


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("DERM_COMPRESS_ROOT", "DERM_COMPRESS_PARAMS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path):
    return toy.project(tmp_path)


# A stage in its notebook, without a kernel


def begin(root, name, **values):
    """A stage as it starts when its parameters cell has just run."""
    schema = params.read_notebooks(root)[name].schema
    namespace = {parameter: known.default for parameter, known in schema.items()} | values
    return start_stage(name, namespace, root=root)


def test_results_are_made_once_and_read_afterwards(root, capsys):
    calls = []

    def make(value):
        calls.append(value)
        return pd.DataFrame({"x": [value]})

    def fill(path, text):
        calls.append(text)
        (path / "inner.txt").write_text(text)

    for attempt in range(3):
        stage = begin(root, "01_data")
        assert stage.p.count == 3 and stage.finished == (attempt == 2)
        assert stage.frame("f", make, 1).x.tolist() == [1]
        assert stage.json("j", dict, a=1) == {"a": 1}
        assert (stage.folder("sub/d", fill, "text") / "inner.txt").read_text() == "text"
        assert stage.measure("speed", make, 3).x.tolist() == [3]
        assert stage.store.resolve(stage.ref("sub/d/inner.txt")).read_text() == "text"
        if attempt:
            stage.finish()
    assert calls == [1, "text", 3]
    names = {"f.parquet", "j.json", "sub/d/inner.txt", "measured/speed.parquet"}
    assert stage.store.manifest("01_data", stage.key)["files"].keys() == names
    assert "from the store" in capsys.readouterr().out
    with pytest.raises(DermError, match="01_data is finished without new.json"):
        stage.json("new", dict)
    with pytest.raises(AttributeError):
        stage.p.count = 4


def test_a_step_is_given_what_it_asks_for_by_keyword(root):
    asked = {}

    def make(value, *, seed, count=1, other="its own", journal=None, store):
        journal.add("a", value)
        asked.update(seed=seed, count=count, other=other, store=store)
        return {}

    def fill(path, *, scratch):
        asked["scratch"] = scratch

    stage = begin(root, "01_data", seed=4)
    stage.json("j", make, 1, count=7)
    assert asked == {"seed": 4, "count": 7, "other": "its own", "store": stage.store}
    assert stage.journal("j").done == {"a": 1}
    stage.folder("d", fill)
    assert asked["scratch"] == stage.scratch("d")


def lacking(frame):
    return int(frame.reply.isna().sum())


def asks(root, replies, **values):
    """Stage 01 begun, with one step that others need nothing of and one that needs replies."""
    stage = begin(root, "01_data", **values)
    stage.frame("before", lambda: pd.DataFrame({"asked": [str(replies)]}))
    frame = stage.frame("asked", lambda: pd.DataFrame({"reply": replies}), lacking=lacking)
    return stage, frame.reply.fillna("").tolist()


def test_what_a_finished_stage_lacks_is_asked_again_until_it_has_all(root):
    for replies in ([None, None], ["a", None], ["a", "b"]):
        stage, told = asks(root, replies)
        assert told == [reply or "" for reply in replies] and not stage.finished
        stage.finish()
    assert asks(root, ["c"])[1] == ["a", "b"] and begin(root, "01_data").finished
    own = stage.store.own("01_data", stage.key)
    assert [path.name for path in own.parent.iterdir()] == [stage.key]
    assert pd.read_parquet(own / "before.parquet").asked.tolist() == ["[None, None]"]


def test_a_result_that_lacks_something_serves_until_there_is_a_better_one(root):
    stage, _ = asks(root, ["a", None])
    stage.finish()
    with pytest.raises(ZeroDivisionError):
        asks(root, ["a", 1 / 0])
    assert begin(root, "02_left").input("01_data") == stage.store.own("01_data", stage.key)
    later, told = asks(root, ["b", None])  # the one that failed had begun, and left no reply
    assert told == ["b", ""] and later.store.complete("01_data", later.key)
    assert "a" in pd.read_parquet(stage.store.own("01_data", stage.key) / "asked.parquet").values


def test_the_runner_asks_again_and_tells_the_runs_that_share_a_result(root):
    notebooks, stages = params.read_notebooks(root), ["01_data"]
    one, other = (plan.make_plan(root, notebooks, {"run": name}) for name in ("one", "other"))

    def finish(replies, name):
        asks(root, replies, run=name)[0].finish()
        for each in (one, other):
            each.executed("01_data").parent.mkdir(parents=True, exist_ok=True)
            each.executed("01_data").write_text('{"cells": []}')

    finish(["a", None], "one")
    finish(["a", None], "other")
    assert run.outdated(one, stages) == run.outdated(other, stages) == stages
    assert not run.borrow(other, "01_data")  # of what lacks something nothing is shown as it is
    assert jobs.listed([one], stages).endswith("  cached, but lacking: asked again")
    finish(["a", "b"], "one")
    assert run.outdated(one, stages) == [] and run.outdated(other, stages) == stages
    assert run.borrow(other, "01_data") and run.outdated(other, stages) == []


def test_no_progress_bar_asks_for_widgets(root):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        begin(root, "01_data")
        warnings.warn("IProgress not found. Please update jupyter and ipywidgets", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in said] == ["another"]


def test_a_report_reads_what_a_stage_reads_and_its_own(root):
    data = begin(root, "01_data")
    assert data.folders == {"01_data": data.store.work("01_data", data.key)}
    data.frame("numbers", pd.DataFrame)
    data.finish()
    own = begin(root, "02_left").folders
    assert list(own) == ["01_data", "02_left"] and own["01_data"] == data.folders["01_data"]


def test_an_input_is_found_or_named(root):
    lost = "02_left needs 01_data with the same parameters: run notebooks/01_data.ipynb"
    with pytest.raises(DermError, match=lost):
        begin(root, "02_left").input("01_data")
    data = begin(root, "01_data")
    data.frame("numbers", pd.DataFrame)
    data.finish()
    stage = begin(root, "02_left")
    assert (stage.input("01_data") / "numbers.parquet").exists()
    with pytest.raises(DermError, match="02_left does not read 03_right"):
        stage.input("03_right")
    with pytest.raises(DermError, match="with the same parameters"):
        begin(root, "02_left", seed=5).input("01_data")


def test_papermill_overrules_the_environment_which_overrules_the_cell(root, monkeypatch, tmp_path):
    notebooks = params.read_notebooks(root)
    kaggle = tmp_path / "kaggle.yaml"
    kaggle.write_text("factor: 4\nseed: 7\ncount: 9\n")

    def resolved(line="", factor=3.0):
        """What counts where papermill has added a cell with this line."""
        history = ["", "x = 1", f"# Parameters\n{line}\n", "start_stage(...)"]
        return resolve("02_left", {"factor": factor, "In": history}, notebooks)

    assert resolved()["factor"] == 3.0
    monkeypatch.setenv("DERM_COMPRESS_PARAMS", str(kaggle))
    assert resolved().items() >= {"factor": 4.0, "seed": 7, "count": 9}.items()
    assert resolved("factor = 5.0")["factor"] == 5.0
    assert resolved("count = 8")["count"] == 8  # another notebook's: needed for its key
    assert resolved('run = "tiny"')["seed"] == 0  # a run of its own: no environment
    kaggle.write_text("run: tiny\nfactor: 4\n")
    assert resolved('run = "tiny"')["factor"] == 4.0  # its own file
    for line, words in {
        "factro = 5.0": "papermill's parameters of 02_left: factro is no .*nearest: factor",
        'factor = "1e-4"': "text to YAML",
        'factor = float("inf")': "papermill's parameters may be",
    }.items():
        with pytest.raises(DermError, match=words):
            resolved(line)
    with pytest.raises(DermError, match="02_left.ipynb: factor is 99.0; allowed: float 0.001..10"):
        resolved(factor=99.0)


def test_only_cells_as_saved_make_results(root):
    history = ["", "scratch = 1", toy.START + 'stage = start_stage("01_data", globals())']
    stage = start_stage("01_data", {"In": history}, root=root)
    made = 'frame = stage.frame("numbers",shapes.numbers, stage.p.count, stage.p.seed) # remark'
    history.append(made)
    stage.frame("numbers", pd.DataFrame)
    history.append('frame = stage.frame("more", shapes.numbers, 99, stage.p.seed)')
    said = r"01_data: `frame = stage.frame\(\"more\".*` is not in the saved notebook"
    for attempt in (partial(stage.frame, "more", dict), partial(stage.journal, "x"), stage.finish):
        with pytest.raises(DermError, match=said):
            attempt()
    assert begin(root, "01_data").finished is False


def test_track_says_little_and_the_right_thing(capsys, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert list(progress.track(range(100), "answers")) == list(range(100))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "answers: 10 of 100, 1.0/s, 1:30 left"
    assert lines[-1].startswith("answers: 100 in 1:4") and len(lines) == 5
    assert list(progress.track((i for i in range(3)), "short")) == [0, 1, 2]
    assert capsys.readouterr().out == ""
    assert list(progress.track([], "none")) == [] and progress.clock(3725) == "1:02:05"


# Models of a run, for export


def test_export_finds_the_operating_point_by_its_columns(tmp_path):
    def made(name, removed, **known):
        recipe = Recipe("tiny", "0", 8).pruned(range(8 - removed))
        return variant(name, recipe, **known)

    ours, rival = {"criterion": "perplexity"}, {"criterion": "magnitude"}
    models = {
        "04_pruning": [
            made("original", 0),
            made("pruned-2", 2, **ours),
            made("pruned-2-magnitude", 2, **rival),
        ],
        "05_sft": [
            made("rival", 2, healed=True, **rival),
            made("again", 2, healed=True, sft_seed=1, **ours),
            made("any name", 2, healed=True, **ours),
        ],
        "07_quantization": [
            made("unhealed", 2, quantizer="awq", bits=4, **ours),
            made("wide", 2, healed=True, quantizer="awq", bits=8, **ours),
            made("small", 2, healed=True, quantizer="awq", bits=4, **ours),
        ],
    }
    cell = toy.cell(toy.PARAMETERS, "parameters")
    for name in ("02_finetune", *models):
        toy.notebook(tmp_path / "notebooks" / f"{name}.ipynb", cell)
        stage = begin(tmp_path, name)
        if name in models:
            stage.frame("variants", pd.DataFrame, models[name])
            stage.json("choice", dict, operating=2, deeper=3, criterion="perplexity")
        else:
            stage.json("recipe", dict, base="tiny")
        stage.finish()
    recipes = {row["variant"]: row["recipe"] for rows in models.values() for row in rows}

    def found(model):
        return plan.find_recipe(model, root=tmp_path)[0]

    assert json.loads(found("default/02_finetune")) == {"base": "tiny"}
    assert found("default/04_pruning") == recipes["pruned-2"]
    assert found("default/04/original") == recipes["original"]
    assert found("default/05_sft") == recipes["any name"]
    assert found("default/07") == recipes["small"]
    for model, words in {
        "default/04/prund": "has no prund; known: original, pruned-2",
        "default/09": "no stage 09; known: 02_finetune",
        "other/04": "there is no run other; runs are default",
        "../runs/04": r"run is '\.\.'",
        "default/02/x": "02_finetune has no model of that name",
    }.items():
        with pytest.raises(DermError, match=words):
            found(model)


# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["params/tniy.yaml"], "no parameter file params/tniy.yaml; its folder has"),
        (
            ["params/odd.yaml"],
            "params/odd.yaml: run is 'tiny'; a file's run is its name, so write `run: odd`",
        ),
        (["params/trap.yaml"], "params/trap.yaml: factor is '1e-2' (text to YAML"),
        (
            ["params/tiny.yaml", "--set", "facto=1"],
            "--set: facto is no parameter of any notebook; nearest: factor",
        ),
        (["params/tiny.yaml", "--set", "factor"], "--set factor: write name=value"),
        (["params/tiny.yaml", "--set", "seed=1", "--set", "seed=2"], "--set: seed is given twice"),
        (["params/tiny.yaml", "--only", "09"], "no stage 09; known: 01_data, 02_left, 03_right"),
        (
            ["params/tiny.yaml", "--from", "02"],
            "01_data is not computed with these parameters: add --from 01",
        ),
        (["params/tiny.yaml", "params/tiny.yaml"], "two parameter files make one run: tiny, tiny"),
    ],
)
def test_a_wrong_request_is_one_line_before_any_kernel(root, words, message):
    (root / "params" / "odd.yaml").write_text("run: tiny\n")
    (root / "params" / "trap.yaml").write_text("run: trap\nfactor: 1e-2\n")
    result = toy.call(root, "run", *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_an_output_path_that_is_a_file_is_one_line(root):
    result = toy.call(root, "pack", "tiny", "params/tiny.yaml")
    said = "pack: params/tiny.yaml is a file; name a new folder\n"
    assert (result.returncode, result.stderr) == (2, said)


def test_set_takes_several_and_values_with_spaces():
    words = ["a=1 b=two words c=[1, 2]", "d=x=y"]
    assert params.assignments(words) == {"a": "1", "b": "two words", "c": "[1, 2]", "d": "x=y"}
    assert params.assignments([]) == params.assignments([""]) == {}
    words = ["m=['a b=c d', 'e f=g'] n=[1]", "o=[2, 3] p=x q=y=z"]  # a list is not torn
    found = {"m": "['a b=c d', 'e f=g']", "n": "[1]", "o": "[2, 3]", "p": "x", "q": "y=z"}
    assert params.assignments(words) == found


def test_every_process_of_a_run_has_the_same_arithmetic(root, monkeypatch, capsys):
    for name in plan.ARITHMETIC:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    begin(root, "01_data")
    wanted = plan.ARITHMETIC | {"MKL_CBWR": "COMPATIBLE"}  # what is set already stays
    assert os.environ.items() >= wanted.items() and plan.environment()["arithmetic"] == wanted
    assert execution.KERNEL.items() >= plan.ARITHMETIC.items()
    for name in plan.ARITHMETIC | plan.ALLOCATOR:
        monkeypatch.delenv(name)
    code = "import derm_compress.study.plan as p; p.settle()"
    code += "; import os; print(os.environ['PYTORCH_ALLOC_CONF'])"
    code += "; import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    memory, vectors = done.stdout.splitlines()
    assert memory == "expandable_segments:True"
    assert vectors in ("AVX2", "DEFAULT", "NO AVX"), vectors


def test_a_stage_and_the_runner_start_without_what_is_heavy(root):
    code = """
import sys
import derm_compress.__main__, derm_compress.study.run
from derm_compress.study import start_stage
start_stage("01_data", {})
heavy = {"torch", "transformers", "pandas", "numpy", "matplotlib", "IPython"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    env = toy.environment(root) | {"DERM_COMPRESS_ROOT": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 3 <= len(done.stdout.splitlines()) <= 4


def test_help_is_quick():
    code = "import sys; import derm_compress.__main__ as m; m.main(['--help'])"
    code += "; assert not {'yaml', 'pandas', 'filelock'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "report" in done.stdout, done.stderr


STAND_IN = """#!/bin/sh
echo "$@" >> log
[ "$2" != venv ] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; }
"""


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_installs_once_and_hands_everything_on(tmp_path):
    here, top = tmp_path / "a path with spaces", toy.PACKAGE.parent
    (here / ".ci").mkdir(parents=True)
    for name in ("Makefile", ".ci/run", "requirements.txt", "pyproject.toml"):
        shutil.copy(top / name, here / name)
    for name in ("stand in", "chromium"):  # .ci/run installs a browser where there is none
        (here / name).write_text(STAND_IN)
        (here / name).chmod(0o755)
    (here / "report").write_text("a file of that name is no reason to do nothing")
    env = os.environ | {"PYTHON": "./stand in", "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}

    def make(*words):
        (here / "log").unlink(missing_ok=True)
        subprocess.run(words, cwd=here, check=True, capture_output=True, env=env)
        return (here / "log").read_text().splitlines()

    venv, installed, _, ran = make("make", "report", "RUN=x", "SET=a=1 b=two words")
    assert venv == "-m venv .venv" and installed.endswith("-r requirements.txt")
    assert ran == "-m derm_compress run params/x.yaml --set a=1 b=two words"
    assert make("make", "report") == ["-m derm_compress run params/tiny.yaml"]
    tests, geometry, mock = make(".ci/run")
    assert tests.startswith("-m pytest") and "geometry-7b" in geometry and "mock_kaggle" in mock
    os.utime(here / "requirements.txt", (time.time() + 9, time.time() + 9))
    assert len(make("make", "test")) == 4


# With kernels


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A toy project after its first run, and what the run said."""
    root = toy.project(tmp_path_factory.mktemp("run"))
    return root, toy.call(root, "run", "params/tiny.yaml")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that project to do harm to."""
    shutil.copytree(finished[0], tmp_path / "copied project")
    return tmp_path / "copied project"


def test_a_run_leaves_notebooks_pointers_and_a_report(finished):
    root, result = finished
    assert result.returncode == 0, result.stdout + result.stderr
    runs = root / "artifacts" / "runs" / "tiny"
    assert len([*(runs / "notebooks").glob("0*.ipynb")]) == 3
    assert (root / "reports" / "tiny" / "index.html").exists()
    said = re.findall(r"(0\w+) +(starts|done)", result.stdout)
    assert said[:2] == [("01_data", "starts"), ("01_data", "done")]
    assert said[2:4] == [("02_left", "starts"), ("03_right", "starts")]
    pointer = json.loads((runs / "02_left.json").read_text())
    assert pointer["parameters"] == {"seed": 0, "factor": 2.0, "sizes": [1, 2], "mode": "plain"}
    assert pointer["cached"] is False and pointer["upstream"].keys() == {"01_data"}
    assert json.loads((runs / "run_info.json").read_text())["params_file"] == "params/tiny.yaml"
    shown = "".join(path.read_text() for path in runs.glob("*.json"))
    assert str(root) not in shown and socket.gethostname() not in shown
    (made,) = root.glob("artifacts/store/02_left/*/scaled.parquet")
    assert pd.read_parquet(made).n.tolist() == [0, 2, 4, 6]


def test_again_nothing_runs_and_only_what_depends_runs_after_a_change(copy):
    books = copy / "artifacts" / "runs" / "tiny" / "notebooks"
    times = {path.name: path.stat().st_mtime_ns for path in books.iterdir()}
    begun = time.monotonic()
    again = toy.call(copy, "run", "params/tiny.yaml")
    assert again.stdout == "nothing has changed: reports/tiny/index.html\n"
    assert time.monotonic() - begun < 15
    toy.edit(copy / "notebooks" / "03_right.ipynb", "# 03_right", "# Better words")
    (copy / "params" / "other.yaml").write_text("run: other\ncount: 4\n")
    both = toy.call(copy, "run", "params/tiny.yaml", "params/other.yaml")
    assert both.returncode == 0 and both.stdout.count(" starts") == 1
    assert "03_right from the store" in both.stdout
    assert {n for n in times if times[n] != (books / n).stat().st_mtime_ns} == {"03_right.ipynb"}
    borrowed = copy / "artifacts" / "runs" / "other" / "notebooks" / "03_right.ipynb"
    assert "Better words" in borrowed.read_text()
    assert json.loads((books.parent / "01_data.json").read_text())["cached"] is True


def test_a_damaged_artifact_is_named_and_computed_again(copy):
    target = next((copy / "artifacts" / "store" / "03_right").glob("*/scaled.parquet"))
    target.write_bytes(target.read_bytes()[:-9])
    listing = toy.call(copy, "run", "params/tiny.yaml", "--list").stdout
    assert "to compute (scaled.parquet was changed or cut short)" in listing and target.exists()
    result = toy.call(copy, "run", "params/tiny.yaml")
    assert "scaled.parquet was changed or cut short; set aside" in result.stdout
    assert result.returncode == 0 and result.stdout.count(" starts") == 1
    assert len(pd.read_parquet(target)) == 4


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("crash", ["in [6] ValueError: the toy crashed", "shapes.py:27, in misbehave"]),
        ("exit", ["failed: in [6] SystemExit: 0"]),
        ("die", ["failed: its kernel died in cell 7"]),
    ],
)
def test_a_notebook_that_fails_is_noticed_and_kept(copy, mode, words):
    result = toy.call(copy, "run", "params/tiny.yaml", "--only", "02", "--set", f"mode={mode}")
    assert result.returncode == 1, result.stdout
    kept = "artifacts/runs/tiny/notebooks/02_left.ipynb"
    assert all(word in result.stdout for word in [*words, kept]), result.stdout
    assert (copy / kept).exists()
    assert not (copy / "artifacts" / "runs" / "tiny" / "02_left.json").exists()


KINDS = ("study.worker", "ipykernel_launcher", "sleep")  # the last is a kernel's own process


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_however_a_run_ends_its_kernels_end_and_the_same_command_goes_on(copy, sent):
    words = ["run", "params/tiny.yaml", "--only", "02", "--set", "mode=slow"]
    options = {"cwd": copy, "env": toy.environment(copy), "stdout": subprocess.PIPE, "text": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # as at a prompt
    process = subprocess.Popen(toy.command(*words), **options)
    while "item 3" not in process.stdout.readline():
        assert process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True)
    assert set(KINDS) <= {name_of(one) for one in family}
    if sent == signal.SIGINT:
        second = toy.call(copy, *words)
        assert second.returncode == 2
        assert second.stderr.startswith("run tiny is going on in another process: wait for it")
    process.send_signal(sent)
    said = process.communicate(timeout=60)[0]
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert (copy / "kept.txt").exists() == (sent == signal.SIGINT)  # it had time for that
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert said.splitlines()[-1].startswith("stopped; what was finished is kept")
    result = toy.call(copy, *words)
    assert result.returncode == 0, result.stdout
    assert "item 3\n" not in result.stdout and "item 11" in result.stdout


def name_of(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    return next((n for n in KINDS if n in words), words)


def test_plain_papermill_finds_what_the_runner_made(copy):
    words = ["-m", "papermill", "notebooks/02_left.ipynb", "out.ipynb", "-f", "params/tiny.yaml"]
    how = {"cwd": copy, "env": toy.environment(copy), "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, *words], **how)
    assert result.returncode == 0, result.stderr
    assert "02_left from the store" in (copy / "out.ipynb").read_text()
    assert os.listdir(copy / "artifacts" / "runs") == ["tiny"]


def test_a_runs_seconds_are_those_of_the_whole_study(tmp_path):
    cached = {"a": False, "b": False}
    plan = SimpleNamespace(folder=tmp_path, notebooks=cached, keys={"a": "1", "b": "2"})
    plan.pointer = lambda stage: {"cached": cached[stage], "seconds": 100}
    assert run.study_seconds(plan, ["a"], 20)["seconds"] == 200  # b was computed by an earlier call
    whole = run.study_seconds(plan, ["a", "b"], 150)
    assert whole["seconds"] == 150 and "wall time" in whole["seconds_are"]
    (tmp_path / "run_info.json").write_text(json.dumps(whole))
    cached["a"] = True  # its notebook was shown anew, its result came from the store
    assert run.study_seconds(plan, ["a", "b"], 20) == whole
    plan.keys["b"] = "3"
    assert "sum" in run.study_seconds(plan, ["b"], 20)["seconds_are"]


# Places and damage


def read_only(folder):
    """Nobody may write in it."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_finished_store_that_is_read_only_serves(copy):
    manifest = next((copy / "artifacts" / "store" / "03_right").glob("*/manifest.json"))
    told = files.read_note(manifest)
    told["made"]["lacking"] = {"scaled": 1}  # it cannot be asked again
    files.write_note(manifest, told)
    read_only(copy / "artifacts")
    again = toy.call(copy, "run", "params/tiny.yaml")
    assert (again.returncode, again.stderr) == (0, "") and "nothing has changed" in again.stdout
    shutil.rmtree(copy / "reports")
    assert toy.call(copy, "run", "params/tiny.yaml").returncode == 0
    assert (copy / "reports" / "tiny" / "index.html").exists()
    more = toy.call(copy, "run", "params/tiny.yaml", "--set", "seed=1")
    assert more.returncode == 2 and more.stderr.count("\n") == 1
    assert "cannot write artifacts/runs/tiny/.locks/01_data: permission denied" in more.stderr


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("''", "artifact_root is empty"),
        ("params/tiny.yaml", "artifact_root: params/tiny.yaml is a file: name a folder"),
        ("params/tiny.yaml/x/y", "artifact_root: params/tiny.yaml is a file: name a folder"),
        ("inputs/results", "artifact_root lies in data_root"),
        ("/proc/no", "/proc/no"),
    ],
)
def test_a_place_that_cannot_take_artifacts_is_one_line(root, place, words):
    (root / "inputs").mkdir()
    (root / "params" / "tiny.yaml").write_text(
        f"run: tiny\nartifact_root: {place}\ndata_root: inputs\n"
    )
    result = toy.call(root, "run", "params/tiny.yaml", "--only", "01")
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr and result.stderr.count("\n") == 1
    if "tiny.yaml" in place:
        listed = toy.call(root, "run", "params/tiny.yaml", "--list")
        assert (listed.returncode, listed.stderr) == (2, result.stderr)


@pytest.mark.parametrize("place", [".", "../elsewhere"])
def test_artifacts_may_lie_anywhere_and_reports_look_there(copy, place):
    shutil.copytree(copy / "artifacts", copy / place, dirs_exist_ok=True)
    shutil.rmtree(copy / "artifacts")
    (copy / "params" / "tiny.yaml").write_text(f"run: tiny\ncount: 4\nartifact_root: {place}\n")
    assert toy.call(copy, "run", "params/tiny.yaml").stdout.startswith("nothing has changed")
    told = toy.call(copy, "report", "tiny")
    assert told.returncode == 0, told.stderr
    page = (copy / "reports" / "tiny" / "index.html").read_text()
    assert page == f"report of {copy / place}"


def test_damaged_notes_of_a_run_are_named_and_made_anew_and_stop_no_other(copy):
    shutil.copytree(copy / "artifacts" / "runs" / "tiny", copy / "artifacts" / "runs" / "other")
    for other in (copy / "artifacts" / "runs" / "other").rglob("*.json"):
        other.write_text("[]")
    home = copy / "artifacts" / "runs" / "tiny"
    toy.edit(home / "02_left.json", '"seconds": ', '"seconds": 1')
    (home / "run_info.json").write_text('{"seconds": null')
    (home / "rendered.json").write_bytes(b"\xff")
    (home / "notebooks" / "03_right.ipynb").write_text("{}")
    result = toy.call(copy, "run", "params/tiny.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("02_left.json", "run_info.json", "03_right.ipynb"):
        assert result.stdout.count(f"tiny/{name}: ") + result.stdout.count(f"books/{name}: ") == 1
    assert result.stdout.count(" starts") == 2 and result.stdout.count("from the store") == 2
    again = toy.call(copy, "run", "params/tiny.yaml").stdout
    assert again == "nothing has changed: reports/tiny/index.html\n"
