"""The content-addressed store: artifacts that are whole or absent, work that survives a kill, journals (no torch)."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from derm_compress.errors import DermError
from derm_compress.keys import digest, file_digest

try:
    import fcntl
except ImportError:  # Windows: two processes may compute one key twice, and the first rename wins
    fcntl = None

MANIFEST = "manifest.json"
MEASURED = re.compile(r"measured(\.json$|/)")
_HELD: dict = {}  # a lock belongs to the open file: a second handle in this process would wait for the first


def shown(path: Path) -> str:
    """A path as people should see it: relative to the working folder where it lies inside."""
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(*paths: Path) -> None:
    """Forces files or folders (their lists of names, not what is in them) onto the disk."""
    for path in paths if os.name != "nt" else ():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def disk_guard(path: Path):
    """Turns a full disk, also one that a library reports in words of its own, into one clear line."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full:
            raise
        advice = "free some space and run again, what was finished is kept"
        raise DermError(f"the disk is full while writing {shown(path)}: {advice}") from error


@contextlib.contextmanager
def atomic(path: Path):
    """Yields a temporary path beside `path`: renamed onto it when the block ends well, removed otherwise."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with disk_guard(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            sync(*(part.rglob("*") if part.is_dir() else ()), part)
            os.replace(part, path)
            sync(path.parent)
    finally:
        remove(part)


def copy(folder: Path, path: Path) -> None:
    """The folder as `path`: whole or not at all, and not read-only where the folder is."""
    with atomic(path) as part:
        shutil.copytree(folder, part, copy_function=shutil.copyfile)
        for inner in [part, *part.rglob("*")]:
            inner.chmod(0o755 if inner.is_dir() else 0o644)


def reached(work: Path) -> tuple[int, ...]:
    """How far a work folder has come: results, lines of journals, files, bytes."""
    files = [path for path in work.rglob("*") if path.is_file()]
    lines = sum(path.read_bytes().count(b"\n") for path in files if path.suffix == ".jsonl")
    results = sum(path.relative_to(work).parts[0] != "journal" for path in files)
    return results, lines, len(files), sum(path.stat().st_size for path in files)


def _plain(value):
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON")


def write_json(path: Path, value) -> None:
    """JSON as the store keeps it: indent 1, sorted keys; NaN is refused, unknown is null."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_plain)
    with atomic(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def write_frame(path: Path, frame) -> None:
    """A frame as parquet, without its index."""
    with atomic(path) as part, open(part, "wb") as handle:
        frame.to_parquet(handle, index=False)


def read_frame(path: Path):
    import pandas

    return pandas.read_parquet(path)


def hold(path: Path, *, waiting: str = "") -> bool:
    """Takes the lock file `path` until `release` or the process ends; where another process has it, says `waiting`
    and waits, or returns False if there is nothing to say."""
    if path in _HELD:
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        handle = opened.enter_context(open(path, "a"))
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                return False
            print(waiting, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems have no locks
        _HELD[path] = opened.pop_all()
    return True


def release(path: Path) -> None:
    """Gives a lock up; without effect where this process does not hold it."""
    if opened := _HELD.pop(path, None):
        opened.close()


class Journal:
    """An append-only log of finished items; a line that a kill cut short is dropped when it is opened again.

    `done` maps each key (str) to its row (JSON value). Without a path it lives in memory only.
    """

    def __init__(self, path: Path | None = None):
        self.done, self._path, whole = {}, path, 0
        for line in path.read_bytes().splitlines(keepends=True) if path and path.exists() else ():
            try:
                key, row = json.loads(line if line.endswith(b"\n") else b"")
            except (ValueError, TypeError):
                os.truncate(path, whole)
                break
            self.done[key], whole = row, whole + len(line)

    def add(self, key: str, row) -> None:
        """Keeps a row, as a later run will read it."""
        line = json.dumps([key, row], default=_plain)
        if self._path:
            with disk_guard(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._path, "a", encoding="utf-8") as handle:
                    handle.write(line + "\n")
        self.done[key] = json.loads(line)[1]


class Store:
    """`root/<stage>/<key>/` holds finished artifacts, `root/<stage>/<key>.work/` what is being computed.

    `mounted`: roots of other stores, read-only; what they have finished counts, what they have begun is gone on with.
    """

    def __init__(self, root: Path, mounted: Sequence[Path] = ()):
        self.root, self.mounted, self._verified, self._refused = Path(root), tuple(mounted), set(), set()

    def own(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def entry(self, stage: str, key: str) -> Path:
        """Where an artifact is: of this store or, if it has none, mounted and not found damaged."""
        own, there = self.own(stage, key), [root / stage / key for root in self.mounted]
        return own if own.is_dir() else next((p for p in there if p.is_dir() and p not in self._refused), own)

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
            print(f"damaged: {shown(self.entry(stage, key))}: {fault}; set aside, to be recomputed", flush=True)
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
            hold(self.lock(stage, key), waiting=f"{stage}: another process computes the same; waiting for it")
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
        paths = {path.relative_to(work).as_posix(): path for path in work.rglob("*") if path.is_file()}
        files = {name: {"sha256": file_digest(path), "size": path.stat().st_size} for name, path in paths.items()}
        results = digest({name: kept["sha256"] for name, kept in files.items() if not MEASURED.match(name)})
        sync(*work.rglob("*"))
        write_json(work / MANIFEST, {"files": files, "results": results, "made": made})
        if not self.complete(stage, key):  # where locks do not exist, another process may have been first
            os.rename(work, entry)
            sync(entry.parent)
        remove(work)
        release(self.lock(stage, key))

    def discard(self, stage: str, key: str) -> None:
        """Forgets an artifact and all work on it; DermError if it is mounted, since it would be found again."""
        if any((root / stage / key).is_dir() for root in self.mounted):
            raise DermError(f"{stage} is mounted read-only: detach that input to compute it anew")
        hold(self.lock(stage, key), waiting=f"{stage}: another process computes this; waiting for it")
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
            raise DermError(f"{ref} is not in {shown(self.root)}: run notebooks/{stage}.ipynb again")
        return path
