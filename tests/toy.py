"""A small project with notebooks of its own, to try store, parameters and runner without torch."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "derm_compress"
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
MODULES = ["__init__", "__main__", "errors", "faces", "files", "progress"]

PARAMETERS = """\
run: str = "default"  # name of the run
artifact_root: str = "artifacts"  # where results go
seed: int = 0  # same in both notebooks [0..1000]
"""
FIRST = f"""\
{PARAMETERS}
count: int = 3  # numbers to make [1..100]
data_root: str = ""  # folder of inputs
"""
SECOND = f"""\
{PARAMETERS}
factor: float = 2.0  # by which to multiply [0.001..10]
sizes: list = [1, 2]  # one file each [1..9]
mode: str = "plain"  # [plain|crash|exit|die|slow]
"""
SHAPES = '''\
"""Toy methods."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from derm_compress.method import words
from derm_compress.progress import say


def numbers(count, seed):
    """Numbers."""
    return pd.DataFrame({"n": [seed + i for i in range(count)], "word": words.word()})


def scaled(frame, factor):
    return frame.assign(n=frame.n * factor)


def misbehave(mode, journal):
    """What notebooks do wrong."""
    if mode == "crash":
        raise ValueError("the toy crashed")
    if mode == "exit":
        sys.exit(0)
    if mode == "die":
        os.kill(os.getpid(), 9)
    if mode == "slow":
        subprocess.Popen(["sleep", "99"])
    try:
        for item in range(12 if mode == "slow" else 2):
            if str(item) not in journal.done:
                journal.add(str(item), item)
                if mode == "slow":
                    say(f"item {item}")
                    time.sleep(3 if item == 6 else 0.1)
    except KeyboardInterrupt:
        Path("kept.txt").touch()
        raise
    return {"items": len(journal.done)}
'''
WORDS = """\
from pathlib import Path


def word():
    return (Path(__file__).parent / "words.yaml").read_text()
"""
RENDER = """\
def render(run, *, root, artifacts, keep=False):
    folder = root / "reports" / run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(f"report of {artifacts}")
    return folder


def render_index(root):
    print("indexed")
"""
START = """\
from derm_compress.method import shapes
from derm_compress.study import start_stage
"""


def cell(source: str, *tags: str) -> dict:
    return {
        "cell_type": "code",
        "id": f"c{abs(hash(source)) % 10**8}",
        "metadata": {"tags": list(tags)},
        "source": source.splitlines(keepends=True),
        "outputs": [],
        "execution_count": None,
    }


def notebook(path: Path, *cells: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": [f"# {path.stem}"]}
    body = {"cells": [text, *cells], "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(body, indent=1))
    return path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def project(root: Path) -> Path:
    """01_data -> 02_left and 03_right, in a folder with a space in its name."""
    root = root / "toy project"
    package = root / "derm_compress"
    compiled = shutil.ignore_patterns("__pycache__")
    for name in ("study", "kaggle"):
        shutil.copytree(PACKAGE / name, package / name, ignore=compiled)
    for name in MODULES:
        shutil.copyfile(PACKAGE / f"{name}.py", package / f"{name}.py")
    for name in ("method", "report"):
        (package / name).mkdir()
        (package / name / "__init__.py").touch()
    (package / "method" / "shapes.py").write_text(SHAPES)
    (package / "method" / "words.py").write_text(WORDS)
    (package / "method" / "words.yaml").write_text("mole")
    (package / "report" / "render.py").write_text(RENDER)
    books = root / "notebooks"
    notebook(
        books / "01_data.ipynb",
        cell(FIRST, "parameters"),
        cell(START + 'stage = start_stage("01_data", globals())'),
        cell('frame = stage.frame("numbers", shapes.numbers, stage.p.count, stage.p.seed)'),
        cell("print(len(frame))", "figure"),
        cell("stage.finish()"),
    )
    for name, mode in (("02_left", "stage.p.mode"), ("03_right", '"plain"')):
        notebook(
            books / f"{name}.ipynb",
            cell(SECOND, "parameters"),
            cell("import pandas as pd\n" + START + f'stage = start_stage("{name}", globals())'),
            cell('frame = pd.read_parquet(stage.input("01_data") / "numbers.parquet")'),
            cell('out = stage.frame("scaled", shapes.scaled, frame, stage.p.factor)'),
            cell(f'items = stage.json("items", shapes.misbehave, {mode}, stage.journal("items"))'),
            cell("stage.finish()"),
        )
    (root / "params").mkdir()
    (root / "params" / "tiny.yaml").write_text("run: tiny\ncount: 4\n")
    return root


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "derm_compress", *words]


def environment(root: Path) -> dict:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DERM_COMPRESS")}
    return clean | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def call(root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """`python -m derm_compress` with these words, in the toy project, by one who obeys modes."""
    how = {"cwd": root, "env": environment(root) | variables, "capture_output": True, "text": True}
    return subprocess.run(command(*words), preexec_fn=as_anybody, **how)


def as_anybody() -> None:
    """Takes from root the right to write where modes forbid it."""
    drop, override = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(drop, override, 0, 0, 0)
