"""reports/index.html: the runs beside each other, from what their reports have left. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from derm_compress.errors import DermError
from derm_compress.files import read_json
from derm_compress.report import signs, sweep, tables
from derm_compress.report.figures.style import Drawing
from derm_compress.report.results import table_of

MODEL = ["blocks_removed_7b", "healed", "method", "bits"]
FRACTION = ["fraction_removed"]
SIDE_BY_SIDE = {  # table: its question, what tells its rows apart, its score
    "table1_pruning": ("Pruning alone, by the fraction of blocks removed", FRACTION, "score"),
    "table2_sft": ("After SFT, by what was removed at 7B", ["blocks_removed_7b"], "score_after"),
    "table3_quantization": ("Quantized", MODEL, "score"),
    "table4_efficiency": ("The ways of Table 4", ["setting"], "score"),
    "table5_ablation": ("One part exchanged at a time", ["setting"], "score"),
}


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, a table, what the table holds, perhaps a figure."""

    heading: str
    frame: pd.DataFrame
    caption: str
    drawing: Drawing | None = None


def sections(root: Path, names: Sequence[str] = ()) -> list[Section]:
    """What runs say, all that have a report or these: sweeps, Tables 1 to 5, the signs of all."""
    runs = {path.parent.name: path.parent for path in sorted(root.glob("reports/*/run.json"))}
    if missing := [name for name in names if name not in runs]:
        again = f"python -m derm_compress run params/{missing[0]}.yaml"
        raise DermError(f"compare: reports/{missing[0]} is not there; {again} makes it")
    runs = {name: runs[name] for name in names or runs}
    if not runs:
        return []
    infos = {folder: info_of(folder) for folder in runs.values()}
    found = [Section("", overview(infos), "Every run, and its verdicts on the paper's claims")]
    for one in sweep.sweeps(infos):
        found += swept(one)
    for stem, (question, keys, score) in SIDE_BY_SIDE.items():
        frame = beside(runs, stem, keys, score)
        if len(frame):
            caption = "score, % (95 % interval), a column a run"
            found.append(Section(f"Table {stem[5]}. {question}", frame, caption))
    table = signs.signs(list(runs.values())) if len(runs) > 1 else ()
    if len(table):
        found.append(Section("Which signs hold in every run", table, signs.counted(table)))
    return found


def swept(one: sweep.Sweep) -> list[Section]:
    """A sweep: scores over seeds, then for all else that it sweeps a figure and differences."""
    heading = f"{one.file}: {', '.join(one.axes)}"
    caption = "mean score of the runs at each point, with its 95 % interval over their seeds"
    found = [Section(heading, tables.readable(sweep.over_seeds(one)), caption)]
    for axis in one.shown:
        frame = sweep.differences(one, axis)
        caption = f"points by {axis}, mean of pairs of runs alike in all else (95 % interval)"
        drawing = sweep.against(one, axis)
        found.append(Section(f"By {axis}", tables.readable(frame), caption, drawing))
    return found


def info_of(folder: Path) -> dict:
    """What a report says of its run; empty where that is damaged."""
    try:
        return dict(read_json(folder / "run.json")["run_info"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def overview(infos: dict[Path, dict]) -> pd.DataFrame:
    """What each run says in one sentence, its verdicts on the paper's claims, what it took."""
    rows = []
    for folder, info in infos.items():
        link = Markup('<a href="{0}/index.html">{0}</a>').format(folder.name)
        again = f"python -m derm_compress report {folder.name}"
        damaged = f"its run.json is damaged; {again} makes it anew"
        said = info.get("headline", "") if info else damaged
        rows.append((link, said, counts(folder), info.get("seconds", "")))
    return pd.DataFrame(rows, columns=["run", "what it says", "claims", "time, s"], dtype=object)


def counts(folder: Path) -> str:
    """How many of the paper's claims got each verdict."""
    table = table_of(folder, "claims")
    found = {} if table.empty else table.query("counted").verdict.value_counts()
    return "; ".join(f"{verdict}: {count}" for verdict, count in found.items())


def beside(runs: dict[str, Path], stem: str, keys: list[str], score: str) -> pd.DataFrame:
    """A row for each key that any run has, in order (settings: of appearance); a column a run."""
    frames = []
    for name, folder in runs.items():
        frame = table_of(folder, stem)
        if len(frame):
            frame = frame.drop_duplicates(keys)
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
