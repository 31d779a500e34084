"""A folder as numbered files of one size and back, for ways that carry small files alone."""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.files import checked, file_digest, read_json, shown, write_note

LIST = "parts.json"  # the last to be written: {"parts": {name: sha256}}, and what the maker notes


def split(folder: Path, into: Path, size: int, **noted) -> list[Path]:
    """Writes a folder to `into` as parts of `size` bytes, and their list with what is `noted`."""
    whole, made = into / "whole.tar", []
    with tarfile.open(whole, "w") as archive:
        archive.add(folder, arcname=".")
    with whole.open("rb") as file:
        while held := file.read(size):
            made.append(into / f"part-{len(made):04}")
            made[-1].write_bytes(held)
    whole.unlink()
    write_note(into / LIST, noted | {"parts": {path.name: file_digest(path) for path in made}})
    return made


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
        with tempfile.TemporaryFile(dir=into) as whole:
            for path in paths:
                whole.write(path.read_bytes())
            whole.seek(0)
            with tarfile.open(fileobj=whole) as archive:
                archive.extractall(into, filter="data")
    except tarfile.TarError as error:
        raise DermError(f"unpack: {shown(folder)} holds no packed run ({error})") from error
