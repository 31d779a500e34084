"""No identity of several pictures lies in two splits, whatever its column is called."""

from functools import partial

import blotches
import numpy as np
import pandas as pd
import pytest
from blotches import picture, plant

from derm_compress.data import identities, items
from derm_compress.errors import DermError

LESIONS = [f"L{i // 4}" for i in range(40)]  # four pictures each
PATIENTS = [f"P{i // 8}" for i in range(40)]


read = partial(blotches.read, n_test=8, n_dev=4)


def together(dataset, values):
    """Whether the pictures of each value lie in one split."""
    pairs = {(values[int(item.id[:2])], item.split) for item in dataset.items}
    return len(pairs) == len({value for value, _ in pairs})


def test_identities_are_found_by_their_names(tmp_path):
    labels = ["melanoma", "melanoma", "rosacea", "rosacea"] * 10
    root = plant(tmp_path, 40, **{"Lesion ": LESIONS, "PatientID": PATIENTS}, label=labels)
    for seed in range(3):
        dataset, report = read(root, seed=seed)
        assert together(dataset, LESIONS) and together(dataset, PATIENTS)
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
    assert together(dataset, LESIONS)


def test_an_identity_by_its_values_is_named_in_the_report(tmp_path):
    exams = [f"EX{1000 + i // 4}" for i in range(40)]
    ages = [str(30 + i // 2) for i in range(40)]
    dates = [f"2019-03-{1 + i // 4:02}" for i in range(40)]
    root = plant(
        tmp_path, 40, exam=exams, age=ages, date=dates, dose=[f"{i // 3}.5" for i in range(40)]
    )
    notes = read(root)[1]["notes"]
    assert [note for note in notes if "identity" in note] == [
        "column 'exam' may be an identity of several pictures, is not used, and 10 of its values "
        "could lie in two splits; `group_columns: [exam]` would keep them together"
    ]
    assert read(root, group_columns=["exam"])[1]["notes"] == []


def test_unknown_patients_are_not_one_group(tmp_path):
    nobody = ["", "unknown", "N/A", "-", "None", "nan", "-1", "NOT_AVAILABLE"]
    _, report = read(plant(tmp_path, 40, patient=["p1"] * 8 + nobody * 4))
    assert report["largest_group"] == 8 and report["groups"] == 33
    assert "32 pictures without a known patient" in report["notes"]


RNG = np.random.default_rng(0)
SOME = [str(i // 3) for i in range(200)]  # short numbers, three pictures each


@pytest.mark.parametrize(
    ("column", "values", "may"),
    [
        ("anything", [f"x{i // 2:05}" for i in range(200)], True),
        ("anything", [f"x{i // 20:05}" for i in range(200)], True),
        ("anything", [f"x{i:05}" for i in range(200)], False),  # of one picture each
        ("anything", ["a1b2", "c3d4"] * 100, False),  # of half of them
        ("visit_id", [str(i // 20) for i in range(200)], True),
        ("visit", [str(i // 20) for i in range(200)], False),
        ("visit", SOME, True),
        ("visit", RNG.permutation(SOME).tolist(), True),
        ("owner", [f"{'ABCDEFGHIJ'[i % 10]}. {'KLMNOPQRST'[i % 7]}." for i in range(200)], True),
        ("age", SOME, False),
        ("orig_width", SOME, False),
        ("age group", [f"{i // 3}-{i // 3 + 1}" for i in range(200)], False),
        ("where", RNG.choice(["back", "face", "arm", "leg"], 200).tolist(), False),
        ("dose", [f"{i // 3}.5" for i in range(200)], False),
        ("seen", [f"2019-{1 + i // 90:02}-{1 + i // 3 % 28:02}" for i in range(200)], False),
    ],
)
def test_values_of_few_pictures_each_may_be_identities_and_measures_are_none(column, values, may):
    assert identities.may_be_identity(column, values) is may


def test_short_numbers_under_an_identitys_name_are_kept_together_or_stop_the_run(tmp_path):
    numbers = [str(1 + i // 4) for i in range(40)]
    exams = [f"{i // 2}" for i in range(40)]
    root = plant(tmp_path, 40, exam=exams, MRN=numbers)
    dataset, report = read(root)
    assert report["read_as"]["groups"] == ["MRN"] and report["groups"] == 10
    assert together(dataset, numbers)
    with pytest.raises(DermError) as caught:
        read(root, group_columns=["exam"])
    said = "`group_columns: [exam, MRN]`, or `subgroup_columns: [MRN]` if it is none"
    assert said in str(caught.value) and "10 of its values" in str(caught.value)


def test_what_is_no_identity_stops_no_run(tmp_path):
    columns = {
        "case": ["case", "control"] * 20,
        "patient": ["yes", "no", "", "yes"] * 10,
        "lesion_code": ["benign", "malignant"] * 20,
        "number_of_lesions": ["1", "2", "3", "4"] * 10,
        "age": [str(30 + i // 2) for i in range(40)],
        "sex": ["f", "m"] * 20,
        "site": ["back", "face", "arm", "leg", "hand"] * 8,
        "file_name": [f"{i:02}.jpg" for i in range(40)],
    }
    root = plant(tmp_path, 40, exam=[f"{i // 2}" for i in range(40)], **columns)
    _, report = read(root, group_columns=["exam"])
    assert report["read_as"]["not_used"] == [*columns] and report["groups"] == 20
    assert not [note for note in report["notes"] if "column '" in note]


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


@pytest.mark.parametrize(
    ("column", "values", "may"),
    [
        ("lesion", [str(i // 50) for i in range(200)], True),  # a study of few lesions over time
        ("lesion", [f"L{i // 100}" for i in range(200)], True),
        ("lesion", [f"{'ABCDEFGHIJKLMNOPQRST'[i // 10]}" for i in range(200)], True),
        ("lesion", RNG.choice(["flat", "raised", "open"], 200).tolist(), False),
        ("lesion", ["flat", "raised"] * 5, False),
        ("patient", ["Ann", "Bob"] * 100, True),
        ("patient", ["yes", "no"] * 100, False),
        ("exam", [str(i // 4) for i in range(200)], False),  # its name says nothing
    ],
)
def test_values_are_those_that_an_identity_of_the_columns_name_has(column, values, may):
    assert identities.repeats(column, values) is may


NUMBERED = ["1", "1", "2", "3"] * 10  # lesions 1 to 3 of each of ten patients
TEN = [f"p{i // 4}" for i in range(40)]


def test_lesions_numbered_within_patients_are_left_and_the_patient_is_taken(tmp_path):
    root = plant(tmp_path, 40, patient_id=TEN, lesion=NUMBERED)
    for asked in ({}, {"group_columns": ["patient"]}):
        dataset, report = read(root, **asked)
        assert report["read_as"]["groups"] == ["patient_id"] and report["groups"] == 10
        assert together(dataset, TEN)
        (note,) = [note for note in report["notes"] if "'lesion'" in note]
        assert note.startswith("column 'lesion' is numbered anew in each 'patient_id'")
    with pytest.raises(
        DermError, match=r"40 of 40 pictures are one group.*numbered anew"
    ) as caught:
        read(root, group_columns=["patient", "lesion"])
    assert "set `group_columns: [patient_id]`" in str(caught.value)
    with pytest.raises(DermError, match=r"'patient_id' looks like an identity") as caught:
        read(root, group_columns=["lesion"])
    assert "set `group_columns: [patient_id]`" in str(caught.value)  # with lesion it would chain
    root = plant(tmp_path, 40, patient_id=TEN, lesion=["1"] * 38 + ["2", "3"])
    with pytest.raises(DermError, match=r"set `group_columns: \[patient_id\]`"):
        read(root, group_columns=["lesion"])


def test_a_chain_that_leaves_something_to_split_is_a_warning(tmp_path):
    lesions = [number if i < 20 else f"L{i}" for i, number in enumerate(NUMBERED)]
    inner = [number if i < 20 else "" for i, number in enumerate(NUMBERED)]
    root = plant(tmp_path, 40, patient=TEN, lesion=inner, other=lesions)
    _, report = read(root, group_columns=["patient", "lesion"])
    assert report["largest_group"] == 20
    assert "set `group_columns: [patient]`" in "".join(report["notes"])
    assert read(root, group_columns=["patient", "other"])[1]["largest_group"] == 20


@pytest.mark.parametrize(
    ("inner", "outer", "within"),
    [
        (("lesion", NUMBERED), ("patient", TEN), True),
        (("lesion", ["1"] * 40), ("patient", TEN), True),
        (("visit", NUMBERED), ("exam", TEN), True),
        (("patient", TEN), ("lesion", NUMBERED), False),
        (("lesion", LESIONS), ("patient", PATIENTS), False),
        (("lesion", [*LESIONS[:-1], "L0"]), ("patient", PATIENTS), False),  # one was misspelt
        (("hospital", [f"h{i // 20}" for i in range(40)]), ("patient", TEN), False),
        (("case_id", [f"case-{i // 8}" for i in range(40)]), ("patient", TEN), False),
        (("group", [f"{i // 8}" for i in range(40)]), ("patient", TEN), False),
    ],
)
def test_numbers_within_another_identity_are_told_from_identities(inner, outer, within):
    assert identities.is_within(inner[0], outer[0], dict([inner, outer])) is within


def test_one_group_of_nearly_all_is_refused(tmp_path):
    with pytest.raises(DermError, match=r"38 of 40 pictures are one group.*`subgroup_columns: \["):
        read(plant(tmp_path, 40, patient=["p"] * 38 + ["q", "r"]))


def test_a_chain_holds_where_its_links_are_left_out(tmp_path):
    patients = ["p", "p", "", *[f"q{i}" for i in range(3, 40)]]
    lesions = ["a", "b", "b", *[f"c{i}" for i in range(3, 40)]]  # 1 joins 0 and 2
    for labels in (["rosacea", "nevus", "rosacea"], ["rosacea"] * 3):
        labels += ["melanoma", "rosacea"] * 18 + ["melanoma"]
        root = plant(tmp_path, 40, patient=patients, lesion=lesions, label=labels)
        (root / "01.jpg").write_bytes(b"damaged")
        dataset, report = read(root, exclude_labels=["*"], max_unreadable=0.1)
        groups = {item.id: item.group for item in dataset.items}
        assert groups["00.jpg"] == groups["02.jpg"] and report["groups"] == 38
        assert "01.jpg" not in groups


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"PAT_{i // 2}_{i}.jpg" for i in range(20)], "as 'PAT_0', and 10 of these beginnings"),
        ([f"p{100 + i // 4}/{i}.jpg" for i in range(20)], "as 'p100', and 5 of these"),
        ([f"ISIC_{i:07}.jpg" for i in range(20)], ""),
        ([f"images/{i:03}.jpg" for i in range(20)], ""),
        ([f"melanoma-{i}.jpg" for i in range(20)], ""),
        ([f"{i:032x}" for i in range(20)], ""),
        ([], ""),
    ],
)
def test_names_of_pictures_that_begin_with_an_identity_are_named(names, said):
    told = "".join(identities.in_names(names, range(len(names))))
    assert said in told and bool(said) == bool(told)
    assert not identities.in_names(names, [0] * len(names))


def test_folders_above_those_of_labels_may_be_identities(tmp_path):
    for i in range(24):
        path = tmp_path / f"p{100 + i // 4}" / ("melanoma", "rosacea")[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    (note,) = [note for note in read(tmp_path)[1]["notes"] if "'folder'" in note]
    assert "may be an identity" in note and "`group_columns: [folder]`" in note
    dataset, report = read(tmp_path, group_columns=["folder"])
    folders = {(item.id[:4], item.split) for item in dataset.items}
    assert report["groups"] == len(folders) == 6 and dataset.of("test")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, "nothing but likeness keeps these together"),
        ({"patient": ["unknown"] * 40}, "nothing but likeness keeps these together"),
        ({"lesion_id": LESIONS}, "pictures of one lesion_id are kept together, others"),
        ({"patient": TEN, "lesion": LESIONS}, ""),
    ],
)
def test_what_keeps_no_patient_together_is_said(tmp_path, columns, said):
    notes = read(plant(tmp_path, 40, **columns))[1]["notes"]
    told = [note for note in notes if "no column says which pictures are of one patient" in note]
    assert len(told) == bool(said) and said in "".join(told)
