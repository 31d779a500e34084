"""One run as data: where it lies, the key of every stage, its notes, its models (no torch)."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.study import keys as keys_
from derm_compress.study import params
from derm_compress.study.grid import find_point
from derm_compress.study.store import Store

ARITHMETIC = {  # what x86 CPUs of the last ten years share: wider vectors sum to other digits
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
}
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # a GPU's memory in no fixed pieces
PLACES = ("run", "artifact_root", "processes")  # where and how, not what is made
PLACES += ("judge_url", "judge_concurrency", "judge_max_tokens")  # a whole reply is the same
FOLDERS = ("data_root", "model", "judge_model", "embedder")  # by content, if they are here
CUT = ["blocks_removed", "attentions_removed", "mlps_removed", "criterion"]  # how a model is pruned
OPERATING = {  # what a stage does to the operating point; export takes it where no name is given
    "05_sft": {"healed": True},
    "07_quantization": {"healed": True, "quantizer": "awq", "bits": 4},
}


@dataclass(frozen=True)
class Plan:
    """One run: the values of all parameters of all notebooks, and what follows from them.

    swept: those of its values in which the runs of its grid differ.
    """

    root: Path
    notebooks: dict[str, params.Notebook]
    values: dict
    package: Path = keys_.PACKAGE
    swept: dict = field(default_factory=dict)

    @property
    def run(self) -> str:
        return self.values.get("run", "default")

    @property
    def artifacts(self) -> Path:
        return files.located(self.values.get("artifact_root", "artifacts"), self.root)

    @property
    def folder(self) -> Path:
        """Where this run's pointers, run_info.json and executed notebooks lie."""
        return self.artifacts / "runs" / self.run

    @cached_property
    def store(self) -> Store:
        """The run's store over those, read-only, that DERM_COMPRESS_STORES names as PATH does."""
        mounted = filter(None, os.environ.get("DERM_COMPRESS_STORES", "").split(os.pathsep))
        return Store(self.artifacts / "store", self.notebooks, map(Path, mounted))

    def settle_models(self) -> None:
        """Says where this process and those it starts keep models that they make, if none has."""
        os.environ[files.MODELS] = os.environ.get(files.MODELS) or str(self.artifacts / "models")

    def adopt(self) -> None:
        """Copies what mounted stores have of this run, which then needs its own store alone."""
        for stage, key in self.keys.items():
            self.store.adopt(stage, key)

    @cached_property
    def graph(self) -> dict[str, tuple[str, ...]]:
        return params.graph(self.notebooks)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Stage -> key."""
        found = {}
        for stage, notebook in self.notebooks.items():
            values = self.counted(stage)
            named = {value for value in values.values() if isinstance(value, str)}
            words = frozenset(named.union(f"{value}.yaml" for value in named))
            parts = keys_.code_parts(notebook.code(), words=words, package=self.package)
            upstream = {earlier: found[earlier] for earlier in self.graph[stage]}
            values = {k: self._by_content(v) if k in FOLDERS else v for k, v in values.items()}
            found[stage] = files.digest([stage, parts, values, upstream, keys_.versions()])
        return found

    def _by_content(self, value: str) -> str:
        path = files.located(value, self.root)
        return keys_.fingerprint(path) if value and path.exists() else value

    def parameters(self, stage: str) -> dict:
        """The values of the parameters that a stage's notebook declares."""
        return {name: self.values[name] for name in self.notebooks[stage].schema}

    def counted(self, stage: str) -> dict:
        """Those of its parameters that say what is made, not where or how.

        The device is a place, too: what a GPU began a CPU finishes. Shapes alone are another thing.
        """
        places = PLACES if self.values.get("device") == "meta" else (*PLACES, "device")
        return {k: v for k, v in self.parameters(stage).items() if k not in places}

    def told(self, stage: str) -> dict:
        """The same as notes and reports may show it."""
        return {name: files.public(value) for name, value in self.counted(stage).items()}

    def view(self, stage: str) -> str:
        """Digest of how a notebook shows results: its text, figure cells, the modules that draw."""
        notebook = self.notebooks[stage]
        parts = keys_.code_parts(
            notebook.code(figures=True), folders=keys_.SHOWN, package=self.package
        )
        return files.digest([[text for text, _, _ in notebook.cells], parts["modules"]])

    def executed(self, stage: str) -> Path:
        """Where the runner leaves a stage's executed notebook."""
        return self.folder / "notebooks" / f"{stage}.ipynb"

    def own(self, stages: Iterable[str]) -> list[str]:
        """Those of the stages that this run has."""
        return [stage for stage in stages if stage in self.notebooks]

    def pointer(self, stage: str) -> dict:
        """What this run last noted of a stage; empty if it did not."""
        return files.read_note(self.folder / f"{stage}.json")

    def point(self, stage: str, *, cached: bool) -> None:
        """Notes that the run's stage is the finished artifact of its key."""
        note = {
            "stage": stage,
            "key": self.keys[stage],
            "cached": cached,
            "parameters": self.told(stage),
            "upstream": {earlier: self.keys[earlier] for earlier in self.graph[stage]},
            "view": self.view(stage),
        }
        manifest = self.store.manifest(stage, self.keys[stage])
        note |= {"results": manifest["results"]}
        files.write_note(self.folder / f"{stage}.json", manifest["made"] | note)

    def made(self, stage: str) -> Path:
        """The folder of what this run last noted for a stage, whatever its key is today."""
        key, runs = self.pointer(stage).get("key"), self.folder.parent
        if not self.folder.is_dir():
            known = ", ".join(sorted(path.name for path in runs.glob("*/"))) or "none yet"
            raise DermError(f"there is no run {self.run}; runs are {known}")
        if not key or not self.store.complete(stage, key):
            raise DermError(
                f"run {self.run} has no finished {stage}; it may have {', '.join(self.notebooks)}"
            )
        return self.store.entry(stage, key)


def make_plan(
    root: Path, notebooks: dict[str, params.Notebook], values: dict, swept: dict | None = None
) -> Plan:
    """A run of the given values over the notebooks' defaults."""
    known = params.known_parameters(notebooks)
    defaults = {name: parameter.default for name, parameter in known.items()}
    values = defaults | values
    plan = Plan(root, params.wanted(notebooks, values), values, swept=swept or {})
    check_places(plan)
    return plan


def check_places(plan: Plan) -> None:
    """DermError for an artifact_root that is empty or lies in a folder whose files are inputs."""
    if not plan.values.get("artifact_root", "artifacts").strip():
        raise DermError("artifact_root is empty: name a folder, such as artifacts")
    above = [plan.artifacts, *plan.artifacts.parents]
    if file := next((path for path in above if path.is_file()), None):
        raise DermError(f"artifact_root: {files.shown(file)} is a file: name a folder")
    for name in FOLDERS:
        value = plan.values.get(name, "")
        folder = files.located(value, plan.root).resolve()
        if value and plan.artifacts.resolve().is_relative_to(folder):
            raise DermError(f"artifact_root lies in {name}, where nothing may change: move it out")


def git_state(root: Path) -> dict:
    """Commit of the project, and whether its sources differ; nulls outside of a repository."""

    def git(*words):
        asked = ["git", "-C", root, *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    sources = [name for name in ("derm_compress", "notebooks", "params") if (root / name).exists()]
    try:
        changed = git("status", "--porcelain", "--", *sources)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def settle() -> None:
    """Vector instructions and GPU allocator of all kernels from now on; what is set already stays.

    Torch reads both as it starts.
    """
    for name, value in (ARITHMETIC | ALLOCATOR).items():
        os.environ.setdefault(name, value)


def environment() -> dict:
    """Python, machine and library versions, without the machine's name."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "arithmetic": {name: os.environ.get(name) for name in ARITHMETIC},
        "gpu": torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else None,
        "versions": keys_.versions(),
    }


def find_plan(run: str, root: Path | None = None) -> Plan:
    """A run by its name: of params/, alone or in a grid, if it is there, else of the defaults."""
    params.run_name(run, "command line")
    root = files.project_root(root)
    notebooks = params.read_notebooks(root)
    point = find_point(root / "params", run, params.known_parameters(notebooks))
    return make_plan(root, notebooks, point.values | {"run": run}, point.swept)


def find_recipe(model: str, *, root: Path | None = None) -> tuple[str, Store]:
    """The recipe (JSON) of RUN/STAGE[/NAME], without NAME of the operating point; and its store."""
    run, stage, name = [*model.split("/", 2), "", ""][:3]
    plan = find_plan(run, root)
    plan.settle_models()
    stage = params.select(stage, plan.notebooks)[0]
    folder = plan.made(stage)
    if (folder / "recipe.json").exists() and not name:
        return (folder / "recipe.json").read_text(encoding="utf-8"), plan.store
    if not (folder / "variants.parquet").exists():
        others = "02_finetune, 04_pruning, 05_sft, 07_quantization"
        raise DermError(f"{run}/{stage} has no model of that name; try {others}")
    frame = files.read_frame(folder / "variants.parquet")
    wanted = {"variant": name} if name else operating(plan, stage)
    found = frame[(frame[list(wanted)] == list(wanted.values())).all(axis=1)]
    if found.empty:
        known = ", ".join(frame.variant)
        raise DermError(f"{run}/{stage} has no {name or 'operating point'}; known: {known}")
    return found.recipe.iloc[0], plan.store


def operating(plan: Plan, stage: str) -> dict:
    """What the columns of a stage's frame of variants hold for the operating point."""
    from derm_compress.model.variants import named, read_choice, read_variants, roles

    folder = plan.made("04_pruning")
    name = roles(read_variants(folder), read_choice(folder))["operating"]
    pruned = named(read_variants(folder), [name]).iloc[0]
    plain = {"healed": False, "sft_seed": 0, "quantizer": ""}
    return {column: pruned[column] for column in CUT} | plain | OPERATING.get(stage, {})
