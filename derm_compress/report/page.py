"""The report's templates: HTML that escapes what is not Markup, inert Markdown. No torch."""

from __future__ import annotations

import base64
import functools
import html
import io
import statistics

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from derm_compress.report import wording

MARKS = {"\\": "&#92;", "|": "\\|", "`": "&#96;", "[": "&#91;", "\n": " "}
MARKS |= {mark: f"\\{mark}" for mark in "*_$"}
LONG = 50  # of a list's items, all that a page shows
SIDE = 216  # pixels of an enlarged picture


@functools.cache
def environment() -> Environment:
    """Jinja with this project's words."""
    made = Environment(
        loader=PackageLoader("derm_compress.report", "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {name: getattr(wording, name) for name in wording.FILTERS}
    made.filters |= {"inert": inert, "markdown": to_markdown, "rows": to_rows}
    made.filters |= {"yaml": as_yaml, "base64": as_base64, "png": as_png}
    made.globals |= {"verdict": wording.verdict, "isnan": pd.isna}
    made.globals |= {"median": statistics.median, "mode": statistics.mode}
    return made


def page(template: str, **view) -> str:
    """A template of this folder, filled."""
    return environment().get_template(template).render(**view)


def inert(text) -> str:
    """Text that Markdown shows as it is, whatever it says."""
    return html.escape(str(text), quote=False).translate(str.maketrans(MARKS))


def to_markdown(frame: pd.DataFrame) -> str:
    """A table for a repository browser."""
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "".join("| " + " | ".join(map(inert, row)) + " |\n" for row in rows)


def to_rows(text: str) -> str:
    """A table's rows of paragraphs `where: what`."""
    found = [" ".join(part.split()).partition(": ") for part in text.strip().split("\n\n")]
    return "".join(f"| {where} | {said[:1].upper()}{said[1:]} |\n" for where, _, said in found)


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def as_png(picture: Image.Image) -> str:
    """A picture's bytes as base64, enlarged for the eye."""
    written = io.BytesIO()
    picture.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(written, "png")
    return as_base64(written.getvalue())


def as_yaml(notes: dict) -> str:
    """Nested notes as people read them; long lists are cut."""
    shown = dict(notes)
    for key, value in notes.items():
        if isinstance(value, list) and len(value) > LONG:
            shown[key] = [*value[:LONG], "…"]
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
