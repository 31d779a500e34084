"""Published data sets: each is read from a folder of its exact layout, and says what is unsure."""

import re
import shutil
from collections import Counter

import layouts
import pytest
from blotches import read
from pydantic import ValidationError

from derm_compress.data import dialogue
from derm_compress.data.preset import Preset, preset_names, read_preset
from derm_compress.errors import DermError

TOLD = {  # pictures by disease, what is left out, the columns of groups, groups
    "pad-ufes-20": (
        {"basal cell carcinoma": 4, "actinic keratosis": 4, "melanoma": 4},
        {"NEV": 4, "SCC": 4},
        ["patient_id", "lesion_id"],
        8,
    ),
    "ham10000": (
        {"basal cell carcinoma": 7, "actinic keratosis": 5, "melanoma": 3},
        {"bkl": 5, "df": 5, "nv": 5, "vasc": 3},
        ["lesion_id"],
        6,
    ),
    "isic-2019": (
        {"basal cell carcinoma": 4, "actinic keratosis": 4, "melanoma": 4},
        {"NV": 4, "BKL": 4, "DF": 4, "VASC": 4, "SCC": 4, "UNK": 4},
        ["lesion_id"],
        7,
    ),
    "fitzpatrick17k": (
        {"dermatitis": 12, "melanoma": 8, "basal cell carcinoma": 5, "rosacea": 4},
        {"acne vulgaris": 2, "scabies": 2, "qc: 3 Wrongly labelled": 1},
        [],
        39,
    ),
    "scin": (
        {"psoriasis": 6, "lichen planus": 6, "dermatitis": 3},
        {"Tinea": 9, "no label of half the weight": 9, "no label": 3},
        ["case_id"],
        8,
    ),
    "ddi": (
        {"melanoma": 8, "seborrheic keratosis": 4, "basal cell carcinoma": 4, "psoriasis": 4},
        {"verruca-vulgaris": 4},
        [],
        20,
    ),
    "derm7pt": (
        {"melanoma": 8, "basal cell carcinoma": 8, "seborrheic keratosis": 8},
        {"clark nevus": 8},
        ["case_num", "case_id"],
        12,
    ),
}


def plant(name, tmp_path):
    root = tmp_path / "dataset"  # SCIN's csv names its folder
    layouts.LAYOUTS[name](root)
    return root


@pytest.mark.parametrize("name", TOLD)
def test_a_layout_is_read_whole(name, tmp_path):
    diseases, excluded, groups, count = TOLD[name]
    dataset, report = read(plant(name, tmp_path), name)
    found = Counter(item.disease for item in dataset.items)
    assert diseases.items() <= found.items() and set(found) <= set(dialogue.diseases())
    assert report["excluded"] == excluded and report["unreadable"] == []
    assert report["read_as"]["groups"] == groups and report["groups"] == count
    columns = {column for item in dataset.items for column in item.subgroups}
    assert columns and columns <= set(read_preset(name).table.subgroup_columns)


def test_every_preset_has_a_layout():
    assert {*TOLD, "dermnet"} == set(preset_names())  # DermNet's is in test_dermnet.py


def test_half_unpacked_and_incomplete_layouts_say_what_is_wanted(tmp_path):
    root = plant("isic-2019", tmp_path)
    (root / "ISIC_2019_Training_Metadata.csv").unlink()  # without it lesions would leak
    with pytest.raises(DermError, match="needs ISIC_2019_Training_Metadata.csv"):
        read(root, "isic-2019")
    for path in (root / "ISIC_2019_Training_Input").rglob("*.jpg"):
        path.unlink()
    shutil.copy(root / "ISIC_2019_Training_GroundTruth.csv", root / "copy.csv")
    with pytest.raises(DermError, match=r"needs HAM10000_metadata.csv or .*csv there: ISIC"):
        read(root, "ham10000")


def test_a_picture_of_two_cases_joins_them_and_one_of_two_labels_is_left_out(tmp_path):
    root = plant("scin", tmp_path)
    groups = {item.id: item.group for item in read(root, "scin")[0].items}
    twice, other = f"dataset/images/{-(10**18)}0.png", f"dataset/images/{-(10**18) - 6}0.png"
    assert groups[twice] == groups[other]
    labels = root / "scin_labels.csv"
    text = labels.read_text().replace("{'Eczema': 0.67, 'Psoriasis': 0.33}", "{'Psoriasis': 1}", 1)
    labels.write_text(text)
    dataset, report = read(root, "scin")
    assert twice not in {item.id for item in dataset.items}
    assert report["excluded"]["several labels"] == 1


def test_a_run_takes_what_a_preset_leaves_out(tmp_path):
    root = plant("ham10000", tmp_path)
    asked = {"label_map": ["BKL = seborrheic keratosis"], "exclude_labels": ["melanoma"]}
    dataset, report = read(root, "ham10000", **asked)
    found = Counter(item.disease for item in dataset.items)
    assert found["seborrheic keratosis"] == 5 and not found["melanoma"]
    assert report["excluded"] == {"df": 5, "nv": 5, "vasc": 3, "mel": 3}


def test_what_nobody_has_checked_is_said():
    for name in ("ham10000", "isic-2019"):
        assert any("columns" in line for line in read_preset(name).unchecked)
    for name in set(preset_names()) - {"pad-ufes-20"}:
        assert read_preset(name).unchecked, name
    for name in preset_names():
        assert re.match("https://", read_preset(name).url) and read_preset(name).citation


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("", {"colour": "red"}, "Extra inputs"),
        ("", {"licence": None}, "valid string"),
        ("", {"table": None}, "either `table` or `names`"),
        ("table", {"labels": {"x": "wart"}}, "no disease of the study: wart"),
        ("table", {"image_columns": "x"}, "valid tuple"),
    ],
)
def test_the_schema_refuses_what_it_does_not_know(where, change, message):
    good = read_preset("ddi").model_dump()
    changed = good | {where: good[where] | change} if where else good | change
    with pytest.raises(ValidationError, match=message):
        Preset.model_validate(changed)
