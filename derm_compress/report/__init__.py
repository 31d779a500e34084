"""What a run says: tables beside the paper's, figures, findings, pages. Without torch."""

from derm_compress.faces import face

FACE = {
    "figures": ["figure"],
    "render": ["render", "render_index"],
    "results": ["Results", "load_results", "of_predictions"],
    "sentences": ["findings", "headline"],
    "tables": ["table"],
}
__getattr__, __all__ = face(__name__, FACE)
