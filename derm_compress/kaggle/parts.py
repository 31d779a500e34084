"""A folder as numbered files of one size and back, for ways that carry small files alone."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.files import checked, file_digest, read_json, shown, write_note

LIST = "parts.json"  # the last to be written: {"parts": {name: sha256}}, and what the maker notes


class Writer:
    """A file that goes on in the next part where one is full."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.held, self.made = folder, size, bytearray(), []

    def write(self, data: bytes) -> int:
        self.held += data
        while len(self.held) >= self.size:
            self.cut()
        return len(data)

    def cut(self) -> None:
        path = self.folder / f"part-{len(self.made):04}"
        path.write_bytes(self.held[: self.size])
        del self.held[: self.size]
        self.made.append(path)


class Reader:
    """Parts as one file."""

    def __init__(self, paths: Sequence[Path]):
        self.paths, self.held = iter(paths), io.BytesIO()

    def read(self, size: int) -> bytes:
        found = self.held.read(size)
        for path in self.paths if not found else ():
            self.held = io.BytesIO(path.read_bytes())
            found = self.held.read(size)
            if found:
                break
        return found


def split(folder: Path, into: Path, size: int, **noted) -> list[Path]:
    """Writes a folder to `into` as parts of `size` bytes, and their list with what is `noted`."""
    writer = Writer(into, size)
    with tarfile.open(fileobj=writer, mode="w|") as archive:
        archive.add(folder, arcname=".")
    if writer.held:
        writer.cut()
    parts = {path.name: file_digest(path) for path in writer.made}
    write_note(into / LIST, noted | {"parts": parts})
    return writer.made


def listed(folder: Path) -> dict:
    """What the list of parts says; DermError where it is missing or damaged."""
    try:
        return checked(read_json(folder / LIST))
    except FileNotFoundError:
        said = f"{shown(folder)} holds no {LIST}; pack --part-mb writes one beside the parts"
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
        if file_digest(paths[-1]) != kept:
            raise DermError(f"unpack: {paths[-1].name} was changed or cut short; copy it again")
    try:
        with tarfile.open(fileobj=Reader(paths), mode="r|") as archive:
            archive.extractall(into, filter="data")
    except tarfile.TarError as error:
        raise DermError(f"unpack: {shown(folder)} holds no packed run ({error})") from error
