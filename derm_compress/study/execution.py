"""Notebooks as papermill processes: started when their inputs are there, watched, understood, ended (no torch)."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from derm_compress.files import atomic, read_json, shown
from derm_compress.progress import clock
from derm_compress.study import keys
from derm_compress.study.plan import ARITHMETIC, Plan

CHATTER = re.compile(  # papermill's and the kernel's own lines, and what every stage says alike
    r"(Input|Output) Notebook|Working directory|Executing notebook|Ending Cell|\[IPKernelApp\]"
    r"|(run|inputs|code|machine|versions) {3,}"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PARAMETERS = (
    "parameters.yaml"  # of all notebooks, by which a kernel finds the keys of its upstream stages
)
KERNEL = (
    {  # threads that wait for each other cost more than they give; progress bars print hundreds of lines
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    | ARITHMETIC
)


@dataclass
class Job:
    """One notebook under way."""

    stage: str
    process: subprocess.Popen
    begun: float
    spoke: float
    cell: int = 0
    failed: bool = False
    last: str = ""
    reader: threading.Thread | None = None


class Execution:
    """Notebooks of one run as papermill processes: each as soon as its inputs are there, two at a time on the CPU."""

    def __init__(self, plan: Plan, todo: list[str]):
        self.plan, self.todo, self.jobs, self.begun = plan, list(todo), [], time.monotonic()
        self.width = 2 if plan.values.get("device") != "cuda" and (os.cpu_count() or 1) > 1 else 1
        report = plan.root / "reports" / plan.run / "run.json"
        reported = read_json(report).get("stages", {}) if report.exists() else {}
        before = {stage: plan.pointer(stage) or reported.get(stage, {}) for stage in plan.notebooks}
        self.expected = {stage: found.get("seconds", 0) for stage, found in before.items()}

    def go(self) -> bool:
        """Runs all; at the first failure the others are stopped and what they finished is kept."""
        with atomic(self.plan.folder / PARAMETERS) as part:
            part.write_text(yaml.safe_dump(self.plan.values), encoding="utf-8")
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
                expected = self.expected[stage]
                self.say(
                    stage,
                    f"starts, about {clock(expected)} as in the last report"
                    if expected
                    else "starts",
                )
                now = time.monotonic()
                self.jobs.append(job := Job(stage, launch(self.plan, stage), now, now))
                job.reader = threading.Thread(target=self._listen, args=(job,), daemon=True)
                job.reader.start()

    def _listen(self, job: Job) -> None:
        for line in map(str.rstrip, job.process.stdout):
            repeated, job.last = (
                line == job.last,
                line or job.last,
            )  # the kernel echoes its own children's lines
            if cell := re.match(r"Executing Cell (\d+)", line):
                job.cell = int(cell[1])
            elif line.startswith("Traceback (most recent call last)"):
                job.failed = True  # what follows is papermill's own; the cell's traceback stands in the notebook
            elif line and not repeated and not job.failed and not CHATTER.match(line):
                job.spoke = time.monotonic()
                self.say(job.stage, line)

    def _heartbeat(self, job: Job) -> None:
        now = time.monotonic()
        if now - job.spoke > 30:
            job.spoke, left = now, self.expected[job.stage] - (now - job.begun)
            cells = len(self.plan.notebooks[job.stage].cells)
            self.say(
                job.stage,
                f"in cell {job.cell} of {cells}"
                + (f", about {clock(left)} of this stage left" if left > 0 else ""),
            )

    def _close(self, job: Job) -> bool:
        self.jobs.remove(job)
        job.reader.join(timeout=5)
        if problem := trouble(self.plan, job):
            self.say(job.stage, problem)
            return False
        left = sum(self.expected[stage] for stage in self.todo)
        done = f"done in {clock(time.monotonic() - job.begun)}"
        self.say(job.stage, f"{done}, about {clock(left)} to go" if left else done)
        return True


def launch(plan: Plan, stage: str) -> subprocess.Popen:
    """Starts a stage's notebook; the pointer, removed here, is written anew by its last cell and so proves success."""
    for old in (plan.folder / f"{stage}.json", plan.executed(stage)):
        old.unlink(missing_ok=True)
    running(plan, stage).parent.mkdir(parents=True, exist_ok=True)
    program = "from derm_compress.study.execution import papermill; papermill()"
    command = [
        sys.executable,
        "-c",
        program,
        f"notebooks/{stage}.ipynb",
        running(plan, stage),
        "--log-output",
    ]
    command += [
        "-k",
        "python3",
        "-l",
        "python",
        "--cwd",
        plan.root,
        "-y",
        yaml.safe_dump(plan.parameters(stage)),
    ]
    paths = {
        "PYTHONPATH": str(keys.PACKAGE.parent),
        "JUPYTER_PATH": str(Path(sys.prefix, "share", "jupyter")),
    }
    env = KERNEL | os.environ
    env |= {
        name: os.pathsep.join(filter(None, [path, os.environ.get(name)]))
        for name, path in paths.items()
    }
    env |= {
        "DERM_COMPRESS_ROOT": str(plan.root),
        "DERM_COMPRESS_PARAMS": str(plan.folder / PARAMETERS),
    }
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        command,
        cwd=plan.root,
        env=env,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        **pipes,
    )


def papermill() -> None:
    """Papermill's command line, which logs what cells print but not the tables and figures that they display."""
    sys.modules["rfc3987_syntax"] = (
        None  # two seconds of compiling a grammar that no notebook needs
    )
    from papermill import cli, clientwrap

    log = clientwrap.PapermillNotebookClient.log_output_message

    def log_streams(client, output):
        if output.output_type == "stream":
            log(client, output)

    clientwrap.PapermillNotebookClient.log_output_message = log_streams
    cli.papermill()


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
    last = f"ended by signal {-code}" if code < 0 else job.last or f"exit code {code}"
    for sign, meaning in (
        ("DeadKernel", f"its kernel died in cell {job.cell} (out of memory?)"),
        ("No space left", "the disk is full, free some space and run again"),
    ):
        last = meaning if sign in last else last
    ended = "code changed while it ran, run again" if pointer else "it ended before its last cell"
    what = cell_error(plan.executed(job.stage)) or (last if code else ended)
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
                    return "\n".join(
                        [
                            f"in [{cell['execution_count']}] {output['ename']}: {output['evalue']}",
                            *trace,
                        ]
                    )
    return ""


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
