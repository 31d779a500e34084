"""The smoke study in two sessions of a mock Kaggle: `make mock-kaggle`.

Real: the built data set and its wheel, setup cells, "Run all" without injected parameters, an
environment in which this package is not installed, folders laid out as both ways of mounting have
it, inputs that must not change. Session one runs notebooks 01 to 04, its artifacts are packed,
session two mounts them and runs the study's script. Mocked: the pictures, the model (random,
8 blocks), the limits of disk and time. Not here: GPUs, the image's versions.
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
from pathlib import Path

import dermnet_tree
import yaml

ROOT = Path(__file__).parent.parent
RUN = "kaggle-mock"
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

    def __init__(self, top: Path, python: Path, params: Path):
        self.root, self.python = top, python
        for name in ("input", "working", "temp"):
            (top / name).mkdir(parents=True)
        foreign = ("PYTHONPATH", "DERM_COMPRESS_ROOT", "HF_HOME")
        self.env = {name: value for name, value in os.environ.items() if name not in foreign}
        self.env |= {"KAGGLE_ROOT": str(top), "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
        self.env |= {"DERM_COMPRESS_PARAMS": str(params), "DERM_COMPRESS_BLOCKS": "8"}
        self.env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def attach(self, folder: Path, where: str) -> None:
        shutil.copytree(folder, self.root / "input" / where)

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

    def run_all(self, build: Path, stages: list[str]) -> str:
        """Executes notebooks as they are pushed, each in a kernel of its own."""
        done = self.python_run("-c", ALL, *(build / f"kernels/{s}/{s}.ipynb" for s in stages))
        if done.returncode:
            said = f"mock Kaggle: one of {', '.join(stages)} failed"
            raise SystemExit(f"{done.stdout[-4000:]}\n{said}")
        return done.stdout


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


def save_model(folder: Path) -> None:
    from derm_compress.model import loading

    model, processor = loading.load_base("pico")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def settings(path: Path) -> Path:
    """The smoke study on DermNet and a mounted model."""
    values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text("utf-8"))
    values |= {"run": RUN, "source": "dermnet", "data_root": "data/dermnet"}
    values |= {"model": "llava-hf/llava-1.5-7b-hf", "rankings": ["output_similarity", "magnitude"]}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def keys_of(working: Path) -> dict[str, str]:
    notes = sorted(working.glob(f"artifacts/runs/{RUN}/0*.json"))
    return {path.stem: json.loads(path.read_text())["key"] for path in notes}


def manifests(working: Path) -> dict[str, str]:
    """What is finished in a session's own store, with the time when it was."""
    found = sorted(working.glob("artifacts/store/*/*/manifest.json"))
    return {path.parent.parent.name: path.read_text() for path in found}


def main(top: Path) -> None:
    from derm_compress.kaggle import build as build_
    from derm_compress.study.params import read_notebooks, wanted

    build_.build(top / "build", "small", owner="me", root=ROOT)
    python, params = environment(top / "env"), settings(top / f"{RUN}.yaml")
    stages = list(wanted(read_notebooks(ROOT), yaml.safe_load(params.read_text("utf-8"))))
    dermnet_tree.plant(top / "pictures")
    save_model(top / "model")

    one = Session(top / "one", python, params)  # mounted as of old
    one.attach(top / "build" / "dataset", "derm-compress")
    one.attach(top / "pictures", "dermnet")
    one.attach(top / "model", "llava/transformers/1.5-7b-hf/1")
    sealed = one.seal()
    said = one.run_all(top / "build", stages[:4])
    print(said)
    assert one.seal() == sealed, "the inputs have changed"
    assert "DermNet" in said and "not attached" not in said and "from the hub" not in said

    plain = {name: value for name, value in one.env.items() if name != "DERM_COMPRESS_PARAMS"}
    plain["DERM_COMPRESS_RUN"] = "small"
    script = one.root / "input" / "derm-compress" / "kaggle_setup.py"
    how = {"capture_output": True, "text": True, "check": True}
    said = subprocess.run([python, script], env=plain, **how).stdout
    assert "run         small" in said, said

    root = one.root / "temp" / "derm_compress"
    packing = one.env | {"DERM_COMPRESS_ROOT": str(root)}
    packing["PYTHONPATH"] = str(one.root / "temp" / "site-packages")
    shutil.copyfile(params, root / "params" / params.name)
    words = [python, "-m", "derm_compress", "pack", RUN, top / "packed", "--owner", "me"]
    print(subprocess.run(words, env=packing, cwd=top, **how).stdout)

    two = Session(top / "two", python, params)  # mounted as since 2026
    two.attach(top / "build" / "dataset", "datasets/me/derm-compress")
    two.attach(top / "pictures", "datasets/shubhamgoel27/dermnet")
    two.attach(top / "model", "models/llava-hf/llava/transformers/1.5-7b-hf/1")
    two.attach(top / "packed", f"datasets/me/derm-compress-{RUN}")
    sealed = two.seal()
    done = two.python_run(top / "build" / "kernels" / "study-2" / "study.py")
    print(done.stdout[-4000:])
    assert done.returncode == 0 and "OUT OF TIME" not in done.stdout, done.returncode
    assert two.seal() == sealed, "the inputs have changed"

    before, after = keys_of(one.root / "working"), keys_of(two.root / "working")
    assert list(after) == stages, f"stages of the second session: {list(after)}"
    assert list(before) == stages[:4] and before.items() <= after.items(), (before, after)
    held, again = (manifests(session.root / "working") for session in (one, two))
    assert list(held) == stages[:4] and list(again) == stages, (list(held), list(again))
    assert held.items() <= again.items(), "computed again"
    for session in (one, two):
        size = sum(p.stat().st_size for p in (session.root / "working").rglob("*") if p.is_file())
        assert size < DISK, f"{size:,} bytes in the working folder"

    tables = list((two.root / "working" / "reports" / RUN / "tables").glob("table*.csv"))
    assert len(tables) == 5, tables
    two.open()
    one.open()


if __name__ == "__main__":
    begun = time.monotonic()
    with contextlib.ExitStack() as opened:
        folder = sys.argv[1:] or [opened.enter_context(tempfile.TemporaryDirectory())]
        main(Path(*folder).resolve())
    print(f"mock Kaggle: 8 notebooks in two sessions, 5 tables, {time.monotonic() - begun:.0f} s")
