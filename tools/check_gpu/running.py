"""Checks run each in a process of its own, with a limit of time."""

import contextlib
import os
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

LEAST = 20  # seconds without which nothing is begun
BESIDE = 5  # checks at once that need no GPU alone
ROOMY = 30  # GiB of a GPU that has room for them beside one that is alone
ENVIRONMENT = {**KERNEL, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "PYTHONUNBUFFERED": "1"}


def row(check: Check, result: str, says: str, began: float, peak: float = 0.0) -> dict:
    told = {"result": result, "name": check.name, "seconds": round(time.monotonic() - began, 1)}
    return told | {"peak_gib": round(peak, 2), "says": says}


def try_here(check: Check, device: str, folder: Path) -> dict:
    """A check's row, tried in this process; its peak since it was last reset.

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
    return row(check, result, says, began, usage.peak_gib(device))


def run_all(checks: list[Check], device: str, seconds: float) -> list[dict]:
    """Rows in this order: those alone run one after another, the others beside them."""
    until = time.monotonic() + seconds
    tight = device != "cpu" and torch.cuda.get_device_properties(0).total_memory < ROOMY * GIB
    beside = max(1, min(BESIDE, (os.cpu_count() or 2) - 1))
    with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(beside) as others:
        running = []
        for check in checks:
            pool = alone if check.alone or tight else others
            running.append(pool.submit(run, check, device, until))
        return [one.result() for one in running]


def run(check: Check, device: str, until: float) -> dict:
    """The row of a check in a process of its own, with what a failed one said last."""
    began = time.monotonic()
    limit = min(check.seconds, until - began)
    if limit < LEAST:
        return row(check, "skipped", "no time is left", began)
    words = [sys.executable, "-m", "tools.check_gpu", check.name, "--device", device, "--into"]
    environment = ENVIRONMENT | os.environ
    if check.alone:  # a model that is not spread over GPUs
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = gpus.partition(",")[0]
    with tempfile.TemporaryDirectory(prefix=f"{check.name}-") as folder:
        into, log = Path(folder, "result.json"), Path(folder, "log")
        with log.open("w") as said, contextlib.suppress(subprocess.TimeoutExpired):
            how = {"env": environment, "stdout": said, "stderr": subprocess.STDOUT}
            subprocess.run([*words, str(into)], timeout=limit, **how)
        lines = log.read_text(errors="replace").splitlines()[-15:]
        dead = "it took too long" if time.monotonic() - began >= limit else "its process has died"
        told = read_json(into) if into.exists() else row(check, "failed", dead, began)
    print(f"{told['seconds']:>6} s  {told['result']:<8} {check.name}", flush=True)
    return told | {"log": lines} if told["result"] == "failed" else told
