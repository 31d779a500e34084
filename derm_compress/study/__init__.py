"""Runs the study: stages, parameters, keys, the store, the runner."""

from derm_compress.faces import face

FACE = {"stage": ["start_stage"]}
__getattr__, __all__ = face(__name__, FACE)
