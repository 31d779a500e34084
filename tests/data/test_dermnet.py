"""DermNet: labels by prefix, traps, duplicates that never cross a split, what the report says."""

import shutil
from collections import Counter

import dermnet_tree
import pytest
from dermnet_tree import ACNE, ECZEMA, NAMES, PSORIASIS, RULES, draw

from derm_compress.data import dialogue, load
from derm_compress.data.pictures import Pictures
from derm_compress.data.request import Request
from derm_compress.data.sources import names
from derm_compress.errors import DermError


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("input") / "dermnet"
    dermnet_tree.plant(root)
    draw(root / "train" / PSORIASIS / "psoriasis-777.jpg", 1)
    draw(root / "test" / ECZEMA / "psoriasis-777.jpg", 2)  # the same name, another picture
    shutil.copy(root / "train" / ACNE / "rosacea-100.jpg", root / "test" / ACNE / "rosacea-555.jpg")
    (root / "train" / ACNE / "Thumbs.db").write_bytes(b"\0")
    draw(root / "train" / "Unheard-of Disease" / "rosacea-1.jpg", 3)
    return root


def read(root, **asked):
    asked = {"image_size": 24, "n_train": 0, "n_dev": 8, "n_test": 8} | asked
    return load.load_source(Request("dermnet", root, **asked))


@pytest.mark.parametrize(("folder", "name", "disease"), NAMES)
def test_real_names(folder, name, disease):
    assert names.label(name, RULES)[0] == disease
    wide = disease == "dermatitis" and name.startswith(("05Atopic", "eczema"))
    assert names.label(name, RULES, "narrow")[0] == ("" if wide else disease)


def test_the_rules_are_those_of_eight_diseases_and_never_two_at_once():
    known = RULES.diseases
    assert set(known) == set(dialogue.diseases()) and len(RULES.folders) == 23
    owner = {}
    for disease, rule in known.items():
        owner |= {prefix.casefold(): disease for prefix in (*rule.prefixes, *rule.wide)}
    for prefix, disease in owner.items():
        assert {d for other, d in owner.items() if other.startswith(prefix)} == {disease}


def test_what_is_kept_and_why(tree):
    dataset, report = read(tree, n_test=20)
    assert set(report["labels"]) == set(dialogue.diseases())
    kept = sum(sum(prefixes.values()) for prefixes in report["labels"].values())
    assert kept == len(dataset.items) + report["unused"]
    assert report["excluded"]["histology"] == 3 and report["excluded"]["no picture"] == 1
    assert report["examples"]["unknown folder"] == ["train/Unheard-of Disease/rosacea-1.jpg"]
    assert (
        report["examples"]["looks like melanoma"]
        and "Systemic Disease" in report["folders_missing"]
    )
    words = ("Unheard-of", "histology", "Forest")
    assert not [item.id for item in dataset.items if any(word in item.id for word in words)]
    assert set(report["test_images"]) == {item.id for item in dataset.of("test")}
    assert len({item.disease for item in dataset.of("test")}) == 8
    narrow = read(tree, dermatitis="narrow", exclude_labels=["rosacea"])[1]["excluded"]
    assert narrow["dermatitis in the wide reading only"] == 2 and narrow["rosacea"] > 12


def test_one_name_in_two_folders_is_two_pictures_and_in_both_splits_one_group(tree):
    items = {item.id: item for item in read(tree)[0].items}
    one, other = f"train/{PSORIASIS}/psoriasis-777.jpg", f"test/{ECZEMA}/psoriasis-777.jpg"
    assert items[one].group != items[other].group
    pairs = [(name, f"test/{name.removeprefix('train/')}") for name in items]
    pairs = [(items[name], items[twin]) for name, twin in pairs if name != twin and twin in items]
    assert len(pairs) > 20
    for first, second in pairs:
        assert first.group == second.group and first.split == second.split


def test_copies_under_other_names_share_a_group(tree):
    dataset, report = read(tree)
    groups = {item.id: item.group for item in dataset.items}
    copy = [f"test/{ACNE}/rosacea-555.jpg", f"train/{ACNE}/rosacea-100.jpg"]
    assert copy in report["exact_duplicates"] and groups[copy[0]] == groups[copy[1]]


def test_classes_are_balanced_and_the_test_list_is_the_seeds(tree):
    dataset, report = read(tree, n_train=40)
    assert len(dataset.of("train")) + len(dataset.of("dev")) == 40 and len(dataset.of("test")) == 8
    counts = Counter(item.disease for item in dataset.items if item.split != "test")
    assert max(counts.values()) - min(counts.values()) <= 2
    assert report["test_images"] == read(tree, n_train=24, n_dev=0)[1]["test_images"]
    assert report["test_images"] != read(tree, n_train=40, seed=1)[1]["test_images"]


def test_the_folder_is_found_below_the_mount_and_others_are_refused(tree, tmp_path):
    assert names.find_top(Pictures(tree.parent), RULES) == "dermnet/"
    (tmp_path / "Train" / ACNE).mkdir(parents=True)
    (tmp_path / "TEST" / ACNE.upper()).mkdir(parents=True)
    draw(tmp_path / "Train" / ACNE / "rosacea-1.jpg", 1)
    draw(tmp_path / "TEST" / ACNE.upper() / "rosacea-2.jpg", 2)
    assert len(load.survey(Request("dermnet", tmp_path)).rows) == 2  # in any case
    shutil.rmtree(tmp_path / "Train")
    (tmp_path / "train" / "cats").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    with pytest.raises(DermError, match="23 folders"):
        read(tmp_path)
