"""What goes to Kaggle, how it sets itself up there, what comes back; the whole: mock_kaggle.py"""

import ast
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import toy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from derm_compress import __version__, files
from derm_compress.errors import DermError
from derm_compress.kaggle import build, setup
from derm_compress.study import params
from derm_compress.study.keys import fingerprint

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "derm_compress"

# What pinned packages need and the image has, as Colab's of 2026-06 lists it: Kaggle's is built on
# that. Of matplotlib, pandas, pillow, pyarrow and pydantic any version of recent years will do.
IMAGE = {
    "aiohttp": "3.14.0", "beautifulsoup4": "4.13.5", "defusedxml": "0.7.1", "entrypoints": "0.4",
    "filelock": "3.29.0", "fsspec": "2025.3.0", "httpx": "0.28.1", "ipython": "7.34.0",
    "jinja2": "3.1.6", "jupyter-client": "7.4.9", "jupyter-core": "5.9.1", "markupsafe": "3.0.3",
    "matplotlib": "3.10.0", "nbformat": "5.10.4", "numpy": "2.0.2", "packaging": "26.2",
    "pandas": "2.2.2", "pandocfilters": "1.5.1", "pillow": "11.3.0", "psutil": "5.9.5",
    "pyarrow": "18.1.0", "pydantic": "2.12.3", "pygments": "2.20.0", "pyyaml": "6.0.3",
    "requests": "2.32.4", "scikit-learn": "1.6.1", "scipy": "1.16.3", "tenacity": "9.1.4",
    "tinycss2": "1.4.0", "torch": "2.10.0", "tqdm": "4.67.3", "traitlets": "5.7.1",
    "typer": "0.25.1", "webencodings": "0.5.1",
}  # fmt: skip
# A running kernel holds its traitlets; nbclient asks for 5.13 and was seen to run with 5.7.1
OLDER = {"traitlets"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kaggle") / "build"
    return build.build(folder, "kaggle-t4", owner="me", root=ROOT)


def test_the_data_set_has_all_that_a_session_needs(built, tmp_path):
    folder = built / "dataset"
    there = {path.name for path in folder.iterdir()}
    assert {"params", "notebooks", "kaggle_setup.py", "requirements-kaggle.txt"} <= there
    assert len(list((folder / "notebooks").glob("*.ipynb"))) == 9
    (wheel,) = folder.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in PACKAGE.rglob("*.*") if "__pycache__" not in path.parts]
    assert len(files) > 60
    assert {path.relative_to(ROOT).as_posix() for path in files if path.is_file()} <= packed
    assert json.loads((folder / "dataset-metadata.json").read_text())["id"] == "me/derm-compress"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target"]
    subprocess.run([*pip, tmp_path, wheel], check=True)
    (found,) = importlib.metadata.distributions(name="derm-compress", path=[str(tmp_path)])
    assert found.version == __version__
    assert all(file.locate().is_file() for file in found.files)


def test_our_pins_are_those_installed_and_nothing_that_the_image_pins(built):
    lines = (built / "dataset/requirements-kaggle.txt").read_text().split()
    pinned = dict(line.split("==") for line in lines)
    assert {"transformers", "bitsandbytes", "peft"} <= set(pinned)
    kept = {"torch", "numpy", "pandas", "pillow", "scipy", "matplotlib", "pyarrow", "triton"}
    assert not set(pinned) & (kept | {"autoawq"} | set(IMAGE))
    for name, version in pinned.items():
        assert importlib.metadata.version(name) == version, name


def needs(name, extra=""):
    """Requirements of an installed package on the image: Linux, Python 3.12."""
    image = {"python_version": "3.12", "python_full_version": "3.12.13", "extra": extra}
    image |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    image |= {"sys_platform": "linux"}
    for line in importlib.metadata.requires(name) or ():
        needed = Requirement(line)
        if not needed.marker or needed.marker.evaluate(image):
            yield needed
            for part in needed.extras:
                yield from set(needs(needed.name, part)) - set(needs(needed.name))


def test_what_the_pinned_packages_need_is_pinned_or_on_the_image():
    pinned = dict(line.split("==") for line in build.pins(ROOT))
    for name in pinned:
        for needed in needs(name):
            other = canonicalize_name(needed.name)
            assert other in pinned or other in IMAGE, f"{name} needs {needed}"
            if other not in OLDER:
                assert needed.specifier.contains((pinned | IMAGE)[other]), f"{name} needs {needed}"


IMPORTED = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "IPython": "ipython"}


def test_what_the_package_imports_is_pinned_or_on_the_image():
    pinned = dict(line.split("==") for line in build.pins(ROOT))
    taken = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                taken.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                taken.add(node.module)
    tops = {name.partition(".")[0] for name in taken} - sys.stdlib_module_names
    names = {IMPORTED.get(top, canonicalize_name(top)) for top in tops}
    own, absent = "derm-compress", "awq"  # the reference quantizer, for Linux with triton alone
    assert names - set(pinned) - set(IMAGE) == {own, absent}


def told(built, name):
    return json.loads((built / "kernels" / name / "kernel-metadata.json").read_text())


def test_kernels_say_machine_internet_and_inputs(built):
    names = [path.name for path in (built / "kernels").iterdir()]
    assert len(names) == 11
    for name in names:
        one = told(built, name)
        assert one["machine_shape"] == "NvidiaTeslaT4" and "docker_image" not in one
        assert one["enable_internet"] is True and one["enable_gpu"] is True
        assert one["dataset_sources"] == ["me/derm-compress", "shubhamgoel27/dermnet"]
        assert one["title"] == f"derm-kaggle-t4-{name}".replace("_", "-")
        assert one["id"] == f"me/{one['title']}" and len(one["title"]) <= 50
        assert (built / "kernels" / name / one["code_file"]).is_file()
    earlier = ("01-data", "02-finetune", "03-layer-importance")
    sources = told(built, "04_pruning")["kernel_sources"]
    assert sources == [f"me/derm-kaggle-t4-{name}" for name in earlier]


def test_a_study_goes_on_from_all_before_it_by_the_same_script(built):
    sources = {name: told(built, name)["kernel_sources"] for name in build.STUDIES}
    first, second = "me/derm-kaggle-t4-study", "me/derm-kaggle-t4-study-2"
    assert sources == {"study": [], "study-2": [first], "study-3": [first, second]}
    assert len({(built / "kernels" / name / "study.py").read_bytes() for name in sources}) == 1


@pytest.mark.parametrize(
    ("model", "models", "datasets"),
    [
        ("", [], []),
        ("them/llava/transformers/7b/1", ["them/llava/transformers/7b/1"], []),
        ("them/llava", [], ["them/llava"]),
    ],
)
def test_model_and_image_are_attached_to_every_kernel(model, models, datasets):
    kernels = build.Kernels("small", "me", ["me/derm-compress"], model, "gcr.io/x@sha256:1")
    made = kernels.metadata("study", "study.py", [])
    assert made["model_sources"] == models and made["docker_image"] == "gcr.io/x@sha256:1"
    assert made["dataset_sources"] == ["me/derm-compress", *datasets]


def test_a_run_that_draws_its_pictures_needs_no_data_set():
    assert build.pictures(build.run_file(ROOT, "small")) == []
    assert build.pictures(build.run_file(ROOT, "kaggle-t4")) == ["shubhamgoel27/dermnet"]


def test_a_stage_that_a_run_leaves_out_has_no_kernel():
    told = build.run_file(ROOT, "small")
    assert build.asked(told, "08_evaluation") and not build.asked(told, "09_allocation")
    assert build.asked(f"{told}budget_gib: [3.0]\n", "09_allocation")


def test_one_data_set_serves_all_runs(built, tmp_path):
    other = build.build(tmp_path / "build", "small", owner="me", root=ROOT)
    same = [path.relative_to(other) for path in (other / "dataset").rglob("*") if path.is_file()]
    assert len(same) > 15
    for path in same:
        assert (other / path).read_bytes() == (built / path).read_bytes(), path


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"run": "nix"}, "no .*nix.yaml.* small"),
        ({"run": "small", "model": "a/b/c"}, "OWNER/MODEL"),
    ],
)
def test_what_cannot_be_built_says_what_to_write(tmp_path, asked, words):
    with pytest.raises(DermError, match=words):
        build.build(tmp_path / "build", root=ROOT, **asked)


def test_the_build_needs_nothing_but_python():
    words = [sys.executable, "-S", "-m", "derm_compress.kaggle.build", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--image" in done.stdout, done.stderr


def test_a_build_overwrites_no_other_folder(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(DermError, match="kaggle: .* is not empty"):
        build.build(tmp_path, "small", root=ROOT)
    assert (tmp_path / "mine").exists()


def test_setup_cells_are_alike_do_nothing_elsewhere_and_are_no_part_of_keys():
    notebooks = params.read_notebooks(ROOT).values()
    (cell,) = {text for n in notebooks for text, tags, _ in n.cells if "setup" in tags}
    assert not any("kaggle_setup" in text for n in notebooks for text in n.code())

    def ran(**variables):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("KAGGLE", "DERM_"))}
        words = [sys.executable, "-c", cell]
        return subprocess.run(words, env=env | variables, capture_output=True, text=True)

    for variables in ({}, {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "DERM_COMPRESS_ROOT": "x"}):
        done = ran(**variables)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lost = ran(KAGGLE_KERNEL_RUN_TYPE="Batch", KAGGLE_ROOT="nowhere")
    assert lost.returncode and "attach the data set" in lost.stderr


def first_cells(built):
    """What each kernel runs first, by the kernel's name."""
    study = (built / "kernels/study/study.py").read_text("utf-8")
    cells = {"study": study.split("\nimport subp")[0]}
    for path in built.glob("kernels/*/*.ipynb"):
        cells[path.stem] = "".join(build.setup_cell(files.read_json(path))["source"])
    assert len(cells) == 9
    return cells


def test_a_kernel_runs_the_script_that_it_was_built_with_and_no_other(built, tmp_path):
    genuine = (built / "dataset" / "kaggle_setup.py").read_bytes()
    env = {"PATH": os.environ["PATH"], "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    refused = "RuntimeError: attach the data set built with this notebook, alone; found "
    for name, cell in first_cells(built).items():
        assert 'os.environ["DERM_COMPRESS_RUN"] = "kaggle-t4"' in cell, name
        assert files.file_digest(built / "dataset/kaggle_setup.py") in cell, name

    def ran(**scripts):
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        for folder, code in scripts.items():
            path = root / "input" / folder / "kaggle_setup.py"
            path.parent.mkdir(parents=True)
            path.write_bytes(code)
        how = {"env": env | {"KAGGLE_ROOT": str(root)}, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", cell], **how)
        return done.stdout, done.stderr.splitlines()[-1]

    evil = b"print('run')"
    for scripts in ({}, {"a": evil}, {"a": genuine, "b": evil}, {"a": genuine, "b": genuine}):
        said, error = ran(**scripts)
        assert not said and error.startswith(refused)
    said, error = ran(a=genuine)  # which then misses what it was built with
    assert not said and error.endswith("is not what `make kaggle` built: build and upload it again")


def test_a_data_set_that_differs_from_its_build_in_any_file_is_refused(built, tmp_path):
    shutil.copytree(built / "dataset", tmp_path / "there")
    known = setup.contents(built / "dataset")
    assert f'CONTENTS = "{known}"' in (built / "dataset/kaggle_setup.py").read_text("utf-8")
    assert setup.contents(tmp_path / "there") == known
    for pattern in ("*.whl", "requirements*", "notebooks/03*", "params/tiny.yaml"):
        (path,) = (tmp_path / "there").glob(pattern)
        path.write_bytes(path.read_bytes() + b" ")
        other = setup.contents(tmp_path / "there")
        assert other != known
        known = other


@pytest.mark.parametrize(
    ("pictures", "model", "earlier"),
    [
        ("dermnet", "llava/transformers/1.5-7b-hf/1", "derm-compress-run/artifacts"),
        ("datasets/a/dermnet/dermnet", "models/a/b/transformers/c/1", "datasets/a/run/artifacts"),
        ("datasets/a/dermnet", "datasets/b/llava-7b", "notebooks/me/derm-01-data/artifacts"),
    ],
)
def test_inputs_are_found_however_they_are_mounted(tmp_path, pictures, model, earlier):
    for split in ("train", "test"):
        (tmp_path / pictures / split / setup.PICTURES).mkdir(parents=True)
    for folder, told in {
        "judge": {"model_type": "qwen2"},
        "a-list": [],
        "a-pruned": {"model_type": "llava", "text_config": {"num_hidden_layers": 26}},
        "a-packed": {"model_type": "llava", "quantization_config": {"quant_method": "awq"}},
        model: {"model_type": "llava"},
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps(told))
        (tmp_path / folder / "model.safetensors").touch()
    (tmp_path / earlier / "store").mkdir(parents=True)
    assert setup.find_pictures(tmp_path) == tmp_path / pictures
    assert setup.find_model(tmp_path) == tmp_path / model
    assert setup.find_artifacts(tmp_path) == [tmp_path / earlier]
    assert setup.find_model(tmp_path / "nowhere") is None


def test_only_what_is_missing_or_of_another_version_is_wanted(tmp_path):
    wanted = ["pyyaml==1.0", "no-such-package==1.0"]
    pins = [f"pyyaml=={importlib.metadata.version('pyyaml')}", *wanted]
    (tmp_path / "pins").write_text("\n".join(pins))
    assert setup.wanted(tmp_path / "pins") == wanted


def test_a_mounted_folder_counts_without_its_times(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    found = []
    for name in ("input", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"x")
        link = tmp_path / f"link-{name}"
        link.symlink_to(tmp_path / name)
        for when in (1, 2):
            os.utime(tmp_path / name / "a.jpg", (when, when))
            found.append(fingerprint(link))
    assert found[0] == found[1] and found[2] != found[3] and found[0] != found[2]
    alone = tmp_path / "alone"  # a folder of links to single files
    alone.mkdir()
    (alone / "a.jpg").symlink_to(tmp_path / "input" / "a.jpg")
    assert fingerprint(alone) == found[0]


def states(done) -> list[str]:
    return [line.split()[-1] for line in done.stdout.splitlines()]


def test_sessions_go_on_from_what_is_packed_or_mounted_and_compute_nothing_twice(tmp_path):
    one, two, three = (toy.project(tmp_path / name) for name in ("one", "two", "three"))
    packed, study = tmp_path / "packed", ("run", "params/tiny.yaml")
    nothing = toy.call(one, "pack", "tiny", str(packed))
    assert nothing.returncode == 2 and "nothing to pack" in nothing.stderr
    assert toy.call(one, *study, "--only", "01").returncode == 0
    done = toy.call(one, "pack", "tiny", str(packed), "--owner", "me")
    assert done.stdout.splitlines()[0] == "01_data finished", done.stderr
    told = json.loads((packed / "dataset-metadata.json").read_text())
    assert told["id"] == "me/derm-compress-tiny"
    assert (packed / "artifacts/runs/tiny/01_data.json").exists()

    mounted = {"DERM_COMPRESS_STORES": str(packed / "artifacts/store")}
    listed = toy.call(two, *study, "--list", **mounted)
    assert states(listed) == ["cached", "compute", "compute"]
    assert toy.call(two, *study, "--only", "02", **mounted).returncode == 0
    manifests = [sorted(root.glob("artifacts/store/0*/*/manifest.json")) for root in (one, two)]
    assert list(map(len, manifests)) == [1, 2]
    assert manifests[0][0].read_bytes() == manifests[1][0].read_bytes()
    mounted = {
        "DERM_COMPRESS_STORES": str(two / "artifacts/store")
    }  # has all of the session before
    listed = toy.call(three, *study, "--list", **mounted)
    assert states(listed) == ["cached", "cached", "compute"]
    forced = toy.call(three, *study, "--force", **mounted)
    assert forced.returncode == 2 and "detach" in forced.stderr


alarms = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms on this system")


@alarms
def test_out_of_hours_a_notebook_ends_and_is_no_failure():
    code = "from derm_compress.kaggle import setup as k; import time"
    code += "; k.end_after((k.age() + 0.2) / 3600); time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and done.stdout.startswith("OUT OF TIME"), done.stderr


@alarms
def test_out_of_hours_a_run_stops_as_if_interrupted(tmp_path):
    done = toy.call(toy.project(tmp_path), "run", "params/tiny.yaml", "--hours", "0.0003")
    assert done.returncode == 130 and "goes on from there" in done.stdout, done.stderr


def test_the_study_out_of_hours_is_no_failure_and_says_so(built, tmp_path):
    script = (built / "kernels" / "study" / "study.py").read_text()
    (tmp_path / "derm_compress.py").write_text("import os, sys; sys.exit(int(os.environ['CODE']))")
    for code, ends in ((130, 0), (1, 1), (0, 0)):
        env = toy.environment(tmp_path) | {"KAGGLE_ROOT": str(tmp_path), "CODE": str(code)}
        env |= {"DERM_COMPRESS_ROOT": str(tmp_path), "DERM_COMPRESS_PARAMS": "x.yaml"}
        how = {"env": env, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", script], **how)
        assert done.returncode == ends, done.stderr
        assert ("OUT OF TIME" in done.stdout) == (code == 130)


def test_what_judges_said_in_several_sessions_is_put_together(tmp_path):
    for name, text in (("a", '["q1", 1]\n["q2", 2]\n["cut'), ("b", '["q1", 1]\n["q3", 3]\n')):
        (tmp_path / name).write_text(text)
        setup.add_lines(str(tmp_path / name), str(tmp_path / "all"))
    assert files.Journal(tmp_path / "all").done == {"q1": 1, "q2": 2, "q3": 3}
