"""Every table of a report, as pure functions of what a run has left."""

from derm_compress.faces import face

FACE = {
    "registry": ["TABLES", "build", "controls", "make", "table"],
    "text": ["heading", "readable", "to_csv"],
}
__getattr__, __all__ = face(__name__, FACE)
