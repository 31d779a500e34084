"""The face of a folder: the names that it offers, each loaded from its module when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence


def face(
    package: str, offers: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], list[str]]:
    """(__getattr__, __all__) of a package's __init__, where `offers` is {module below it: names}.

    So `from derm_compress.method import tap` loads one module, not the folder; study.keys reads
    the same FACE.
    """
    home = {name: module for module, names in offers.items() for name in names}

    def load(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return load, sorted(home)
