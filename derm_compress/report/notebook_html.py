"""Executed notebooks as inert HTML: sanitised outputs, MathML, no trace of the machine."""

from __future__ import annotations

import functools
import re
import socket
import sys
from pathlib import Path

import bleach
from latex2mathml.converter import convert
from markupsafe import Markup

from derm_compress.errors import DermError
from derm_compress.files import shown

MIMES = ("text/plain", "text/html", "text/markdown", "image/png", "image/jpeg")
TAGS = re.findall(r"\w+", "a b blockquote br code del div em h1 h2 h3 h4 hr i li ol p pre span")
TAGS += re.findall(r"\w+", "strong sub sup ul table tbody td th thead tr")
SPANS = ["colspan", "rowspan"]
ATTRIBUTES = {"a": ["href", "title"], "th": SPANS, "td": SPANS, "span": ["class"]}
FOLDED = Markup("<details><summary>{}</summary><pre>{}</pre></details>")
SUMMARIES = {"parameters": "Parameters", "injected-parameters": "What this run sets"}
FORMULA = re.compile(r"(?s)```.*?```|`[^`]*`|\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+?)(?<!\\)\$")


def cleaner(root: Path):
    """A function that hides this machine in a JSON value: absolute paths and its name."""
    places = {str(root): ".", str(root.parent): "..", str(Path.home()): "~", sys.prefix: "python"}
    known = sorted((place for place in places if len(place) > 2), key=len, reverse=True)
    folder = re.compile("(?:" + "|".join(map(re.escape, known)) + r")(?![\w.-])")
    other = re.compile(
        r"(?<![\w./~:<\\-])/(?:[\w.+@-]+/)+(?=[\w.+@-])|(?<!\w)[A-Z]:\\(?:[\w .+@-]+\\)+"
    )
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b")

    def clean(value, name=""):
        if isinstance(value, dict):
            return {clean(key): clean(inner, key) for key, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner, name) for inner in value]
        if not isinstance(value, str) or name.startswith("image/"):
            return value
        value = other.sub("…/", folder.sub(lambda found: places[found[0]], value))
        return host.sub("host", value) if len(socket.gethostname()) > 4 else value

    return clean


@functools.cache
def exporter():
    """Nbconvert's, for all notebooks: each one of its own would compile the templates anew."""
    from nbconvert import HTMLExporter

    made = HTMLExporter(template_name="basic", sanitize_html=True, exclude_anchor_links=True)
    made.register_preprocessor("nbconvert.preprocessors.CoalesceStreamsPreprocessor", enabled=True)
    made.register_filter("clean_html", clean_html)  # its own would show <p> and <h1> as text
    return made


def notebook_body(path: Path, clean) -> str:
    """The HTML of an executed notebook, to be put into a page: no setup, its parameters folded.

    DermError for a file that is no notebook.
    """
    # Two seconds of compiling a grammar that no notebook needs.
    sys.modules.setdefault("rfc3987_syntax", None)
    import nbformat

    try:
        notebook = nbformat.from_dict(clean(nbformat.read(path, as_version=4)))
        return body_of(notebook)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "delete it, and running the study makes it anew"
        raise DermError(f"report: {shown(path)} is damaged; {advice}") from error


def body_of(notebook) -> str:
    from nbformat.v4 import new_markdown_cell

    aside: list[str] = []  # HTML that stands for words of the text
    cells = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "setup" in tags:
            continue
        if cell.cell_type == "markdown":
            cell.source = set_aside(cell.source, aside)
        for tag in SUMMARIES.keys() & set(tags):
            word = word_for(FOLDED.format(SUMMARIES[tag], cell.source), aside)
            cell = new_markdown_cell(word, id=cell.get("id", tag))
        for output in cell.get("outputs", ()):
            if "data" in output:
                slim(output)
        cells.append(cell)
    notebook.cells = cells
    body = exporter().from_notebook_node(notebook)[0]
    body = re.sub(r"<table[^>]*>", "<table><caption>computed in this notebook</caption>", body)
    known = dict(enumerate(aside))
    return re.sub(r"set(\d+)aside", lambda found: known.get(int(found[1]), found[0]), body)


def word_for(html: str, aside: list[str]) -> str:
    """A word that stands for this HTML until the notebook is rendered."""
    aside.append(str(html))
    return f"set{len(aside) - 1}aside"


def clean_html(html: str) -> str:
    """Leave tags that only format; everything else becomes text."""
    known = {"tags": TAGS, "attributes": ATTRIBUTES, "protocols": {"http", "https"}}
    return Markup(bleach.clean(html, **known))


def slim(output) -> None:
    """Leave of an output what a page can show without scripts; each image gets a text."""
    from nbformat import from_dict

    alt = {"alt": output.metadata.get("image/png", {}).get("alt", "A figure of this notebook")}
    data = {mime: output.data[mime] for mime in MIMES if mime in output.data}
    if "text/html" in data:  # the sanitiser would show pandas' style sheet as text
        data["text/html"] = re.sub(r"(?s)<style.*?</style>", "", data["text/html"])
    output.metadata, output.data = from_dict({"image/png": alt, "image/jpeg": alt}), from_dict(data)


def set_aside(text: str, aside: list[str]) -> str:
    """Put a word in the place of each formula, which goes `aside` as MathML; code stays."""

    def one(found: re.Match) -> str:
        latex = found[1] or found[2]
        if latex is None:
            return found[0]
        known = re.sub(r"\\arg\b", r"\\operatorname{arg}", latex)
        try:
            return word_for(convert(known, display="block" if found[1] else "inline"), aside)
        except Exception:  # the converter has errors of many kinds, and the source reads well
            return word_for(Markup("<code>{}</code>").format(latex), aside)

    return FORMULA.sub(one, text)
