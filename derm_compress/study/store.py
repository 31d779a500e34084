"""The content-addressed store: artifacts are whole or absent, work survives a kill (no torch)."""

import contextlib
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.progress import say

MANIFEST = "manifest.json"
MEASURED = ("measured/", "measured.json")  # differ from run to run; the second is of old ones


class Store:
    """`root/<stage>/<key>/` holds finished artifacts, `root/<stage>/<key>.work/` what is begun.

    `mounted`: roots of other stores, read-only; what they have finished counts, what they have
    begun can be adopted. Every stage and key is checked first: no other place is ever touched.
    """

    def __init__(self, root: Path, stages: Collection[str], mounted: Sequence[Path] = ()):
        self.root, self.stages, self.mounted = Path(root), tuple(stages), tuple(mounted)
        self._verified: set[tuple[str, str]] = set()
        self._refused: set[Path] = set()

    def own(self, stage: str, key: str) -> Path:
        if stage not in self.stages:
            known = ", ".join(self.stages)
            raise DermError(f"{stage}/{key} names no artifact: the stages are {known}")
        return files.artifact(self.root, stage, key)

    def work(self, stage: str, key: str) -> Path:
        return self.own(stage, key).with_name(f"{key}.work")

    def lock(self, stage: str, key: str) -> Path:
        return self.own(stage, key).parents[1] / ".locks" / f"{stage}-{key}"

    def entry(self, stage: str, key: str) -> Path:
        """Where an artifact is: of this store or, if it has none, mounted and not found damaged."""
        own = self.own(stage, key)
        for place in [own, *(files.artifact(root, stage, key) for root in self.mounted)]:
            if place.is_dir() and place not in self._refused:
                return place
        return own

    def manifest(self, stage: str, key: str) -> dict:
        """What an artifact says of itself: files, results, made; ValueError if that is damaged."""
        told = files.checked(files.read_json(self.entry(stage, key) / MANIFEST))
        if told["results"] != results(told["files"]):
            raise ValueError("its results are not those of its files")
        return told

    def fault(self, stage: str, key: str) -> str:
        """Why an artifact cannot be used; empty if it is just the files that its manifest lists."""
        entry = self.entry(stage, key)
        if not entry.is_dir():
            return "absent"
        there = file_names(entry)
        for path in links(entry):
            return f"{path.name} is a link"
        try:
            listed = self.manifest(stage, key)["files"]
            for name, kept in listed.items():
                if name not in there:
                    return f"{name} is missing"
                if files.file_digest(entry / name) != kept["sha256"]:
                    return f"{name} was changed or cut short"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} is damaged"
        for name in sorted(there - listed.keys() - {MANIFEST}):
            if not PurePosixPath(name).name.startswith("."):  # what file browsers leave
                return f"{name} is not in its manifest"
        return ""

    def complete(self, stage: str, key: str) -> bool:
        """Whether an artifact can be used; a damaged one is named, set aside and so recomputed."""
        fault, entry = self.fault(stage, key), self.entry(stage, key)
        if not fault:
            self._verified.add((stage, key))
            return True
        if entry != self.own(stage, key):
            say(f"damaged: {files.shown(entry)}: {fault}; it is not used")
            self._refused.add(entry)
            return self.complete(stage, key)
        if fault != "absent":
            say(f"damaged: {files.shown(entry)}: {fault}; set aside, to be recomputed")
            self._set_aside(stage, key)
        return False

    def ready(self, stage: str, key: str) -> bool:
        """`complete`, looked at once per process."""
        return (stage, key) in self._verified or self.complete(stage, key)

    def resolve(self, ref: str) -> Path:
        """What a recipe calls "stage/key/name"; of unfinished stages only this process's own."""
        stage, key, *inner = *PurePosixPath(ref).parts, "", ""
        self.own(stage, key)  # refuses what names no artifact
        if ".." in inner:
            raise DermError(f"{ref} leads out of its artifact")
        unfinished = not self.ready(stage, key) and files.held(self.lock(stage, key))
        folder = self.work(stage, key) if unfinished else self.entry(stage, key)
        path = folder.joinpath(*inner)
        if not path.exists():
            here = files.shown(self.root)
            raise DermError(f"{ref} is not in {here}: run notebooks/{stage}.ipynb again")
        return path

    def lacking(self, stage: str, key: str) -> bool:
        """Whether a finished artifact lacks what may still come: it serves, and is asked again.

        False where nothing can be written.
        """
        made = self.manifest(stage, key)["made"]
        return bool(made.get("lacking")) and os.access(self.root, os.W_OK)

    def final(self, stage: str, key: str) -> bool:
        """`complete`, and lacking nothing."""
        return self.complete(stage, key) and not self.lacking(stage, key)

    def begin(self, stage: str, key: str) -> tuple[Path, bool]:
        """A final artifact's folder and True; else a work folder, now locked, and False."""
        if not self.final(stage, key):
            waiting = f"{stage}: another process computes the same; waiting for it"
            files.hold(self.lock(stage, key), waiting=waiting)
            if not self.final(stage, key):
                return self._begun(stage, key), False
            files.release(self.lock(stage, key))
        return self.entry(stage, key), True

    def _begun(self, stage: str, key: str) -> Path:
        work, entry = self.work(stage, key), self.entry(stage, key)
        if entry.is_dir() and not work.exists():  # finished, but lacking something
            copy(entry, work)
        with files.disk_guard(work):
            work.mkdir(parents=True, exist_ok=True)
        for leftover in [*work.rglob(".part-*"), *links(work)]:
            files.remove(leftover)
        return work

    def adopt(self, stage: str, key: str) -> None:
        """Copies what mounted stores have finished, or else the furthest of what they have begun.

        This store then stands alone; what it has finished or begun itself stays.
        """
        own, work = self.own(stage, key), self.work(stage, key)
        if not self.mounted or own.is_dir():
            return
        if self.complete(stage, key):
            copy(self.entry(stage, key), own)
            return
        begun = [files.artifact(root, stage, key).with_name(work.name) for root in self.mounted]
        found = max((path for path in begun if path.is_dir()), key=reached, default=None)
        if found and not work.exists():
            say(f"{stage}: goes on from {files.shown(found)}")
            copy(found, work)

    def commit(self, stage: str, key: str, made: dict) -> None:
        """Turns the work folder into the artifact: manifest last, then one rename."""
        work, own = self.work(stage, key), self.own(stage, key)
        for passing in (work / "journal", work / MANIFEST):
            files.remove(passing)
        listed = {}
        for name in file_names(work):
            path = work / name
            listed[name] = {"sha256": files.file_digest(path), "size": path.stat().st_size}
        files.sync(*work.rglob("*"))
        note = {"files": listed, "results": results(listed), "made": made}
        files.write_note(work / MANIFEST, note)
        if not self.final(stage, key):  # without locks another process may have been first
            self._set_aside(stage, key)
            os.rename(work, own)
            files.sync(own.parent)
        files.remove(work)
        files.remove(self._aside(stage, key))
        files.release(self.lock(stage, key))

    def discard(self, stage: str, key: str) -> None:
        """Forgets an artifact and all work on it; DermError if it is mounted and so found again."""
        if any(files.artifact(root, stage, key).is_dir() for root in self.mounted):
            raise DermError(f"{stage} is mounted read-only: detach that input to compute it anew")
        waiting = f"{stage}: another process computes this; waiting for it"
        files.hold(self.lock(stage, key), waiting=waiting)
        self._set_aside(stage, key)
        files.remove(self.work(stage, key))
        files.release(self.lock(stage, key))

    def _set_aside(self, stage: str, key: str) -> None:
        """Keeps a damaged, unwanted or lacking artifact until there is a new one."""
        own, aside = self.own(stage, key), self._aside(stage, key)
        self._verified.discard((stage, key))
        files.remove(aside)
        with files.disk_guard(own), contextlib.suppress(FileNotFoundError):
            os.rename(own, aside)

    def _aside(self, stage: str, key: str) -> Path:
        return self.own(stage, key).with_name(f"{key}.old")


def copy(folder: Path, path: Path) -> None:
    """The folder as `path`: whole or not at all, writable, and without links to anywhere."""
    with files.atomic(path) as part:
        shutil.copytree(folder, part, copy_function=shutil.copyfile, ignore=passing)
        for inner in [part, *part.rglob("*")]:
            inner.chmod(0o755 if inner.is_dir() else 0o644)


def passing(folder: str, names: list[str]) -> list[str]:
    """What copytree shall leave out: links to anywhere, and what a kill left half written."""
    return [n for n in names if n.startswith(".part-") or Path(folder, n).is_symlink()]


def file_names(folder: Path) -> set[str]:
    """The files in a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def links(folder: Path) -> list[Path]:
    """Links in a folder: no part of an artifact, since they may lead to any file there is."""
    return [path for path in folder.rglob("*") if path.is_symlink()]


def results(listed: dict) -> str:
    """Digest of all files of a manifest but those of what was measured."""
    made = {name: kept["sha256"] for name, kept in listed.items()}
    return files.digest({n: sha256 for n, sha256 in made.items() if not n.startswith(MEASURED)})


def reached(work: Path) -> tuple[int, ...]:
    """How far a work folder has come: results, lines of journals, files, bytes."""
    inside = [path for path in work.rglob("*") if path.is_file()]
    results = sum(path.relative_to(work).parts[0] != "journal" for path in inside)
    lines = sum(path.read_bytes().count(b"\n") for path in inside if path.suffix == ".jsonl")
    return results, lines, len(inside), sum(path.stat().st_size for path in inside)
