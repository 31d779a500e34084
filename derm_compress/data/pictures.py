"""The files of a data folder or zip archive, found by names as people and csv files write them."""

from __future__ import annotations

import os
import re
import unicodedata
import zipfile
from collections import defaultdict
from functools import cached_property
from pathlib import Path, PurePosixPath

from derm_compress.errors import DermError
from derm_compress.files import shown, walk

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
PLACES = ("/{}", "/images/{}", "{}")  # as written, in images/, anywhere
LARGEST = 2**28  # bytes that a file in an archive may unpack to
COPIES = 4  # files of one name that are compared


class Pictures:
    """{name: file} below a folder or in an archive; a file has name, open("rb") and read_bytes."""

    def __init__(self, root: Path):
        self.root = root
        self.files = dict(sorted(walk(root) if root.is_dir() else members(root)))
        self._index = defaultdict(list)
        for name in self.files:
            path = tidy(name)
            parts = f"/{path}".split("/")
            tails = ["/".join(parts[i:]) for i in range(len(parts))]
            tails.append(f"/{root.absolute().stem}/{path}")  # as written from the folder above
            for way in (str, str.casefold, without_suffix):
                for tail in tails:
                    self._index[way, way(tail)].append(name)

    def find(self, name: str) -> list[str]:
        """The files that a name means: one, none, or several between which it does not decide.

        A name is a path, or the end of one; its case, the suffix, and how its umlauts are composed
        count only where files differ in nothing else. Equal copies are one file.
        """
        if name in self.files:
            return [name]
        wanted = tidy(name)
        if not wanted:
            return []
        ways = [str, str.casefold, without_suffix]
        for way in ways[:2] if is_picture(wanted) else ways:
            for place in PLACES:
                if found := self._index.get((way, place.format(way(wanted)))):
                    return found[:1] if self._are_copies(found) else found
        return []

    def _are_copies(self, names: list[str]) -> bool:
        few = 1 < len(names) <= COPIES
        return few and len({self.files[name].read_bytes() for name in names}) == 1

    def one(self, name: str) -> tuple[str, str]:
        """(the one file that a name means, ""), or ("", why there is none)."""
        found = self.find(name)
        if len(found) > 1:
            return "", f"several files have this name: {', '.join(found[:3])}"
        if found:
            return found[0], ""
        dead = stem(tidy(name)) in self._dead_stems
        return "", "a link that leads nowhere" if dead else "not in the data folder"

    @cached_property
    def dead(self) -> dict[str, str]:
        """{name: target} of links below the folder that lead nowhere."""
        paths = self.root.rglob("*") if self.root.is_dir() else ()
        links = [path for path in paths if path.is_symlink() and not path.exists()]
        return {path.relative_to(self.root).as_posix(): str(path.readlink()) for path in links}

    @cached_property
    def _dead_stems(self) -> set[str]:
        return set(map(stem, self.dead))


def tidy(name: str) -> str:
    """A relative path with slashes, its characters composed; "" for one that leads elsewhere."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts:
        return ""
    return "/".join(parts)


def without_suffix(name: str) -> str:
    """A name in lower case, without the suffix of a picture."""
    stem, suffix = os.path.splitext(name.casefold())
    return stem if suffix in SUFFIXES else name.casefold()


def stem(name: str) -> str:
    return without_suffix(PurePosixPath(name).name)


def is_picture(name: str) -> bool:
    return name.casefold().endswith(SUFFIXES)


def members(archive: Path) -> list[tuple[str, zipfile.Path]]:
    """(name, file) in a zip archive, of which nothing is unpacked; DermError for a dubious one."""
    try:
        opened = zipfile.ZipFile(archive)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DermError(
            f"{shown(archive)} is neither a folder nor a zip archive: {error}"
        ) from None
    found = [info for info in opened.infolist() if not info.is_dir()]
    for info in found:
        wrong = ""
        if not tidy(info.filename):
            wrong = "leads out of the archive"
        elif info.file_size > LARGEST:
            wrong = f"would unpack to {info.file_size / 2**20:.0f} MiB"
        elif info.flag_bits & 1:
            wrong = "is encrypted"
        if wrong:
            name = f"{shown(archive)}: {info.filename[:80]!r}"
            raise DermError(f"{name} {wrong}; unpack what you trust and name the folder")
    return [(info.filename, zipfile.Path(opened, info.filename)) for info in found]
