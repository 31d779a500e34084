"""`look` says what a run would read, and the run file that it writes reads just that."""

import re
import shlex
import subprocess
import sys

import dermnet_tree
import pytest
import yaml
from blotches import plant
from layouts import LAYOUTS
from runs import DEFAULTS, KNOWN, ROOT

from derm_compress.data import load
from derm_compress.data.request import Request
from derm_compress.errors import DermError
from derm_compress.study import params
from derm_compress.study.look.propose import name_of, propose


def look(folder, out, **sets):
    """(page, values of the run file, checked) of a folder that a run would read."""
    said, runs = propose(folder, sets, out, ROOT)
    assert runs and "WOULD STOP" not in said, said
    return said, params.read_params(out, KNOWN)


@pytest.mark.parametrize("name", [*LAYOUTS, "dermnet"])
def test_published_data_sets_are_recognised(name, tmp_path):
    root = tmp_path / "dataset"
    make = LAYOUTS.get(name, dermnet_tree.plant)
    make(root)
    said, values = look(root, tmp_path / f"{name}.yaml")
    assert values["source"] == name and values["run"] == name
    assert "licence" in said and ("UNCHECKED" in said) == (name != "pad-ufes-20")
    assert "missing" not in said and re.search("^test +[1-9]", said, re.M)


def test_a_folder_of_ones_own(tmp_path):
    labels = ["mel", "nv", "Rosacea", "wart\n# x: y"] * 5
    columns = {"sex": ["f", "m"] * 10, "Patient": [f"p{i // 2}" for i in range(20)]}
    named = {"image": "picture", "label": "dx"}
    root = plant(tmp_path / "Clinic 7", named=named, label=labels, **columns)
    (root / "03.jpg").unlink()
    told, runs = propose(root, {}, tmp_path / "mine.yaml", ROOT)
    assert not runs and not (tmp_path / "mine.yaml").exists()
    assert "unknown 5   wart?# x: y (5)" in told and "none of the eight diseases: nv (5)" in told
    left = '["wart\\n# x: y"]'
    said, values = look(root, tmp_path / "mine.yaml", n_dev="3", exclude_labels=left)
    assert values["image_column"] == "picture" and values["label_column"] == "dx"
    assert values["label_map"] == ["mel = melanoma"] and values["n_dev"] == 3
    assert values["exclude_labels"] == ["wart\n# x: y", "nv"]
    assert values["group_columns"] == ["Patient"] and values["subgroup_columns"] == ["sex"]
    assert "5 melanoma: mel (5)" in said and "nv (5)" in said and "Patient: 5 groups" not in said
    assert "10 pictures with a wanted label, all there" in said
    assert "Patient: 10 groups of at most 1" in said
    dataset, report = load.load_source(Request.of(values | {"image_size": 24}, project=ROOT))
    assert len(dataset.items) == 10 and report["groups"] == 10
    assert "# 5 pictures" in (tmp_path / "mine.yaml").read_text()


def test_one_hot_columns_and_folders_by_label_are_recognised(tmp_path):
    columns = {"MEL": ["True", "False"] * 10, "NV": ["", "x"] * 10, "site": ["arm"] * 20}
    one = plant(tmp_path / "hot", named={"label": "kind"}, **columns)
    said, values = look(one, tmp_path / "hot.yaml")
    assert values["onehot_columns"] == ["MEL", "NV"] and "10 melanoma: MEL (10)" in said
    other = tmp_path / "folders"
    plant(other / "melanoma")
    (other / "melanoma" / "labels.csv").unlink()
    said, values = look(other, tmp_path / "folders.yaml")
    assert "table" not in values and "20 melanoma: melanoma (20)" in said


def test_what_stops_a_run_and_what_is_missing_are_said(tmp_path):
    patients, lesions = ([f"p{i // n}" for i in range(20)] for n in (4, 2))
    plant(tmp_path, patient=patients, lesion=lesions)
    (tmp_path / "03.jpg").unlink()
    said, runs = propose(tmp_path, {"group_columns": "lesion"}, tmp_path / "mine.yaml", ROOT)
    assert not runs and not (tmp_path / "mine.yaml").exists()
    assert "WOULD STOP" in said and "'patient' looks like an identity" in said
    assert "`group_columns: [lesion, patient]`" in " ".join(said.split())
    assert "03.jpg: not in the data folder" in said and "1 of them missing" in said


def test_what_describes_a_person_is_no_identity_and_numbers_within_a_patient_are_none(tmp_path):
    patients, lesions = [f"p{i // 4}" for i in range(20)], ["1", "1", "2", "3"] * 5
    skin = [f"s{i // 2}" for i in range(20)]
    plant(tmp_path, patient=patients, lesion=lesions, skin_lesion_id=skin, skin_type=["2"] * 20)
    said, values = look(tmp_path, tmp_path / "mine.yaml")
    assert values["group_columns"] == ["patient", "skin_lesion_id"]
    assert values["subgroup_columns"] == ["skin_type"]
    assert "column 'lesion' is numbered anew in each 'patient'" in " ".join(said.split())


def damage(root):
    for i in range(3):
        (root / f"{i:02}.jpg").write_bytes((root / f"{i:02}.jpg").read_bytes()[:900])


def remove(root):
    for i in range(3):
        (root / f"{i:02}.jpg").unlink()


def empty_a_class(root):
    plant(root, label=["melanoma", *["rosacea"] * 19])
    (root / "00.jpg").unlink()


def one_patient(root):
    plant(root, patient=["p"] * 20)


def two_patients(root):
    plant(root, patient=["p", "p", "q", "q"] * 5)


def one_group_of_a_class(root):
    plant(root, lesion=["a", "b"] + [f"a{i}" if i % 2 else "a" for i in range(2, 20)])


STOPS = [  # what is done to 20 pictures, whether seen without opening one, what is said
    (damage, False, "3 of 20 images cannot be read, more than max_unreadable = 0.05"),
    (remove, True, "3 of 20 images cannot be read, more than max_unreadable = 0.05"),
    (empty_a_class, True, "no image left of melanoma: 00.jpg (not in the data folder)"),
    (one_patient, True, "labels.csv: 20 of 20 pictures are one group"),
    (two_patients, False, "no image left for the test set: no test image of melanoma"),
    (one_group_of_a_class, False, ""),
]


@pytest.mark.parametrize(("change", "unopened", "told"), STOPS)
def test_what_stage_01_would_say_is_said_first(tmp_path, change, unopened, told):
    root, out = tmp_path / "pictures", tmp_path / "mine.yaml"
    change(plant(root))
    said, runs = propose(root, {}, out, ROOT)
    flat = " ".join(said.split())
    if not told:
        assert runs and "no test image of melanoma: its 10 pictures are one group" in flat
        return
    assert propose(root, {}, out, ROOT, quick=True)[1] is not unopened
    assert not runs
    asked = DEFAULTS | {"source": "folder", "data_root": str(root), "n_train": 0, "n_heldout": 0}
    with pytest.raises(DermError) as caught:
        load.load_source(Request.of(asked | {"n_dev": 2, "n_test": 4}))
    assert str(caught.value).startswith(told)
    assert f"WOULD STOP  {caught.value}" in said.splitlines()


def test_no_file_is_written_over(tmp_path):
    plant(tmp_path)
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    with pytest.raises(DermError, match="is there already; choose another --out"):
        propose(tmp_path, {}, out, ROOT)
    (tmp_path / "params").mkdir()
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    kept = tmp_path / "params" / "pictures.yaml"
    kept.write_text("mine")
    root = plant(tmp_path / "pictures")
    said, _ = propose(root, {}, None, tmp_path)
    assert "is there already, says it otherwise and stays" in said
    assert kept.read_text() == "mine"
    kept.unlink()
    assert "written: " in propose(root, {}, None, tmp_path)[0]
    assert yaml.safe_load(kept.read_text())["data_root"] == "pictures"  # from the project's root


def test_what_cannot_be_guessed_is_asked(tmp_path):
    plant(tmp_path, named={"label": "kind"}, label=["x", "y"] * 10)
    with pytest.raises(DermError, match="no column of known labels; it has image, kind"):
        propose(tmp_path, {}, None, ROOT)
    (tmp_path / "labels.csv").write_text("a,b\nnowhere.jpg,melanoma\n")
    with pytest.raises(DermError, match=r"such as 00.jpg; it has a .nowhere.jpg., b .mel.*=NAME"):
        propose(tmp_path, {}, None, ROOT)
    for path in tmp_path.glob("*.jpg"):
        path.unlink()
    with pytest.raises(DermError, match="holds labels.csv and no pictures: name a folder that"):
        propose(tmp_path, {}, None, ROOT)
    (tmp_path / "a.jpg").symlink_to("/nowhere/a.jpg")
    with pytest.raises(DermError, match="no pictures: 1 link to nowhere, such as a.jpg -> /nowh"):
        propose(tmp_path, {}, None, ROOT)
    with pytest.raises(DermError, match="does not exist"):
        propose(tmp_path / "nowhere", {}, None, ROOT)


def test_the_command_needs_no_torch_and_ends_with_1_where_a_run_would_stop(tmp_path):
    good, bad = plant(tmp_path / "good"), plant(tmp_path / "bad")
    remove(bad)
    code = (
        "import sys; from derm_compress.__main__ import main;"
        "codes = [main(['look', root, '--out', f'{root}.yaml']) for root in sys.argv[1:]];"
        "sys.exit('torch' in sys.modules or codes != [0, 1])"
    )
    words = [sys.executable, "-c", code, str(good), str(bad)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1 == done.stdout.count("WOULD STOP")
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["good.yaml"]


def test_a_given_column_is_taken_and_labels_that_nobody_knows_are_asked_for(tmp_path):
    named = {"image": "Bild", "label": "Befund"}
    root = plant(tmp_path / "klinik", named=named, label=["Melanom", "Ekzem"] * 10)
    out = tmp_path / "mine.yaml"
    said, runs = propose(root, {"label_column": "Befund"}, out, ROOT)
    assert "unknown 20  Melanom (10), Ekzem (10)" in said and not runs and not out.exists()
    assert "--set 'label_map=[Melanom = DISEASE]'" in said
    sets = {"label_column": "Befund", "label_map": "Melanom = melanoma", "exclude_labels": "*"}
    said, values = look(root, out, **sets)
    assert "10 melanoma: Melanom (10)" in said and "another reason: Ekzem (10)" in said
    assert values["exclude_labels"] == ["*"]


@pytest.mark.parametrize(
    ("folder", "asked", "out", "run"),
    [
        ("Büro Fotos", {}, None, "buro-fotos"),
        ("Straße.v2", {}, None, "strasse-v2"),
        ("写真", {}, None, "data"),
        ("a", {"run": "mine"}, None, "mine"),
        ("a", {}, "other.yaml", "other"),
        ("a", {"run": "mine"}, "other.yaml", None),
    ],
)
def test_the_name_of_a_run(tmp_path, folder, asked, out, run):
    values = asked | {"source": "folder"}
    if run:
        assert name_of(values, tmp_path / folder, out and tmp_path / out) == run
    else:
        with pytest.raises(DermError, match="run is mine, but --out names another"):
            name_of(values, tmp_path / folder, tmp_path / out)


def test_a_list_of_pictures_is_read_with_its_folder(tmp_path):
    plant(tmp_path)
    (tmp_path / "other.csv").write_text("image,label\n")
    said, values = look(tmp_path / "labels.csv", tmp_path / "mine.yaml", run="mine")
    assert values["table"] == "labels.csv" and values["data_root"] == str(tmp_path)
    assert values["run"] == "mine" and "20 pictures with a wanted label" in said


def test_what_is_given_reads_a_published_data_set_as_a_folder(tmp_path):
    LAYOUTS["ham10000"](tmp_path)
    sets = {"label_column": "dx", "exclude_labels": "*"}
    assert look(tmp_path, tmp_path / "mine.yaml", **sets)[1]["source"] == "folder"


def test_a_published_data_sets_run_file_is_named_with_where_its_pictures_lie(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "params" / "derm7pt.yaml").write_text("run: derm7pt\nsource: derm7pt\n")
    root = tmp_path / "my data"
    LAYOUTS["derm7pt"](root)
    said, runs = propose(root, {"phash_distance": "2"}, None, tmp_path)
    command = shlex.split(said.splitlines()[-1])
    assert runs and command[-1] == f"data_root={root}" and command[-5].endswith("derm7pt.yaml")
    assert command[-3] == "phash_distance=2"
