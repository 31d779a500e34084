"""Kill -9 of a run and all that it has started, at random moments in all eight stages.

    .venv/bin/python tests/kill.py [--kills 20] [--seed 0] [FOLDER]

A small study runs once undisturbed. Then the same one runs in a folder of its own, is killed while
a stage finishes one item after the other, and goes on, until every stage has had its kills. After
each nobody is left, the stage's entry is absent, and what was finished is there; nothing is made
twice; and at last the eight results have the same digests. One line a kill; exit code 1 at the
first deviation.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml
from runs import project

from derm_compress.study.plan import find_plan

RUN = "kill"
OTHER = {  # than the smoke study: less of everything, small batches, workers side by side
    "run": RUN,
    "n_train": 24,
    "batch_size": 6,
    "rankings": ["output_similarity", "perplexity-iterative"],
    "importance_items": 4,
    "importance_batch": 3,
    "depths": [8, 12],
    "sft_depths": [],
    "sft_seeds": 1,
    "processes": 2,
    "methods": ["awq", "bitsandbytes"],
    "bits": [4],
    "equal_bytes": [],
}
JOURNALED = ("journal/scales/*/*.safetensors", "journal/adapters/*/*")  # blocks, adapters
PASSING = ("journal", "measured", "manifest.json")  # what may change, or go
PATIENCE = 600  # seconds for a stage to come as far as it is waited for
POLL = 0.03
TOO_LATE = "TOO LATE"  # a kill that found its stage whole


def ensure(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"DEVIATION: {what}")


class Study:
    """A project of its own, its run, and what has been seen finished in each stage's folder.

    journals: {stage: {name: lines}}, which may only grow. items: {stage: {file: what it was}}: a
    file that is made again has another inode or time.
    """

    def __init__(self, root: Path):
        self.root = project(root)
        values = yaml.safe_load((root / "params" / "smoke.yaml").read_text("utf-8"))
        file = root / "params" / f"{RUN}.yaml"
        file.write_text(yaml.safe_dump(values | OTHER), encoding="utf-8")
        self.plan = find_plan(RUN, root)
        self.stages = list(self.plan.keys)
        self.journals = {stage: {} for stage in self.stages}
        self.items = {stage: {} for stage in self.stages}

    def start(self) -> subprocess.Popen:
        words = [sys.executable, "-m", "derm_compress", "run", f"params/{RUN}.yaml"]
        env = os.environ | {"DERM_COMPRESS_ROOT": str(self.root), "HF_HUB_OFFLINE": "1"}
        with (self.root / "said.txt").open("a") as said:
            to = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": subprocess.STDOUT}
            return subprocess.Popen(words, cwd=self.root, env=env, **to)

    def said(self) -> str:
        return (self.root / "said.txt").read_text("utf-8")[-3000:]

    def family(self) -> list[psutil.Process]:
        """All processes of the run, also those whose parent is dead: their environment names it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("DERM_COMPRESS_ROOT") == str(self.root):
                    found.append(process)
        return found

    def work(self, stage: str) -> Path:
        return self.plan.store.work(stage, self.plan.keys[stage])

    def entry(self, stage: str) -> Path:
        return self.plan.store.own(stage, self.plan.keys[stage])

    def fault(self, stage: str) -> str:
        return self.plan.store.fault(stage, self.plan.keys[stage])

    def results(self, stage: str) -> str:
        return self.plan.store.manifest(stage, self.plan.keys[stage])["results"]

    def look(self) -> None:
        """Sees what is finished by now; what was seen before must be as it was."""
        for stage in self.stages:
            work = self.work(stage)
            with contextlib.suppress(FileNotFoundError):  # it may just have been committed
                for path in work.glob("journal/*.jsonl"):
                    self.see_journal(stage, path)
                for path in items(work):
                    self.see_item(stage, path, path.relative_to(work).as_posix())

    def see_journal(self, stage: str, path: Path) -> None:
        lines = whole_lines(path)
        before = self.journals[stage].get(path.stem, [])
        ensure(lines[: len(before)] == before, f"{stage}: journal {path.stem} has lost lines")
        self.journals[stage][path.stem] = lines

    def see_item(self, stage: str, path: Path, name: str) -> None:
        made = identity(path)
        known = self.items[stage].setdefault(name, made)
        ensure(known == made, f"{stage}: {name} was made twice")

    def count(self, stage: str) -> int:
        """Lines and files seen finished."""
        return len(self.items[stage]) + sum(map(len, self.journals[stage].values()))

    def told(self, stage: str) -> str:
        parts = [f"{name} {len(lines)}" for name, lines in self.journals[stage].items()]
        return ", ".join([*parts, f"{len(self.items[stage])} files"])

    def results_of(self, stage: str) -> set[str]:
        return {name for name in self.items[stage] if not name.startswith("journal/")}

    def ensure_kept(self, calm: Study) -> None:
        """All that was seen is there; a commit begins by removing journals and checkpoints."""
        for stage in self.stages:
            place, names = self.work(stage), self.results_of(stage)
            if self.entry(stage).is_dir():
                place = self.entry(stage)
            elif not calm.results_of(stage) <= names:
                names = {*self.items[stage], *(f"journal/{n}.jsonl" for n in self.journals[stage])}
            for name in names:
                ensure((place / name).exists(), f"{stage}: {name} was finished and is gone")
                made = self.items[stage].get(name, identity(place / name))
                ensure(made == identity(place / name), f"{stage}: {name} was made twice")

    def ensure_nothing_twice(self) -> None:
        for stage, journals in self.journals.items():
            for name, lines in journals.items():
                keys = [json.loads(line)[0] for line in lines]
                ensure(len({*keys}) == len(keys), f"{stage}: an item is twice in journal {name}")


def items(work: Path) -> list[Path]:
    """The files of a work folder that no later moment may change."""
    inner = itertools.chain.from_iterable(map(work.glob, JOURNALED))
    results = [path for path in work.rglob("*") if path.relative_to(work).parts[0] not in PASSING]
    return [path for path in [*inner, *results] if path.is_file() and ".part-" not in str(path)]


def identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def wait_until(
    study: Study, process: subprocess.Popen, ready: Callable[[], bool], what: str
) -> None:
    """Looks again and again until ready(); the run must not end before."""
    until = time.monotonic() + PATIENCE
    while not ready():
        ensure(process.poll() is None, f"the run ended before {what}:\n{study.said()}")
        ensure(time.monotonic() < until, f"waited {PATIENCE} s for {what}")
        time.sleep(POLL)
        study.look()


def go_on(study: Study, calm: Study) -> None:
    """Runs the study to its end."""
    process = study.start()
    while process.poll() is None:
        time.sleep(POLL)
        study.look()
    ensure(process.returncode == 0, f"the run failed:\n{study.said()}")
    study.ensure_kept(calm)
    study.ensure_nothing_twice()
    for stage in study.stages:
        ensure(study.fault(stage) == "", f"{stage}: {study.fault(stage)}")


def strike(study: Study, process: subprocess.Popen, chance: random.Random) -> int:
    """Kills the run and all of its descendants in any order; how many they were."""
    killed, until = set(), time.monotonic() + 10
    while family := study.family():
        ensure(time.monotonic() < until, f"{family} cannot be killed")
        chance.shuffle(family)
        for one in family:
            killed.add(one.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        time.sleep(POLL)
    process.wait()
    return len(killed)


def kill(study: Study, calm: Study, stage: str, left: int, chance: random.Random) -> str:
    """One kill in a stage that has `left` more to come: its line."""
    begun, before = time.monotonic(), study.told(stage)
    share = max(0, 0.9 * calm.count(stage) - study.count(stage)) / (left + 1)
    goal = study.count(stage) + 1 + int(chance.uniform(0, share))  # later kills have their share
    process = study.start()

    def far_enough() -> bool:
        return study.count(stage) >= goal or study.entry(stage).is_dir()

    wait_until(study, process, far_enough, f"{goal} items of {stage}")
    until = time.monotonic() + chance.uniform(0, 0.4)
    wait_until(study, process, lambda: time.monotonic() >= until, "the kill")
    killed = strike(study, process, chance)
    study.look()
    study.ensure_kept(calm)
    fault = study.fault(stage)
    ensure(fault in ("", "absent"), f"{stage}: the entry is neither whole nor absent: {fault}")
    state = "entry absent" if fault else TOO_LATE
    told = f"{time.monotonic() - begun:5.1f} s, {killed} processes, {state}"
    return f"{stage:<22} {told}; before: {before}; kept: {study.told(stage)}"


def journaled(calm: Study, *, after: str = "") -> list[str]:
    return [stage for stage in calm.stages if stage > after and calm.journals[stage]]


def spread(kills: int, calm: Study) -> list[str]:
    """The stages to kill, in order: each once, and again in turn those that keep journals."""
    again = itertools.cycle(journaled(calm))
    more = itertools.islice(again, max(0, kills - len(calm.stages)))
    return sorted([*calm.stages[:kills], *more])


def main(top: Path, kills: int, seed: int) -> None:
    begun, calm = time.monotonic(), Study(top / "calm")
    go_on(calm, calm)
    print(f"undisturbed: {time.monotonic() - begun:.0f} s", flush=True)
    study, chance = Study(top / "killed"), random.Random(seed)
    todo, done, late = spread(kills, calm), 0, 0
    try:
        while todo:
            stage = todo.pop(0)
            line = f"{stage:<22} {TOO_LATE}, whole before"
            if not study.entry(stage).is_dir():
                line = kill(study, calm, stage, todo.count(stage), chance)
            if TOO_LATE in line:  # the next stage that keeps a journal makes up for it
                late += 1
                todo = sorted([*todo, *journaled(calm, after=stage)[:1]])
            else:
                done += 1
            print(f"{done + late:>3}  {line}", flush=True)
        go_on(study, calm)
    finally:
        for process in study.family():
            process.kill()
    for stage in study.stages:
        same = study.results(stage) == calm.results(stage)
        print(f"  {stage:<22} {study.results(stage)[:12]}  {'equal' if same else 'DIFFERENT'}")
    differ = [s for s in study.stages if study.results(s) != calm.results(s)]
    ensure(not differ, f"other results than undisturbed: {', '.join(differ)}")
    print(f"{done} kills, {late} more too late, seed {seed}: {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", metavar="FOLDER", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with contextlib.ExitStack() as opened:
        place = asked.folder or Path(opened.enter_context(tempfile.TemporaryDirectory()))
        main(place.resolve(), asked.kills, asked.seed)
