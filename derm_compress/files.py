"""Files: written whole or not at all, journals that survive a kill, locks, digests (no torch)."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path, PurePath

from filelock import FileLock, Timeout

from derm_compress.errors import DermError
from derm_compress.progress import say

STAGE, KEY = re.compile(r"[0-9]{2}_[a-z0-9_]+"), re.compile(r"[0-9a-f]{64}")
_HELD: dict[Path, FileLock] = {}  # a second lock on one file would wait for this process's own


def shown(path: Path) -> str:
    """A path as people should see it: relative to the working folder where it lies inside."""
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


def public(value):
    """A value as reports may show it: without the folders of this machine."""
    if isinstance(value, str) and PurePath(value).is_absolute():
        return f"…/{PurePath(value).name}"
    return value


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
    """Turns a full disk, also one that a library reports in its own words, into one clear line."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
            raise
        advice = "free some space and run again, what was finished is kept"
        raise DermError(f"the disk is full while writing {shown(path)}: {advice}") from error


@contextlib.contextmanager
def atomic(path: Path):
    """Yields a path beside `path`: renamed onto it when the block ends well, else removed."""
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


def write_json(path: Path, value) -> None:
    """JSON as the store keeps it: indent 1, sorted keys; NaN is refused, unknown is null."""
    text = json.dumps(
        value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_plain
    )
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(value):
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON")


def write_frame(path: Path, frame) -> None:
    """A frame as parquet, without its index."""
    with atomic(path) as part, open(part, "wb") as handle:
        frame.to_parquet(handle, index=False)


def read_frame(path: Path):
    import pandas

    return pandas.read_parquet(path)


def hold(path: Path, *, waiting: str = "") -> bool:
    """Takes the lock file `path` until `release` or the process ends; whether it is taken now.

    Where another process has it: says `waiting` and waits, or is False if there is nothing to say.
    """
    if path in _HELD:
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not waiting:
            return False
        say(waiting)
        lock.acquire()
    _HELD[path] = lock
    return True


def held(path: Path) -> bool:
    """Whether this process holds a lock file."""
    return path in _HELD


def release(path: Path) -> None:
    """Gives a lock file up; without effect where this process does not hold it."""
    if path in _HELD:
        _HELD.pop(path).release()


def artifact(store: Path, stage: str, key: str) -> Path:
    """Where a store keeps a stage's result; DermError for what can be no stage and key."""
    if not STAGE.fullmatch(str(stage)) or not KEY.fullmatch(str(key)):
        raise DermError(
            f"{stage}/{key} names no artifact: NN_stage and a key of 64 digits are wanted"
        )
    return store / stage / key


class Journal:
    """An append-only log of finished items; a line that a kill cut short is dropped on opening.

    `done` maps each key (str) to its row (JSON value). Without a path it lives in memory only.
    """

    def __init__(self, path: Path | None = None):
        self.done, self._path = {}, path
        if path and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                key, row = json.loads(line if line.endswith(b"\n") else b"")
            except (ValueError, TypeError):
                os.truncate(path, whole)
                break
            self.done[key] = row
            whole += len(line)

    def add(self, key: str, row) -> None:
        """Keeps a row, as a later run will read it."""
        line = json.dumps([key, row], default=_plain)
        if self._path:
            with disk_guard(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._path, "a", encoding="utf-8") as handle:
                    handle.write(line + "\n")
        self.done[key] = json.loads(line)[1]


def digest(value) -> str:
    """sha256 (hex) of a JSON value; the order of an object's keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Digest of a folder's listing (names, sizes, times): a changed photograph is new input.

    Of Kaggle's read-only inputs names and sizes alone: their times may differ in every session.
    """
    inputs = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"), "input").resolve()
    mounted = folder.resolve().is_relative_to(inputs)
    listing = {}
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            times = [] if mounted else [stat.st_mtime_ns]
            listing[path.relative_to(folder).as_posix()] = [stat.st_size, *times]
    return digest(listing)
