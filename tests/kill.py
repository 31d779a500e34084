"""Kill -9 of a run and all that it has started, at random moments in all eight stages.

    .venv/bin/python tests/kill.py [--kills 20] [--seed 0] [FOLDER]

A small study runs once undisturbed. Then the same one runs in a folder of its own and is killed
while a journal grows, or in stages without one while their notebook runs, and goes on, until every
stage has had its kills. After each kill nobody is left, the stage's entry is absent, and all that
was finished is there; no item is made twice; and the eight results have the same digests at last.
One line a kill; exit code 1 at the first deviation.
"""

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
FINISHED = ("journal/*.jsonl", "journal/scales/*/block-*", "journal/adapters/*/*")
PATIENCE = 600  # seconds for a stage to come as far as it is waited for
POLL = 0.02


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
                for path in finished(self.work(stage)):
                    self.keep(path, self.seen / stage / path.relative_to(self.work(stage)))

    def keep(self, path: Path, link: Path) -> None:
        """A link to a finished file; a journal's may move on to one without a line cut short."""
        journal = path.suffix == ".jsonl" and link.exists() and not link.samefile(path)
        if journal:
            ensure(whole_lines(path)[: len(whole_lines(link))] == whole_lines(link), f"{path} lost")
            link.unlink()
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, link)

    def journals(self, stage: str) -> dict[str, list[bytes]]:
        """The whole lines of each journal so far."""
        paths = sorted((self.seen / stage).glob("journal/*.jsonl"))
        return {path.stem: whole_lines(path) for path in paths}

    def files(self, stage: str) -> set[str]:
        """Every other file that was finished, by its path in the work folder."""
        folder = self.seen / stage
        paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
        return {path.relative_to(folder).as_posix() for path in paths}

    def count(self, stage: str) -> int:
        """How much of the passing kind is finished: lines of journals, blocks, adapters."""
        passing = [name for name in self.files(stage) if name.startswith("journal/")]
        return len(passing) + sum(map(len, self.journals(stage).values()))


def finished(work: Path) -> list[Path]:
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
    for stage in study.stages:
        journals = {name: len(lines) for name, lines in study.journals(stage).items()}
        ensure(study.fault(stage) == "", f"{stage}: {study.fault(stage)}")
        print(f"  {stage:<22} {study.results(stage)[:12]}  {told(journals)}")


def told(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "no journal"


def spread(kills: int, calm: Study) -> list[str]:
    """The stages to kill, in order: each once, and again in turn those that keep journals."""
    again = itertools.cycle(stage for stage in calm.stages if calm.journals(stage))
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
    begun, before, all_ = time.monotonic(), study.count(stage), calm.count(stage)
    process = study.start()
    if calm.journals(stage):
        share = (0.95 * all_ - before) / (left + 1)
        goal = before + 1 + int(chance.uniform(0, max(share, 0)))
        wait_until(study, process, lambda: study.count(stage) >= goal, f"{goal} items of {stage}")
        delay = chance.uniform(0, 0.4)
    else:
        wait_until(study, process, study.work(stage).exists, stage)
        delay = chance.uniform(0, 0.7) * calm.plan.pointer(stage)["seconds"]
    until = time.monotonic() + delay
    wait_until(study, process, lambda: time.monotonic() >= until, "the kill")
    grown, reached = study.count(stage) - before, {s: held(study, s) for s in study.stages}
    processes = strike(study, process, chance)
    seconds = time.monotonic() - begun
    study.look()
    for name, earlier in reached.items():
        ensure_kept(study, calm, name, earlier)
    after = held(study, stage)
    time.sleep(0.3)
    study.look()
    ensure(not study.family(), "processes are left")
    ensure(held(study, stage) == after, f"{stage}: somebody is still working")
    fault = study.fault(stage)
    ensure(fault in ("", "absent"), f"{stage}: the entry is neither whole nor absent: {fault}")
    in_time = fault == "absent"
    ensure(not in_time or study.work(stage).is_dir(), f"{stage}: the work folder is gone")
    journals = {name: len(lines) for name, lines in after[0].items()}
    line = f"{stage:<22} {seconds:5.1f} s  {processes} killed  +{grown:<4}"
    line += f"kept {told(journals)}; {len(after[1])} files"
    return in_time, line if in_time else f"{line}  TOO LATE, the entry is whole"


def held(study: Study, stage: str) -> tuple[dict[str, list[bytes]], set[str]]:
    return study.journals(stage), study.files(stage)


def ensure_kept(study: Study, calm: Study, stage: str, earlier: tuple) -> None:
    """All that was finished before is there, journals byte for byte, files not made anew."""
    journals, files = earlier
    for name, lines in journals.items():
        now = study.journals(stage)[name]
        ensure(now[: len(lines)] == lines, f"{stage}: lines of journal {name} have changed")
        keys = Counter(json.loads(line)[0] for line in now)
        ensure(len(keys) == len(now), f"{stage}: {keys.most_common(1)} in journal {name}")
    made = {name for name in calm.files(stage) if not name.startswith("journal/")}
    committed = made <= study.files(stage)  # journals go with the commit
    places = [study.work(stage), study.entry(stage)]
    for name in files:
        if committed and name.startswith("journal/"):
            continue
        there = [place / name for place in places if (place / name).exists()]
        ensure(bool(there), f"{stage}: {name} was finished and is gone")
        ensure(there[0].samefile(study.seen / stage / name), f"{stage}: {name} was made twice")
    for name in () if committed else journals:
        ensure((places[0] / "journal" / f"{name}.jsonl").exists(), f"{stage}: {name} is gone")


def compare(study: Study, calm: Study) -> None:
    """The end: eight whole entries, of the same digests, for which nothing was made twice."""
    for stage in study.stages:
        ensure(study.fault(stage) == "", f"{stage}: {study.fault(stage)}")
        ensure_kept(study, calm, stage, held(study, stage))
        journals, expected = study.journals(stage), calm.journals(stage)
        lines = {name: len(found) for name, found in journals.items()}
        wanted = {name: len(found) for name, found in expected.items()}
        ensure(lines == wanted, f"{stage}: {told(lines)} lines instead of {told(wanted)}")
        same = study.results(stage) == calm.results(stage)
        print(f"  {stage:<22} {study.results(stage)[:12]}  {'equal' if same else 'DIFFERENT'}")
    differ = [s for s in study.stages if study.results(s) != calm.results(s)]
    ensure(not differ, f"other results than undisturbed: {', '.join(differ)}")


def main(top: Path, kills: int, seed: int) -> None:
    calm = Study(top / "calm")
    undisturbed(calm)
    study, chance = Study(top / "killed"), random.Random(seed)
    stages, struck = spread(kills, calm), Counter()
    for number, stage in enumerate(stages, 1):
        in_time, line = kill(study, calm, stage, stages[number:].count(stage), chance)
        struck[stage] += in_time
        print(f"{number:>3}  {line}", flush=True)
    process = study.start()
    wait_until(study, process, lambda: process.poll() is not None, "the end")
    ensure(process.returncode == 0, f"the last run failed:\n{study.said()[-3000:]}")
    compare(study, calm)
    late = sum(map(stages.count, study.stages)) - struck.total()
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
