"""Kill -9 of a run and all that it has started, at random moments in all eight stages.

    .venv/bin/python tests/kill.py [--kills 20] [--seed 0] [FOLDER]

A small study runs once undisturbed. Then the same one runs in a folder of its own and is killed
while a journal grows, or in stages without one while their notebook runs, and goes on, until every
stage has had its kills. After each kill nobody is left, the stage's entry is absent, and all that
was finished is there; no item is made twice; and the eight results have the same digests at last.
One line a kill; exit code 1 at the first deviation.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from derm_compress.study.plan import Plan, find_plan

PROJECT = Path(__file__).parent.parent
RUN = "kill"
OTHER = {  # than the smoke study: smaller batches, a checkpoint, workers side by side, fewer models
    "run": RUN,
    "batch_size": 6,
    "rankings": ["output_similarity", "perplexity-iterative", "block_influence-text"],
    "importance_items": 6,
    "importance_batch": 6,
    "finetune_steps": 60,
    "finetune_batch": 2,
    "sft_seeds": 1,
    "processes": 2,
    "methods": ["awq", "bitsandbytes", "rtn"],
    "bits": [4],
    "equal_bytes": [],
}
FINISHED = ("journal/*.jsonl", "journal/scales/*/*.safetensors", "journal/adapters/*/*")
PATIENCE = 600  # seconds for a stage to come as far as it is waited for
POLL = 0.02


@dataclass(frozen=True)
class Finished:
    """What a stage has finished: whole lines of its journals, and all other files by path."""

    journals: dict[str, list[bytes]]
    files: set[str]

    @classmethod
    def of(cls, folder: Path) -> Finished:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = {path.relative_to(folder).as_posix() for path in paths}
        journals = sorted(name for name in names if name.endswith(".jsonl"))
        lines = {Path(name).stem: whole_lines(folder / name) for name in journals}
        return cls(lines, names - {*journals})

    @property
    def results(self) -> set[str]:
        return {name for name in self.files if not name.startswith("journal/")}

    @property
    def journal_files(self) -> set[str]:
        return {f"journal/{name}.jsonl" for name in self.journals}

    @property
    def count(self) -> int:
        """Lines of journals, blocks and adapters."""
        return len(self.files - self.results) + sum(map(len, self.journals.values()))

    def told(self, before: Finished | None = None) -> str:
        """The number of lines of each journal, and how many of them are new."""
        parts = []
        for name, lines in self.journals.items():
            new = len(lines) - len(before.journals.get(name, ())) if before else 0
            parts.append(f"{name} {len(lines)}" + (f" (+{new})" if new else ""))
        return ", ".join(parts) or "no journal"


class Study:
    """A project of its own, its run, and hard links to all that the run has finished.

    A link keeps what a journal held when its stage has removed it, and shows a file made anew.
    """

    def __init__(self, top: Path):
        self.root, self.seen = top / "project", top / "seen"
        for name in ("notebooks", "params"):
            shutil.copytree(PROJECT / name, self.root / name)
        values = yaml.safe_load((PROJECT / "params" / "smoke.yaml").read_text("utf-8"))
        file = self.root / "params" / f"{RUN}.yaml"
        file.write_text(yaml.safe_dump(values | OTHER), encoding="utf-8")
        self.plan: Plan = find_plan(RUN, self.root)
        self.stages = list(self.plan.keys)

    def start(self) -> subprocess.Popen:
        words = [sys.executable, "-m", "derm_compress", "run", f"params/{RUN}.yaml"]
        with (self.root / "said.txt").open("a") as said:
            return subprocess.Popen(
                words,
                cwd=self.root,
                env=os.environ | {"DERM_COMPRESS_ROOT": str(self.root), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return (self.root / "said.txt").read_text("utf-8")

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
        """Links to what has been finished since the last look."""
        for stage in self.stages:
            with contextlib.suppress(FileNotFoundError):  # it may just have been committed
                for path in unchanging(self.work(stage)):
                    self.keep(path, self.seen / stage / path.relative_to(self.work(stage)))

    def keep(self, path: Path, link: Path) -> None:
        """A link to a finished file; a journal's may move on to one without a line cut short."""
        if path.suffix == ".jsonl" and link.exists() and not link.samefile(path):
            lines = whole_lines(link)
            ensure(whole_lines(path)[: len(lines)] == lines, f"{link.name} has lost lines")
            link.unlink()
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)

    def finished(self) -> dict[str, Finished]:
        """What each stage has finished so far, whether its work folder still has it or not."""
        return {stage: Finished.of(self.seen / stage) for stage in self.stages}


def unchanging(work: Path) -> list[Path]:
    """The files of a work folder that no later moment may change, but for journals that grow."""
    inner = itertools.chain.from_iterable(work.glob(pattern) for pattern in FINISHED)
    results = [path for path in work.rglob("*") if path.relative_to(work).parts[0] != "journal"]
    paths = [path.relative_to(work) for path in [*inner, *results] if path.is_file()]
    passing = ("measured", "manifest.json")
    return [
        work / path
        for path in paths
        if ".part-" not in str(path) and not path.parts[0].startswith(passing)
    ]


def whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def ensure(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"DEVIATION: {what}")


def undisturbed(study: Study) -> None:
    begun, process = time.monotonic(), study.start()
    while process.poll() is None:
        study.look()
        time.sleep(POLL)
    ensure(process.returncode == 0, f"the undisturbed run failed:\n{study.said()[-3000:]}")
    print(f"undisturbed: {time.monotonic() - begun:.0f} s")
    for stage, made in study.finished().items():
        ensure(study.fault(stage) == "", f"{stage}: {study.fault(stage)}")
        print(f"  {stage:<22} {study.results(stage)[:12]}  {made.told()}")


def spread(kills: int, calm: Study) -> list[str]:
    """The stages to kill, in order: each once, and again in turn those that keep journals."""
    again = itertools.cycle(s for s, made in calm.finished().items() if made.journals)
    return sorted([*calm.stages, *itertools.islice(again, max(0, kills - len(calm.stages)))])


def wait_until(study: Study, process: subprocess.Popen, ready, what: str) -> None:
    """Looks again and again until ready(); the run must not end before."""
    until = time.monotonic() + PATIENCE
    while not ready():
        ensure(process.poll() is None, f"the run ended before {what}:\n{study.said()[-3000:]}")
        ensure(time.monotonic() < until, f"waited {PATIENCE} s for {what}")
        time.sleep(POLL)
        study.look()


def strike(study: Study, process: subprocess.Popen, chance: random.Random) -> int:
    """Kills the run and all of its descendants in any order; how many they were."""
    family = study.family()
    chance.shuffle(family)
    killed = 0
    until = time.monotonic() + 10
    while family:
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
                killed += 1
        ensure(time.monotonic() < until, f"{family} cannot be killed")
        time.sleep(POLL)
        family = study.family()
    process.wait()
    return killed


def kill(
    study: Study, calm: Study, stage: str, left: int, chance: random.Random
) -> tuple[bool, str]:
    """One kill in a stage that has `left` more to come: whether it was in time, and its line."""
    begun, before = time.monotonic(), study.finished()
    process = study.start()
    wait_for_moment(study, process, calm, stage, left, chance)
    reached = study.finished()
    killed = strike(study, process, chance)
    seconds = time.monotonic() - begun
    study.look()
    ensure_kept(study, calm, before)
    ensure_kept(study, calm, reached)
    ensure_nobody_works(study)
    fault = study.fault(stage)
    ensure(fault in ("", "absent"), f"{stage}: the entry is neither whole nor absent: {fault}")
    ensure(not fault or study.work(stage).is_dir(), f"{stage}: the work folder is gone")
    kept = study.finished()[stage]
    state = f"entry {fault}" if fault else "TOO LATE, entry whole"
    line = f"{stage:<22} {seconds:5.1f} s  {killed} processes killed, {state}; kept "
    return bool(fault), line + f"{kept.told(before[stage])}, {len(kept.files)} files"


def wait_for_moment(
    study: Study,
    process: subprocess.Popen,
    calm: Study,
    stage: str,
    left: int,
    chance: random.Random,
) -> None:
    """Until a journal of the stage has grown to a random size, or its work has begun; and on."""
    before, all_ = study.finished()[stage].count, calm.finished()[stage].count
    if calm.finished()[stage].journals:
        share = max(0, 0.95 * all_ - before) / (left + 1)  # the later kills have theirs
        goal = before + 1 + int(chance.uniform(0, share))
        what = f"{goal} items of {stage}"
        wait_until(study, process, lambda: Finished.of(study.seen / stage).count >= goal, what)
        delay = chance.uniform(0, 0.4)
    else:
        wait_until(study, process, study.work(stage).exists, f"the work on {stage}")
        delay = chance.uniform(0, 0.7) * calm.plan.pointer(stage)["seconds"]
    until = time.monotonic() + delay
    wait_until(study, process, lambda: time.monotonic() >= until, "the kill")


def ensure_nobody_works(study: Study) -> None:
    before = study.finished()
    time.sleep(0.3)
    study.look()
    ensure(not study.family(), f"processes are left: {study.family()}")
    ensure(study.finished() == before, "after the kill something was finished")


def ensure_kept(study: Study, calm: Study, earlier: dict[str, Finished]) -> None:
    """All that was finished earlier is there: journals byte for byte, files not made anew."""
    now = study.finished()
    for stage, then in earlier.items():
        for name, lines in then.journals.items():
            same = now[stage].journals[name][: len(lines)] == lines
            ensure(same, f"{stage}: lines of journal {name} have changed")
        # a commit begins with journals and checkpoints
        committed = calm.finished()[stage].results <= now[stage].results
        kept = then.results if committed else then.files | then.journal_files
        for name in kept:
            places = [study.work(stage) / name, study.entry(stage) / name]
            there = [path for path in places if path.exists()]
            ensure(bool(there), f"{stage}: {name} was finished and is gone")
            same = there[0].samefile(study.seen / stage / name)
            ensure(same or name in then.journal_files, f"{stage}: {name} was made twice")


def ensure_nothing_twice(study: Study, calm: Study) -> None:
    """Journals have as many lines as those of the undisturbed run, each of another item."""
    for stage, made in study.finished().items():
        for name, lines in made.journals.items():
            ((key, times),) = Counter(json.loads(line)[0] for line in lines).most_common(1)
            ensure(times == 1, f"{stage}: {key} is {times} times in journal {name}")
        expected = calm.finished()[stage]
        said = f"{made.told()} instead of {expected.told()}"
        ensure(made.told() == expected.told(), f"{stage}: {said}")
        ensure(made.files == expected.files, f"{stage}: {made.files ^ expected.files}")


def ensure_equal(study: Study, calm: Study) -> None:
    """Eight whole entries, of the same digests."""
    for stage in study.stages:
        ensure(study.fault(stage) == "", f"{stage}: {study.fault(stage)}")
        same = study.results(stage) == calm.results(stage)
        print(f"  {stage:<22} {study.results(stage)[:12]}  {'equal' if same else 'DIFFERENT'}")
    differ = [s for s in study.stages if study.results(s) != calm.results(s)]
    ensure(not differ, f"other results than undisturbed: {', '.join(differ)}")


def main(top: Path, kills: int, seed: int) -> None:
    calm = Study(top / "calm")
    undisturbed(calm)
    study, chance = Study(top / "killed"), random.Random(seed)
    try:
        disturbed(study, calm, kills, chance)
    finally:
        for process in study.family():
            process.kill()


def disturbed(study: Study, calm: Study, kills: int, chance: random.Random) -> None:
    stages, late = spread(kills, calm), 0
    for number, stage in enumerate(stages, 1):
        in_time, line = kill(study, calm, stage, stages[number:].count(stage), chance)
        late += not in_time
        print(f"{number:>3}  {line}", flush=True)
    before, process = study.finished(), study.start()
    wait_until(study, process, lambda: process.poll() is not None, "the end")
    ensure(process.returncode == 0, f"the last run failed:\n{study.said()[-3000:]}")
    ensure_kept(study, calm, before)
    ensure_nothing_twice(study, calm)
    ensure_equal(study, calm)
    ensure(not late, f"{late} kills came too late, take another seed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", metavar="FOLDER", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked, began = parser.parse_args(), time.monotonic()
    with contextlib.ExitStack() as opened:
        place = asked.folder or Path(opened.enter_context(tempfile.TemporaryDirectory()))
        main(place.resolve(), asked.kills, asked.seed)
    print(f"{asked.kills} kills, seed {asked.seed}: {time.monotonic() - began:.0f} s")
