"""A study as jobs for a cluster: a Snakefile, or a script that submits to Slurm. No torch.

A job for each result, by this runner's `--only`; for each run one more, which takes the results of
all its stages and reports; the last one compares the runs.
"""

import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.files import digest, project_root, shown
from derm_compress.study.grid import as_text
from derm_compress.study.jobs import Job, jobs, result_of
from derm_compress.study.params import read_notebooks
from derm_compress.study.plan import Plan
from derm_compress.study.run import plan_runs

SLACK = 2  # times what a result took where it was measured, and five minutes more


@dataclass(frozen=True)
class Rule:
    """A job: its words, what it leaves, the rules before it, what it needs of a machine."""

    name: str
    words: tuple[str, ...]
    output: str
    key: str
    needs: tuple["Rule", ...] = ()
    log: str = ""
    threads: int = 1
    resources: dict[str, int] = field(default_factory=dict)  # gpu, gpu_gib, runtime in minutes


def emit(kind: str, params_files: Sequence[Path], sets: dict[str, str], machine=None) -> str:
    """The text, for `snakemake` or `slurm`, that computes the runs of parameter files.

    machine: a preflight.Machine, for which memory is planned; else that at hand, or Kaggle's.
    """
    if kind not in WRITERS:
        raise DermError(f"emit: {kind} is unknown; write snakemake or slurm")
    root = project_root()
    notebooks = read_notebooks(root)
    asked = [(p, plan) for p in params_files for plan in plan_runs(p, sets, root, notebooks)]
    words = ["emit", kind, *map(str, params_files), *as_set(sets)]
    made = f"# Made by: {shlex.join(['python', '-m', 'derm_compress', *words])}\n"
    return made + WRITERS[kind](rules(asked, sets, machine))


def rules(asked: Sequence[tuple[Path, Plan]], sets: dict[str, str], machine=None) -> list[Rule]:
    """The rules in an order in which they could run."""
    plans = [plan for _, plan in asked]
    commands = {plan.folder: command(path, plan, sets) for path, plan in asked}
    found: dict[Path, Rule] = {}
    every = dict.fromkeys(stage for plan in plans for stage in plan.notebooks)
    for place, job in jobs(plans, list(every)).items():
        needs = tuple(found[before] for before in job.needs)
        found[place] = rule(job, commands[job.plan.folder], needs, machine)
    reports = []
    for plan in plans:
        needs = tuple(found[result_of(plan, stage)] for stage in plan.notebooks)
        name, words = f"report_{re.sub('[^A-Za-z0-9_]', '_', plan.run)}", commands[plan.folder]
        note = shown(plan.folder / "rendered.json")
        reports.append(Rule(name, words, note, digest(plan.keys), needs))
    index = shown(plans[0].root / "reports" / "index.html")
    words = ("compare", *(plan.run for plan in plans))
    key = digest([report.key for report in reports])
    return [*found.values(), *reports, Rule("compare", words, index, key, tuple(reports))]


def rule(job: Job, words: tuple[str, ...], needs: tuple[Rule, ...], machine) -> Rule:
    """The rule of a stage's result; its notebook is the log, its run's note what it leaves."""
    plan, stage = job.plan, job.stage
    resources = {}
    if plan.values.get("device") == "cuda":
        from derm_compress.study import preflight

        gpus, gib = preflight.share(plan, stage, machine)
        resources = {"gpu": gpus, "gpu_gib": math.ceil(gib)} if gpus else {}
    if job.seconds:
        resources["runtime"] = math.ceil(SLACK * job.seconds / 60) + 5
    return Rule(
        name=f"stage{stage}_{job.key[:8]}",
        words=(*words, "--only", stage),
        output=shown(plan.folder / f"{stage}.json"),
        key=job.key,
        needs=needs,
        log=shown(plan.executed(stage)),
        threads=plan.parameters(stage).get("processes", 1),
        resources=resources,
    )


def command(path: Path, plan: Plan, sets: dict[str, str]) -> tuple[str, ...]:
    """The runner's words for one run of a file: what the grid sweeps is set."""
    pinned = {name: as_text(value) for name, value in plan.swept.items()}
    return "run", str(path), *as_set(sets | pinned)


def as_set(texts: dict[str, str]) -> list[str]:
    said = " ".join(f"{name}={text}" for name, text in texts.items())
    return ["--set", said] if said else []


def snakefile(made: Sequence[Rule]) -> str:
    """Inputs are `ancient`, since keys say what is outdated: they are parameters of the rules."""
    outputs = ",\n        ".join(f'"{one.output}"' for one in made)
    parts = [
        f'PYTHON = config.get("python", {sys.executable!r})\n',
        f"localrules: all, compare\n\nrule all:\n    input:\n        {outputs}\n",
    ]
    for one in made:
        lines = [f"rule {one.name}:"]
        if one.needs:
            before = ", ".join(f'ancient("{need.output}")' for need in one.needs)
            lines.append(f"    input: {before}")
        lines += [f'    output: "{one.output}"', f'    params: key="{one.key}"']
        if one.log:
            lines.append(f'    log: "{one.log}"')
        lines.append(f"    threads: {one.threads}")
        if one.resources:
            told = ", ".join(f"{name}={value}" for name, value in one.resources.items())
            lines.append(f"    resources: {told}")
        words = shlex.join(one.words).replace("{", "{{").replace("}", "}}")
        shell = "{PYTHON:q} -m derm_compress " + words
        lines.append(f"    shell: {shell!r}\n")
        parts.append("\n".join(lines))
    return "\n".join(parts)


def sbatch(made: Sequence[Rule]) -> str:
    """A job starts when those before it have ended well; where one fails those after it go."""
    logs = Path(made[0].output).parents[2] / "slurm"
    lines = [
        "# bash this in the project's folder; SBATCH_PARTITION, SBATCH_ACCOUNT say where it goes.",
        "set -euo pipefail",
        f"PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}",
        f"mkdir -p {shlex.quote(str(logs))}",
    ]
    for one in made:
        words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", f"--job-name={one.name}"]
        words += [f"--output={logs}/%x-%j.txt", f"--cpus-per-task={one.threads}"]
        if gpus := one.resources.get("gpu"):
            words.append(f"--gpus={gpus}")
        if minutes := one.resources.get("runtime"):
            words.append(f"--time={minutes}")
        said = shlex.join(words)
        if one.needs:
            said += " --dependency=afterok:" + ":".join(f"${need.name}" for need in one.needs)
        run = f"-m derm_compress {shlex.join(one.words)}"
        lines.append(f'{one.name}=$({said} --wrap="$PYTHON "{shlex.quote(run)})')
    return "\n".join([*lines, "squeue --me", ""])


WRITERS = {"snakemake": snakefile, "slurm": sbatch}
