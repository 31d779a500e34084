"""Work in processes of its own. Nothing here loads torch, so workers start at once."""

import os
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest

from derm_compress.errors import DermError
from derm_compress.method.finetune.workers import side_by_side


def meet(name, folder):
    """Waits for the other: only two at a time can both come to an end."""
    (folder / name).write_text(str(os.getpid()))
    wait_for(lambda: len(list(folder.iterdir())) > 1)


def fail(name):
    if name == "b":
        raise DermError("fine-tuning b: no")
    time.sleep(60)


def wait_for(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_pieces_run_at_the_same_time_each_in_a_process_of_its_own(tmp_path):
    side_by_side(partial(meet, folder=tmp_path), ["a", "b"])
    workers = {file.read_text() for file in tmp_path.iterdir()}
    assert len(workers) == 2 and str(os.getpid()) not in workers


def test_a_failure_is_raised_as_it_was_and_ends_what_waits():
    began = time.monotonic()
    with pytest.raises(DermError, match="fine-tuning b: no"):
        side_by_side(fail, ["a", "b"])
    assert time.monotonic() - began < 50


def test_a_killed_worker_is_said_in_one_line():
    with pytest.raises(DermError, match="a worker process was killed: memory may have run out"):
        side_by_side(os._exit, [9])


def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    """Else it would write into the folder of the resumed run."""
    (tmp_path / "parent.py").write_text(
        "import os, sys, time\n"
        "from derm_compress.method.finetune.workers import side_by_side\n"
        "def work(path):\n"
        "    open(path, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    side_by_side(work, sys.argv[1:])\n"
    )
    told = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py", told])
    wait_for(lambda: told.exists() and told.read_text())
    worker = psutil.Process(int(told.read_text()))
    parent.kill()
    parent.wait()
    wait_for(lambda: not worker.is_running() or worker.status() == "zombie", 10)
