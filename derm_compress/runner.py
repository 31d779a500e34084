"""Runs parameter files by papermill: everything is checked first, what is missing is computed, progress is shown."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml

from derm_compress import keys
from derm_compress.artifacts import atomic, hold, read_json, release, shown, write_json
from derm_compress.errors import DermError
from derm_compress.params import check, known_parameters, read_notebooks, read_params, select
from derm_compress.plan import Plan, git_state, make_plan, project_root, public
from derm_compress.progress import clock

CHATTER = re.compile(  # papermill's and the kernel's own lines, outputs without text, what every stage says alike
    r"(Input|Output) Notebook|Working directory|Executing notebook|Ending Cell|\[IPKernelApp\]|<(IPython|Figure)"
    r"|(run|inputs|code|machine|versions) {3,}"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PARAMETERS = "parameters.yaml"  # of all notebooks, by which a kernel finds the keys of its upstream stages
# papermill's command line without a grammar that jsonschema compiles for two seconds and that notebooks never use
PAPERMILL = "import sys; sys.modules['rfc3987_syntax'] = None; from papermill.cli import papermill; papermill()"
KERNEL = {  # threads that wait for each other cost more than they give; progress bars print hundreds of lines
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def run(params_files, only=None, from_=None, sets=None, force=False, list_=False, *, root=None) -> int:
    """Computes and reports the runs of parameter files; the exit code: 0 done, 1 a stage failed, 130 stopped.

    only, from_: a stage by name or number; sets: parameter -> text from the command line, over every file.
    """
    root = project_root(root)
    notebooks = read_notebooks(root)
    first = select(from_, notebooks)[0]
    stages = [name for name in select(only, notebooks) if name >= first]
    plans = [plan_run(Path(path), sets or {}, root, notebooks) for path in params_files]
    if len({plan.folder for plan in plans}) < len(plans):
        raise DermError(f"two parameter files make one run: {', '.join(plan.run for plan in plans)}")
    if list_:
        print("\n".join(line for plan in plans for line in listing(plan, stages)))
        return 0
    try:
        done = [
            run_one(plan, stages, force, public(str(path)), sets)
            for path, plan in zip(params_files, plans, strict=True)
        ]
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on from there", flush=True)
        return 130
    return 0 if all(done) else 1


def plan_run(path: Path, sets: dict[str, str], root: Path, notebooks) -> Plan:
    """A parameter file and what the command line sets over it, checked."""
    known = known_parameters(notebooks)
    values = read_params(path, known)
    if values.get("run") != path.stem:
        raise DermError(f"{path}: run is {values.get('run')!r}; a file's run is its name, so write `run: {path.stem}`")
    texts = {k: known[k].from_text(v) if k in known and isinstance(v, str) else v for k, v in sets.items()}
    return make_plan(root, notebooks, values | check(texts, known, "--set"))


def shows(pointer: dict, plan: Plan, stage: str, folder: Path) -> bool:
    """Whether a run's folder has the executed notebook of just this result, with the text and figures of today."""
    same = pointer.get("key") == plan.keys[stage] and pointer.get("view") == plan.view(stage)
    return same and (folder / "notebooks" / f"{stage}.ipynb").exists()


def listing(plan: Plan, stages) -> list[str]:
    """Per stage: key, and whether it is cached or to be computed and why."""
    faults = {stage: plan.store.fault(stage, plan.keys[stage]) for stage in stages}
    words = {"": "cached", "absent": "to compute"}
    return [f"{plan.run}  {s:<24} {plan.keys[s][:12]}  {words.get(f, f'to compute ({f})')}" for s, f in faults.items()]


def run_one(plan: Plan, stages, force: bool, params_file: str, sets: dict | None) -> bool:
    """One run under its lock: its stages, its notes, its report."""
    lock, begun = plan.folder / ".lock", time.monotonic()
    if not hold(lock):
        raise DermError(f"run {plan.run} is going on in another process: wait for it, or give this one another name")
    try:
        info = {"run": plan.run, "params_file": params_file, "started": datetime.now(UTC).isoformat(timespec="seconds")}
        info["overrides"] = {name: public(value) for name, value in (sets or {}).items()}
        stale = outdated(plan, stages, force)
        todo = [stage for stage in stale if not borrow(plan, stage)]
        with atomic(plan.folder / PARAMETERS) as part:
            part.write_text(yaml.safe_dump(plan.values), encoding="utf-8")
        done = Execution(plan, todo).go()
        if done and stale:
            for stage in set(stages) - set(todo):
                plan.point(stage, cached=True)
            info |= {"git": git_state(plan.root), "seconds": round(time.monotonic() - begun, 1)}
            write_json(plan.folder / "run_info.json", info)
        if done:
            render_report(plan, changed=bool(stale))
        return done
    finally:
        release(lock)


def outdated(plan: Plan, stages, force: bool) -> list[str]:
    """The stages whose result, or whose notebook as it would look today, this run does not have."""
    needed = {earlier for stage in stages for earlier in plan.graph[stage]} - set(stages)
    stale = []
    for stage in stages if force else ():
        plan.store.discard(stage, plan.keys[stage])
    for stage in (name for name in plan.notebooks if name in needed or name in stages):
        complete = plan.store.complete(stage, plan.keys[stage])
        if stage in needed and not complete:
            raise DermError(f"{stage} is not computed with these parameters: add --from {stage[:2]} to compute it, too")
        if stage in stages and not (complete and shows(plan.pointer(stage), plan, stage, plan.folder)):
            stale.append(stage)
    return stale


def borrow(plan: Plan, stage: str) -> bool:
    """Takes the executed notebook of a finished stage from another run that shares it; no kernel is needed then."""
    if not plan.store.complete(stage, plan.keys[stage]):
        return False
    for path in sorted((plan.artifacts / "runs").glob(f"*/{stage}.json")):
        if shows(read_json(path), plan, stage, path.parent):
            plan.executed(stage).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.parent / "notebooks" / f"{stage}.ipynb", plan.executed(stage))
            plan.point(stage, cached=True)
            return True
    return False


def render_report(plan: Plan, *, changed: bool) -> None:
    """reports/<run>/ and the comparison of all runs, if anything that they show has changed."""
    index = plan.root / "reports" / plan.run / "index.html"
    modules = [keys.read_module(name, keys.PACKAGE) for name in sorted(keys.PRESENTATION)]
    looks = [[m.digest for m in modules if m], keys.data_files(keys.PACKAGE, {"templates"})]
    mark = keys.digest([{stage: [plan.keys[stage], plan.view(stage)] for stage in plan.notebooks}, looks])
    rendered = plan.folder / "rendered.json"
    if not changed and index.exists() and rendered.exists() and read_json(rendered) == mark:
        print(f"nothing has changed: {shown(index)}", flush=True)
        return
    if missing := [stage for stage in plan.notebooks if plan.pointer(stage).get("key") != plan.keys[stage]]:
        print(f"no report yet: {', '.join(missing)} not computed", flush=True)
        return
    from derm_compress.report import render, render_index

    place = {} if plan.artifacts == plan.root / "artifacts" else {"artifacts": plan.artifacts}
    render(plan.run, root=plan.root, **place)
    render_index(plan.root)
    write_json(rendered, mark)
    print(f"report: {shown(index)}", flush=True)


@dataclass
class Job:
    """One notebook under way."""

    stage: str
    process: subprocess.Popen
    begun: float
    spoke: float
    cell: int = 0
    failed: bool = False
    tail: deque = field(default_factory=lambda: deque(maxlen=6))
    reader: threading.Thread | None = None


class Execution:
    """Notebooks of one run as papermill processes: each as soon as its inputs are there, two at a time on the CPU."""

    def __init__(self, plan: Plan, todo: list[str]):
        self.plan, self.todo, self.jobs, self.begun = plan, list(todo), [], time.monotonic()
        self.width = 2 if plan.values.get("device", "cpu") == "cpu" and (os.cpu_count() or 1) > 1 else 1
        self.expected = expected_seconds(plan)

    def go(self) -> bool:
        """Runs all; at the first failure the others are stopped and what they finished is kept."""
        try:
            while self.todo or self.jobs:
                self._start_ready()
                time.sleep(0.05)
                for job in list(self.jobs):
                    if job.process.poll() is None:
                        self._heartbeat(job)
                    elif not self._close(job):
                        return False
            return True
        finally:
            with deaf():
                end([job.process for job in self.jobs])
                for job in self.jobs:
                    settle(self.plan, job.stage)

    def say(self, stage: str, text: str) -> None:
        print(f"{clock(time.monotonic() - self.begun):>7}  {stage:<24} {text}", flush=True)

    def _start_ready(self) -> None:
        busy = {*self.todo, *(job.stage for job in self.jobs)}
        for stage in [name for name in self.todo if not busy & set(self.plan.graph[name])]:
            if len(self.jobs) < self.width:
                self.todo.remove(stage)
                expected = self.expected.get(stage)
                self.say(stage, f"starts, about {clock(expected)} as before" if expected else "starts")
                now = time.monotonic()
                self.jobs.append(job := Job(stage, launch(self.plan, stage), now, now))
                job.reader = threading.Thread(target=self._listen, args=(job,), daemon=True)
                job.reader.start()

    def _listen(self, job: Job) -> None:
        for line in map(str.rstrip, job.process.stdout):
            job.tail.append(line)
            if cell := re.match(r"Executing Cell (\d+)", line):
                job.cell = int(cell[1])
            elif line.startswith("Traceback (most recent call last)"):
                job.failed = True  # what follows is papermill's own; the cell's traceback stands in the notebook
            elif line and not job.failed and not CHATTER.match(line):
                job.spoke = time.monotonic()
                self.say(job.stage, line)

    def _heartbeat(self, job: Job) -> None:
        now = time.monotonic()
        if now - job.spoke > 30:
            job.spoke, left = now, self.expected.get(job.stage, 0) - (now - job.begun)
            cells = len(self.plan.notebooks[job.stage].cells)
            self.say(job.stage, f"in cell {job.cell} of {cells}" + (f", about {clock(left)} left" if left > 0 else ""))

    def _close(self, job: Job) -> bool:
        self.jobs.remove(job)
        job.reader.join(timeout=5)
        if problem := trouble(self.plan, job):
            self.say(job.stage, problem)
            return False
        left = sum(self.expected.get(stage, 0) for stage in self.todo)
        self.say(
            job.stage,
            f"done in {clock(time.monotonic() - job.begun)}" + (f", about {clock(left)} to go" if left else ""),
        )
        return True


def expected_seconds(plan: Plan) -> dict[str, float]:
    """Seconds of each stage as this run last took them, else as its committed report says, else 0."""
    report = plan.root / "reports" / plan.run / "run.json"
    reported = read_json(report).get("stages", {}) if report.exists() else {}
    return {stage: (plan.pointer(stage) or reported.get(stage, {})).get("seconds", 0) for stage in plan.notebooks}


def launch(plan: Plan, stage: str) -> subprocess.Popen:
    """Starts a stage's notebook; the pointer, removed here, is written anew by its last cell and so proves success."""
    for old in (plan.folder / f"{stage}.json", plan.executed(stage)):
        old.unlink(missing_ok=True)
    running(plan, stage).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", PAPERMILL, f"notebooks/{stage}.ipynb", running(plan, stage), "--log-output"]
    command += ["-k", "python3", "-l", "python", "--cwd", plan.root, "-y", yaml.safe_dump(plan.parameters(stage))]
    paths = {"PYTHONPATH": str(keys.PACKAGE.parent), "JUPYTER_PATH": str(Path(sys.prefix, "share", "jupyter"))}
    env = KERNEL | os.environ
    env |= {name: os.pathsep.join(filter(None, [path, os.environ.get(name)])) for name, path in paths.items()}
    env |= {"DERM_COMPRESS_ROOT": str(plan.root), "DERM_COMPRESS_PARAMS": str(plan.folder / PARAMETERS)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        command, cwd=plan.root, env=env, encoding="utf-8", errors="replace", start_new_session=True, **pipes
    )


def running(plan: Plan, stage: str) -> Path:
    """Where papermill writes the notebook while it runs."""
    return plan.executed(stage).with_name(f".running-{stage}.ipynb")


def settle(plan: Plan, stage: str) -> None:
    """Gives the notebook that papermill wrote, whole or not, its name."""
    with contextlib.suppress(FileNotFoundError):
        running(plan, stage).replace(plan.executed(stage))


def trouble(plan: Plan, job: Job) -> str:
    """Why a notebook that has ended did not do its work; empty if it did.

    Papermill cannot be asked: it calls a notebook completed whose kernel was killed, and one that left by sys.exit(0).
    """
    settle(plan, job.stage)
    code, key, pointer = job.process.returncode, plan.keys[job.stage], plan.pointer(job.stage)
    if code == 0 and pointer.get("key") == key and plan.store.complete(job.stage, key):
        return ""
    last = job.tail[-1] if job.tail else f"exit code {code}"
    died = f"its kernel died in cell {job.cell} (out of memory?)" if "DeadKernel" in last else last
    ended = "code changed while it ran, run again" if pointer else "it ended before its last cell"
    what = cell_error(plan.executed(job.stage)) or (died if code else ended)
    return f"failed: {what}\nthe notebook so far: {shown(plan.executed(job.stage))}"


def cell_error(notebook: Path) -> str:
    """The error at which an executed notebook stopped, with the end of its traceback; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        for cell in read_json(notebook)["cells"]:
            for output in cell.get("outputs", ()):
                if output["output_type"] == "error":
                    if output["ename"] == "DermError":
                        return output["evalue"]
                    trace = COLOUR.sub("", "\n".join(output["traceback"])).splitlines()[-12:]
                    return "\n".join([f"in [{cell['execution_count']}] {output['ename']}: {output['evalue']}", *trace])
    return ""


@contextlib.contextmanager
def deaf():
    """Keeps a second Ctrl-C from cutting short what the first one began."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end(processes: list[subprocess.Popen]) -> None:
    """Ends papermill processes with their kernels (which live in sessions of their own) and all of their children."""
    import psutil

    family = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            family += [parent, *parent.children(recursive=True)]
            parent.terminate()  # papermill then saves the notebook and ends the kernel
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
