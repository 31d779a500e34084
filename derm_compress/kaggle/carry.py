"""Carries a run to another machine: what it has finished and begun, as a folder or in parts."""

import shutil
import tarfile
import tempfile
from pathlib import Path

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.kaggle.build import NAME, NOBODY, write_metadata
from derm_compress.kaggle.setup import add_lines
from derm_compress.study.plan import Plan, find_plan
from derm_compress.study.store import Store, passing, reached

MB = 10**6
LIST = "parts.json"  # the last to be written: {"run": its name, "parts": {name: sha256}}


def pack(run: str, path: Path, *, owner: str = "", part_mb: int = 0) -> list[str]:
    """Copies what a run has finished and begun into a data set to mount; returns what it took.

    part_mb: in files of at most so many MB instead, which unpack() joins.
    """
    plan = find_plan(run)
    files.check_new(path, "pack")
    with files.atomic(path) as draft:
        artifacts = draft / "artifacts"
        taken = gather(plan, artifacts)
        if part_mb:
            made = split(artifacts, draft, part_mb * MB, run)
            files.remove(artifacts)
            taken.append(f"{len(made)} parts")
        else:
            write_metadata(draft, f"{NAME}-{run}".replace("_", "-"), owner or NOBODY, "other")
    return taken


def gather(plan: Plan, artifacts: Path) -> list[str]:
    """Copies a run's results, notes and marks to a folder of artifacts."""
    taken = []
    for stage, key in plan.keys.items():
        finished = plan.store.complete(stage, key)
        folder = (plan.store.entry if finished else plan.store.work)(stage, key)
        if folder.is_dir():
            shutil.copytree(folder, artifacts / "store" / stage / folder.name, ignore=passing)
            taken.append(f"{stage} {'finished' if finished else 'begun'}")
    if not taken:
        why = "no stage has begun with its parameters"
        raise DermError(f"run {plan.run} has nothing to pack: {why}")
    for folder in (plan.folder, plan.artifacts / "judged"):
        if folder.is_dir():
            where = artifacts / folder.relative_to(plan.artifacts)
            shutil.copytree(folder, where, ignore=shutil.ignore_patterns(".*"))
    return taken


def split(folder: Path, into: Path, size: int, run: str) -> list[Path]:
    """Writes a run's folder to `into` as parts of `size` bytes, and their list."""
    whole, made = into / "whole.tar", []
    with tarfile.open(whole, "w") as archive:
        archive.add(folder, arcname=".")
    with whole.open("rb") as file:
        while held := file.read(size):
            made.append(into / f"part-{len(made):04}")
            made[-1].write_bytes(held)
    whole.unlink()
    parts = {path.name: files.file_digest(path) for path in made}
    files.write_note(into / LIST, {"run": run, "parts": parts})
    return made


def unpack(path: Path) -> list[str]:
    """Takes what pack() has put into parts into the project's artifacts; returns what it took.

    Each part and each result is checked first. What is there already stays as it is.
    """
    plan = find_plan(str(listed(path).get("run")))
    plan.artifacts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plan.artifacts, prefix=".part-") as draft:
        come = Path(draft)
        join(path, come)
        taken = take(plan, come)
        for name, copy in (("runs", keep), ("judged", add_lines)):
            if (come / name).is_dir():
                how = {"dirs_exist_ok": True, "copy_function": copy}
                shutil.copytree(come / name, plan.artifacts / name, **how)
    return taken


def listed(folder: Path) -> dict:
    """What the list of parts says; DermError where it is missing or damaged."""
    try:
        return files.checked(files.read_json(folder / LIST))
    except FileNotFoundError:
        said = f"{files.shown(folder)} holds no {LIST}; pack --part-mb writes one beside the parts"
        raise DermError(f"unpack: {said}") from None
    except (OSError, ValueError) as error:
        raise DermError(f"unpack: {LIST} is damaged ({error}); copy it again") from error


def join(folder: Path, into: Path) -> None:
    """Fills the folder `into` from parts; DermError, with nothing written, where one is wrong."""
    paths = []
    for name, kept in dict(listed(folder).get("parts") or {}).items():
        paths.append(folder / Path(name).name)
        if not paths[-1].is_file():
            raise DermError(f"unpack: {paths[-1].name} is missing; copy it again")
        if files.file_digest(paths[-1]) != kept:
            raise DermError(f"unpack: {paths[-1].name} was changed or cut short; copy it again")
    try:
        with tempfile.TemporaryFile(dir=into) as whole:
            for path in paths:
                whole.write(path.read_bytes())
            whole.seek(0)
            with tarfile.open(fileobj=whole) as archive:
                archive.extractall(into, filter="data")
    except tarfile.TarError as error:
        raise DermError(f"unpack: {files.shown(folder)} holds no packed run ({error})") from error


def take(plan: Plan, come: Path) -> list[str]:
    """Copies the stages of a run that other artifacts have and its own have not, or less far."""
    store, taken = Store(plan.artifacts / "store", plan.notebooks, [come / "store"]), []
    for stage, key in plan.keys.items():
        lock, work = store.lock(stage, key), store.work(stage, key)
        files.hold(lock, waiting=f"{stage}: another process computes this; waiting for it")
        if reached(come / "store" / stage / work.name) > reached(work):
            files.remove(work)
        states = {"finished": store.own(stage, key), "begun": work}
        missing = [word for word, folder in states.items() if not folder.is_dir()]
        store.adopt(stage, key)
        taken += [f"{stage} {word}" for word in missing if states[word].is_dir()]
        files.release(lock)
    if not taken:
        why = "all of it is here, or it is of other code or parameters"
        raise DermError(f"unpack: nothing in it is new to run {plan.run}: {why}")
    return taken


def keep(source: str, target: str) -> None:
    """Copies a file where there is none."""
    if not Path(target).exists():
        with files.atomic(Path(target)) as part:
            shutil.copyfile(source, part)
