"""HTML of the reports: tables, pictures, pages; whatever is not Markup is escaped. No torch."""

from __future__ import annotations

import base64

import pandas as pd
from markupsafe import Markup

from derm_compress.report.figures import Drawing

LONG = "<td class=long>{}</td>"


def table(frame: pd.DataFrame | None, caption: str) -> Markup | None:
    """An HTML table in its own scroll box; every cell is escaped."""
    if frame is None or frame.empty:
        return None
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(name) for name in frame.columns)
    rows = [
        Markup("").join(
            Markup(LONG if len(str(cell)) > 40 else "<td>{}</td>").format(cell) for cell in row
        )
        for row in frame.to_numpy()
    ]
    body = Markup("").join(Markup("<tr>{}</tr>\n").format(row) for row in rows)
    whole = Markup(
        "<table><caption><span>{}</span></caption><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table>"
    )
    return Markup("<div class=wide tabindex=0>{}</div>").format(whole.format(caption, head, body))


def picture(drawing: Drawing | None) -> Markup | None:
    """A figure in its own scroll box; on a phone, where that cuts its title, the finding stands above it."""
    if drawing is None:
        return None
    data = base64.b64encode(drawing.png()).decode()
    image = Markup(
        '<div class=figure tabindex=0><img src="data:image/png;base64,{}" alt="{}"></div>'
    )
    said = Markup("<figure class=shown><figcaption aria-hidden=true>{}</figcaption>{}</figure>")
    return said.format(
        drawing.finding[:1].upper() + drawing.finding[1:],
        image.format(Markup(data), drawing.finding),
    )


def page(**view) -> str:
    """templates/report.html with everything escaped that is not Markup."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("derm_compress.report", "templates")
    return (
        Environment(loader=loader, autoescape=True, trim_blocks=True)
        .get_template("report.html")
        .render(**view)
    )
