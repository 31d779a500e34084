"""What the notebooks' first cell runs on Kaggle, before this package is installed: standard library only.

Installs the package and what the image lacks or has in another version into scratch space, ahead of the image's own
packages, of which none is touched; lays out a project there; finds pictures, model and earlier artifacts below the
inputs, whichever way they are mounted; leaves artifacts and reports where they are saved.
"""

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
PARAMS = "kaggle-t4"
HOURS = 11.3  # of the 12 that Kaggle gives a session: the rest is for saving
BLOCKS = int(
    os.environ.get("DERM_COMPRESS_BLOCKS", 32)
)  # of LLaVA-1.5-7B; fewer are what pruning leaves


def folders(top: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Folders at or below `top`, shallow ones first, each level in order."""
    level = [top] if top.is_dir() else []
    for _ in range(depth):
        yield from level
        inside = [
            folder for folder in level if not (folder / "train").is_dir()
        ]  # thousands of pictures
        level = [path for folder in inside for path in sorted(folder.iterdir()) if path.is_dir()]


def find_pictures(top: Path) -> Path | None:
    """The first folder with train/ and test/ of DermNet."""
    return next(
        (
            f
            for f in folders(top)
            if all((f / split / PICTURES).is_dir() for split in ("train", "test"))
        ),
        None,
    )


def find_model(top: Path) -> Path | None:
    """The first folder with a LLaVA in safetensors, neither pruned nor quantized."""
    return next(
        (
            folder
            for folder in folders(top)
            if any(folder.glob("*.safetensors")) and is_whole(folder)
        ),
        None,
    )


def is_whole(folder: Path) -> bool:
    """Whether a model folder's config is of a LLaVA with all its blocks (32 where it says nothing) and full weights."""
    try:
        told = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    if (
        not isinstance(told, dict)
        or told.get("model_type") != "llava"
        or "quantization_config" in told
    ):
        return False
    return (told.get("text_config") or {}).get("num_hidden_layers", BLOCKS) == BLOCKS


def find_artifacts(top: Path) -> list[Path]:
    """Folders named artifacts with a store: of packed runs and of earlier notebooks' outputs."""
    return [
        folder
        for folder in folders(top)
        if folder.name == "artifacts" and (folder / "store").is_dir()
    ]


def wanted(requirements: Path) -> list[str]:
    """The pins that the image does not meet."""
    found = []
    for line in requirements.read_text("utf-8").split():
        name, _, version = line.partition("==")
        try:
            met = importlib.metadata.version(name) == version
        except importlib.metadata.PackageNotFoundError:
            met = False
        found += [] if met else [line]
    return found


def install(site: Path) -> list[str]:
    """Installs what is wanted and this package into `site`, without dependencies; what was installed."""
    missing, wheels = wanted(HERE / "requirements-kaggle.txt"), sorted(map(str, HERE.glob("*.whl")))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
    ]
    pip += ["--root-user-action=ignore", "--upgrade", "--target", str(site)]
    for words in ([*missing], ["--no-index", *wheels]):
        if words and subprocess.run([*pip, *words]).returncode:
            raise RuntimeError(
                f"could not install {' '.join(words)}: turn the notebook's internet on and run again"
            )
    replaced = {line.partition("==")[0].replace("-", "_") for line in missing}
    for module in [name for name in sys.modules if name.partition(".")[0] in replaced]:
        del sys.modules[module]  # the image's own version, if something has imported it already
    return missing


def link(path: Path, target: Path | None) -> None:
    """Makes `path` a link to `target`, if there is one."""
    if target and not path.is_symlink():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target, target_is_directory=True)


def add_lines(source: str, target: str) -> None:
    """Copies the whole lines of a file; a file that is there keeps its own."""
    held = [path.read_bytes() for path in (Path(source), Path(target)) if path.exists()]
    lines = [
        line for text in held for line in text.splitlines(keepends=True) if line.endswith(b"\n")
    ]
    Path(target).write_bytes(b"".join(dict.fromkeys(lines)))


def lay_out(root: Path) -> dict[str, str]:
    """The project folder on scratch space, linked to what is mounted and to what is saved; what was found."""
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
    os.environ["DERM_COMPRESS_STORES"] = os.pathsep.join(
        str(artifacts / "store") for artifacts in earlier
    )
    found = {"DermNet": pictures or "not attached", "model": model or "from the hub"}
    return {name: str(path) for name, path in found.items()} | {
        "earlier": f"{len(earlier)} folders of artifacts"
    }


def age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def end_after(hours: float) -> None:
    """Ends the cell that runs so long after this process began, by sys.exit(0): no failure to papermill."""

    def end(*_) -> None:
        print(
            f"OUT OF TIME after {hours:g} hours: what is kept is saved; attach it and go on from there",
            flush=True,
        )
        sys.exit(0)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, 3600 * hours - age()))


def main() -> None:
    root, site = SCRATCH / "derm_compress", SCRATCH / "site-packages"
    installed = install(site)
    found = lay_out(root)
    sys.path.insert(0, str(site))
    for name, path in (("PYTHONPATH", site), ("JUPYTER_PATH", site / "share" / "jupyter")):
        os.environ[name] = os.pathsep.join(filter(None, [str(path), os.environ.get(name)]))
    os.environ["DERM_COMPRESS_ROOT"] = str(root)
    named = os.environ.get("DERM_COMPRESS_RUN", PARAMS)
    os.environ.setdefault("DERM_COMPRESS_PARAMS", str(root / "params" / f"{named}.yaml"))
    os.environ.setdefault("HF_HOME", str(SCRATCH / "huggingface"))  # 14 GB that need not be saved
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TQDM_DISABLE", "1"),
        ("PYTHONHASHSEED", "0"),
    ):
        os.environ.setdefault(name, value)
    told = found | {
        "run": Path(os.environ["DERM_COMPRESS_PARAMS"]).stem,
        "installed": " ".join(installed) or "this package only",
        "saved in": str(WORKING),
    }
    print("\n".join(f"{name:10}  {value}" for name, value in told.items()), flush=True)
    if "ipykernel" in sys.modules:  # a notebook; the study as a script has its own limit
        end_after(HOURS)


if __name__ == "__main__":
    main()
