"""Notebooks as processes: started when their inputs are there, watched, ended (no torch)."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import yaml

from derm_compress.files import name_damaged, read_json, shown, write_text
from derm_compress.progress import LOG, clock
from derm_compress.study import keys
from derm_compress.study.plan import ARITHMETIC, Plan

SILENCE = 30  # seconds after which a stage that says nothing is told to be alive
PATIENCE = 30  # seconds that a stage has for its end when it is told to stop
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
KERNEL = {  # waiting threads cost more than they give; progress bars print hundreds of lines
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    **ARITHMETIC,
}


@dataclass
class Job:
    """One notebook under way."""

    stage: str
    process: subprocess.Popen
    begun: float
    spoke: float
    log: TextIO
    last: str = ""


class Execution:
    """The notebooks of one run: each as soon as its inputs are there, two at a time on the CPU."""

    def __init__(self, plan: Plan, todo: list[str]):
        self.plan, self.todo, self.jobs = plan, list(todo), []
        self.begun = time.monotonic()
        cpu = plan.values.get("device") != "cuda"
        self.width = 2 if cpu and (os.cpu_count() or 1) > 1 else 1
        self.expected = {stage: seconds_before(plan, stage) for stage in todo}

    def go(self) -> bool:
        """Runs all; at the first failure the others are stopped and what they finished is kept."""
        try:
            while self.todo or self.jobs:
                self._start_ready()
                time.sleep(0.05)
                for job in list(self.jobs):
                    self._relay(job)
                    if job.process.poll() is None:
                        self._heartbeat(job)
                    elif not self._close(job):
                        return False
            return True
        finally:
            end([job.process for job in self.jobs])
            for job in self.jobs:
                settle(self.plan, job.stage)

    def say(self, stage: str, text: str) -> None:
        print(f"{clock(time.monotonic() - self.begun):>7}  {stage:<24} {text}", flush=True)

    def _start_ready(self) -> None:
        unfinished = {*self.todo, *(job.stage for job in self.jobs)}
        ready = [stage for stage in self.todo if not unfinished & set(self.plan.graph[stage])]
        for stage in ready[: self.width - len(self.jobs)]:
            self.todo.remove(stage)
            expected = self.expected[stage]
            about = f", {clock(expected)} the last time" if expected else ""
            self.say(stage, f"starts{about}")
            now = time.monotonic()
            process = launch(self.plan, stage)
            log = log_of(self.plan, stage).open(encoding="utf-8", errors="replace")
            self.jobs.append(Job(stage, process, now, now, log))

    def _relay(self, job: Job) -> None:
        for line in map(str.rstrip, job.log):
            if line:
                job.last, job.spoke = line, time.monotonic()
                self.say(job.stage, line)

    def _heartbeat(self, job: Job) -> None:
        now = time.monotonic()
        if now - job.spoke < SILENCE:
            return
        job.spoke, left = now, self.expected[job.stage] - (now - job.begun)
        begun, cells = cells_begun(running(self.plan, job.stage))
        about = f", about {clock(left)} of this stage left" if left > 0 else ""
        self.say(job.stage, f"in cell {begun} of {cells}{about}")

    def _close(self, job: Job) -> bool:
        self._relay(job)
        job.log.close()
        self.jobs.remove(job)
        settle(self.plan, job.stage)
        why = trouble(self.plan, job)
        self.say(job.stage, why or f"done in {clock(time.monotonic() - job.begun)}")
        return not why


def launch(plan: Plan, stage: str) -> subprocess.Popen:
    """Starts a stage's notebook; its pointer goes, and is written anew by its last cell alone."""
    for old in (plan.folder / f"{stage}.json", plan.executed(stage)):
        old.unlink(missing_ok=True)
    running(plan, stage).parent.mkdir(parents=True, exist_ok=True)
    request = {
        "notebook": f"notebooks/{stage}.ipynb",
        "output": str(running(plan, stage)),
        "parameters": plan.parameters(stage),
        "cwd": str(plan.root),
    }
    env = KERNEL | os.environ
    for name, path in (
        ("PYTHONPATH", keys.PACKAGE.parent),
        ("JUPYTER_PATH", Path(sys.prefix, "share", "jupyter")),
    ):
        env[name] = os.pathsep.join(filter(None, [str(path), os.environ.get(name)]))
    env["DERM_COMPRESS_ROOT"] = str(plan.root)
    given = plan.folder / f"{stage}.yaml"  # all of a run's: by these it finds its inputs' keys
    write_text(given, yaml.safe_dump(plan.values))
    env["DERM_COMPRESS_PARAMS"] = str(given)
    env[LOG] = str(log_of(plan, stage))
    with log_of(plan, stage).open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "derm_compress.study.worker", json.dumps(request)],
            cwd=plan.root,
            env=env,
            stdin=subprocess.PIPE,  # ends when this process does, however it does
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def seconds_before(plan: Plan, stage: str) -> float:
    """What a stage to compute took with these parameters when it last was; 0 where unknown."""
    note = plan.pointer(stage)
    same = note.get("parameters") == plan.told(stage)
    return seconds_in(note) if same and not plan.store.ready(stage, plan.keys[stage]) else 0


def seconds_in(note: dict) -> float:
    """What a note says of its seconds, 0 where that is nothing."""
    seconds = note.get("seconds")
    return seconds if isinstance(seconds, int | float) else 0


def whole(notebook: Path) -> bool:
    """Whether an executed notebook is there and can be read."""
    try:
        return isinstance(read_json(notebook)["cells"], list)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        name_damaged(notebook)
        return False


def log_of(plan: Plan, stage: str) -> Path:
    """Where a stage's lines of progress go, for the runner to show."""
    return plan.folder / f"{stage}.log"


def running(plan: Plan, stage: str) -> Path:
    """Where papermill writes the notebook while it runs."""
    return plan.executed(stage).with_name(f".running-{stage}.ipynb")


def settle(plan: Plan, stage: str) -> None:
    """Gives the notebook that papermill wrote, whole or not, its name."""
    with contextlib.suppress(FileNotFoundError):
        running(plan, stage).replace(plan.executed(stage))


def trouble(plan: Plan, job: Job) -> str:
    """Why a notebook that has ended did not do its work; empty if it did.

    Papermill cannot be asked: it calls a notebook completed whose kernel was killed, and one that
    left by sys.exit(0).
    """
    code, key, pointer = job.process.returncode, plan.keys[job.stage], plan.pointer(job.stage)
    if code == 0 and pointer.get("key") == key and plan.store.complete(job.stage, key):
        return ""
    notebook = plan.executed(job.stage)
    if error := cell_error(notebook):
        what = error
    elif "DeadKernel" in job.last:
        what = f"its kernel died in cell {cells_begun(notebook)[0]} (out of memory?)"
    elif "No space left" in job.last:
        what = "the disk is full, free some space and run again"
    elif code < 0:
        what = f"ended by signal {-code}"
    elif code:
        what = job.last or f"exit code {code}"
    elif pointer:
        what = "code changed while it ran, run again"
    else:
        what = "it ended before its last cell"
    return f"failed: {what}\nthe notebook so far: {shown(notebook)}"


def cells_begun(notebook: Path) -> tuple[int, int]:
    """How many cells of a notebook papermill has begun, and how many there are."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        cells = read_json(notebook)["cells"]
        begun = [bool(cell["metadata"]["papermill"]["start_time"]) for cell in cells]
        return sum(begun), len(cells)
    return 0, 0


def cell_error(notebook: Path) -> str:
    """The error at which an executed notebook stopped, with the end of its traceback, or ""."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for cell in read_json(notebook)["cells"]:
            for output in cell.get("outputs", ()):
                if output["output_type"] == "error":
                    return told(output, cell["execution_count"])
    return ""


def told(error: dict, count: int) -> str:
    if error["ename"] == "DermError":
        return error["evalue"]
    trace = COLOUR.sub("", "\n".join(error["traceback"])).splitlines()[-12:]
    return "\n".join([f"in [{count}] {error['ename']}: {error['evalue']}", *trace])


def end(processes: list[subprocess.Popen]) -> None:
    """Ends workers with their kernels (in sessions of their own) and all of their children.

    Kernels are interrupted and have time to keep what they wait for, such as a judge's replies.
    """
    import psutil

    workers, family = [], []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker = psutil.Process(process.pid)
            kernels = worker.children()
            family += [worker, *worker.children(recursive=True)]
            workers.append(worker)
            for kernel in kernels:
                kernel.send_signal(signal.SIGINT)  # papermill then saves the notebook and ends
            if not kernels:
                worker.terminate()
    psutil.wait_procs(workers, timeout=PATIENCE)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
