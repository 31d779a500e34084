"""Files: written whole or not at all, notes and journals with checksums, locks (no torch)."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from derm_compress.errors import DermError
from derm_compress.progress import say

if TYPE_CHECKING:
    from filelock import FileLock

CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
CLOSED += (errno.ENOTEMPTY, errno.ENAMETOOLONG)
PACKAGE = Path(__file__).resolve().parent
MODELS = "DERM_COMPRESS_MODELS"  # names the folder of models that the package makes
CHECKSUM = "checksum"  # of all else that a note says
_HELD: dict[Path, "FileLock"] = {}  # a second lock on one file would wait for this process's own
STAGE, KEY = re.compile(r"[0-9]{2}_[a-z0-9_]+"), re.compile(r"[0-9a-f]{64}")


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
    """Removes a file, a link or a whole folder, if it is there and as far as that is allowed."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


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
    """Turns a full disk, also in a library's words, or a place that takes no file into one line."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            advice = "free some space and run again, what was finished is kept"
            raise DermError(f"the disk is full while writing {shown(path)}: {advice}") from error
        named = Path(getattr(error, "filename", None) or path)
        above, beside = named in path.parents, path.parent in named.parents
        if number in CLOSED and (above or beside) or number == errno.ENOENT and above:
            why = f"{error.strerror.lower()} ({shown(named)})"
            raise DermError(f"cannot write {shown(path)}: {why}") from error
        raise


@contextlib.contextmanager
def atomic(path: Path):
    """Yields a path beside `path`: renamed onto it when the block ends well, else removed."""
    part = path.with_name(f".part-{platform.node()}-{os.getpid()}-{path.name}")
    try:
        with disk_guard(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            sync(*(part.rglob("*") if part.is_dir() else ()), part)
            os.replace(part, path)
            sync(path.parent)
    finally:
        remove(part)


def check_new(path: Path, what: str) -> None:
    """DermError for a path that is a file, or a folder that holds something."""
    if path.is_dir() and any(path.iterdir()):
        raise DermError(f"{what}: {path} exists and is not empty; name a new folder")
    if os.path.lexists(path) and not path.is_dir():
        raise DermError(f"{what}: {path} is a file; name a new folder")


def write_json(path: Path, value) -> None:
    """JSON as the store keeps it: indent 1, sorted keys; NaN is refused, unknown is null."""
    text = json.dumps(
        value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False, default=plain
    )
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def plain(value):
    """What JSON does not know as what it does."""
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON")


def write_note(path: Path, note: dict) -> None:
    """A JSON object with the checksum by which `checked` notices damage."""
    note = json.loads(json.dumps(note, default=plain))  # as it will be read
    write_json(path, note | {CHECKSUM: digest(note)})


def read_note(path: Path) -> dict:
    """What write_note left; empty where it is missing or damaged, which is said once."""
    try:
        return checked(read_json(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        name_damaged(path)
        return {}


@functools.cache
def name_damaged(path: Path) -> None:
    """Says, once, that a file cannot be used."""
    say(f"damaged: {shown(path)}: it is not used, and made anew")


def checked(note: dict) -> dict:
    """A note without its checksum, which older ones have not; ValueError if it is damaged."""
    if not isinstance(note, dict):
        raise ValueError("no JSON object")
    told = {name: value for name, value in note.items() if name != CHECKSUM}
    if note.get(CHECKSUM, digest(told)) != digest(told):
        raise ValueError("changed")
    return told


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
    from filelock import FileLock, Timeout  # what goes to Kaggle is built without it

    if path in _HELD:
        return True
    lock = FileLock(path, thread_local=False)
    with disk_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
        wanted = "NN_stage and a key of 64 digits"
        raise DermError(f"{stage}/{key} names no artifact: {wanted} are wanted")
    return store / stage / key


class Journal:
    """An append-only log of finished items, a line each: [key, row, checksum of both].

    `done`: {key: row}; without a path in memory alone. A line that a kill cut short is dropped on
    opening; a damaged one too, and said. Several processes may add to one, a write a line.
    """

    def __init__(self, path: Path | None = None):
        self.done, self.path = {}, path
        if path and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        lines, whole = path.read_bytes().splitlines(keepends=True), []
        for number, line in enumerate(lines, 1):
            try:
                key, row = read_line(line)
            except ValueError:
                if number < len(lines) or line.endswith(b"\n"):
                    say(f"damaged: {shown(path)}, line {number}: it is made anew")
                continue
            self.done[key] = row
            whole.append(line)
        if len(whole) < len(lines):
            with atomic(path) as part:
                part.write_bytes(b"".join(whole))

    def add(self, key: str, row) -> None:
        """Keeps a row, as a later run will read it."""
        row = json.loads(json.dumps(row, default=plain))
        if self.path:
            line = json.dumps([key, row, checksum(key, row)]).encode() + b"\n"
            with disk_guard(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab", buffering=len(line) + 1) as handle:
                    handle.write(line)
        self.done[key] = row


def read_line(line: bytes) -> tuple[str, object]:
    """(key, row) of a whole line, in older journals without checksum; ValueError if damaged."""
    try:
        key, row, *check = json.loads(line)
    except (TypeError, RecursionError) as error:
        raise ValueError("no list") from error
    if not line.endswith(b"\n") or not isinstance(key, str):
        raise ValueError("cut short")
    if check not in ([], [checksum(key, row)]):
        raise ValueError("changed")
    return key, row


def checksum(key: str, row) -> int:
    return zlib.crc32(json.dumps([key, row]).encode())


def digest(value) -> str:
    """sha256 (hex) of a JSON value; the order of an object's keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def project_root(root: Path | None = None) -> Path:
    """The folder of notebooks/ and params/: `root`, DERM_COMPRESS_ROOT or that of the package."""
    return Path(root or os.environ.get("DERM_COMPRESS_ROOT") or PACKAGE.parent).resolve()


def located(value: str, root: Path | None = None) -> Path:
    """A path that a person wrote: below the project unless it is absolute, ~ is their home."""
    return project_root(root) / os.path.expanduser(value)


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name below `folder`, path) of each file, through links too, but into no folder it is in."""
    todo = [(folder, "", (os.path.realpath(folder),))]
    while todo:
        here, name, above = todo.pop()
        try:
            inside = sorted(os.listdir(here))
        except OSError as error:
            raise DermError(f"folder {shown(here)} cannot be read: {error.strerror}") from None
        for path in (here / inner for inner in inside):
            if path.is_file():
                yield f"{name}{path.name}", path
            elif path.is_dir() and (real := os.path.realpath(path)) not in above:
                todo.append((path, f"{name}{path.name}/", (*above, real)))
