"""docs/paper.md: the paper against itself, made once, since no run is in it."""

from __future__ import annotations

from pathlib import Path

from derm_compress.files import write_text
from derm_compress.report.page import page, to_markdown
from derm_compress.report.paper import memory, model, numbers
from derm_compress.report.tables.text import readable

SHOWN = [
    *("table", "setting", "paper_params_b", "blocks_removed", "quantizer", "paper_vram"),
    *("plan_gib", "plan_gb", "apart_gib", "within", "explanation", "peak_gib"),
]


def write(root: Path) -> Path:
    """Writes docs/paper.md below `root`; returns its path."""
    path = Path(root, "docs", "paper.md")
    write_text(path, text())
    return path


def text() -> str:
    plan = memory.beside_plan()
    shown = to_markdown(readable(plan[SHOWN]))
    known = {"model": model, "numbers": numbers, "memory": memory, "plan": plan, "shown": shown}
    return page("paper.md.j2", **known, **printed())


def printed() -> dict[str, dict]:
    """The paper's tables by name of row; Tables 2 to 4 with the depth that their sizes mean."""
    one, two, three, four, five = (numbers.table(number) for number in range(1, 6))
    for table in (two, three):
        table["size"] = table.paper_model.map(model.billions)
        table["gone"] = table["size"].map(model.blocks_gone)
    four["gone"] = four.paper_params_b.map(model.blocks_gone)
    by_role = {role: rows.set_index("quantizer") for role, rows in three.groupby("role")}
    return {
        "one": one.set_index("blocks_removed").to_dict("index"),
        "two": two.set_index("role").to_dict("index"),
        "three": {role: rows.to_dict("index") for role, rows in by_role.items()},
        "four": four.set_index("setting").to_dict("index"),
        "five": five.set_index("setting").to_dict("index"),
    }
