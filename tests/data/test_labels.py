"""What a row says of a picture: mapped, left out, or told in one line with all its like."""

import pytest
from blotches import plant, read

from derm_compress.data import labels, load
from derm_compress.data.request import Request
from derm_compress.errors import DermError

HALF = ["1.0", "0.0"] * 10


def test_labels_are_mapped_by_a_run(tmp_path):
    root = plant(tmp_path, label=["MEL", "sek"] * 10)
    asked = ["mel = Melanoma", "SEK=seborrheic keratosis"]
    dataset, report = read(root, label_map=asked)
    assert {item.disease for item in dataset.items} == {"melanoma", "seborrheic keratosis"}
    assert report["labels"] == {"melanoma": {"MEL": 10}, "seborrheic keratosis": {"sek": 10}}


@pytest.mark.parametrize("line", ["mel", "mel = wart", "= melanoma wart", 3])
def test_a_line_of_the_map_that_says_nothing_is_refused(line):
    with pytest.raises(DermError, match="write `spelling = disease`, not .*diseases: rosacea"):
        labels.read_map([line])


def test_all_unknown_labels_are_told_at_once_with_counts(tmp_path):
    root = plant(tmp_path, label=["nv"] * 9 + ["wart\nx"] * 6 + [f"x{i}" for i in range(5)])
    with pytest.raises(DermError) as caught:
        read(root)
    assert "unknown labels: 'nv' (9), 'wart\\nx' (6), 'x0' (1)" in str(caught.value)
    assert "seborrheic keratosis" in str(caught.value) and "\n" not in str(caught.value)
    root = plant(tmp_path, label=["nv", "melanoma"] * 10)
    for excluded in (["NV"], ["*"]):
        assert read(root, exclude_labels=excluded)[1]["excluded"] == {"nv": 10}


def test_numbers_are_labels_too(tmp_path):
    root = plant(tmp_path, label=["0", "1"] * 10)
    report = read(root, label_map=["1 = melanoma"], exclude_labels=[0])[1]
    assert report["excluded"] == {"0": 10}


def test_one_hot_columns(tmp_path):
    columns = {"MEL": HALF, "BCC": HALF[::-1], "NV": ["0.0"] * 20}
    columns["NV"][:2] = ["1.0", "1.0"]  # two labels each
    columns["BCC"][3] = "0.0"  # none
    root = plant(tmp_path, **columns)
    how = {"onehot_columns": ["mel", "bcc", "nv"], "label_map": ["MEL = melanoma"]}
    dataset, report = read(root, **how, exclude_labels=["nv"])
    assert report["excluded"] == {"several labels": 2, "no label": 1}
    assert {item.id: item.disease for item in dataset.items}["02.jpg"] == "melanoma"
    columns["NV"][7] = "perhaps"
    with pytest.raises(DermError, match=r"row 9: columns of labels hold 0 or 1, .*'perhaps'"):
        read(plant(tmp_path, **columns), **how)


@pytest.mark.parametrize(
    ("cell", "marked"),
    [
        *[(cell, True) for cell in ("1", "1.0", "TRUE", "True", "yes", "Y", "x", "WAHR", "0.5")],
        *[(cell, False) for cell in ("0", "0.0", "FALSE", "no", "N", "", "-", "n/a", "nan", "0,4")],
        *[(cell, None) for cell in ("2", "perhaps", "melanoma", "inf", "-0.5", "1 of 2")],
    ],
)
def test_marks_as_people_and_programs_write_them(cell, marked):
    if marked is None:
        with pytest.raises(ValueError, match=cell):
            labels.is_marked(cell)
    else:
        assert labels.is_marked(cell) is marked


NAMED = [  # what a run names, and what is left out, or what is said
    ({"exclude_labels": ["Wart_X"]}, {"wart-x": 5}),
    ({"exclude_labels": ["ROSACEA", "*"]}, {"acne rosacea": 5, "wart-x": 5}),  # all spellings
    ({"label_map": ["WART X = psoriasis"]}, {}),
    ({"exclude_labels": ["rosaca"]}, "exclude_labels: 'rosaca' is in no row of labels.csv; near"),
    ({"exclude_labels": ["psoriasis"]}, "'psoriasis' is in no row of labels.csv; there are: 'acn"),
    ({"label_map": ["melanom = melanoma"]}, "label_map: 'melanom' is in no row of labels.csv; ne"),
    ({"label_map": ["wart x = psoriasis", "Wart_X = melanoma"]}, "'Wart_X' cannot mean both pso"),
    ({"label_map": ["wart x = melanoma"], "exclude_labels": ["Wart X"]}, "'wart x' is in label_m"),
]


@pytest.mark.parametrize(("asked", "told"), NAMED)
def test_labels_that_a_run_names_are_those_of_rows(tmp_path, asked, told):
    root = plant(tmp_path, label=["Melanoma", "acne rosacea", "wart-x", "melanoma"] * 5)
    try:
        found = load.survey(Request("folder", root, **asked))
        said = found.problems[0] if found.problems else found.told["excluded"]
    except DermError as error:
        said = str(error)
    assert said == told if isinstance(told, dict) else told in said


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("{'Eczema': 0.6, 'Psoriasis': 0.4}", "Eczema"),
        ("{'Eczema': 0.4, \"Kaposi's sarcoma\": 0.6}", "Kaposi's sarcoma"),
        ("{'Eczema': 0.5, 'Psoriasis': 0.5}", "no label of half the weight"),
        ("{'Eczema': 0.4, 'Psoriasis': 0.3, 'Tinea': 0.3}", "no label of half the weight"),
        ("{}", "no label"),
        ("Eczema", "Eczema"),
        ("{'Eczema': open('x')}", "{'Eczema': open('x')}"),
        ("{" * 5000, "{" * 5000),
        ("{1, 2}", "{1, 2}"),
    ],
)
def test_a_dict_of_weights_means_its_heaviest_label(text, label):
    assert labels.weightiest(text) == label
