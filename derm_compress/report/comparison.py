"""reports/index.html: the runs beside each other, from what their reports have left. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from derm_compress.report import tables, verdicts
from derm_compress.report.page import table

KEYS = {  # table: its question, what tells its rows apart, its score
    "table1_pruning": (
        "Pruning alone, by the fraction of blocks removed",
        ["fraction_removed"],
        "score",
    ),
    "table2_sft": ("After SFT, by what was removed at 7B", ["blocks_removed_7b"], "score_after"),
    "table3_quantization": (
        "Quantized",
        ["blocks_removed_7b", "healed", "method", "bits"],
        "score",
    ),
    "table4_efficiency": ("The six ways of Table 4", ["setting"], "score"),
    "table5_ablation": ("One part exchanged at a time", ["setting"], "score"),
}


def body(root: Path) -> Markup:
    """Headlines, then Tables 1 to 5 with a column a run."""
    runs = {
        path.parent.name: path.parent for path in sorted(Path(root, "reports").glob("*/run.json"))
    }
    if not runs:
        return Markup("<p>No run has a report yet.</p>")
    parts = [
        table(
            overview(runs),
            "Every run; verdicts: reproduced / not reproduced / cannot be tested at its size",
        )
    ]
    for stem, (question, keys, score) in KEYS.items():
        shown = table(beside(runs, stem, keys, score), "score, % (95 % interval), a column a run")
        if shown:
            parts.append(Markup("<h2>Table {}. {}</h2>").format(stem[5], question) + shown)
    return Markup("\n").join(parts)


def overview(runs: dict[str, Path]) -> pd.DataFrame:
    """What each run says in one sentence, its verdicts on the paper's claims, what it took."""
    rows = []
    for name, folder in runs.items():
        info = json.loads((folder / "run.json").read_text("utf-8"))["run_info"]
        link = Markup('<a href="{0}/index.html">{0}</a>').format(name)
        rows.append((link, info.get("headline", ""), counts(folder), info.get("seconds", "")))
    return pd.DataFrame(rows, columns=["run", "what it says", "claims", "time, s"], dtype=object)


def counts(folder: Path) -> str:
    """7 / 8 / 2 of the claims' verdicts."""
    file = folder / "tables" / "extra_verdicts.csv"
    if not file.exists():
        return ""
    found = pd.read_csv(file).verdict.value_counts()
    return " / ".join(
        str(found.get(name, 0)) for name in (verdicts.REPRODUCED, verdicts.NOT, verdicts.UNTESTED)
    )


def beside(runs: dict[str, Path], stem: str, keys: list[str], score: str) -> pd.DataFrame:
    """A row a key of any run in order of the keys' values or, of names, of appearance; a column a run."""
    columns = {}
    for name, folder in runs.items():
        file = folder / "tables" / f"{stem}.csv"
        frame = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=keys)
        readable = tables.readable(frame.reindex(columns=[score, f"{score}_lo", f"{score}_hi"]))
        cells = readable[tables.heading(score)] if len(frame) else []
        columns[name] = pd.Series(
            list(cells), index=pd.MultiIndex.from_frame(frame[keys]), dtype=object
        )
        columns[name] = columns[name][~columns[name].index.duplicated()]
    order = pd.Index([]) if not columns else next(iter(columns.values())).index
    for column in columns.values():
        order = order.append(column.index.difference(order, sort=False))
    whole = pd.DataFrame({name: column.reindex(order) for name, column in columns.items()}).fillna(
        ""
    )
    whole = whole if keys == ["setting"] else whole.sort_index()
    told = tables.readable(whole.index.to_frame(index=False).rename(columns=tables.heading))
    return pd.concat([told, whole.reset_index(drop=True)], axis=1)
