"""A stage as its notebook sees it: parameters, inputs, results kept as they are made (no torch)."""

import ast
import inspect
import os
import time
import warnings
from collections import namedtuple
from datetime import UTC, datetime
from pathlib import Path

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.progress import clock, say
from derm_compress.study import batches, params, store
from derm_compress.study.plan import Plan, environment, git_state, make_plan, settle


class Stage:
    """A stage under way: what it makes is kept at once, and read instead where it is there.

    What a step takes by keyword and a call leaves out, the stage gives: its parameter of that
    name, its `store`, a `journal` or `scratch` folder of the result's name to go on from.
    """

    def __init__(self, name: str, plan: Plan, history: list):
        self.name, self.key = name, plan.keys[name]
        self.root, self.store, self._plan = plan.root, plan.store, plan
        self._history, self._seen = history, max(len(history) - 1, 0)
        self._begun = time.monotonic()
        self._folder, self.finished = self.store.begin(name, self.key)
        values = batches.of_stage(plan, name, measure=not self.finished)
        self.p = namedtuple("Parameters", values)(**values)  # noqa: PYI024
        self._lacking: dict[str, int] = {}

    def input(self, stage: str) -> Path:
        """The folder of an earlier stage's finished artifact, of this run; name it literally."""
        if stage not in self._plan.graph[self.name]:
            said = f'its saved cells say stage.input("{stage}") nowhere, or it is no earlier stage'
            raise DermError(f"{self.name} does not read {stage}: {said}")
        if not self.store.ready(stage, self._plan.keys[stage]):
            advice = f"run notebooks/{stage}.ipynb first"
            raise DermError(f"{self.name} needs {stage} with the same parameters: {advice}")
        return self.store.entry(stage, self._plan.keys[stage])

    def inputs(self) -> dict[str, Path]:
        """The folders of all earlier stages, by stage."""
        return {stage: self.input(stage) for stage in self._plan.graph[self.name]}

    @property
    def folders(self) -> dict[str, Path]:
        """The folders of the stages that it reads, and its own, by stage: what a report reads."""
        return self.inputs() | {self.name: self._folder}

    def ref(self, name: str) -> str:
        """How a recipe refers to a file or folder of this stage: stage/key/name."""
        return f"{self.name}/{self.key}/{name}"

    def frame(self, name: str, make, *args, lacking=None, **kwargs):
        """make(*args, **kwargs) -> DataFrame, kept as <name>.parquet without index, read back.

        lacking: counts what a kept frame lacks; while there is any, every run makes it anew, even
        of a finished stage.
        """
        path = self._folder / f"{name}.parquet"

        def write(path):
            files.write_frame(path, make(*args, **self._given(name, make, kwargs)))

        anew = lacking and not self.finished and path.exists() and lacking(files.read_frame(path))
        frame = files.read_frame(self._keep(path.name, write, anew=bool(anew)))
        if lacking:
            self._lacking[name] = lacking(frame)
        return frame

    def json(self, name: str, make, *args, **kwargs):
        """The same for JSON values, kept as <name>.json."""

        def write(path):
            files.write_json(path, make(*args, **self._given(name, make, kwargs)))

        return files.read_json(self._keep(f"{name}.json", write))

    def folder(self, name: str, make, *args, **kwargs) -> Path:
        """make(path, *args, **kwargs) fills an empty folder, kept as <name>/ when it is done."""

        def fill(path):
            with files.atomic(path) as part:
                part.mkdir()
                make(part, *args, **self._given(name, make, kwargs))

        return self._keep(name, fill)

    def _given(self, name: str, make, kwargs: dict) -> dict:
        """A step's keywords: those of the call, and what the stage has of the others."""
        known = self.p._asdict() | {"store": self.store}
        made = {"journal": self.journal, "scratch": self.scratch}
        found = {}
        for key in set(_keywords(make)) - set(kwargs):
            if key in made:
                found[key] = made[key](name)
            elif key in known:
                found[key] = known[key]
        return found | kwargs

    def _keep(self, file: str, make, *, anew: bool = False) -> Path:
        path = self._folder / file
        if anew or not path.exists():
            self._check_own(file)
            begun = time.monotonic()
            make(path)
            if (seconds := time.monotonic() - begun) >= 1:
                say(f"{file} made in {clock(seconds)}")
        return path

    def journal(self, name: str) -> files.Journal:
        """A log of the items inside a long step; empty and not kept once the stage is finished."""
        if self.finished:
            return files.Journal()
        self._check_own(name)
        return files.Journal(self._folder / "journal" / f"{name}.jsonl")

    def scratch(self, name: str) -> Path:
        """A folder for checkpoints: kept over a kill, gone once the stage is finished."""
        path = self._folder / "journal" / name
        if not self.finished:
            path.mkdir(parents=True, exist_ok=True)
        return path

    def measure(self, name: str, make, *args, **kwargs):
        """`frame` of what differs from run to run (seconds, memory): kept apart from results."""

        def write(path):
            files.write_frame(path, make(*args, **self._given(name, make, kwargs)))

        return files.read_frame(self._keep(f"measured/{name}.parquet", write))

    def _check_own(self, what: str) -> None:
        """Results have the key of the saved notebook, so only its cells may make them."""
        if self.finished:
            why = "cells tagged `figure` cannot add results"
            raise DermError(f"{self.name} is finished without {what}: {why}")
        saved = {_syntax(text) for text in self._plan.notebooks[self.name].code(figures=True)}
        for text in self._history[self._seen :]:
            if text.strip() and _syntax(text) not in saved:
                line = text.strip().splitlines()[0]
                advice = "save it, restart and run all"
                raise DermError(f"{self.name}: `{line}` is not in the saved notebook: {advice}")

    def finish(self) -> None:
        """Makes the work the finished artifact, notes it for the run, and says what it holds."""
        cached = self.finished
        if not cached:
            self._check_own(store.MANIFEST)
            made = {
                "seconds": round(time.monotonic() - self._begun, 1),
                "environment": environment(),
                "git": git_state(self.root),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            if lacking := {name: count for name, count in self._lacking.items() if count}:
                made["lacking"] = lacking
            self.store.commit(self.name, self.key, made)
            self._folder, self.finished = self.store.entry(self.name, self.key), True
        self._plan.point(self.name, cached=cached)
        manifest = self.store.manifest(self.name, self.key)
        state = "from the store"
        if not cached:
            state = f"finished in {clock(manifest['made']['seconds'])}"
        told = f"{len(manifest['files'])} files, results {manifest['results'][:12]}"
        say(f"{self.name} {state}: {told}")

    def provenance(self) -> str:
        """Where the stage stands, in three lines; in a fourth what differs from the defaults."""
        plan = self._plan
        state = "to be computed"
        if self.finished:
            state = "in the store"
        elif any(self._folder.iterdir()):
            state = "to be continued"
        inputs = [f"{name} {plan.keys[name][:8]}" for name in plan.graph[self.name]]
        machine, schema = environment(), plan.notebooks[self.name].schema
        lines = [
            f"{self.name}  run {plan.run}, key {self.key[:12]}, {state}",
            f"reads  {', '.join(inputs) or 'nothing'}",
            f"on  {machine['gpu'] or machine['processor']}, Python {machine['python']}",
        ]
        changed = [
            f"{name}={files.public(value)!r}"
            for name, value in plan.counted(self.name).items()
            if value != schema[name].default
        ]
        return "\n".join([*lines, *([f"with  {', '.join(changed)}"] if changed else [])])


def _keywords(make) -> list[str]:
    """What a function takes by keyword alone; nothing is known of some built-in ones."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:
        return []
    return [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]


def _syntax(text: str) -> str:
    try:
        return ast.dump(ast.parse(text))
    except SyntaxError:
        return text


def injected_values(history: list) -> dict:
    """The values in the cell that papermill adds after the parameters; {} outside of papermill."""
    cells = [text for text in history if text.lstrip().startswith("# Parameters\n")]
    body = ast.parse(cells[-1]).body if cells else ()
    try:
        return {node.targets[0].id: ast.literal_eval(node.value) for node in body}
    except (AttributeError, ValueError) as error:
        allowed = "numbers, texts, booleans and lists of these"
        raise DermError(f"papermill's parameters may be {allowed}") from error


def resolve(name: str, namespace: dict, notebooks: dict[str, params.Notebook]) -> dict:
    """Values of all parameters, checked: papermill's over the environment file's over the cell's.

    The file that DERM_COMPRESS_PARAMS names counts while `run` has its default, or if it is the
    file of this very run.
    """
    known, schema = params.known_parameters(notebooks), notebooks[name].schema
    cell = {key: namespace.get(key, parameter.default) for key, parameter in schema.items()}
    cell = params.check(cell, known, f"notebooks/{name}.ipynb")
    history = namespace.get("In", [])
    injected = params.check(injected_values(history), known, f"papermill's parameters of {name}")
    path, run = os.environ.get("DERM_COMPRESS_PARAMS"), (cell | injected).get("run")
    outside = params.read_params(Path(path), known) if path else {}
    if run not in (known["run"].default, outside.get("run")):
        outside = {}
    return cell | outside | injected


def start_stage(name: str, namespace: dict, *, root: Path | None = None) -> Stage:
    """Begins a stage after its parameters cell, and says so; `namespace`: its globals()."""
    settle()
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm would have a widget
    root = files.project_root(root)
    notebooks = params.read_notebooks(root)
    if name not in notebooks:
        raise DermError(f"no notebooks/{name}.ipynb; {params.nearest(name, notebooks)}")
    plan = make_plan(root, notebooks, resolve(name, namespace, notebooks))
    if name not in plan.notebooks:
        raise params.left_out(name)
    plan.adopt()
    plan.settle_models()
    stage = Stage(name, plan, namespace.get("In", []))
    print(stage.provenance(), flush=True)
    if plan.values.get("device") == "cuda" and not stage.finished:
        from derm_compress.study import checks  # only here: it asks the GPU

        checks.check(plan, [name])
    return stage
