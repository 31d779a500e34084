"""Checks run each in a process of its own, with a limit of time."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from derm_compress.errors import first_line
from derm_compress.files import read_json
from derm_compress.model import usage
from derm_compress.model.memory import GIB
from derm_compress.study.execution import KERNEL
from tools.check_gpu import Check, Skip

BAD = ("failed", "too long")
LEAST = 20  # seconds without which nothing is begun
TAIL = 15  # lines of a failed check's log
ROOMY = 30  # GiB of a GPU that has room for others beside one that is alone
BESIDE = 5  # checks at once that need no GPU alone
ENVIRONMENT = {**KERNEL, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "PYTHONUNBUFFERED": "1"}


def try_here(check: Check, device: str, folder: Path) -> dict:
    """Tries a check in this process: name, result, seconds, peak_gib (since its last reset), says.

    What lacks a package is skipped.
    """
    began = time.monotonic()
    try:
        result, says = "passed", check.work(device, folder)
    except Skip as error:
        result, says = "skipped", str(error)
    except Exception as error:  # of any kind: the table says it
        traceback.print_exc()
        foreign = isinstance(error, ModuleNotFoundError) and "derm_compress" not in str(error)
        result = "skipped" if foreign else "failed"
        says = f"{type(error).__name__}: {first_line(error)}"
    seconds, peak = time.monotonic() - began, usage.peak_gib(device)
    return row(check, result, says, seconds) | {"peak_gib": round(peak, 2)}


def row(check: Check, result: str, says: str, seconds: float = 0.0) -> dict:
    told = {"name": check.name, "result": result, "seconds": round(seconds, 1)}
    return told | {"peak_gib": 0.0, "says": says}


def run_all(checks: list[Check], device: str, seconds: float) -> list[dict]:
    """Results in this order: those alone run one after another, the others beside them."""
    until = time.monotonic() + seconds
    beside = max(1, min(BESIDE, (os.cpu_count() or 2) - 1))
    with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(beside) as others:
        tight = device != "cpu" and torch.cuda.get_device_properties(0).total_memory < ROOMY * GIB
        pools = [alone if check.alone or tight else others for check in checks]
        running = [
            pool.submit(run, one, device, until) for pool, one in zip(pools, checks, strict=True)
        ]
        return [one.result() for one in running]


def run(check: Check, device: str, until: float) -> dict:
    limit = min(check.seconds, until - time.monotonic())
    if limit < LEAST:
        return row(check, "skipped", "no time is left")
    with tempfile.TemporaryDirectory(prefix=f"{check.name}-") as folder:
        told = watched(check, device, Path(folder), limit)
    print(f"{told['seconds']:>6} s  {told['result']:<8} {check.name}", flush=True)
    return told


def watched(check: Check, device: str, folder: Path, limit: float) -> dict:
    """The result of a check's process, which ends at its limit with all that it has started."""
    into, began = folder / "result.json", time.monotonic()
    words = [sys.executable, "-m", "tools.check_gpu", check.name, "--device", device]
    with (folder / "log").open("w") as log:
        how = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        environment = ENVIRONMENT | os.environ
        if check.alone:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
            environment["CUDA_VISIBLE_DEVICES"] = gpus.partition(",")[0]
        process = subprocess.Popen([*words, "--into", str(into)], env=environment, **how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        late = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = (folder / "log").read_text(errors="replace").splitlines()[-TAIL:]
    result = "too long" if late else "failed"
    told = row(check, result, f"exit code {process.returncode}", time.monotonic() - began)
    told = read_json(into) if into.exists() else told
    return told | {"log": lines} if told["result"] in BAD else told
