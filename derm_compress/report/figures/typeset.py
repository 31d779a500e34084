"""Figures of text: lines of (column, words, look), the first of them beside a picture. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from derm_compress.report.figures import style

COLUMNS = 60  # characters of a line
POINTS, LINE = 8.4, 0.165  # size of the letters; inches from line to line
ROWS, BESIDE = 8, 42  # lines beside a picture, and their columns
HEAD, SMALL = {"fontweight": "bold"}, {"color": style.QUIET}

Run = tuple[int, str, dict]
Lines = list[list[Run]]


def plain(text: str, limit: int) -> str:
    """One line of at most so many characters; control characters become blanks."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def flow(
    text: str, spans: Sequence[tuple] = (), *, look: dict | None = None, at: int = 1, to: int = 0
) -> Lines:
    """Lines of runs between two columns, in one look; spans: (start, end, look) of other words."""
    end = to or COLUMNS - 1
    found: Lines = [[]]
    column = at
    for word in re.finditer(rf"\S{{1,{end - at}}}", text):
        looks = [other for a, b, other in spans if a < word.end() and word.start() < b]
        own = looks[0] if looks else look or {}
        if column > at and column + len(word.group()) > end:
            found.append([])
            column = at
        start, words = column, word.group()
        if found[-1] and found[-1][-1][2] == own:
            start, before, _ = found[-1].pop()
            words = f"{before} {words}"
        found[-1].append((start, words, own))
        column += len(word.group()) + 1
    return found


def drawn(
    lines: Lines, finding: str, *, picture: Image.Image | None = None, beside: Lines | None = None
) -> Figure:
    """A figure of monospaced lines under their finding; `beside` ones stand left of the picture."""
    title = style.wrapped(finding)
    first = list(beside or [])
    if picture:
        first += [[]] * (ROWS - len(first))
    above = title.count("\n") + 2
    rows = [*first, *lines]
    height = LINE * (above + len(rows) + 0.5)
    figure = Figure(figsize=(style.WIDTH, height))
    figure.set_layout_engine("none")
    FigureCanvasAgg(figure)
    figure.text(0.01, 1 - 0.4 * LINE / height, title, va="top", **style.TITLE)
    font = {"family": "DejaVu Sans Mono", "fontsize": POINTS, "parse_math": False}
    for row, line in enumerate(rows, above):
        for column, words, look in line:
            place = column / COLUMNS, 1 - LINE * (row + 0.5) / height
            figure.text(*place, words, **font, **look)
    if picture:
        side = LINE * (ROWS - 1)
        left = 1 - (side + 0.05) / style.WIDTH
        bottom = 1 - LINE * (above - 0.4) / height - side / height
        frame = figure.add_axes((left, bottom, side / style.WIDTH, side / height))
        frame.imshow(picture, interpolation="nearest")
        frame.axis("off")
    return figure
