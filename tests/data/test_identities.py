"""No identity of several pictures lies in two splits, whatever its column is called."""

import numpy as np
import pandas as pd
import pytest
from blotches import plant

from derm_compress.data import identities, items, load
from derm_compress.data.request import Request
from derm_compress.errors import DermError

LESIONS = [f"L{i // 4}" for i in range(40)]  # four pictures each
PATIENTS = [f"P{i // 8}" for i in range(40)]


def read(root, **asked):
    asked = {"n_train": 0, "n_test": 8, "n_dev": 4, "image_size": 24} | asked
    return load.load_source(Request("folder", root, **asked))


def homes(dataset, values):
    """{value: splits that its pictures lie in}."""
    found = {}
    for item in dataset.items:
        found.setdefault(values[int(item.id[:2])], set()).add(item.split)
    return found


@pytest.mark.parametrize(
    "names",
    [
        ("lesion_id", "patient_id"),
        ("Lesion ", " Patient"),
        ("LESION-ID", "PatientID"),
        ("lesion no.", "Subject Number"),
        ("case_num", "group"),
    ],
)
def test_identities_are_found_by_their_names(tmp_path, names):
    labels = ["melanoma", "melanoma", "rosacea", "rosacea"] * 10
    root = plant(tmp_path, 40, **{names[0]: LESIONS, names[1]: PATIENTS}, label=labels)
    for seed in range(3):
        dataset, report = read(root, seed=seed)
        for values in (LESIONS, PATIENTS):
            assert all(len(splits) == 1 for splits in homes(dataset, values).values())
        assert report["groups"] == 5 and report["largest_group"] == 8


def test_several_columns_join_in_chains(tmp_path):
    left = [f"a{(i + 1) // 2}" for i in range(40)]  # pairs 1-2, 3-4 ...
    right = [f"b{i // 2}" if i < 8 else "" for i in range(40)]  # and 0-1, 2-3 ... up to 7
    dataset, _ = read(plant(tmp_path, 40, left=left, right=right), group_columns=["left", "right"])
    groups = {item.id: item.group for item in dataset.items}
    assert {groups[f"{i:02}.jpg"] for i in range(9)} == {"00.jpg"}
    assert groups["09.jpg"] == groups["10.jpg"] == "09.jpg"


def test_an_identity_by_name_that_is_not_used_stops_the_run(tmp_path):
    root = plant(tmp_path, 40, lesion_id=LESIONS, patient_id=PATIENTS)
    with pytest.raises(DermError, match="column 'patient_id' looks like an identity") as caught:
        read(root, group_columns=["lesion"])
    assert "5 of its values could lie in two splits" in str(caught.value)
    assert "group_columns" in str(caught.value) and "\n" not in str(caught.value)
    dataset, _ = read(root, group_columns=["lesion"], subgroup_columns=["Patient"])
    assert dataset.items[0].subgroups == {"patient_id": "P0"}  # the way to say it is none
    dataset, _ = read(root, group_columns=["patient"])  # lesions lie within patients
    assert all(len(splits) == 1 for splits in homes(dataset, LESIONS).values())


def test_an_identity_by_its_values_is_named_in_the_report(tmp_path):
    exams = [f"EX{1000 + i // 4}" for i in range(40)]
    ages = [str(30 + i // 2) for i in range(40)]
    dates = [f"2019-03-{1 + i // 4:02}" for i in range(40)]
    root = plant(
        tmp_path, 40, exam=exams, age=ages, date=dates, dose=[f"{i // 3}.5" for i in range(40)]
    )
    notes = read(root)[1]["notes"]
    assert [note for note in notes if "looks like" in note] == [
        "column 'exam' looks like an identity of several pictures and is not used; "
        "group_columns would keep them together"
    ]
    assert not [note for note in read(root, group_columns=["exam"])[1]["notes"] if "looks" in note]


@pytest.mark.parametrize(
    "nobody", ["", "unknown", "N/A", "-", "None", "nan", "-1", "NOT_AVAILABLE"]
)
def test_unknown_patients_are_not_one_group(tmp_path, nobody):
    patients = ["p1"] * 3 + [nobody] * 37
    _, report = read(plant(tmp_path, 40, patient=patients))
    assert report["largest_group"] == 3 and report["groups"] == 38
    assert "37 pictures without a known patient" in report["notes"]


def test_names_say_whose_the_pictures_are():
    for column in (
        "patient",
        "Patient ID",
        "anon_patient_id",
        "lesionId",
        "case_num",
        "subject no",
    ):
        assert identities.names_owner(column), column
    for column in ("age_group", "patient_sex", "lesion_type", "id", "", "casein", "control group"):
        assert not identities.names_owner(column), column


@pytest.mark.parametrize("each", [2, 5])
def test_codes_of_few_pictures_look_like_identities_and_measures_do_not(each):
    rng = np.random.default_rng(0)
    codes = [f"x{i // each:05}" for i in range(200)]
    assert identities.looks_like_identity("anything", codes)
    assert identities.looks_like_identity("visit_id", [str(i // each) for i in range(200)])
    for values in (
        [f"x{i:05}" for i in range(200)],  # of one picture each
        ["a1b2"] * 100 + ["c3d4"] * 100,  # of half of them
        rng.integers(20, 90, 200).astype(str).tolist(),
        rng.choice(["back", "face", "arm", "leg"], 200).tolist(),
        rng.normal(5, 1, 200).round(1).astype(str).tolist(),
    ):
        assert not identities.looks_like_identity("anything", values), values[:3]


def test_subgroups_survive_the_disk_without_unknown_ones(tmp_path):
    sexes = ["female", "unknown", "male", ""] * 10
    root = plant(tmp_path, 40, sex=sexes)
    dataset, report = read(root, subgroup_columns=["Sex"])
    assert report["subgroups"] == {"sex": {"female": 10, "male": 10}}
    assert {item.id: item.subgroups for item in dataset.items}["01.jpg"] == {}
    items.save_dataset(tmp_path, dataset)
    assert items.load_dataset(tmp_path).items == dataset.items
    assert isinstance(pd.read_parquet(tmp_path / "items.parquet").subgroups[0], str)


def test_a_class_without_test_pictures_says_why(tmp_path):
    labels = ["melanoma"] * 6 + ["psoriasis"] * 4 + ["rosacea"] * 30
    patients = ["p"] * 6 + ["q"] * 3 + [""] * 31
    notes = read(plant(tmp_path, 40, label=labels, patient=patients), n_test=6)[1]["notes"]
    (told,) = [note for note in notes if "melanoma" in note]
    assert told.startswith("no test image of melanoma: its 6 pictures are one group")
