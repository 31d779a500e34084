"""What a result's key depends on, and what an edit therefore computes anew."""

import shutil
from pathlib import Path

import pytest
import toy

from derm_compress.study import keys
from derm_compress.study.params import known_parameters, read_notebooks, read_params
from derm_compress.study.plan import Plan, make_plan

ROOT = Path(__file__).parents[2]
STAGES = [f"{number:02}" for number in range(1, 9)]


def planned(root: Path, run: str, **values) -> Plan:
    """A run as a new process sees it, with the package that lies in the project."""
    keys.code_parts.cache_clear()
    keys.read_module.cache_clear()
    keys.face_of.cache_clear()
    notebooks = read_notebooks(root)
    asked = read_params(root / "params" / f"{run}.yaml", known_parameters(notebooks))
    made = make_plan(root, notebooks, asked | values)
    return Plan(made.root, made.notebooks, made.values, root / "derm_compress")


def changed(before: dict, after: dict) -> list[str]:
    return [stage for stage in before if before[stage] != after[stage]]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A copy of the study, to edit; its keys, and how its notebooks show results, before."""
    root = tmp_path_factory.mktemp("study")
    for name in ("derm_compress", "notebooks", "params"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    return root, *keys_and_views(root)


def keys_and_views(root: Path) -> tuple[dict, dict]:
    run = planned(root, "smoke")
    return run.keys, {stage: run.view(stage) for stage in run.notebooks}


@pytest.mark.parametrize(
    ("module", "recomputed"),
    [
        ("data/dialogue.py", STAGES),
        ("model/prompts.py", STAGES[1:]),
        ("method/finetune/train.py", STAGES[1:]),
        ("method/importance/criteria.py", STAGES[2:]),
        ("method/quantization/grids.py", STAGES[6:]),
        ("method/quantization/methods.py", STAGES[6:]),
        ("method/quantization/scaling.py", STAGES[6:]),
        ("evaluate/latency.py", STAGES[7:]),
        ("report/results.py", []),
        ("study/store.py", []),
        ("kaggle/build.py", []),
    ],
)
def test_an_edit_recomputes_what_uses_it_and_what_follows(study, module, recomputed):
    root, before, drawn = study
    file = root / "derm_compress" / module
    text = file.read_text()
    file.write_text(text + "\nEDITED = 1\n")
    after, redrawn = keys_and_views(root)
    file.write_text(text)
    assert [stage[:2] for stage in changed(before, after)] == recomputed
    assert bool(changed(drawn, redrawn)) == (module.partition("/")[0] in keys.SHOWN)


@pytest.mark.parametrize(
    ("file", "old", "new", "recomputed"),
    [
        ("notebooks/01_data.ipynb", "# 01_data", "# Another title", ""),
        ("notebooks/01_data.ipynb", "print(len(frame))", "print(frame)", ""),
        ("notebooks/01_data.ipynb", "count, stage.p.seed", "count,  # why\\n stage.p.seed", ""),
        (
            "notebooks/01_data.ipynb",
            "import shapes\\n",
            "import figures, shapes\\nimport os\\n",
            "",
        ),
        ("notebooks/01_data.ipynb", "numbers to make", "how many numbers", ""),
        ("notebooks/03_right.ipynb", "stage.p.factor", "stage.p.factor + 1", "03"),
        ("notebooks/01_data.ipynb", "stage.p.seed", "stage.p.seed + 1", "01 02 03"),
        ("derm_compress/method/shapes.py", '"""Numbers."""', '"""Words."""  # and more', ""),
        ("derm_compress/method/shapes.py", "seed + i", "seed - i", "01 02 03"),
        ("derm_compress/method/words.py", "read_text()", "read_text().strip()", "01 02 03"),
        ("derm_compress/method/words.yaml", "mole", "wart", "01 02 03"),
        ("params/tiny.yaml", "count: 4", "count: 5", "01 02 03"),
        ("params/tiny.yaml", "count: 4", "count: 4\nfactor: 2", ""),
        ("params/tiny.yaml", "count: 4", "count: 4\nfactor: 2.5", "02 03"),
        ("params/tiny.yaml", "count: 4", "count: 4\nartifact_root: elsewhere", ""),
    ],
)
def test_a_key_changes_with_what_the_result_depends_on(tmp_path, file, old, new, recomputed):
    root = toy.project(tmp_path)
    before = planned(root, "tiny").keys
    toy.edit(root / file, old, new)
    after = planned(root, "tiny").keys
    assert [stage[:2] for stage in changed(before, after)] == recomputed.split()


def test_of_a_face_counts_what_is_taken_and_of_a_folder_all(tmp_path):
    package = toy.project(tmp_path) / "derm_compress"
    (package / "method" / "__init__.py").write_text(
        'FACE = {"shapes": ["numbers"], "words": ["word"]}\n'
    )
    for cell, modules in {
        "from derm_compress.method import word\nword()": {"method.words"},
        "from derm_compress import method\nmethod.word()": {"method.words"},
        "from derm_compress import method as m\nm.numbers(1, 2)": {"method.shapes", "method.words"},
        "from derm_compress.method import *": {"method.shapes", "method.words"},
        "import derm_compress.method\nderm_compress": {"method.shapes", "method.words"},
        "from derm_compress.method import words": set(),  # not used
    }.items():
        keys.read_module.cache_clear()
        keys.face_of.cache_clear()
        assert set(keys.code_parts((cell,), package=package)["modules"]) == modules, cell


def test_a_data_folder_counts_by_its_files_not_by_its_place(tmp_path):
    root = toy.project(tmp_path)
    photos = root / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_text("a")
    first = planned(root, "tiny", data_root="photos").keys
    shutil.copytree(photos, root / "moved there")
    assert planned(root, "tiny", data_root="moved there").keys == first
    (photos / "a.jpg").write_text("another")
    assert planned(root, "tiny", data_root="photos").keys["01_data"] != first["01_data"]


def test_of_the_published_data_sets_that_of_the_source_counts():
    stored = read_notebooks(ROOT)
    counted = {}
    for source in ("synthetic", "scin"):
        values = make_plan(ROOT, stored, {"source": source}).counted("01_data").values()
        words = frozenset(f"{value}.yaml" for value in values if isinstance(value, str))
        data = keys.code_parts(stored["01_data"].code(), words=words)["data"]
        counted[source] = {name for name in data if name.startswith("data/presets")}
    assert counted == {"synthetic": set(), "scin": {"data/presets/scin.yaml"}}


def test_a_link_or_an_archive_of_pictures_counts_by_what_it_holds(tmp_path):
    root = toy.project(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_text("a")
    (root / "photos").mkdir()
    (root / "photos" / "train").symlink_to(tmp_path / "real", target_is_directory=True)
    (root / "photos.zip").write_bytes(b"one")
    before = [planned(root, "tiny", data_root=name).keys for name in ("photos", "photos.zip")]
    (tmp_path / "real" / "a.jpg").unlink()
    (root / "photos.zip").write_bytes(b"another")
    after = [planned(root, "tiny", data_root=name).keys for name in ("photos", "photos.zip")]
    assert all(one["01_data"] != other["01_data"] for one, other in zip(before, after, strict=True))


def test_a_sentence_transformer_counts_by_what_it_holds(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = planned(ROOT, "tiny", embedder=str(tmp_path)).keys
    weights.write_bytes(b"another")
    after = planned(ROOT, "tiny", embedder=str(tmp_path)).keys
    assert before["02_finetune"] == after["02_finetune"]
    assert before["03_layer_importance"] != after["03_layer_importance"]


def test_a_gpu_and_a_cpu_share_results_and_shapes_alone_are_apart():
    notebooks = read_notebooks(ROOT)
    on = {
        name: make_plan(ROOT, notebooks, {"device": name}).keys for name in ("cpu", "cuda", "meta")
    }
    assert on["cpu"] == on["cuda"]
    assert changed(on["cpu"], on["meta"]) == list(on["cpu"])[1:]
