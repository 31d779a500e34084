"""reports/<run>/: every table and figure of the paper beside its own values, from stored files alone. No torch.

Self-contained pages without scripts, whose own policy forbids requests; whatever a model or a label says is escaped.
"""

from __future__ import annotations

import html
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import yaml
from markupsafe import Markup

from derm_compress.errors import DermError
from derm_compress.evaluate.judges import prompts, rubric
from derm_compress.files import artifact, atomic, disk_guard
from derm_compress.report import (
    answers_html,
    comparison,
    figures,
    findings,
    pareto,
    quantization_figures,
    quotes,
    ranking_figures,
    side_by_side,
    statistics_figures,
    tables,
)
from derm_compress.report.notebook_html import cleaner, notebook_body
from derm_compress.report.page import page, picture, table
from derm_compress.report.parts import (
    BRIEF,
    CAPTION,
    CAPTIONS,
    LONG_PAPER_TABLE,
    LONG_TABLE,
    OPEN,
    PARTS,
    QUESTION,
    SAID_OF,
)
from derm_compress.report.results import Results, load_results, variant_id

IN_WORDS = {  # figures that are text in the page
    "fig5_case_studies": lambda drawing: drawing and answers_html.case_studies(drawing.data),
    "fig6_judge_prompt": lambda drawing: answers_html.prompt(drawing.data),
    "fig7_iterative_pruning": lambda drawing: (
        drawing and answers_html.iterative_pruning(drawing.data)
    ),
}


@dataclass(frozen=True)
class Run:
    """What a run has left: the stages' notes, run_info.json, and where its artifacts and executed notebooks lie."""

    name: str
    folder: Path
    stages: dict[str, dict]
    info: dict
    artifacts: dict[str, Path]


def read_run(name: str, *, artifacts: Path, clean) -> Run:
    """The stages' notes in order, with the folders that they name; DermError where there is no such run."""
    folder, info = artifacts / "runs" / name, artifacts / "runs" / name / "run_info.json"
    notes = [
        clean(json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("[0-9]*.json"))
    ]
    if not notes:
        raise DermError(
            f"report: run {name} has no finished stage; python -m derm_compress run params/{name}.yaml"
        )
    store = artifacts / "store"
    kept = {note["stage"]: artifact(store, note["stage"], note["key"]) for note in notes}
    known = clean(json.loads(info.read_text("utf-8"))) if info.exists() else {}
    return Run(name, folder, {note["stage"]: note for note in notes}, known, kept)


def render(run: str, *, root: Path, artifacts: Path | None = None) -> Path:
    """Write reports/<run>/ anew, whole or not at all, and print its headline; returns its index.html."""
    root = Path(root).resolve()
    clean = cleaner(root)
    made = read_run(run, artifacts=Path(artifacts or root / "artifacts"), clean=clean)
    results = load_results(made.artifacts)
    results = replace(results, data_report=clean(results.data_report))
    frozen = {"rubric_sha256": rubric.frozen_hash()}
    if results.items is not None:
        frozen["test_items_sha256"] = tables.items_hash(results.items)[:16]
    made = replace(made, info=made.info | frozen | {"headline": findings.headline(results)})
    built = tables.build(results) | side_by_side.build(results)
    graph = {stage: list(note["upstream"]) for stage, note in made.stages.items()}
    drawn = draw(results, built, graph, asked_of_judge(parameters(made)))
    files = {
        "run.json": json.dumps(record(made), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    }
    for stem, frame in built.items():
        files[f"tables/{stem}.csv"] = tables.to_csv(frame)
        files[f"tables/{stem}.md"] = to_markdown(tables.readable(frame))
    for path in sorted((made.folder / "notebooks").glob("[0-9]*.ipynb")):
        body = Markup(notebook_body(path, clean))
        files[f"notebooks/{path.stem}.html"] = page(
            title=path.stem.replace("_", " "), body=body, back=True
        )
    view = contents(
        made, results, built, drawn, [name for name in files if name.startswith("notebooks/")]
    )
    files |= {"index.html": page(**view), "README.md": readme(view)}
    folder = replace_folder(root / "reports" / run, files, drawn)
    print(made.info["headline"], flush=True)
    return folder / "index.html"


def asked_of_judge(told: dict) -> str:
    """What the judge of a run with these parameters goes by."""
    by_model = told.get("judge", "rubric") != "rubric"
    return (
        prompts.judge_prompt(told["judge_prompt"]).explanation() if by_model else rubric.explanation()
    )


def replace_folder(target: Path, files: dict[str, str], drawn: dict[str, figures.Drawing]) -> Path:
    """Fill a temporary folder beside the target and swap them: a report is whole or the one before."""
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
    return target


def draw(
    results: Results, built: dict, graph: dict[str, list[str]], asked: str
) -> dict[str, figures.Drawing]:
    """{stem: drawing} of every figure that the results suffice for; `asked`: what the judge goes by."""
    n, said = results.operating, set() if results.answers is None else set(results.answers.variant)
    removed = built["table1_pruning"].blocks_removed if "table1_pruning" in built else ()
    depths = {int(n): variant_id(int(n)) for n in removed}
    cases = {"Original": variant_id(0), "Pruned + quantized": variant_id(n, method="awq")}
    cases["Pruned + SFT + quantized"] = variant_id(n, healed=True, method="awq")
    drawn = {
        "fig1_pipeline": figures.fig1_pipeline(graph),
        "fig6_judge_prompt": quotes.fig6_judge_prompt(asked),
    }
    if plan := (results.plans or {}).get(results.criterion):
        drawn["fig2_block_removal"] = figures.fig2_block_removal(plan, n)
    if results.scores is not None and figures.drawn_in_figure_3(results.scores)[0]:
        drawn["fig3_layer_importance"] = figures.fig3_layer_importance(results.scores, n)
    drawn |= draw_rankings(results, built) | quantization_figures.drawings(results, built)
    if "extra_diagnosis" in built and (drawing := statistics_figures.confusions(results)):
        drawn["extra_diagnosis"] = drawing
    if results.figure4 is not None and len(results.figure4):
        drawn["fig4_activations"] = figures.fig4_activations(results.figure4)
    if said.issuperset(cases.values()):
        drawn["fig5_case_studies"] = quotes.fig5_case_studies(results.answers, cases)
    if said.intersection(depths.values()):
        drawn["fig7_iterative_pruning"] = quotes.fig7_iterative_pruning(results.answers, depths)
    if depths:
        healed = built.get("table2_sft", tables.tidy(pd.DataFrame(), "table2_sft"))
        drawn["score_vs_blocks"] = figures.score_vs_blocks(built["table1_pruning"], healed)
        drawn["pareto"] = pareto.fig_pareto(pareto.points(results), built["table4_efficiency"])
    return drawn


def draw_rankings(results: Results, built: dict) -> dict[str, figures.Drawing]:
    """{stem: drawing} of how criteria compare."""
    drawn, own = {}, results.criterion
    if "extra_agreement" in built:
        drawn["extra_agreement"] = ranking_figures.fig_agreement(built["extra_agreement"], own)
    if "extra_calibration_size" in built:
        drawn["extra_calibration_size"] = ranking_figures.fig_calibration_size(
            built["extra_calibration_size"], own
        )
    if {"extra_criteria", "table1_pruning"} <= set(built) and built[
        "extra_criteria"
    ].score.notna().any():
        frames = built["extra_criteria"], built["table1_pruning"], built.get("extra_criteria_tests")
        drawn["extra_criteria"] = ranking_figures.fig_criteria(*frames, own)
    return drawn


def contents(made: Run, results, built: dict, drawn: dict, notebooks: list[str]) -> dict:
    """All that index.html and README.md say, as data."""
    parts, brief = [], built.get("table4_efficiency")
    for stem, (label, question, find) in PARTS.items():
        if stem in built or stem in drawn:
            frame = tables.readable(built[stem]) if stem in built else None
            said = find(results) if find else SAID_OF[stem](built[stem]) if stem in SAID_OF else []
            part = {"stem": stem, "label": label, "question": question, "said": said}
            part |= {"frame": frame, "caption": f"{label}: {CAPTIONS.get(stem, CAPTION)}"}
            part["fold"] = len(frame) if frame is not None and is_long(stem, frame) else 0
            shown = IN_WORDS.get(stem, picture)(drawn.get(stem))
            parts.append(part | {"image": shown, "table": table(frame, part["caption"])})
    brief = None if brief is None else tables.readable(brief[BRIEF])
    facts = [
        (name, note["key"][:12], note.get("seconds"), note.get("cached"))
        for name, note in made.stages.items()
    ]
    last, told, data = list(made.stages.values())[-1], parameters(made), results.data_report
    return {
        "title": f"derm_compress, run {made.name}",
        "again": f"make report RUN={made.name}",
        "question": QUESTION,
        "headline": made.info["headline"],
        "about": findings.about(results),
        "limits": findings.photographs(data, told.get("model")) if data else [],
        "first": picture(drawn.get("score_vs_blocks")),
        "brief": table(brief, "The six ways of Table 4, with 95 % intervals"),
        "parts": parts,
        "notebooks": notebooks,
        "noted": findings.findings_data(data, told.get("model")) if data else [],
        "data": as_yaml(data or {}),
        "stages": table(
            pd.DataFrame(facts, columns=["stage", "key", "seconds", "from the store"]), "Stages"
        ),
        "parameters": as_yaml(told),
        "provenance": as_yaml(made.info | {k: last.get(k) for k in ("git", "environment")}),
    }


def is_long(stem: str, frame: pd.DataFrame) -> bool:
    most = LONG_TABLE if stem.startswith("extra") else LONG_PAPER_TABLE
    return stem not in OPEN and len(frame) > most


def as_yaml(value) -> str:
    """Nested notes as people read them; long lists are cut."""
    if isinstance(value, dict):
        value = {
            k: v[:50] + ["…"] if isinstance(v, list) and len(v) > 50 else v
            for k, v in value.items()
        }
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def parameters(made: Run) -> dict:
    return {
        name: value
        for note in made.stages.values()
        for name, value in note.get("parameters", {}).items()
    }


def record(made: Run) -> dict:
    """run.json: what the run was, its stages, its environment."""
    stages = {
        name: {key: note.get(key) for key in ("key", "seconds", "cached")}
        for name, note in made.stages.items()
    }
    return {
        "run_info": made.info,
        "stages": stages,
        "environment": list(made.stages.values())[-1].get("environment"),
    }


def readme(view: dict) -> str:
    """The report for a repository browser."""
    lines = [
        f"# {inert(view['title'])}",
        view["question"],
        f"**{inert(view['headline'])}**",
        *view["limits"],
    ]
    lines += (
        ["![Score against blocks removed](figures/score_vs_blocks.png)"] if view["first"] else []
    )
    lines += [inert(text) for text in view["about"]]
    for part in view["parts"]:
        lines += [
            f"## {part['label']}. {part['question']}",
            *(f"- {inert(text)}" for text in part["said"]),
        ]
        lines += [f"![{part['label']}](figures/{part['stem']}.png)"] if part["image"] else []
        if part["frame"] is not None:
            shown = [part["caption"], to_markdown(part["frame"])]
            summary = f"<details><summary>All {part['fold']} rows</summary>"
            lines += [summary, *shown, "</details>"] if part["fold"] else shown
            lines += [f"[csv](tables/{part['stem']}.csv)"]
    lines += [
        f"All of it again: `{view['again']}`",
        "## Notebooks",
        *(f"- [{n}]({n})" for n in view["notebooks"]),
    ]
    lines += [
        "Provenance: [run.json](run.json), and the last section of [index.html](index.html).",
        "",
    ]
    return "\n\n".join(lines)[:-1]


def to_markdown(frame: pd.DataFrame) -> str:
    """The readable table for a repository browser."""
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "".join("| " + " | ".join(inert(cell) for cell in row) + " |\n" for row in rows)


def inert(text) -> str:
    """Text that Markdown shows as it is, whatever it says."""
    marks = {
        "\\": "&#92;",
        "|": "\\|",
        "`": "&#96;",
        "[": "&#91;",
        "\n": " ",
        "*": "\\*",
        "_": "\\_",
        "$": "\\$",
    }
    return html.escape(str(text)).translate(str.maketrans(marks))


def render_index(root: Path) -> Path:
    """reports/index.html: every run that has a report, beside the others."""
    target = Path(root, "reports", "index.html")
    with atomic(target) as part:
        part.write_text(
            page(title="derm_compress: all runs", question=QUESTION, body=comparison.body(root)),
            "utf-8",
        )
    return target
