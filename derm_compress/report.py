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
from markupsafe import Markup

from derm_compress import figures, findings, judge, quotes, tables
from derm_compress.errors import DermError
from derm_compress.notebook_html import cleaner, notebook_body

QUESTION = "How far can a multimodal medical model be compressed, and what does it cost?"
CAPTION = "score with its 95 % interval, n answers; what the paper has stands beside it"
BRIEF = ["setting", "score", "score_lo", "score_hi", "paper_score", "vram_gib_7b", "paper_vram"]
LONG = "<td class=long>{}</td>"
PARTS = {  # in the paper's order: label, question, and what the numbers say to it
    "fig1_pipeline": ("Figure 1", "The pipeline", None),
    "fig2_block_removal": ("Figure 2", "Which blocks are tried, and which go?", None),
    "fig3_layer_importance": ("Figure 3", "How much does each block matter?", findings.findings_importance),
    "fig4_activations": ("Figure 4", "Where do activations stand out?", findings.findings_activations),
    "table1_pruning": ("Table 1", "What does pruning alone cost, at each depth?", findings.findings_pruning),
    "extra_criteria": ("Beside Table 1", "Is the paper's criterion better than its rivals?", None),
    "table2_sft": ("Table 2", "What does SFT heal, beyond what it gives the unpruned model?", findings.findings_sft),
    "table3_quantization": ("Table 3", "What do fewer bits cost, by method?", findings.findings_quantization),
    "table4_efficiency": ("Table 4", "What does the whole pipeline gain in memory and time?", None),
    "pareto": ("Beside Table 4", "What is the best score for the memory?", None),
    "table5_ablation": (
        "Table 5",
        "Which part of the pipeline matters?",
        lambda r: findings.findings_evaluation(r)[1:],
    ),
    "extra_baselines": ("Beside Table 5", "Does the score come from fine-tuning and from seeing?", None),
    "fig5_case_studies": ("Figure 5", "What do the models say?", None),
    "fig6_judge_prompt": ("Figure 6", "How are answers judged?", None),
    "fig7_iterative_pruning": ("Figure 7", "How do answers change while blocks go?", None),
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
    built = tables.build(results)
    drawn = draw(results, built, {stage: list(note["upstream"]) for stage, note in made.stages.items()})
    files = {"run.json": json.dumps(record(made), indent=1, sort_keys=True, ensure_ascii=False) + "\n"}
    for stem, frame in built.items():
        files[f"tables/{stem}.csv"] = tables.to_csv(frame)
        files[f"tables/{stem}.md"] = to_markdown(tables.readable(frame))
    for path in sorted((made.folder / "notebooks").glob("[0-9]*.ipynb")):
        body = Markup(notebook_body(path, clean))
        files[f"notebooks/{path.stem}.html"] = page(title=path.stem.replace("_", " "), body=body, back=True)
    view = contents(made, results, built, drawn, [name for name in files if name.startswith("notebooks/")])
    files |= {"index.html": page(**view), "README.md": readme(view, built)}
    return replace_folder(root / "reports" / run, files, drawn) / "index.html"


def replace_folder(target: Path, files: dict[str, str], drawn: dict[str, figures.Drawing]) -> Path:
    """Fill a temporary folder beside the target and swap them: a report is whole or the one before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
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


def draw(results: tables.Results, built: dict, graph: dict[str, list[str]]) -> dict[str, figures.Drawing]:
    """{stem: drawing} of every figure that the results suffice for."""
    n, said = results.operating, set() if results.answers is None else set(results.answers.variant)
    depths = {int(n): tables.variant_id(int(n)) for n in built["table1_pruning"].blocks_removed} if built else {}
    cases = {"Original": tables.variant_id(0), "Pruned + quantized": tables.variant_id(n, method="awq")}
    cases["Pruned + SFT + quantized"] = tables.variant_id(n, healed=True, method="awq")
    drawn = {"fig1_pipeline": figures.fig1_pipeline(graph, outcomes(results, built))}
    drawn["fig6_judge_prompt"] = quotes.fig6_judge_prompt(judge.explanation())
    if plan := (results.plans or {}).get(results.criterion):
        drawn["fig2_block_removal"] = figures.fig2_block_removal(plan, n)
    if results.scores is not None:
        drawn["fig3_layer_importance"] = figures.fig3_layer_importance(results.scores, n)
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


def outcomes(results: tables.Results, built: dict) -> dict[str, str]:
    """What came out of a stage, in a few words for Figure 1."""
    said, names = {}, {"02_finetune": {}, "04_pruning": {}, "05_sft": {"healed": True}}
    names["07_quantization"] = {"healed": True, "method": "awq"}
    if results.items is not None:
        said["01_data"] = ", ".join(f"{count} {split}" for split, count in results.items.split.value_counts().items())
    for row in built["table4_efficiency"].dropna(subset=["score"]).itertuples() if built else ():
        for stage, how in names.items():
            if row.variant == tables.variant_id(results.operating if stage > "03" else 0, **how):
                said[stage] = f"{row.variant}: {row.score:.1f} %"
    return said


def contents(made: Run, results, built: dict, drawn: dict, notebooks: list[str]) -> dict:
    """All that index.html and README.md say, as data."""
    parts, shown = [], {stem: tables.readable(frame) for stem, frame in built.items()}
    for stem, (label, question, find) in PARTS.items():
        if stem in built or stem in drawn:
            part = {"stem": stem, "label": label, "question": question, "said": find(results) if find else []}
            part |= {"image": picture(drawn.get(stem)), "table": table(shown.get(stem), f"{label}: {CAPTION}")}
            parts.append(part)
    brief = built.get("table4_efficiency")
    facts = [(name, note["key"][:12], note.get("seconds"), note.get("cached")) for name, note in made.stages.items()]
    last = list(made.stages.values())[-1]
    return {
        "title": f"derm_compress, run {made.name}",
        "again": f"make report RUN={made.name}",
        "question": QUESTION,
        "headline": findings.headline(results),
        "first": picture(drawn.get("score_vs_blocks")),
        "brief": None
        if brief is None
        else table(tables.readable(brief[BRIEF]), "The six ways of Table 4, with 95 % intervals"),
        "parts": parts,
        "notebooks": notebooks,
        "noted": findings.findings_data(results.data_report) if results.data_report else [],
        "data": table(flat(results.data_report or {}), "What stage 01 notes of the data"),
        "stages": table(strings(facts, ["stage", "key", "seconds", "from the store"]), "Stages: seconds to compute"),
        "parameters": table(flat(parameters(made)), "Parameters of all stages"),
        "provenance": table(flat(made.info | {k: last.get(k) for k in ("git", "environment")}), "Where it comes from"),
    }


def parameters(made: Run) -> dict:
    return {name: value for note in made.stages.values() for name, value in note.get("parameters", {}).items()}


def record(made: Run) -> dict:
    """run.json: what the run was, its stages, its environment."""
    stages = {name: {key: note.get(key) for key in ("key", "seconds", "cached")} for name, note in made.stages.items()}
    return {"run_info": made.info, "stages": stages, "environment": list(made.stages.values())[-1].get("environment")}


def strings(rows, columns) -> pd.DataFrame:
    return pd.DataFrame([["" if cell is None else str(cell) for cell in row] for row in rows], columns=columns)


def flat(value, path: str = "") -> pd.DataFrame:
    """Nested JSON as a table of two columns; long lists are cut."""
    rows = []
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            rows += flat(inner, f"{path}{name}: ").to_numpy().tolist()
        elif isinstance(inner, list):
            told = [": ".join(map(str, one.values())) if isinstance(one, dict) else str(one) for one in inner[:50]]
            rows.append((f"{path}{name}", ", ".join([*told, *["…"] * (len(inner) > 50)]) or "none"))
        else:
            rows.append((f"{path}{name}", inner))
    return strings(rows, ["what", "value"])


def table(frame: pd.DataFrame | None, caption: str) -> Markup | None:
    """An HTML table in its own scroll box; every cell is escaped."""
    if frame is None or frame.empty:
        return None
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(name) for name in frame.columns)
    rows = [
        Markup("").join(Markup(LONG if len(cell) > 40 else "<td>{}</td>").format(cell) for cell in row)
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


def readme(view: dict, built: dict) -> str:
    """The report for a repository browser."""
    lines = [f"# {inert(view['title'])}", view["question"], f"**{inert(view['headline'])}**"]
    if view["first"]:
        lines.append("![Score against blocks removed](figures/score_vs_blocks.png)")
    for part in view["parts"]:
        lines += [f"## {part['label']}. {part['question']}", *(f"- {inert(text)}" for text in part["said"])]
        lines += [f"![{part['label']}](figures/{part['stem']}.png)"] if part["image"] else []
        if part["stem"] in built:
            lines += [to_markdown(tables.readable(built[part["stem"]])), f"[csv](tables/{part['stem']}.csv)"]
    lines += [
        f"All of it again: `{view['again']}`",
        "## Notebooks",
        *(f"- [{name}]({name})" for name in view["notebooks"]),
    ]
    return (
        "\n\n".join(lines + ["Provenance: [run.json](run.json), and the last section of [index.html](index.html)."])
        + "\n"
    )


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
        frame = tables.readable(frame.reindex(columns=[*BRIEF, "decode_ms_per_token"]))
        frame.insert(0, "run", pd.Series([link] * len(frame), dtype=object))
        rows.append(frame.assign(**{"wall time, s": str(seconds)}))
    runs = pd.concat(rows).fillna("") if rows else None
    shown = table(runs, "Table 4 of every run")
    target = Path(root, "reports", "index.html")
    part = target.with_suffix(".part")
    body = shown or "No run has a report yet."
    part.write_text(page(title="derm_compress: all runs", question=QUESTION, body=body), "utf-8")
    os.replace(part, target)
    return target
