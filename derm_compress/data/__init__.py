"""Labelled pictures and what is asked about them, from any source, split so that nothing leaks."""

from derm_compress.faces import face

FACE = {
    "items": ["SPLITS", "Dataset", "Item", "load_dataset", "sample", "save_dataset"],
    "dialogue": ["QUESTIONS", "answers", "conversation", "diseases", "question", "reference"],
    "request": ["Request"],
    "load": ["SOURCES", "load_source", "read_report", "survey", "write_source"],
}
__getattr__, __all__ = face(__name__, FACE)
