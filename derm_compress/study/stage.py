"""A stage as its notebook sees it: validated parameters, inputs, results that are kept as they are made (no torch)."""

import ast
import os
import time
from collections import namedtuple
from datetime import UTC, datetime
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.files import (
    Journal,
    atomic,
    public,
    read_frame,
    read_json,
    write_frame,
    write_json,
)
from derm_compress.progress import clock
from derm_compress.study import store
from derm_compress.study.params import (
    Notebook,
    check,
    known_parameters,
    nearest,
    read_notebooks,
    read_params,
)
from derm_compress.study.plan import (
    PLACES,
    Plan,
    environment,
    git_state,
    make_plan,
    project_root,
    settle,
)


class Stage:
    """A stage under way: what it makes is kept at once, and read instead of made when it is there already."""

    def __init__(self, name: str, plan: Plan, history: list):
        self.name, self.key, self.store, self._plan = name, plan.keys[name], plan.store, plan
        self._history, self._seen, self._begun = history, max(len(history) - 1, 0), time.monotonic()
        values, self.root = plan.parameters(name), plan.root
        self.p = namedtuple("Parameters", values)(**values)  # noqa: PYI024
        self._folder, self.finished = self.store.begin(name, self.key)

    def input(self, stage: str) -> Path:
        """The folder of an upstream stage's finished artifact of this run."""
        if stage not in self._plan.graph[self.name]:
            raise DermError(
                f"{self.name}: {stage} is no earlier stage that its cells name as a string"
            )
        if not self.store.ready(stage, self._plan.keys[stage]):
            raise DermError(
                f"{self.name} needs {stage} with the same parameters: run notebooks/{stage}.ipynb first"
            )
        return self.store.entry(stage, self._plan.keys[stage])

    def ref(self, name: str) -> str:
        """How a recipe refers to a file or folder of this stage: stage/key/name."""
        return f"{self.name}/{self.key}/{name}"

    def frame(self, name: str, make, *args, **kwargs):
        """make(*args, **kwargs) -> DataFrame, kept as <name>.parquet without index, and read back."""
        path = self._keep(f"{name}.parquet", lambda path: write_frame(path, make(*args, **kwargs)))
        return read_frame(path)

    def json(self, name: str, make, *args, **kwargs):
        """The same for JSON values, kept as <name>.json."""
        return read_json(
            self._keep(f"{name}.json", lambda path: write_json(path, make(*args, **kwargs)))
        )

    def folder(self, name: str, make, *args, **kwargs) -> Path:
        """make(path, *args, **kwargs) fills an empty folder, which is kept as <name>/ when it is done."""

        def fill(path):
            with atomic(path) as part:
                part.mkdir()
                make(part, *args, **kwargs)

        return self._keep(name, fill)

    def _keep(self, file: str, make) -> Path:
        path = self._folder / file
        if not path.exists():
            self._check_own(file)
            begun = time.monotonic()
            make(path)
            seconds = time.monotonic() - begun
            self.measure(Path(file).stem if "." in file else file, {"seconds": round(seconds, 3)})
            if seconds >= 1:
                print(f"{file} made in {clock(seconds)}", flush=True)
        return path

    def journal(self, name: str) -> Journal:
        """An append-only log of the items inside a long step; empty and not kept once the stage is finished."""
        if self.finished:
            return Journal()
        self._check_own(name)
        return Journal(self._folder / "journal" / f"{name}.jsonl")

    def scratch(self, name: str) -> Path:
        """A folder for checkpoints inside a long step: kept over a kill, gone once the stage is finished."""
        path = self._folder / "journal" / name
        if not self.finished:
            path.mkdir(parents=True, exist_ok=True)
        return path

    def measure(self, name: str, value, *args, **kwargs):
        """Keeps what differs from run to run (seconds, memory) apart from the results and returns what is kept: a
        dict, a DataFrame, or a function that makes one of them and is called only if there is nothing yet."""
        before = self._measured(self._folder, name)
        if self.finished or (callable(value) and before is not None):
            return before
        value = value(*args, **kwargs) if callable(value) else value
        if isinstance(value, dict):
            path = self._folder / "measured.json"
            write_json(
                path, (read_json(path) if path.exists() else {}) | {name: (before or {}) | value}
            )
        else:
            write_frame(self._folder / "measured" / f"{name}.parquet", value)
        return self._measured(self._folder, name)

    def measured(self, stage: str, name: str):
        """What a stage measured under a name: this one's, or an upstream stage's."""
        value = self._measured(self._folder if stage == self.name else self.input(stage), name)
        if value is None:
            raise DermError(f"{stage} measured nothing under the name {name}")
        return value

    @staticmethod
    def _measured(folder: Path, name: str):
        frame, notes = folder / "measured" / f"{name}.parquet", folder / "measured.json"
        if frame.exists():
            return read_frame(frame)
        return read_json(notes).get(name) if notes.exists() else None

    def _check_own(self, what: str) -> None:
        """Results are filed under the key of the saved notebook, so only cells as they are saved may make them."""
        if self.finished:
            raise DermError(
                f"{self.name} is finished without {what}: cells tagged `figure` cannot add results"
            )
        saved = {_syntax(text) for text in self._plan.notebooks[self.name].code(figures=True)}
        for text in self._history[self._seen :]:
            if text.strip() and _syntax(text) not in saved:
                line = text.strip().splitlines()[0]
                raise DermError(
                    f"{self.name}: `{line}` is not in the saved notebook: save it, restart and run all"
                )

    def finish(self) -> None:
        """Makes the work the finished artifact, notes it for the run, and says what it holds."""
        cached = self.finished
        if not cached:
            self._check_own(store.MANIFEST)
            made = {
                "seconds": round(time.monotonic() - self._begun, 1),
                "environment": environment(),
            }
            made |= {
                "git": git_state(self._plan.root),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self.store.commit(self.name, self.key, made)
            self._folder, self.finished = self.store.entry(self.name, self.key), True
        self._plan.point(self.name, cached=cached)
        manifest = self.store.manifest(self.name, self.key)
        state = "from the store" if cached else f"finished in {clock(manifest['made']['seconds'])}"
        print(
            f"{self.name} {state}: {len(manifest['files'])} files, results {manifest['results'][:12]}"
        )

    def provenance(self) -> str:
        """Where the stage's results come from, one fact a line."""
        plan, kept = self._plan, len([*self._folder.iterdir()])
        state = "in the store" if self.finished else "to be continued" if kept else "to be computed"
        git, machine = git_state(plan.root), environment()
        rows = {
            "stage": f"{self.name}, key {self.key[:12]}, {state}",
            "run": plan.run,
            "parameters": ", ".join(
                f"{k}={public(v)!r}" for k, v in self.p._asdict().items() if k not in PLACES
            ),
            "inputs": ", ".join(f"{name} {plan.keys[name][:12]}" for name in plan.graph[self.name])
            or "none",
            "code": f"commit {(git['commit'] or 'unknown')[:12]}{', with changes' if git['dirty'] else ''}",
            "machine": f"{machine['platform']}, {machine['cores']} cores, Python {machine['python']}",
            "versions": ", ".join(
                f"{name} {version or 'absent'}" for name, version in machine["versions"].items()
            ),
        }
        return "\n".join(f"{name:10}  {text}" for name, text in rows.items())


def _syntax(text: str) -> str:
    try:
        return ast.dump(ast.parse(text))
    except SyntaxError:
        return text


def injected_values(history: list) -> dict:
    """The values that papermill put into the cell it adds after the parameters; {} outside of papermill."""
    cell = next(
        (text for text in reversed(history) if text.lstrip().startswith("# Parameters\n")), ""
    )
    try:
        return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell).body}
    except (AttributeError, ValueError) as error:
        raise DermError(
            "papermill's parameters may be numbers, texts, booleans and lists of these"
        ) from error


def resolve(name: str, namespace: dict, notebooks: dict[str, Notebook]) -> dict:
    """Values of all parameters, checked: papermill's over the environment file's over the parameters cell's.

    The file that DERM_COMPRESS_PARAMS names counts while `run` has its default, or if it is the file of this very run.
    """
    known = known_parameters(notebooks)
    cell = {
        k: namespace.get(k, parameter.default) for k, parameter in notebooks[name].schema.items()
    }
    cell = check(cell, known, f"notebooks/{name}.ipynb")
    injected = check(
        injected_values(namespace.get("In", [])), known, f"papermill's parameters of {name}"
    )
    path, run = os.environ.get("DERM_COMPRESS_PARAMS"), injected.get("run", cell.get("run"))
    outside = read_params(Path(path), known) if path else {}
    return cell | (outside if run in (known["run"].default, outside.get("run")) else {}) | injected


def start_stage(name: str, namespace: dict, *, root: Path | None = None) -> Stage:
    """Begins a stage right after its parameters cell; `namespace` is the notebook's globals(). Prints provenance."""
    settle()
    root = project_root(root)
    notebooks = read_notebooks(root)
    if name not in notebooks:
        raise DermError(f"no notebooks/{name}.ipynb; {nearest(name, notebooks)}")
    plan = make_plan(root, notebooks, resolve(name, namespace, notebooks))
    plan.adopt()
    stage = Stage(name, plan, namespace.get("In", []))
    print(stage.provenance(), flush=True)
    if plan.values.get("device") == "cuda" and not stage.finished:
        from derm_compress.study import preflight  # only here: it asks the GPU

        preflight.foresee(plan, refuse=True)
    return stage
