"""The smoke study and a cut of `small`, each in two sessions of a mock Kaggle: `make mock-kaggle`.

Real: data set, wheel and kernels by `make kaggle`'s builder, what their metadata attach, setup
cells, "Run all" without injected parameters, an environment in which this package is not installed,
both ways of mounting, inputs that must not change. Session one runs the first notebooks, its
artifacts are packed, session two mounts them and runs the study's script. Mocked: the pictures
(DermNet's, for the smoke study), the models (random, of 8 and of 2 blocks), the limits of disk and
time. Both go at once. Not here: GPUs, the image's versions, the fetching of small's weights.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import dermnet_tree
import test_small_smoke
import yaml
from runs import NOTEBOOKS, ROOT, project

from derm_compress.kaggle import build
from derm_compress.model import loading
from derm_compress.study.params import wanted

DISK = 60e6  # bytes that the working folder may hold
ALL = """
import sys, nbformat
from nbclient import NotebookClient
for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    try:
        NotebookClient(notebook, kernel_name="python3", timeout=300).execute()
    finally:
        for cell in notebook.cells:
            told = [o["text"] for o in cell.get("outputs", ()) if o["output_type"] == "stream"]
            every = "setup" in cell["metadata"].get("tags", ())
            print(*(told if every else told[-1:]), sep="", end="")
"""


class Session:
    """One Kaggle session: its own folders, nothing left of earlier ones."""

    def __init__(self, top: Path, python: Path, blocks: int):
        self.root, self.python = top, python
        for name in ("input", "working", "temp"):
            (top / name).mkdir(parents=True)
        foreign = ("PYTHONPATH", "DERM_COMPRESS_ROOT", "DERM_COMPRESS_PARAMS", "HF_HOME")
        self.env = {name: value for name, value in os.environ.items() if name not in foreign}
        self.env |= {"KAGGLE_ROOT": str(top), "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
        self.env |= {"DERM_COMPRESS_BLOCKS": str(blocks)}
        self.env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def attach(self, kernel: Path, sources: dict[str, Path], *, anew: bool) -> list[str]:
        """Mounts what a kernel's metadata name, and says it; anew: as Kaggle does since 2026."""
        told = json.loads((kernel / "kernel-metadata.json").read_text("utf-8"))
        named = {"datasets": told["dataset_sources"], "models": told["model_sources"]}
        for kind, names in named.items():
            for name in names:
                where = f"{kind}/{name}" if anew else name.partition("/")[2]
                shutil.copytree(sources[name], self.root / "input" / where)
        return [name for names in named.values() for name in names]

    def seal(self) -> str:
        """Makes the inputs read-only; digest of all that they hold."""
        digest = hashlib.sha256()
        for path in sorted((self.root / "input").rglob("*")):
            digest.update(f"{path.relative_to(self.root)}".encode())
            digest.update(path.read_bytes() if path.is_file() else b"")
            path.chmod(0o555 if path.is_dir() else 0o444)
        return digest.hexdigest()

    def open(self) -> None:
        for path in [self.root / "input", *(self.root / "input").rglob("*")]:
            path.chmod(0o755)

    def python_run(self, *words) -> subprocess.CompletedProcess:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        where = {"env": self.env, "cwd": self.root / "working"}
        return subprocess.run([self.python, *words], **where, **pipes)

    def run_all(self, kernels: Path, stages: list[str]) -> str:
        """Executes notebooks as they are pushed, each in a kernel of its own."""
        done = self.python_run("-c", ALL, *(kernels / f"{s}/{s}.ipynb" for s in stages))
        if done.returncode:
            said = f"mock Kaggle: one of {', '.join(stages)} failed"
            raise SystemExit(f"{done.stdout[-4000:]}\n{said}")
        return done.stdout

    def pack(self, run: str, into: Path) -> None:
        temp = self.root / "temp"
        env = self.env | {"DERM_COMPRESS_ROOT": str(temp / "derm_compress")}
        env["PYTHONPATH"] = str(temp / "site-packages")
        words = [self.python, "-m", "derm_compress", "pack", run, into, "--owner", "me"]
        subprocess.run(words, env=env, check=True, cwd=self.root)


def environment(folder: Path) -> Path:
    """A Python in which all but this package is installed: no gigabyte is fetched again."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    installed = sysconfig.get_path("purelib")  # no .pth of that folder is run
    Path(site, "installed.pth").write_text(f"{installed}\n")
    jupyter = folder / "share" / "jupyter"
    jupyter.mkdir(parents=True)
    (jupyter / "nbconvert").symlink_to(Path(sys.prefix, "share", "jupyter", "nbconvert"))
    python = folder / "bin" / "python"
    words = [python, "-c", "import derm_compress"]
    found = subprocess.run(words, cwd=folder, capture_output=True, env={})
    assert found.returncode, "the mock must not see an installed derm_compress"
    return python


def save_pico(folder: Path, scratch: Path) -> None:
    for part in loading.load_base("pico"):
        part.save_pretrained(folder)


@dataclass(frozen=True)
class Mock:
    """A study that goes to Kaggle, in folders of its own below `top`.

    model: as MODEL= names it; notebooks: those that session one runs, the first so many.
    """

    run: str
    values: dict
    save_model: Callable[[Path, Path], None]
    model: str
    blocks: int
    notebooks: int
    top: Path

    def prepare(self) -> None:
        """A project with the run's file, built for Kaggle; the pictures and the model beside it."""
        root, values = project(self.top / "project"), self.values | {"run": self.run}
        values["model"] = "llava-hf/llava-1.5-7b-hf"  # the attached one
        (root / "params" / f"{self.run}.yaml").write_text(yaml.safe_dump(values), "utf-8")
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "derm_compress", root / "derm_compress", ignore=unwanted)
        for name in ("LICENSE", "requirements.txt"):
            shutil.copyfile(ROOT / name, root / name)
        build.build(self.top / "build", self.run, owner="me", model=self.model, root=root)
        dermnet_tree.plant(self.top / "pictures")
        self.save_model(self.top / "model", self.top)

    @property
    def sources(self) -> dict[str, Path]:
        folders = {"me/derm-compress": "build/dataset", build.DERMNET: "pictures"}
        folders |= {self.model: "model", f"me/derm-compress-{self.run}": "packed"}
        return {name: self.top / folder for name, folder in folders.items()}

    def go(self, python: Path) -> None:
        """Both sessions; AssertionError or SystemExit where something is not as it must be."""
        kernels, stages = self.top / "build" / "kernels", list(wanted(NOTEBOOKS, self.values))
        first = stages[: self.notebooks]

        one = Session(self.top / "one", python, self.blocks)
        attached = one.attach(kernels / first[-1], self.sources, anew=False)
        sealed = one.seal()
        said = one.run_all(kernels, first)
        print(said)
        assert one.seal() == sealed, "the inputs have changed"
        assert f"run         {self.run}" in said and "from the hub" not in said
        assert ("not attached" in said) != (build.DERMNET in attached), attached
        one.pack(self.run, self.top / "packed")

        two = Session(self.top / "two", python, self.blocks)
        two.attach(kernels / "study-2", self.sources, anew=True)
        packed = f"me/derm-compress-{self.run}"
        shutil.copytree(self.sources[packed], two.root / "input" / "datasets" / packed)
        sealed = two.seal()
        done = two.python_run(kernels / "study-2" / "study.py")
        print(done.stdout[-4000:])
        assert done.returncode == 0 and "OUT OF TIME" not in done.stdout, done.returncode
        assert two.seal() == sealed, "the inputs have changed"
        self.compare(one.root / "working", two.root / "working", stages)
        two.open()
        one.open()

    def compare(self, one: Path, two: Path, stages: list[str]) -> None:
        """What session one has finished, session two has as it was, and the rest with tables."""
        before, after = keys_of(one, self.run), keys_of(two, self.run)
        first = stages[: self.notebooks]
        assert list(after) == stages, f"stages of the second session: {list(after)}"
        assert list(before) == first and before.items() <= after.items(), (before, after)
        held, again = manifests(one), manifests(two)
        assert list(held) == first and list(again) == stages, (list(held), list(again))
        assert held.items() <= again.items(), "computed again"
        for working in (one, two):
            size = sum(path.stat().st_size for path in working.rglob("*") if path.is_file())
            assert size < DISK, f"{size:,} bytes in the working folder"
        tables = list((two / "reports" / self.run / "tables").glob("table*.csv"))
        assert len(tables) == 5, tables


def keys_of(working: Path, run: str) -> dict[str, str]:
    notes = sorted(working.glob(f"artifacts/runs/{run}/0*.json"))
    return {path.stem: json.loads(path.read_text())["key"] for path in notes}


def manifests(working: Path) -> dict[str, str]:
    """What is finished in a session's own store, with the time when it was."""
    found = sorted(working.glob("artifacts/store/*/*/manifest.json"))
    return {path.parent.parent.name: path.read_text() for path in found}


def smoke(top: Path) -> Mock:
    """The smoke study on DermNet and a mounted model of 8 blocks."""
    values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text("utf-8"))
    values |= {"source": "dermnet", "data_root": "data/dermnet"}
    values["rankings"] = ["output_similarity", "magnitude"]
    model, how = "llava-hf/llava/transformers/1.5-7b-hf/1", {"blocks": 8, "notebooks": 4}
    return Mock("kaggle-mock", values, save_pico, model, **how, top=top)


def small(top: Path) -> Mock:
    """`small` as it is pushed first, with few items, on two blocks that are made as its own are."""
    model, how = "me/small/transformers/two-blocks/1", {"blocks": 2, "notebooks": 2}
    values = yaml.safe_load(test_small_smoke.RUN)
    values["importance_items"] = 3  # 05's least squares want more tokens than the model is wide
    return Mock("small", values, test_small_smoke.write_model, model, **how, top=top)


def main(top: Path) -> None:
    python = environment(top / "env")
    mocks = [smoke(top / "smoke"), small(top / "small")]
    for mock in mocks:
        mock.prepare()
    with ThreadPoolExecutor() as both:  # each in one thread of processes of its own
        for done in [both.submit(mock.go, python) for mock in mocks]:
            done.result()


if __name__ == "__main__":
    begun = time.monotonic()
    with contextlib.ExitStack() as opened:
        folder = sys.argv[1:] or [opened.enter_context(tempfile.TemporaryDirectory())]
        main(Path(*folder).resolve())
    print(f"mock Kaggle: two studies in two sessions each, {time.monotonic() - begun:.0f} s")
