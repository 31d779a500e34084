"""The content-addressed store: artifacts that are whole or absent, work that survives a kill, journals (no torch)."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from derm_compress.errors import DermError
from derm_compress.files import (
    _HELD,
    copy,
    digest,
    disk_guard,
    file_digest,
    hold,
    read_json,
    release,
    remove,
    shown,
    sync,
    write_json,
)

MANIFEST = "manifest.json"
MEASURED = re.compile(r"measured(\.json$|/)")


def reached(work: Path) -> tuple[int, ...]:
    """How far a work folder has come: results, lines of journals, files, bytes."""
    files = [path for path in work.rglob("*") if path.is_file()]
    lines = sum(path.read_bytes().count(b"\n") for path in files if path.suffix == ".jsonl")
    results = sum(path.relative_to(work).parts[0] != "journal" for path in files)
    return results, lines, len(files), sum(path.stat().st_size for path in files)


class Store:
    """`root/<stage>/<key>/` holds finished artifacts, `root/<stage>/<key>.work/` what is being computed.

    `mounted`: roots of other stores, read-only; what they have finished counts, what they have begun is gone on with.
    """

    def __init__(self, root: Path, mounted: Sequence[Path] = ()):
        self.root, self.mounted, self._verified, self._refused = (
            Path(root),
            tuple(mounted),
            set(),
            set(),
        )

    def own(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def entry(self, stage: str, key: str) -> Path:
        """Where an artifact is: of this store or, if it has none, mounted and not found damaged."""
        own, there = self.own(stage, key), [root / stage / key for root in self.mounted]
        return (
            own
            if own.is_dir()
            else next((p for p in there if p.is_dir() and p not in self._refused), own)
        )

    def work(self, stage: str, key: str) -> Path:
        return self.root / stage / f"{key}.work"

    def lock(self, stage: str, key: str) -> Path:
        return self.root / ".locks" / f"{stage}-{key}"

    def manifest(self, stage: str, key: str) -> dict:
        return read_json(self.entry(stage, key) / MANIFEST)

    def fault(self, stage: str, key: str) -> str:
        """Why an artifact cannot be used; empty if every file is there as its manifest says."""
        entry = self.entry(stage, key)
        if not entry.is_dir():
            return "absent"
        try:
            for name, kept in self.manifest(stage, key)["files"].items():
                if file_digest(entry / name) != kept["sha256"]:
                    return f"{name} was changed or cut short"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} is unreadable"
        return ""

    def complete(self, stage: str, key: str) -> bool:
        """Whether an artifact can be used; a damaged one is named, set aside and so recomputed."""
        fault, entry = self.fault(stage, key), self.entry(stage, key)
        if not fault:
            self._verified.add((stage, key))
        elif entry != self.own(stage, key):
            print(f"damaged: {shown(entry)}: {fault}; it is not used", flush=True)
            self._refused.add(entry)
            return self.complete(stage, key)
        elif fault != "absent":
            print(
                f"damaged: {shown(self.entry(stage, key))}: {fault}; set aside, to be recomputed",
                flush=True,
            )
            self._set_aside(stage, key)
        return not fault

    def _set_aside(self, stage: str, key: str) -> None:
        self._verified.discard((stage, key))
        remove(aside := self.root / stage / f"{key}.old")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.own(stage, key), aside)

    def begin(self, stage: str, key: str) -> tuple[Path, bool]:
        """The folder of an artifact, and whether it is finished; else its work folder, locked for this process."""
        finished = self.complete(stage, key)
        if not finished:
            hold(
                self.lock(stage, key),
                waiting=f"{stage}: another process computes the same; waiting for it",
            )
            finished = self.complete(stage, key)
        if finished:
            release(self.lock(stage, key))
            return self.entry(stage, key), True
        work = self.work(stage, key)
        self._go_on(stage, key)
        with disk_guard(work):
            work.mkdir(parents=True, exist_ok=True)
        for leftover in [*work.rglob(".part-*")]:
            remove(leftover)
        return work, False

    def _go_on(self, stage: str, key: str) -> None:
        """Copies the furthest of what mounted stores have begun, unless this one has begun as well."""
        begun = [root / stage / f"{key}.work" for root in self.mounted]
        found = max((path for path in begun if path.is_dir()), key=reached, default=None)
        if found and not self.work(stage, key).exists():
            print(f"{stage}: goes on from {shown(found)}", flush=True)
            copy(found, self.work(stage, key))

    def adopt(self, stage: str, key: str) -> None:
        """Copies what mounted stores have of an artifact, finished or begun: this one then stands without them."""
        if not self.mounted or self.own(stage, key).is_dir():
            return
        if self.complete(stage, key):
            copy(self.entry(stage, key), self.own(stage, key))
        else:
            self._go_on(stage, key)

    def commit(self, stage: str, key: str, made: dict) -> None:
        """Turns the work folder into the artifact: manifest last, then one rename.

        `results` is the digest of all but what was measured (measured.json, measured/), which differs from run to run.
        """
        work, entry = self.work(stage, key), self.own(stage, key)
        for passing in (work / "journal", work / MANIFEST):
            remove(passing)
        paths = {
            path.relative_to(work).as_posix(): path for path in work.rglob("*") if path.is_file()
        }
        files = {
            name: {"sha256": file_digest(path), "size": path.stat().st_size}
            for name, path in paths.items()
        }
        results = digest(
            {name: kept["sha256"] for name, kept in files.items() if not MEASURED.match(name)}
        )
        sync(*work.rglob("*"))
        write_json(work / MANIFEST, {"files": files, "results": results, "made": made})
        if not self.complete(
            stage, key
        ):  # where locks do not exist, another process may have been first
            os.rename(work, entry)
            sync(entry.parent)
        remove(work)
        release(self.lock(stage, key))

    def discard(self, stage: str, key: str) -> None:
        """Forgets an artifact and all work on it; DermError if it is mounted, since it would be found again."""
        if any((root / stage / key).is_dir() for root in self.mounted):
            raise DermError(f"{stage} is mounted read-only: detach that input to compute it anew")
        hold(
            self.lock(stage, key), waiting=f"{stage}: another process computes this; waiting for it"
        )
        self._set_aside(stage, key)
        remove(self.work(stage, key))
        release(self.lock(stage, key))

    def ready(self, stage: str, key: str) -> bool:
        """`complete`, looked at once per process."""
        return (stage, key) in self._verified or self.complete(stage, key)

    def resolve(self, ref: str) -> Path:
        """The file or folder that a recipe calls "stage/key/name"; of unfinished stages only this process's own."""
        stage, key, *rest = PurePosixPath(ref).parts
        own = not self.ready(stage, key) and self.lock(stage, key) in _HELD
        path = (self.work(stage, key) if own else self.entry(stage, key)).joinpath(*rest)
        if ".." in rest or not path.exists():
            raise DermError(
                f"{ref} is not in {shown(self.root)}: run notebooks/{stage}.ipynb again"
            )
        return path
