"""docs/paper.md: the paper against itself, made once, since no run is in it."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from derm_compress.files import atomic
from derm_compress.report.page import to_markdown
from derm_compress.report.paper import memory, model, numbers
from derm_compress.report.tables.text import readable

SHOWN = [
    *("table", "setting", "paper_params_b", "blocks_removed", "quantizer", "paper_vram"),
    *("plan_gib", "plan_gb", "apart_gib", "within", "explanation", "peak_gib"),
]


def write(root: Path) -> Path:
    """Writes docs/paper.md below `root`; returns its path."""
    path = Path(root, "docs", "paper.md")
    with atomic(path) as part:
        part.write_text(text(), "utf-8", newline="\n")
    return path


def text() -> str:
    made = Environment(
        loader=PackageLoader("derm_compress.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"f": _fixed, "g": _short, "rows": _rows}
    plan = memory.beside_plan()
    return made.get_template("paper.md.j2").render(
        **printed(),
        **{name: getattr(model, name) for name in ("BLOCK", "TOTAL", "GB")},
        **{name: getattr(model, name) for name in ("params_b", "weights_gib", "peak_gib")},
        **{name: getattr(memory, name) for name in ("LARGE", "PACKED")},
        SPEEDUP=numbers.SPEEDUP,
        SAVED=numbers.SAVED,
        plan=plan,
        far=memory.worst(plan),
        shown=to_markdown(readable(plan[SHOWN])),
    )


def printed() -> dict[str, dict]:
    """The paper's tables by name of row; Tables 2 to 4 with the depth that their sizes mean."""
    one, two, three, four, five = (numbers.table(number) for number in range(1, 6))
    for table in (two, three):
        table["size"] = table.paper_model.map(model.billions)
        table["gone"] = table["size"].map(model.blocks_gone)
    four["gone"] = four.paper_params_b.map(model.blocks_gone)
    return {
        "one": one.set_index("blocks_removed").to_dict("index"),
        "two": two.set_index("role").to_dict("index"),
        "three": {
            role: rows.set_index("quantizer").to_dict("index")
            for role, rows in three.groupby("role")
        },
        "four": four.set_index("setting").to_dict("index"),
        "five": five.set_index("setting").to_dict("index"),
    }


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _short(value: float) -> str:
    return f"{value:g}"


def _rows(text: str) -> str:
    """A table's rows of paragraphs `where: what`."""
    found = [" ".join(part.split()).partition(": ") for part in text.strip().split("\n\n")]
    return "".join(f"| {where} | {said[:1].upper()}{said[1:]} |\n" for where, _, said in found)
