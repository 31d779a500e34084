"""What a run says: tables beside the paper's, figures, findings, pages. Without torch."""

from derm_compress.faces import face

FACE = {
    "figures": ["figure"],
    "results": ["Results", "load_results"],
    "sentences": ["findings", "headline"],
    "tables": ["controls", "readable", "table"],
}
__getattr__, __all__ = face(__name__, FACE)
