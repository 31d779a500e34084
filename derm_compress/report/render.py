"""reports/<run>/: every table and figure of the paper beside its own values, from stored files.

Self-contained pages without scripts, whose own policy forbids requests; whatever a model or a label
says is escaped. No torch.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from derm_compress.errors import DermError
from derm_compress.evaluate.judges import prompts, rubric
from derm_compress.files import artifact, disk_guard, read_note, shown, write_text
from derm_compress.report import comparison, figures, tables, wording
from derm_compress.report.figures.style import Drawing
from derm_compress.report.notebook_html import cleaner, notebook_body
from derm_compress.report.page import page, to_markdown
from derm_compress.report.parts import PARTS, QUESTION, REFERENCES, Part
from derm_compress.report.results import Results, items_hash, load_results
from derm_compress.report.sentences import Facts

MEASURED_TABLES = {"extra_latency", "extra_measured"}
MEASURED = ("seconds", "ms")  # words in names of columns that differ from run to run
TIMED = "faster"  # and in claims of time


@dataclass(frozen=True)
class Run:
    """What a run has left: its stages' notes, run_info.json, and where its artifacts lie."""

    name: str
    folder: Path
    stages: dict[str, dict]
    info: dict
    artifacts: dict[str, Path]

    @property
    def parameters(self) -> dict:
        found: dict = {}
        for note in self.stages.values():
            found |= note.get("parameters", {})
        return found

    @property
    def last(self) -> dict:
        return list(self.stages.values())[-1]


def read_run(name: str, artifacts: Path, clean: Callable) -> Run:
    """The stages' notes in order, with the folders that they name; DermError for no such run."""
    folder = artifacts / "runs" / name
    notes = {path: clean(read_note(path)) for path in sorted(folder.glob("[0-9]*.json"))}
    again = f"python -m derm_compress run params/{name}.yaml"
    if not notes:
        raise DermError(f"report: run {name} has no finished stage; {again}")
    if damaged := [
        shown(path) for path, note in notes.items() if not {"stage", "key"} <= set(note)
    ]:
        raise DermError(f"report: {', '.join(damaged)} cannot be used; {again} makes it anew")
    stages = {note["stage"]: note for note in notes.values()}
    kept = {stage: artifact(artifacts / "store", stage, n["key"]) for stage, n in stages.items()}
    return Run(name, folder, stages, clean(read_note(folder / "run_info.json")), kept)


def render(run: str, *, root: Path, artifacts: Path | None = None, keep: bool = False) -> Path:
    """Write reports/<run>/ anew, whole or not at all, and print its headline; its index.html.

    keep: a report that git tracks stays where this run has the same results, since it would differ
    in times and dates alone; then this run's own goes beside its stages.
    """
    root = Path(root).resolve()
    clean = cleaner(root)
    made = read_run(run, Path(artifacts or root / "artifacts"), clean)
    results = load_results(made.artifacts)
    results = replace(results, data_report=clean(results.data_report))
    built = tables.build(results)
    graph = {stage: list(note["upstream"]) for stage, note in made.stages.items()}
    facts = Facts(results, built, graph=graph, asked=asked_of_judge(made.parameters))
    drawn = figures.draw_all(facts)
    made = replace(made, info=made.info | frozen(results) | {"headline": facts.said("answer")[0]})
    notebooks = {
        f"notebooks/{path.stem}.html": Markup(notebook_body(path, clean))
        for path in sorted((made.folder / "notebooks").glob("[0-9]*.ipynb"))
    }
    view = contents(made, facts, built, drawn, list(notebooks))
    files = {"run.json": record(made)}
    for stem, frame in built.items():
        files[f"tables/{stem}.csv"] = tables.to_csv(frame)
        files[f"tables/{stem}.md"] = to_markdown(tables.readable(frame, results.names))
    for name, body in notebooks.items():
        title = Path(name).stem.replace("_", " ")
        files[name] = page("notebook.html", title=title, body=body)
    files |= {"index.html": page("report.html", **view), "README.md": page("readme.md.j2", **view)}
    target = root / "reports" / run
    if keep and tracked(target) and same_results(built, target / "tables"):
        print(f"the results are those of the committed {target.relative_to(root)}, which stays")
        target = made.folder / "report"
    replace_folder(target, files, drawn)
    print(made.info["headline"], flush=True)
    return target / "index.html"


def frozen(results: Results) -> dict:
    """What scores can be compared by: the rubric, and the pictures they rest on."""
    found = {"rubric_sha256": rubric.frozen_hash()}
    if results.items is not None:
        found["test_items_sha256"] = items_hash(results.items)[:16]
    return found


def asked_of_judge(told: dict) -> str:
    """What the judge of a run with these parameters goes by."""
    if told.get("judge", "rubric") == "rubric":
        return rubric.explanation()
    return prompts.judge_prompt(told["judge_prompt"]).explanation()


def record(made: Run) -> str:
    """run.json: what the run was, its stages, its environment."""
    names = ("key", "seconds", "cached")
    stages = {stage: {name: n.get(name) for name in names} for stage, n in made.stages.items()}
    told = {"run_info": made.info, "stages": stages, "environment": made.last.get("environment")}
    return json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def contents(made: Run, facts: Facts, built: dict, drawn: dict, notebooks: list[str]) -> dict:
    """All that index.html and README.md say, as data."""
    parts = []
    for stem, part in PARTS.items():
        if stem in built or stem in drawn:
            shown = shown_table(part, built.get(stem), facts.results.names)
            more = {"said": facts.said(stem), "drawing": drawn.get(stem), "frame": shown}
            folded = shown is not None and len(shown) > part.shown
            parts.append(asdict(part) | more | {"folded": folded})
    stages = [
        (stage, note["key"][:12], note.get("seconds"), note.get("cached"))
        for stage, note in made.stages.items()
    ]
    return {
        "title": f"derm_compress, run {made.name}",
        "question": QUESTION,
        "made_on": wording.made_on(made.last.get("environment"), made.info),
        "run": made,
        "facts": facts,
        "first": {part["stem"]: part for part in parts if part["first"]},
        "parts": [part for part in parts if not part["first"]],
        "references": REFERENCES,
        "notebooks": notebooks,
        "stages": pd.DataFrame(stages, columns=["stage", "key", "seconds", "from the store"]),
        "provenance": made.info | {name: made.last.get(name) for name in ("git", "environment")},
    }


def shown_table(
    part: Part, frame: pd.DataFrame | None, names: dict[str, str]
) -> pd.DataFrame | None:
    """What a page shows of a table; its file has the rest."""
    if frame is None:
        return None
    return tables.readable(frame[part.brief.split() or list(frame)], names)


def tracked(folder: Path) -> bool:
    """Whether git keeps this report."""
    command = ["git", "ls-files", "--error-unmatch", "run.json"]
    if not folder.is_dir():
        return False
    try:
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    except FileNotFoundError:  # there is no git here
        return False


def same_results(built: dict[str, pd.DataFrame], folder: Path) -> bool:
    """Whether a report's tables hold these, digit by digit, but for what was measured."""
    wanted = set(built) - MEASURED_TABLES
    if {path.stem for path in folder.glob("*.csv")} - MEASURED_TABLES != wanted:
        return False
    for stem in wanted:
        ours = of_results(io.StringIO(tables.to_csv(built[stem])))
        if not ours.equals(of_results(folder / f"{stem}.csv")):
            return False
    return True


def of_results(file) -> pd.DataFrame:
    """A table from its csv as texts, without the columns and the values that were measured."""
    frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    frame = frame[[name for name in frame if not set(MEASURED) & set(name.split("_"))]]
    if "claim" in frame:
        columns = [name for name in frame if name not in ("claim", "paper")]
        frame.loc[frame.claim.str.contains(TIMED), columns] = ""
    return frame


def replace_folder(target: Path, files: dict[str, str], drawn: dict[str, Drawing]) -> None:
    """Fill a folder beside the target and swap them: a report is whole or the one before."""
    with disk_guard(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    beside = {"prefix": f".{target.name}-", "dir": target.parent}
    with disk_guard(target), tempfile.TemporaryDirectory(**beside) as temporary:
        new = Path(temporary, "new")
        (new / "figures").mkdir(parents=True)
        for stem, drawing in drawn.items():
            drawing.save(new / "figures" / stem)
        for name, text in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text, "utf-8", newline="\n")
        if target.exists():
            os.replace(target, Path(temporary, "old"))
        os.replace(new, target)


def render_index(root: Path, names: Sequence[str] = (), to: str = "index.html") -> Path:
    """A page in reports/: the runs of these names beside each other, or all that have a report."""
    target, sections = Path(root, "reports", to), comparison.sections(Path(root), names)
    view = {"title": "derm_compress: all runs", "question": QUESTION, "sections": sections}
    write_text(target, page("runs.html", **view))
    return target
