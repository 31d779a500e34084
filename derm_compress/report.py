"""reports/<run>/: every table and figure of the paper beside its own values, from stored files alone. No torch.

Self-contained pages without scripts, whose own policy forbids requests; whatever a model or a label says is escaped.
"""

from __future__ import annotations

import base64
import html
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import yaml
from markupsafe import Markup

from derm_compress import (
    figures,
    findings,
    judge,
    judge_controls,
    judge_forms,
    quantization_figures,
    quantization_findings,
    quotes,
    ranking_figures,
    ranking_findings,
    tables,
)
from derm_compress.artifacts import atomic, disk_guard
from derm_compress.errors import DermError
from derm_compress.notebook_html import cleaner, notebook_body

QUESTION = "How far can a multimodal medical model be compressed, and what does it cost?"
CAPTION = "score with its 95 % interval, n answers; what the paper has stands beside it"
CAPTIONS = {  # of the tables that need another one
    "table3_quantization": f"{CAPTION}; output error: relative, on calibration pictures. awq-duo: scales know "
    "weights' magnitudes too; -clip: ranges are clipped; -text: calibrated without pictures; -double: scales in 8 bits",
    "table4_efficiency": f"{CAPTION}; times are medians with their quartiles",
    "extra_agreement": "Spearman's rank correlation over unprotected blocks; 95 % interval over draws of the items",
    "extra_calibration_size": "two disjoint draws of so many pictures; 95 % of the draws lie within the brackets",
    "extra_criteria": "score before SFT with its 95 % interval, n answers",
    "extra_criteria_tests": "the study's criterion minus its rival in points, paired, 95 % interval, p by sign flips",
    "extra_quantization_tests": "difference: minus AWQ of the same model and width; minus 16 bits: minus the model "
    "that was quantized; points, paired, 95 % interval, p by sign flips, corrected over all of one width (Holm)",
    "extra_equal_bytes": "score with its 95 % interval; difference: minus all blocks at the budget's width, healed "
    "alike, paired; where two widths are mixed, the blocks that the plan would remove last get the wider one",
    "extra_cliffs": "the steepest fall between neighbouring depths, per block; its interval is of the step that was "
    "chosen for being the steepest; level until: the last depth before the first whose paired interval to the "
    "unpruned one lies below 0",
    "extra_sublayers": "without single attentions or MLPs; difference: to the nearest whole-block model, paired",
    "extra_measured": "weights as planned (16 bits or fewer) and as run (a CPU takes 32 for 16); one process runs all",
    "extra_judges": "marks of 1 to 4 for answers whose worth is known; n answers",
    "extra_baselines": "score with its 95 % interval, n answers; base answered the test pictures alone",
}
BRIEF = ["setting", "score", "score_lo", "score_hi", "paper_score", "vram_gib_7b", "paper_vram"]
LONG = "<td class=long>{}</td>"
LONG_TABLE = 24  # rows from which a table beside the paper's is folded
RUBRIC_LIMITS = "The rubric counts stated facts; it judges neither safety nor negation nor grammar."
PARTS = {  # in the paper's order: label, question, and what the numbers say to it
    "fig1_pipeline": ("Figure 1", "The pipeline", None),
    "fig2_block_removal": ("Figure 2", "Which blocks are tried, and which go?", None),
    "fig3_layer_importance": (
        "Figure 3", "How much does each block matter?",
        lambda results: ranking_findings.findings_order(results) + ranking_findings.findings_drafts(results),
    ),
    "extra_agreement": ("Beside Figure 3", "Do the criteria agree?", ranking_findings.findings_agreement),
    "extra_calibration_size": (
        "Beside Figure 3", "How many pictures are enough, and do they change the ranking?",
        lambda results: ranking_findings.findings_calibration(results) + ranking_findings.findings_images(results),
    ),
    "fig4_activations": ("Figure 4", "Where do activations stand out?", quantization_findings.findings_activations),
    "extra_activations": (
        "Beside Figure 4", "And in every other block and projection?", quantization_findings.findings_outliers
    ),
    "table1_pruning": ("Table 1", "What does pruning alone cost, at each depth?", findings.findings_depths),
    "extra_criteria": ("Beside Table 1", "Does the criterion beat its rivals?", ranking_findings.findings_rivals),
    "extra_criteria_tests": ("Beside Table 1", "How sure is each comparison?", None),
    "extra_cliffs": ("Beside Table 1", "Where does the score fall?", ranking_findings.findings_cliffs),
    "extra_sublayers": (
        "Beside Table 1", "Do single attentions or MLPs give more than whole blocks?",
        ranking_findings.findings_sublayers,
    ),
    "table2_sft": ("Table 2", "What does SFT heal, beyond what it gives the unpruned model?", findings.findings_sft),
    "table3_quantization": (
        "Table 3", "What do fewer bits cost, by method?", quantization_findings.findings_quantization
    ),
    "extra_quantization_tests": ("Beside Table 3", "How sure is each comparison of methods?", None),
    "extra_errors": ("Beside Table 3", "Where do errors arise, and do they cost answers?", None),
    "extra_alpha": ("Beside Table 3", "What does AWQ scale?", quantization_findings.findings_scales),
    "extra_equal_bytes": (
        "Beside Table 3", "Fewer blocks or fewer bits, at equal bytes?", quantization_findings.findings_equal_bytes
    ),
    "table4_efficiency": ("Table 4", "What does the whole pipeline gain in memory and time?", None),
    "extra_measured": ("Beside Table 4", "What does a running model take?", None),
    "pareto": ("Beside Table 4", "What is the best score for the memory?", None),
    "table5_ablation": ("Table 5", "Which part matters?", lambda results: findings.findings_evaluation(results)[1:]),
    "extra_baselines": ("Beside Table 5", "Does the score come from fine-tuning and from seeing?", None),
    "fig5_case_studies": ("Figure 5", "What do the models say?", None),
    "fig6_judge_prompt": ("Figure 6", "How are answers judged?", lambda results: [RUBRIC_LIMITS]),
    "extra_judges": (
        "Beside Figure 6", "Is the judge any good?", lambda results: judge_controls.findings(results.judge_controls)
    ),
    "fig7_iterative_pruning": ("Figure 7", "How do answers change while blocks go?", None),
}  # fmt: skip


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
    notes = [clean(json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("[0-9]*.json"))]
    if not notes:
        raise DermError(f"report: run {name} has no finished stage; python -m derm_compress run params/{name}.yaml")
    kept = {note["stage"]: artifacts / "store" / note["stage"] / note["key"] for note in notes}
    known = clean(json.loads(info.read_text("utf-8"))) if info.exists() else {}
    return Run(name, folder, {note["stage"]: note for note in notes}, known, kept)


def render(run: str, *, root: Path, artifacts: Path | None = None) -> Path:
    """Write reports/<run>/ anew, whole or not at all; returns its index.html."""
    root = Path(root).resolve()
    clean = cleaner(root)
    made = read_run(run, artifacts=Path(artifacts or root / "artifacts"), clean=clean)
    results = tables.load_results(made.artifacts)
    results = replace(results, data_report=clean(results.data_report))
    frozen = {"rubric_sha256": judge.frozen_hash()}
    if results.items is not None:
        frozen["test_items_sha256"] = tables.items_hash(results.items)[:16]
    made = replace(made, info=made.info | frozen)
    built = tables.build(results)
    graph = {stage: list(note["upstream"]) for stage, note in made.stages.items()}
    drawn = draw(results, built, graph, asked_of_judge(parameters(made)))
    files = {"run.json": json.dumps(record(made), indent=1, sort_keys=True, ensure_ascii=False) + "\n"}
    for stem, frame in built.items():
        files[f"tables/{stem}.csv"] = tables.to_csv(frame)
        files[f"tables/{stem}.md"] = to_markdown(tables.readable(frame))
    for path in sorted((made.folder / "notebooks").glob("[0-9]*.ipynb")):
        body = Markup(notebook_body(path, clean))
        files[f"notebooks/{path.stem}.html"] = page(title=path.stem.replace("_", " "), body=body, back=True)
    view = contents(made, results, built, drawn, [name for name in files if name.startswith("notebooks/")])
    files |= {"index.html": page(**view), "README.md": readme(view)}
    return replace_folder(root / "reports" / run, files, drawn) / "index.html"


def asked_of_judge(told: dict) -> str:
    """What the judge of a run with these parameters goes by."""
    by_model = told.get("judge", "rubric") != "rubric"
    return judge_forms.form(told["judge_prompt"]).explanation() if by_model else judge.explanation()


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


def draw(results: tables.Results, built: dict, graph: dict[str, list[str]], asked: str) -> dict[str, figures.Drawing]:
    """{stem: drawing} of every figure that the results suffice for; `asked`: what the judge goes by."""
    n, said = results.operating, set() if results.answers is None else set(results.answers.variant)
    removed = built["table1_pruning"].blocks_removed if "table1_pruning" in built else ()
    depths = {int(n): tables.variant_id(int(n)) for n in removed}
    cases = {"Original": tables.variant_id(0), "Pruned + quantized": tables.variant_id(n, method="awq")}
    cases["Pruned + SFT + quantized"] = tables.variant_id(n, healed=True, method="awq")
    drawn = {"fig1_pipeline": figures.fig1_pipeline(graph), "fig6_judge_prompt": quotes.fig6_judge_prompt(asked)}
    if plan := (results.plans or {}).get(results.criterion):
        drawn["fig2_block_removal"] = figures.fig2_block_removal(plan, n)
    if results.scores is not None and figures.drawn_in_figure_3(results.scores)[0]:
        drawn["fig3_layer_importance"] = figures.fig3_layer_importance(results.scores, n)
    drawn |= draw_rankings(results, built) | quantization_figures.drawings(results, built)
    if results.figure4 is not None:
        drawn["fig4_activations"] = figures.fig4_activations(results.figure4)
    if said.issuperset(cases.values()):
        drawn["fig5_case_studies"] = quotes.fig5_case_studies(results.answers, cases)
    if said.intersection(depths.values()):
        drawn["fig7_iterative_pruning"] = quotes.fig7_iterative_pruning(results.answers, depths)
    if depths:
        healed = built.get("table2_sft", tables.tidy(pd.DataFrame(), "table2_sft"))
        drawn["score_vs_blocks"] = figures.score_vs_blocks(built["table1_pruning"], healed)
        drawn["pareto"] = figures.pareto(built["table4_efficiency"])
    return drawn


def draw_rankings(results: tables.Results, built: dict) -> dict[str, figures.Drawing]:
    """{stem: drawing} of how criteria compare."""
    drawn, own = {}, results.criterion
    if "extra_agreement" in built:
        drawn["extra_agreement"] = ranking_figures.fig_agreement(built["extra_agreement"], own)
    if "extra_calibration_size" in built:
        drawn["extra_calibration_size"] = ranking_figures.fig_calibration_size(built["extra_calibration_size"], own)
    if {"extra_criteria", "table1_pruning"} <= set(built) and built["extra_criteria"].score.notna().any():
        frames = built["extra_criteria"], built["table1_pruning"], built.get("extra_criteria_tests")
        drawn["extra_criteria"] = ranking_figures.fig_criteria(*frames, own)
    return drawn


def contents(made: Run, results, built: dict, drawn: dict, notebooks: list[str]) -> dict:
    """All that index.html and README.md say, as data."""
    parts, brief = [], built.get("table4_efficiency")
    for stem, (label, question, find) in PARTS.items():
        if stem in built or stem in drawn:
            frame = tables.readable(built[stem]) if stem in built else None
            part = {"stem": stem, "label": label, "question": question, "said": find(results) if find else []}
            part |= {"frame": frame, "caption": f"{label}: {CAPTIONS.get(stem, CAPTION)}"}
            part["fold"] = len(frame) if frame is not None and is_long(stem, frame) else 0
            parts.append(part | {"image": picture(drawn.get(stem)), "table": table(frame, part["caption"])})
    brief = None if brief is None else tables.readable(brief[BRIEF])
    facts = [(name, note["key"][:12], note.get("seconds"), note.get("cached")) for name, note in made.stages.items()]
    last, told, data = list(made.stages.values())[-1], parameters(made), results.data_report
    return {
        "title": f"derm_compress, run {made.name}",
        "again": f"make report RUN={made.name}",
        "question": QUESTION,
        "headline": findings.headline(results),
        "about": findings.about(results),
        "limits": findings.photographs(data, told.get("model")) if data else [],
        "first": picture(drawn.get("score_vs_blocks")),
        "brief": table(brief, "The six ways of Table 4, with 95 % intervals"),
        "parts": parts,
        "notebooks": notebooks,
        "noted": findings.findings_data(data, told.get("model")) if data else [],
        "data": as_yaml(data or {}),
        "stages": table(pd.DataFrame(facts, columns=["stage", "key", "seconds", "from the store"]), "Stages"),
        "parameters": as_yaml(told),
        "provenance": as_yaml(made.info | {k: last.get(k) for k in ("git", "environment")}),
    }


def is_long(stem: str, frame: pd.DataFrame) -> bool:
    return stem.startswith("extra") and len(frame) > LONG_TABLE


def as_yaml(value) -> str:
    """Nested notes as people read them; long lists are cut."""
    if isinstance(value, dict):
        value = {k: v[:50] + ["…"] if isinstance(v, list) and len(v) > 50 else v for k, v in value.items()}
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def parameters(made: Run) -> dict:
    return {name: value for note in made.stages.values() for name, value in note.get("parameters", {}).items()}


def record(made: Run) -> dict:
    """run.json: what the run was, its stages, its environment."""
    stages = {name: {key: note.get(key) for key in ("key", "seconds", "cached")} for name, note in made.stages.items()}
    return {"run_info": made.info, "stages": stages, "environment": list(made.stages.values())[-1].get("environment")}


def table(frame: pd.DataFrame | None, caption: str) -> Markup | None:
    """An HTML table in its own scroll box; every cell is escaped."""
    if frame is None or frame.empty:
        return None
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(name) for name in frame.columns)
    rows = [
        Markup("").join(Markup(LONG if len(str(cell)) > 40 else "<td>{}</td>").format(cell) for cell in row)
        for row in frame.to_numpy()
    ]
    body = Markup("").join(Markup("<tr>{}</tr>\n").format(row) for row in rows)
    whole = Markup("<table><caption><span>{}</span></caption><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table>")
    return Markup("<div class=wide tabindex=0>{}</div>").format(whole.format(caption, head, body))


def picture(drawing: figures.Drawing | None) -> Markup | None:
    if drawing is None:
        return None
    data = base64.b64encode(drawing.png()).decode()
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(Markup(data), drawing.finding)


def page(**view) -> str:
    """templates/report.html with everything escaped that is not Markup."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("derm_compress", "templates")
    return Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("report.html").render(**view)


def readme(view: dict) -> str:
    """The report for a repository browser."""
    lines = [f"# {inert(view['title'])}", view["question"], f"**{inert(view['headline'])}**", *view["limits"]]
    lines += ["![Score against blocks removed](figures/score_vs_blocks.png)"] if view["first"] else []
    lines += [inert(text) for text in view["about"]]
    for part in view["parts"]:
        lines += [f"## {part['label']}. {part['question']}", *(f"- {inert(text)}" for text in part["said"])]
        lines += [f"![{part['label']}](figures/{part['stem']}.png)"] if part["image"] else []
        if part["frame"] is not None:
            shown = [part["caption"], to_markdown(part["frame"])]
            summary = f"<details><summary>All {part['fold']} rows</summary>"
            lines += [summary, *shown, "</details>"] if part["fold"] else shown
            lines += [f"[csv](tables/{part['stem']}.csv)"]
    lines += [f"All of it again: `{view['again']}`", "## Notebooks", *(f"- [{n}]({n})" for n in view["notebooks"])]
    lines += ["Provenance: [run.json](run.json), and the last section of [index.html](index.html).", ""]
    return "\n\n".join(lines)[:-1]


def to_markdown(frame: pd.DataFrame) -> str:
    """The readable table for a repository browser."""
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "".join("| " + " | ".join(inert(cell) for cell in row) + " |\n" for row in rows)


def inert(text) -> str:
    """Text that Markdown shows as it is, whatever it says."""
    marks = {"|": "\\|", "`": "&#96;", "[": "&#91;", "\n": " ", "*": "\\*", "_": "\\_", "$": "\\$"}
    return html.escape(str(text)).translate(str.maketrans(marks))


def render_index(root: Path) -> Path:
    """reports/index.html: the same table of every run that has a report."""
    rows = []
    for path in sorted(Path(root, "reports").glob("*/run.json")):
        file = path.parent / "tables" / "table4_efficiency.csv"
        seconds = json.loads(path.read_text("utf-8"))["run_info"].get("seconds")
        frame = pd.read_csv(file) if file.exists() else pd.DataFrame([{}])
        link = Markup('<a href="{0}/index.html">{0}</a>').format(path.parent.name)
        frame = tables.readable(frame.reindex(columns=[*BRIEF, *tables.TIMES[:3]]))
        frame.insert(0, "run", pd.Series([link] * len(frame), dtype=object))
        rows.append(frame.assign(**{"run, s": str(seconds)}))
    runs = pd.concat(rows).fillna("") if rows else None
    shown = table(runs, "Table 4 of every run")
    target = Path(root, "reports", "index.html")
    body = shown or "No run has a report yet."
    with atomic(target) as part:
        part.write_text(page(title="derm_compress: all runs", question=QUESTION, body=body), "utf-8")
    return target
