"""The report's parts in the paper's order: templates/parts.yaml says what each asks. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

QUESTION = "How far can a multimodal medical model be compressed, and what does it cost?"
FILE = Path(__file__).with_name("templates") / "parts.yaml"


@dataclass(frozen=True)
class Part:
    """A table, a figure or both, of one stem; a table of more than `shown` rows is folded.

    columns: what is shown of the table, in order; all of it where none are named.
    """

    stem: str
    label: str
    question: str
    caption: str = "score with its 95 % interval, n answers; what the paper has stands beside it"
    columns: str = ""
    shown: int = 16


_TOLD = yaml.safe_load(FILE.read_text("utf-8"))
PARTS = {stem: Part(stem, **told) for stem, told in _TOLD.items()}
