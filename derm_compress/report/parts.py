"""The report's parts in the paper's order: templates/parts.yaml says what each asks. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

QUESTION = "How far can a multimodal medical model be compressed, and what does it cost?"
TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Part:
    """A table, a figure or both, of one stem; a table of more than `shown` rows is folded.

    look: what to look at in the table; columns: its columns in order, all where none are named;
    brief: those that the page shows, all where none are named; first: on the first page.
    """

    stem: str
    label: str
    question: str
    look: str = ""
    columns: str = ""
    brief: str = ""
    shown: int = 8
    first: bool = False


def _read(name: str):
    return yaml.safe_load((TEMPLATES / name).read_text("utf-8"))


PARTS = {stem: Part(stem, **told) for stem, told in _read("parts.yaml").items()}
REFERENCES = _read("references.yaml")  # name, address, why it is here
