"""The report's templates: HTML that escapes what is not Markup, inert Markdown. No torch."""

from __future__ import annotations

import base64
import functools
import html

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, select_autoescape


def page(template: str, **view) -> str:
    """A template of this folder, filled."""
    return environment().get_template(template).render(**view)


@functools.cache
def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("derm_compress.report", "templates"),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"inert": inert, "markdown": to_markdown, "yaml": as_yaml}
    made.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return made


MARKS = {"\\": "&#92;", "|": "\\|", "`": "&#96;", "[": "&#91;", "\n": " "}
MARKS |= {mark: f"\\{mark}" for mark in "*_$"}


def inert(text) -> str:
    """Text that Markdown shows as it is, whatever it says."""
    return html.escape(str(text)).translate(str.maketrans(MARKS))


def to_markdown(frame: pd.DataFrame) -> str:
    """A table for a repository browser."""
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "".join("| " + " | ".join(map(inert, row)) + " |\n" for row in rows)


def as_yaml(value) -> str:
    """Nested notes as people read them; long lists are cut."""
    if isinstance(value, dict):
        value = {
            key: inner[:50] + ["…"] if isinstance(inner, list) and len(inner) > 50 else inner
            for key, inner in value.items()
        }
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
