"""What a notebook's first cell runs on Kaggle, where this package is not yet there: plain Python.

Installs the package, and what the image lacks or has in another version, into scratch space ahead
of the image's own packages; lays a project out there; finds pictures, model and earlier artifacts
below the inputs, however they are mounted; leaves artifacts and reports where they are saved.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent  # the mounted data set that `make kaggle` built
KAGGLE = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))
INPUT, WORKING, SCRATCH = KAGGLE / "input", KAGGLE / "working", KAGGLE / "temp"
DEEPEST = 7  # input/models/OWNER/MODEL/FRAMEWORK/VARIATION/VERSION
PICTURES = "Acne and Rosacea Photos"  # one of DermNet's folders
HOURS = 11.3  # of the 12 that Kaggle gives a session: the rest is for saving
CONTENTS = ""  # digest of what lies beside this script; `make kaggle` fills it in
BLOCKS = int(os.environ.get("DERM_COMPRESS_BLOCKS", 32))  # fewer are what pruning leaves


def main() -> None:
    if contents(HERE) != CONTENTS:
        raise RuntimeError(f"{HERE} is not what `make kaggle` built: build and upload it again")
    root, site = SCRATCH / "derm_compress", SCRATCH / "site-packages"
    installed = install(site)
    found = lay_out(root)
    set_environment(root, site)
    told = found | {
        "run": Path(os.environ["DERM_COMPRESS_PARAMS"]).stem,
        "installed": " ".join(installed) or "this package only",
        "saved in": str(WORKING),
        "image": os.environ.get("KAGGLE_DOCKER_IMAGE", "unknown"),
    }
    print("\n".join(f"{name:10}  {value}" for name, value in told.items()), flush=True)
    if "ipykernel" in sys.modules:  # a notebook; the study as a script has its own limit
        end_after(HOURS)


def contents(folder: Path) -> str:
    """Digest of all that a data set brings: what is installed, and what is laid out."""
    patterns = ("*.whl", "requirements-kaggle.txt", "notebooks/*.ipynb", "params/*.yaml")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    digest = hashlib.sha256()
    for path in files:
        held = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {held}\n".encode())
    return digest.hexdigest()


def install(site: Path) -> list[str]:
    """Installs what is wanted, which it returns, and this package into `site`, both alone."""
    missing, wheels = wanted(HERE / "requirements-kaggle.txt"), sorted(map(str, HERE.glob("*.whl")))
    options = "--no-deps --quiet --disable-pip-version-check --root-user-action=ignore --upgrade"
    pip = [sys.executable, "-m", "pip", "install", *options.split(), "--target", str(site)]
    for words in (missing, ["--no-index", *wheels]):
        if words and subprocess.run([*pip, *words]).returncode:
            advice = "turn the notebook's internet on and run again"
            raise RuntimeError(f"could not install {' '.join(words)}: {advice}")
    replaced = {line.partition("==")[0].replace("-", "_") for line in missing}
    for module in [name for name in sys.modules if name.partition(".")[0] in replaced]:
        del sys.modules[module]  # the image's own version, if something has imported it already
    return missing


def wanted(requirements: Path) -> list[str]:
    """The pins that the image does not meet."""
    found = []
    for line in requirements.read_text("utf-8").split():
        name, _, version = line.partition("==")
        try:
            met = importlib.metadata.version(name) == version
        except importlib.metadata.PackageNotFoundError:
            met = False
        if not met:
            found.append(line)
    return found


def lay_out(root: Path) -> dict[str, str]:
    """The project folder, linked to what is mounted and to what is saved; says what was found."""
    for name in ("notebooks", "params"):
        shutil.copytree(HERE / name, root / name, dirs_exist_ok=True)
    for name in ("artifacts", "reports"):
        (WORKING / name).mkdir(parents=True, exist_ok=True)
        link(root / name, WORKING / name)
    pictures, model, earlier = find_pictures(INPUT), find_model(INPUT), find_artifacts(INPUT)
    link(root / "data" / "dermnet", pictures)
    link(root / "llava-hf" / "llava-1.5-7b-hf", model)
    for artifacts in earlier:  # which run made what, and what judges said: small
        for name, copy in (("runs", shutil.copy2), ("judged", add_lines)):
            if (artifacts / name).is_dir():
                where = WORKING / "artifacts" / name
                shutil.copytree(artifacts / name, where, dirs_exist_ok=True, copy_function=copy)
    stores = [str(artifacts / "store") for artifacts in earlier]
    os.environ["DERM_COMPRESS_STORES"] = os.pathsep.join(stores)
    return {
        "DermNet": str(pictures or "not attached"),
        "model": str(model or "from the hub"),
        "earlier": f"{len(earlier)} folders of artifacts",
    }


def link(path: Path, target: Path | None) -> None:
    """Makes `path` a link to `target`, if there is one."""
    if target and not path.is_symlink():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target, target_is_directory=True)


def add_lines(source: str, target: str) -> None:
    """Copies the whole lines of a file; a file that is there keeps its own."""
    held = [path.read_bytes() for path in (Path(source), Path(target)) if path.exists()]
    lines = [line for text in held for line in text.splitlines(keepends=True)]
    whole = dict.fromkeys(line for line in lines if line.endswith(b"\n"))
    Path(target).write_bytes(b"".join(whole))


def set_environment(root: Path, site: Path) -> None:
    sys.path.insert(0, str(site))
    for name, path in (("PYTHONPATH", site), ("JUPYTER_PATH", site / "share" / "jupyter")):
        os.environ[name] = os.pathsep.join(filter(None, [str(path), os.environ.get(name)]))
    os.environ["DERM_COMPRESS_ROOT"] = str(root)
    run = os.environ["DERM_COMPRESS_RUN"]  # as the kernel's first cell says
    defaults = {
        "DERM_COMPRESS_PARAMS": str(root / "params" / f"{run}.yaml"),
        "HF_HOME": str(SCRATCH / "huggingface"),  # 14 GB that need not be saved
        "DERM_COMPRESS_MODELS": str(SCRATCH / "models"),  # nor need these
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONHASHSEED": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def folders(top: Path) -> Iterator[Path]:
    """Folders at or below `top`, shallow ones first, each level in order."""
    level = [top] if top.is_dir() else []
    for _ in range(DEEPEST):
        yield from level
        searched = [folder for folder in level if not (folder / "train").is_dir()]  # of pictures
        level = [path for folder in searched for path in sorted(folder.iterdir()) if path.is_dir()]


def find_pictures(top: Path) -> Path | None:
    """The first folder with train/ and test/ of DermNet."""
    for folder in folders(top):
        if all((folder / split / PICTURES).is_dir() for split in ("train", "test")):
            return folder
    return None


def find_model(top: Path) -> Path | None:
    """The first folder with a LLaVA in safetensors, neither pruned nor quantized."""
    for folder in folders(top):
        if any(folder.glob("*.safetensors")) and is_whole(folder):
            return folder
    return None


def is_whole(folder: Path) -> bool:
    """Whether a folder's config is of a LLaVA with all blocks (32 if unsaid) and full weights."""
    try:
        told = json.loads((folder / "config.json").read_text("utf-8"))
        blocks = (told.get("text_config") or {}).get("num_hidden_layers", BLOCKS)
        return (
            told.get("model_type") == "llava"
            and "quantization_config" not in told
            and blocks == BLOCKS
        )
    except (OSError, ValueError, AttributeError):
        return False


def find_artifacts(top: Path) -> list[Path]:
    """Folders named artifacts with a store: of packed runs and of earlier notebooks' outputs."""
    named = [folder for folder in folders(top) if folder.name == "artifacts"]
    return [folder for folder in named if (folder / "store").is_dir()]


def end_after(hours: float) -> None:
    """Ends the cell that runs so long after this process began, by sys.exit(0): no failure."""

    def end(*_) -> None:
        advice = "what is kept is saved; attach it and go on from there"
        print(f"OUT OF TIME after {hours:g} hours: {advice}", flush=True)
        sys.exit(0)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, 3600 * hours - age()))


def age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


if __name__ == "__main__":
    main()
