"""What all figures share: a `Drawing`, one style, scores with intervals. No torch.

Dense grey, pruned blue, SFT orange, quantized green, the paper's own values black and dotted;
markers and dashes differ too, so that a grey print reads. Text is never parsed as mathtext.
"""

from __future__ import annotations

import base64
import functools
import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from derm_compress.evaluate import metrics
from derm_compress.report.sentences import Facts

DENSE, PRUNED, SFT, QUANTIZED, PAPER = "#6b6b6b", "#1f6fb4", "#d96f00", "#2a8c4a", "#111111"
BAND, QUIET = "#d9d9d9", "#555555"
WIDTH = 4.2  # inches: a phone's column shows the smallest letters, of 8 points, at 10 pixels
TITLE = {"fontweight": "bold", "fontsize": 9.5, "ha": "left"}
STYLE = {
    "figure.dpi": 200,
    "savefig.dpi": 200,  # equal, so that the layout is made for what is saved
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e2e2",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.titlesize": 8.5,
    "figure.labelsize": 8.5,
    "axes.titlelocation": "left",
    "text.parse_math": False,
    "svg.hashsalt": "derm_compress",
}
FIGURES: dict[str, Callable[[Facts], Drawing | None]] = {}  # by stem, as `figure` registers them


@dataclass(frozen=True)
class Drawing:
    """A figure, its tidy data, its finding (the text alternative), and HTML if it is text."""

    figure: Figure
    data: pd.DataFrame
    finding: str
    html: Markup | None = None

    def save(self, path: Path) -> None:
        """Write path.png, path.svg and path.csv; the bytes depend on the content alone."""
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(f"{path}.svg", metadata={"Date": None, "Creator": None})
        Path(f"{path}.png").write_bytes(self.png)
        self.data.to_csv(f"{path}.csv", index=False, float_format="%.6g", lineterminator="\n")

    @functools.cached_property
    def png(self) -> bytes:
        """With a palette of 256: a third of the size, and charts have no more."""
        drawn, small = io.BytesIO(), io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(drawn, format="png", metadata={"Software": None})
        with Image.open(drawn) as image:
            palette = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            palette.save(small, format="png", optimize=True)
        return small.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None):
        """What Jupyter shows; nbconvert turns `alt` into the text alternative."""
        picture = base64.b64encode(self.png).decode()
        told = {"alt": self.finding, "width": int(100 * WIDTH)}
        return {"image/png": picture}, {"image/png": told}


def figure(stem: str, *needs: str):
    """Registers what draws a figure from Facts and what it needs: fields of Results and tables.

    It is drawn in the one style, whatever the caller's settings are; not at all where a need or
    the function's answer is None.
    """

    def register(draw: Callable[..., Drawing | None]):
        @functools.wraps(draw)
        def styled(facts: Facts) -> Drawing | None:
            given = [facts.get(name) for name in needs]
            if any(part is None for part in given):
                return None
            with matplotlib.rc_context(STYLE):
                drawing = draw(facts, *given)
                if drawing:  # the layout is solved once, so that no format depends on another
                    drawing.figure.draw_without_rendering()
                    drawing.figure.set_layout_engine("none")
            return drawing

        FIGURES[stem] = styled
        return styled

    return register


def wrapped(finding: str) -> str:
    """A figure's title in lines."""
    units = re.sub(r"(?<=\d) (?=%|bits|points)", "\N{NO-BREAK SPACE}", finding[1:])
    return textwrap.fill(finding[:1].upper() + units, 50)


def canvas(finding: str, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure whose title is its finding, and its axes row by row."""
    made = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(made)
    made.suptitle(wrapped(finding), x=0.01, **TITLE)
    return made, list(made.subplots(rows, columns, squeeze=False, **options).flat)


def legend_below(made: Figure, ncols: int, **look) -> None:
    """A figure's legend: every label of its axes once."""
    known = {}
    for axes in made.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    made.legend(known.values(), known, ncols=ncols, loc="outside lower center", **look)


def reach(rows: pd.DataFrame, name: str) -> list[pd.Series]:
    """How far a value's interval reaches below and above it, as errorbar takes it."""
    below, above = rows[name] - rows[f"{name}_lo"], rows[f"{name}_hi"] - rows[name]
    return [below.clip(lower=0), above.clip(lower=0)]


def scores(axes, x: pd.Series, rows: pd.DataFrame, name: str = "score", **look) -> None:
    """Scores with their 95 % interval; rows without a score are left out."""
    rows = rows.dropna(subset=[name])
    if len(rows):
        axes.errorbar(x[rows.index], rows[name], yerr=reach(rows, name), capsize=3, **look)


def score_axis(axes, label: str = "score, % (95 % interval)") -> None:
    axes.axhline(metrics.FLOOR, color="#999999", linewidth=1)
    axes.set(ylabel=label, ylim=(metrics.FLOOR - 9, 100))
