"""reports/index.html: the runs beside each other, from what their reports have left. No torch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from markupsafe import Markup

from derm_compress.files import read_json
from derm_compress.report import tables

MODEL = ["blocks_removed_7b", "healed", "method", "bits"]
SIDE_BY_SIDE = {  # table: its question, what tells its rows apart, its score
    "table1_pruning": (
        "Pruning alone, by the fraction of blocks removed",
        ["fraction_removed"],
        "",
    ),
    "table2_sft": ("After SFT, by what was removed at 7B", ["blocks_removed_7b"], "_after"),
    "table3_quantization": ("Quantized", MODEL, ""),
    "table4_efficiency": ("The ways of Table 4", ["setting"], ""),
    "table5_ablation": ("One part exchanged at a time", ["setting"], ""),
}


def sections(root: Path) -> list[tuple[str, pd.DataFrame, str]]:
    """(heading, table, caption): what every run says, then Tables 1 to 5 with a column a run."""
    runs = {path.parent.name: path.parent for path in sorted(root.glob("reports/*/run.json"))}
    if not runs:
        return []
    found = [("", overview(runs), "Every run, and its verdicts on the paper's claims")]
    for stem, (question, keys, end) in SIDE_BY_SIDE.items():
        frame = beside(runs, stem, keys, f"score{end}")
        if len(frame):
            caption = "score, % (95 % interval), a column a run"
            found.append((f"Table {stem[5]}. {question}", frame, caption))
    return found


def overview(runs: dict[str, Path]) -> pd.DataFrame:
    """What each run says in one sentence, its verdicts on the paper's claims, what it took."""
    rows = []
    for name, folder in runs.items():
        link = Markup('<a href="{0}/index.html">{0}</a>').format(name)
        try:
            info = read_json(folder / "run.json")["run_info"]
            said, seconds = info.get("headline", ""), info.get("seconds", "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            again = f"python -m derm_compress report {name}"
            said, seconds = f"its run.json is damaged; {again} makes it anew", ""
        rows.append((link, said, counts(folder), seconds))
    return pd.DataFrame(rows, columns=["run", "what it says", "claims", "time, s"], dtype=object)


def counts(folder: Path) -> str:
    """How many of the paper's claims got each verdict."""
    file = folder / "tables" / "claims.csv"
    if not file.exists():
        return ""
    found = pd.read_csv(file).query("counted").verdict.value_counts()
    return "; ".join(f"{count} {verdict}" for verdict, count in found.items())


def beside(runs: dict[str, Path], stem: str, keys: list[str], score: str) -> pd.DataFrame:
    """A row for each key that any run has, in order (settings: of appearance); a column a run."""
    frames = []
    for name, folder in runs.items():
        file = folder / "tables" / f"{stem}.csv"
        if file.exists():
            frame = pd.read_csv(file).drop_duplicates(keys)
            cells = tables.readable(frame[[score, f"{score}_lo", f"{score}_hi"]])
            frames.append(frame[keys].assign(run=name, cell=cells[tables.heading(score)]))
    if not frames:
        return pd.DataFrame()
    every = pd.concat(frames)
    whole = every.pivot(index=keys, columns="run", values="cell").reindex(columns=list(runs))
    if keys == ["setting"]:
        whole = whole.reindex(every.setting.unique())
    told = tables.readable(whole.index.to_frame(index=False).rename(columns=tables.heading))
    return pd.concat([told, whole.astype(object).fillna("").reset_index(drop=True)], axis=1)
