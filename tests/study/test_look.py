"""`look` says what a run would read, and the run file that it writes reads just that."""

import subprocess
import sys
from pathlib import Path

import dermnet_tree
import pytest
import yaml
from blotches import plant
from layouts import LAYOUTS

from derm_compress.data import load
from derm_compress.data.request import Request
from derm_compress.errors import DermError
from derm_compress.study import params
from derm_compress.study.look.propose import propose

ROOT = Path(__file__).parents[2]
PAD = ROOT.parent / "shared" / "pad-ufes-20"


def look(folder, out, **sets):
    """(page, values of the run file, checked)."""
    said = propose(folder, sets, out, ROOT)
    known = params.known_parameters(params.read_notebooks(ROOT))
    return said, params.read_params(out, known)


@pytest.mark.parametrize("name", [*LAYOUTS, "dermnet"])
def test_published_data_sets_are_recognised(name, tmp_path):
    root = tmp_path / "dataset"
    make = LAYOUTS.get(name, dermnet_tree.plant)
    make(root)
    said, values = look(root, tmp_path / f"{name}.yaml")
    assert values["source"] == name and values["run"] == name
    assert "licence" in said and ("UNCHECKED" in said) == (name != "pad-ufes-20")
    assert "WOULD STOP" not in said and "missing" not in said


def test_a_folder_of_ones_own(tmp_path):
    root = tmp_path / "Clinic 7"
    root.mkdir()
    labels = ["mel", "nv", "Rosacea", "wart\n# x: y"] * 5
    plant(root, label=labels, sex=["f", "m"] * 10, Patient=[f"p{i // 2}" for i in range(20)])
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_text(text.replace("image,label", "picture,dx"))
    (root / "03.jpg").unlink()
    said, values = look(root, tmp_path / "mine.yaml", n_dev="3")
    assert values["image_column"] == "picture" and values["label_column"] == "dx"
    assert values["label_map"] == ["mel = melanoma"] and values["n_dev"] == 3
    assert values["exclude_labels"] == ["nv", "wart\n# x: y"]
    assert values["group_columns"] == ["Patient"] and values["subgroup_columns"] == ["sex"]
    assert "5 melanoma: mel (5)" in said and "nv (5)" in said and "Patient: 5 groups" not in said
    assert "10 of 10 are there" in said and "Patient: 10 groups of at most 1" in said
    request = Request.of(values | {"image_size": 24}, project=ROOT)
    dataset, report = load.load_source(request)
    assert len(dataset.items) == 10 and report["groups"] == 10
    assert "# 5 pictures" in (tmp_path / "mine.yaml").read_text()


def test_one_hot_columns_and_folders_by_label_are_recognised(tmp_path):
    one, other = tmp_path / "hot", tmp_path / "folders"
    one.mkdir()
    plant(one, MEL=["1", "0"] * 10, NV=["0", "1"] * 10)
    text = (one / "labels.csv").read_text()
    (one / "labels.csv").write_text(text.replace("label", "site", 1))
    assert look(one, tmp_path / "hot.yaml")[1]["onehot_columns"] == ["MEL", "NV"]
    (other / "melanoma").mkdir(parents=True)
    plant(other / "melanoma")
    (other / "melanoma" / "labels.csv").unlink()
    said, values = look(other, tmp_path / "folders.yaml")
    assert "table" not in values and "20 melanoma: melanoma (20)" in said


def test_what_stops_a_run_and_what_is_missing_are_said(tmp_path):
    plant(
        tmp_path,
        patient=[f"p{i // 4}" for i in range(20)],
        lesion=[f"l{i // 2}" for i in range(20)],
    )
    (tmp_path / "03.jpg").unlink()
    said, _ = look(tmp_path, tmp_path / "mine.yaml", group_columns="lesion")
    assert "WOULD STOP" in said and "'patient' looks like an identity" in said
    assert "03.jpg: not in the data folder" in said


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
    root = tmp_path / "pictures"
    root.mkdir()
    said = propose(plant(root), {}, None, tmp_path)
    assert "is there already, says it otherwise and stays" in said
    assert kept.read_text() == "mine"
    kept.unlink()
    assert "written: " in propose(root, {}, None, tmp_path)
    assert yaml.safe_load(kept.read_text())["data_root"] == "pictures"  # from the project's root


def test_what_cannot_be_guessed_is_asked(tmp_path):
    plant(tmp_path, label=["x", "y"] * 10)
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(text.replace("label", "kind", 1))
    with pytest.raises(DermError, match="no column of known labels; it has image, kind"):
        propose(tmp_path, {}, None, ROOT)
    (tmp_path / "labels.csv").write_text("a,b\nnowhere.jpg,melanoma\n")
    with pytest.raises(DermError, match="no column that names pictures"):
        propose(tmp_path, {}, None, ROOT)
    with pytest.raises(DermError, match="does not exist"):
        propose(tmp_path / "nowhere", {}, None, ROOT)


def test_the_command_needs_no_torch(tmp_path):
    plant(tmp_path)
    code = (
        "import sys; from derm_compress.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    words = ["look", str(tmp_path), "--out", str(tmp_path / "a.yaml")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "written: " in done.stdout and (tmp_path / "a.yaml").is_file()


@pytest.mark.skipif(not PAD.is_dir(), reason="the sample of pad-ufes-20 is not beside the project")
def test_the_real_photographs(tmp_path):
    said, values = look(PAD, tmp_path / "pad-ufes-20.yaml")
    assert values["source"] == "pad-ufes-20" and "86 of 86 are there" in said
    assert "patient_id, lesion_id: 83 groups" in said


def test_a_given_column_is_taken_and_labels_that_nobody_knows_are_asked_for(tmp_path):
    (tmp_path / "klinik").mkdir()
    plant(tmp_path / "klinik", label=["Melanom", "Ekzem"] * 10)
    listing = tmp_path / "klinik" / "labels.csv"
    listing.write_text(listing.read_text().replace("image,label", "Bild,Befund"))
    out = tmp_path / "mine.yaml"
    said = propose(tmp_path / "klinik", {"label_column": "Befund"}, out, ROOT)
    assert "left out 20" in said and "label_map=['LABEL = DISEASE']" in said and not out.exists()
    sets = {"label_column": "Befund", "label_map": "['Melanom = melanoma']"}
    said, values = look(tmp_path / "klinik", out, **sets)
    assert "10 melanoma: Melanom (10)" in said and values["exclude_labels"] == ["Ekzem"]
