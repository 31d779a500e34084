"""The paper's own numbers, its model as shapes, and where the two or its texts disagree."""

from derm_compress.faces import face

FACE = {"numbers": ["BLOCKS", "table"], "page": ["write"]}

__getattr__, __all__ = face(__name__, FACE)
