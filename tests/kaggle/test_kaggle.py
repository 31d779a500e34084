"""What goes to Kaggle, how it sets itself up there, and artifacts that come back mounted. All of it: mock_kaggle.py."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.kaggle import build, setup
from derm_compress.study import params
from derm_compress.study import store as store_

ROOT = Path(__file__).parents[2]
STAGES = ("01_data", "02_left", "03_right")

# What pinned packages need and the image has, as Colab's of 2026-06 lists it, on which Kaggle's is built
IMAGE = {
    "aiohttp": "3.14.0", "beautifulsoup4": "4.13.5", "defusedxml": "0.7.1", "entrypoints": "0.4", "filelock": "3.29.0",
    "fsspec": "2025.3.0", "httpx": "0.28.1", "jinja2": "3.1.6", "jupyter-client": "7.4.9", "jupyter-core": "5.9.1",
    "markupsafe": "3.0.3", "nbformat": "5.10.4", "numpy": "2.0.2", "packaging": "26.2", "pandocfilters": "1.5.1",
    "psutil": "5.9.5", "pygments": "2.20.0", "pyyaml": "6.0.3", "requests": "2.32.4", "scikit-learn": "1.6.1",
    "scipy": "1.16.3", "tenacity": "9.1.4", "tinycss2": "1.4.0", "torch": "2.10.0", "tqdm": "4.67.3",
    "traitlets": "5.7.1", "typer": "0.25.1", "typing-extensions": "4.15.0", "webencodings": "0.5.1",
}  # fmt: skip
# A running kernel holds its traitlets; nbclient asks for 5.13 and was seen to run notebooks with 5.7.1
OLDER = {"traitlets"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("kaggle") / "build", owner="me", root=ROOT)


def test_the_data_set_has_all_that_a_session_needs(built):
    folder = built / "dataset"
    assert {"params", "notebooks", "kaggle_setup.py", "requirements-kaggle.txt"} <= {
        p.name for p in folder.iterdir()
    }
    assert len(list((folder / "notebooks").glob("*.ipynb"))) == 8
    (wheel,) = folder.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True
    ).stdout
    for part in (
        "data/sources/dermnet.yaml", "data/diseases.yaml", "model/tiny_llava/model.safetensors", "report/templates/",
        "evaluate/judges/judge_prompts/", "method/pruning/published_plan.json",
    ):  # fmt: skip
        assert f"derm_compress/{part}" in names
    assert json.loads((folder / "dataset-metadata.json").read_text())["id"] == "me/derm-compress"


def test_nothing_that_the_image_pins_is_installed(built):
    lines = (built / "dataset/requirements-kaggle.txt").read_text().split()
    names = {line.partition("==")[0] for line in lines}
    assert {"transformers", "bitsandbytes", "peft"} <= names
    assert not names & {
        "torch",
        "numpy",
        "pandas",
        "pillow",
        "scipy",
        "matplotlib",
        "pyarrow",
        "autoawq",
        "triton",
    }
    for line in lines:
        name, _, version = line.partition("==")
        assert importlib.metadata.version(name) == version, name


def needs(name, extra=""):
    """Requirements of an installed package on the image: Linux, Python 3.12."""
    image = {
        "python_version": "3.12",
        "python_full_version": "3.12.13",
        "sys_platform": "linux",
        "extra": extra,
    }
    image |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    for line in importlib.metadata.requires(name) or ():
        needed = Requirement(line)
        if not needed.marker or needed.marker.evaluate(image):
            yield needed
            for part in needed.extras:
                yield from set(needs(needed.name, part)) - set(needs(needed.name))


def test_what_the_pinned_packages_need_is_pinned_or_on_the_image():
    pinned = dict(line.split("==") for line in build.pins(ROOT))
    assert not set(pinned) & set(IMAGE)
    for name in pinned:
        for needed in needs(name):
            other = canonicalize_name(needed.name)
            assert other in pinned or other in IMAGE, f"{name} needs {needed}"
            if other not in OLDER:
                assert needed.specifier.contains((pinned | IMAGE)[other]), f"{name} needs {needed}"


def test_kernels_say_machine_internet_and_inputs(built):
    told = [
        json.loads(path.read_text())
        for path in sorted((built / "kernels").glob("*/kernel-metadata.json"))
    ]
    assert len(told) == 9
    for one in told:
        assert (
            one["machine_shape"] == "NvidiaTeslaT4"
            and one["enable_internet"] is True
            and one["enable_gpu"] is True
        )
        assert set(one["dataset_sources"]) == {"me/derm-compress", "shubhamgoel27/dermnet"}
    assert told[3]["kernel_sources"] == [
        f"me/derm-compress-{n}" for n in ("01-data", "02-finetune", "03-layer-importance")
    ]
    study = built / "kernels" / "study" / "study.py"
    compile(study.read_text(), str(study), "exec")


def test_a_build_overwrites_no_other_folder(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(DermError, match="no earlier build"):
        build.build(tmp_path, root=ROOT)
    assert (tmp_path / "mine").exists()


def test_setup_cells_are_alike_do_nothing_elsewhere_and_are_no_part_of_keys():
    notebooks = params.read_notebooks(ROOT)
    cells = {text for n in notebooks.values() for text, tags, _ in n.cells if "setup" in tags}
    assert len(cells) == 1 and all(
        not any("kaggle_setup" in text for text in n.code()) for n in notebooks.values()
    )
    for variable in ({}, {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "DERM_COMPRESS_ROOT": "x"}):
        env = {k: v for k, v in os.environ.items() if not k.startswith("KAGGLE")} | variable
        done = subprocess.run(
            [sys.executable, "-c", *cells], env=env, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lost = os.environ | {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_ROOT": "nowhere"}
    lost.pop("DERM_COMPRESS_ROOT", None)
    done = subprocess.run([sys.executable, "-c", *cells], env=lost, capture_output=True, text=True)
    assert done.returncode and "attach the data set" in done.stderr


@pytest.mark.parametrize(
    ("pictures", "model", "earlier"),
    [
        ("dermnet", "llava/transformers/1.5-7b-hf/1", "derm-compress-run/artifacts"),
        (
            "datasets/a/dermnet/dermnet",
            "models/llava-hf/llava/transformers/1.5-7b-hf/1",
            "datasets/a/run/artifacts",
        ),
        (
            "datasets/a/dermnet",
            "datasets/b/llava-1-5-7b-hf",
            "notebooks/me/derm-compress-01-data/artifacts",
        ),
    ],
)
def test_inputs_are_found_however_they_are_mounted(tmp_path, pictures, model, earlier):
    for split in ("train", "test"):
        (tmp_path / pictures / split / setup.PICTURES).mkdir(parents=True)
    pruned, packed = (
        {"text_config": {"num_hidden_layers": 26}},
        {"quantization_config": {"quant_method": "awq"}},
    )
    for folder, told in (
        ("judge", {"model_type": "qwen2"}),
        ("a-pruned", pruned),
        ("a-packed", packed),
        (model, {}),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "llava"} | told))
        (tmp_path / folder / "model.safetensors").touch()
    (tmp_path / earlier / "store").mkdir(parents=True)
    assert setup.find_pictures(tmp_path) == tmp_path / pictures
    assert setup.find_model(tmp_path) == tmp_path / model
    assert setup.find_artifacts(tmp_path) == [tmp_path / earlier]
    assert setup.find_model(tmp_path / "nowhere") is None


def test_only_what_is_missing_or_of_another_version_is_wanted(tmp_path):
    (tmp_path / "pins").write_text(
        f"pyyaml=={importlib.metadata.version('pyyaml')}\npyyaml==1.0\nno-such-package==1.0\n"
    )
    assert setup.wanted(tmp_path / "pins") == ["pyyaml==1.0", "no-such-package==1.0"]


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
            found.append(files.folder_fingerprint(link))
    assert found[0] == found[1] and found[2] != found[3] and found[0] != found[2]


K1, K2 = "1" * 64, "2" * 64


class TestMounted:
    """A second store, below the first, that is never written to."""

    @pytest.fixture
    def stores(self, tmp_path):
        below = store_.Store(tmp_path / "mounted")
        work, _ = below.begin("01_a", K1)
        (work / "x.json").write_text("1")
        below.commit("01_a", K1, {})
        work, _ = below.begin("02_b", K2)
        files.Journal(work / "journal" / "j.jsonl").add("one", 1)
        files.release(below.lock("02_b", K2))
        return store_.Store(tmp_path / "own", [tmp_path / "mounted"]), below

    def test_what_is_finished_is_used_where_it_is(self, stores):
        store, below = stores
        folder, finished = store.begin("01_a", K1)
        assert (
            finished
            and folder == below.own("01_a", K1)
            and store.resolve(f"01_a/{K1}/x.json").read_text() == "1"
        )
        assert not store.own("01_a", K1).exists()

    def test_what_is_begun_goes_on_in_a_copy(self, stores, capsys):
        store, below = stores
        before = {p: p.read_bytes() for p in below.root.rglob("*") if p.is_file()}
        folder, finished = store.begin("02_b", K2)
        journal = files.Journal(folder / "journal" / "j.jsonl")
        assert (
            not finished
            and journal.done == {"one": 1}
            and "goes on from" in capsys.readouterr().out
        )
        journal.add("two", 2)
        store.commit("02_b", K2, {})
        assert store.own("02_b", K2).is_dir()
        assert {p: p.read_bytes() for p in below.root.rglob("*") if p.is_file()} == before

    def test_what_is_damaged_is_named_and_computed_anew(self, stores, capsys):
        store, below = stores
        (below.own("01_a", K1) / "x.json").write_text("2")
        folder, finished = store.begin("01_a", K1)
        assert (
            not finished
            and folder == store.work("01_a", K1)
            and "it is not used" in capsys.readouterr().out
        )
        (folder / "x.json").write_text("1")
        store.commit("01_a", K1, {})
        assert store.complete("01_a", K1) and (below.own("01_a", K1) / "x.json").read_text() == "2"

    def test_what_is_adopted_stands_alone(self, stores):
        store, below = stores
        for path in below.root.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        for stage, key in (("01_a", K1), ("02_b", K2), ("03_c", "0" * 64)):
            store.adopt(stage, key)
        alone = store_.Store(store.root)
        assert alone.complete("01_a", K1) and not alone.own("03_c", "0" * 64).exists()
        folder, _ = alone.begin("02_b", K2)
        journal = files.Journal(folder / "journal" / "j.jsonl")
        journal.add("two", 2)
        assert journal.done == {"one": 1, "two": 2}
        for path in below.root.rglob("*"):
            path.chmod(0o755)

    def test_of_several_the_furthest_is_gone_on_with(self, stores, tmp_path):
        further = store_.Store(tmp_path / "further", [tmp_path / "mounted"])
        work, _ = further.begin("02_b", K2)
        files.Journal(work / "journal" / "j.jsonl").add("two", 2)
        for roots in (["mounted", "further"], ["further", "mounted"]):
            store = store_.Store(tmp_path / f"own-{roots[0]}", [tmp_path / root for root in roots])
            folder, _ = store.begin("02_b", K2)
            assert files.Journal(folder / "journal" / "j.jsonl").done == {"one": 1, "two": 2}

    def test_it_cannot_be_forced_away(self, stores):
        with pytest.raises(DermError, match="detach"):
            stores[0].discard("01_a", K1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A toy run, all of it finished, in a data set folder."""
    top = tmp_path_factory.mktemp("pack")
    root = toy.project(top)
    nothing = toy.call(root, "pack", "tiny", str(top / "none"))
    assert nothing.returncode == 2 and "nothing to pack" in nothing.stderr
    assert toy.call(root, "run", "params/tiny.yaml").returncode == 0
    done = toy.call(root, "pack", "tiny", str(top / "packed"), "--owner", "me")
    assert done.returncode == 0 and done.stdout.splitlines()[:3] == [
        f"{s} finished" for s in STAGES
    ], done.stderr
    return top / "packed"


def mounting(root, packed, *words):
    env = toy.environment(root) | {"DERM_COMPRESS_STORES": str(packed / "artifacts" / "store")}
    return subprocess.run(
        toy.command(root, *words), cwd=root, env=env, capture_output=True, text=True
    )


def test_a_packed_run_is_not_computed_again(packed, tmp_path):
    assert (
        json.loads((packed / "dataset-metadata.json").read_text())["id"] == "me/derm-compress-tiny"
    )
    assert {p.name for p in packed.glob("artifacts/runs/tiny/*.json")} >= {
        f"{s}.json" for s in STAGES
    }
    root = toy.project(tmp_path)
    said = mounting(root, packed, "run", "params/tiny.yaml", "--list").stdout.splitlines()
    assert len(said) == 3 and all(line.endswith("cached") for line in said)
    assert mounting(root, packed, "run", "params/tiny.yaml").returncode == 0
    for manifest in (packed / "artifacts" / "store").glob("0*/*/manifest.json"):
        assert (root / manifest.relative_to(packed)).read_bytes() == manifest.read_bytes()
    again = mounting(root, packed, "pack", "tiny", str(tmp_path / "again"))
    assert again.returncode == 0 and len(list((tmp_path / "again").rglob("manifest.json"))) == 3
    forced = mounting(root, packed, "run", "params/tiny.yaml", "--force")
    assert forced.returncode == 2 and "detach" in forced.stderr


def test_the_last_of_three_sessions_needs_the_second_alone(tmp_path):
    roots = [toy.project(tmp_path / name) for name in ("one", "two", "three")]
    assert toy.call(roots[0], "run", "params/tiny.yaml", "--only", "01").returncode == 0
    assert mounting(roots[1], roots[0], "run", "params/tiny.yaml", "--only", "02").returncode == 0
    listed = mounting(roots[2], roots[1], "run", "params/tiny.yaml", "--list").stdout.splitlines()
    assert [line.split()[-1] for line in listed] == ["cached", "cached", "compute"]
    assert mounting(roots[2], roots[1], "run", "params/tiny.yaml").returncode == 0
    stores = [sorted(root.glob("artifacts/store/0*/*/manifest.json")) for root in roots]
    assert list(map(len, stores)) == [1, 2, 3]
    assert len({found[0].read_bytes() for found in stores}) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms on this system")
def test_out_of_hours_a_notebook_ends_and_is_no_failure(tmp_path):
    start = "from derm_compress.kaggle import setup as k\nk.end_after((k.age() + 1) / 3600)"
    cells = [toy.cell(text) for text in (start, "import time\ntime.sleep(60)", "print('never')")]
    book, out = toy.notebook(tmp_path / "a.ipynb", *cells), tmp_path / "out.ipynb"
    words = [sys.executable, "-m", "papermill", book, out, "-k", "python3", "--cwd", ROOT]
    done = subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    told = [
        json.dumps(cell["outputs"])
        for cell in json.loads(out.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    assert "OUT OF TIME" in told[1] and "SystemExit" in told[1] and "never" not in told[2]


def test_the_study_out_of_hours_is_no_failure_and_says_so(built, tmp_path):
    script = (built / "kernels" / "study" / "study.py").read_text()
    (tmp_path / "input" / "data").mkdir(parents=True)
    (tmp_path / "input" / "data" / "kaggle_setup.py").touch()
    (tmp_path / "derm_compress.py").write_text("import os, sys; sys.exit(int(os.environ['CODE']))")
    for code, ends in ((130, 0), (1, 1), (0, 0)):
        env = toy.environment(tmp_path) | {"KAGGLE_ROOT": str(tmp_path), "CODE": str(code)}
        env |= {"DERM_COMPRESS_ROOT": str(tmp_path), "DERM_COMPRESS_PARAMS": "x.yaml"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True
        )
        assert done.returncode == ends and ("OUT OF TIME" in done.stdout) == (code == 130), (
            done.stderr
        )


def test_what_judges_said_in_several_sessions_is_put_together(tmp_path):
    for name, text in (("a", '["q1", 1]\n["q2", 2]\n["cut'), ("b", '["q1", 1]\n["q3", 3]\n')):
        (tmp_path / name).write_text(text)
        setup.add_lines(str(tmp_path / name), str(tmp_path / "all"))
    assert files.Journal(tmp_path / "all").done == {"q1": 1, "q2": 2, "q3": 3}


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms on this system")
def test_out_of_hours_a_run_stops_as_if_interrupted(tmp_path):
    done = toy.call(toy.project(tmp_path), "run", "params/tiny.yaml", "--hours", "0.0005")
    assert done.returncode == 130 and "goes on from there" in done.stdout, done.stderr
