"""DermNet: labels by prefix, traps, duplicates that never cross a split, what the report says."""

import shutil
from collections import Counter

import dermnet_tree
import numpy as np
import pytest
from dermnet_tree import ACNE, ECZEMA, NAMES, PSORIASIS

from derm_compress.data import dermnet, dialogue, photographs, sources, splits
from derm_compress.errors import DermError

HOW = {"size": 24, "min_side": 16, "n_train": 40, "n_dev": 8, "n_test": 8}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("input") / "dermnet"
    dermnet_tree.plant(root)
    draw = dermnet_tree.draw
    draw(
        root / "train" / PSORIASIS / "psoriasis-777.jpg", 1
    )  # the picture of one name in two folders
    draw(root / "test" / ECZEMA / "psoriasis-777.jpg", 2)  # the same name, another picture
    shutil.copy(root / "train" / ACNE / "rosacea-100.jpg", root / "test" / ACNE / "rosacea-555.jpg")
    (root / "train" / ACNE / "Thumbs.db").write_bytes(b"\0")
    draw(root / "train" / "Unheard-of Disease" / "rosacea-1.jpg", 3)
    return root


def load(root, **options):
    return sources.load_source("dermnet", **HOW | {"data_root": root} | options)


@pytest.mark.parametrize(("folder", "name", "disease"), NAMES)
def test_real_names(folder, name, disease):
    assert dermnet.label(name)[0] == disease
    wide = disease == "dermatitis" and name.startswith(("05Atopic", "eczema"))
    assert dermnet.label(name, "narrow")[0] == ("" if wide else disease)


def test_the_rules_are_those_of_eight_diseases_and_never_two_at_once():
    known = dermnet.rules()["diseases"]
    assert set(known) == set(dialogue.diseases()) and len(dermnet.rules()["folders"]) == 23
    owner = [
        (p.casefold(), d)
        for d, rule in known.items()
        for p in (*rule["prefixes"], *rule.get("wide", ()))
    ]
    for prefix, disease in owner:
        assert not [other for p, other in owner if other != disease and p.startswith(prefix)]


def test_what_is_kept_and_why(tree):
    dataset, report = load(tree, n_train=0, n_test=20)
    assert {r["disease"] for r in report["rules"]} == set(dialogue.diseases())
    assert sum(r["pictures"] for r in report["rules"]) == len(dataset.items) + report["unused"]
    assert report["excluded"]["histology"] == 3 and report["excluded"]["no picture"] == 1
    assert report["examples"]["unknown folder"] == ["train/Unheard-of Disease/rosacea-1.jpg"]
    assert report["examples"]["looks like melanoma"] and report["folders_missing"] == []
    assert not [
        i.id
        for i in dataset.items
        if "Unheard-of" in i.id or "histology" in i.id or "Forest" in i.id
    ]
    assert set(report["test_images"]) == {i.id for i in dataset.of("test")}
    assert len({i.disease for i in dataset.of("test")}) == 8
    narrow = load(tree, n_train=0, dermatitis="narrow")[1]
    assert narrow["excluded"]["dermatitis in the wide reading only"] == 2


def test_one_name_in_two_folders_is_two_pictures_and_in_both_splits_one_group(tree):
    items = {i.id: i for i in load(tree, n_train=0)[0].items}
    one, other = f"train/{PSORIASIS}/psoriasis-777.jpg", f"test/{ECZEMA}/psoriasis-777.jpg"
    assert items[one].group != items[other].group
    pairs = [(i, f"test/{i.removeprefix('train/')}") for i in items if i.startswith("train/")]
    pairs = [(items[i], items[j]) for i, j in pairs if j in items]
    assert len(pairs) > 20
    for first, second in pairs:
        assert first.group == second.group and first.split == second.split


def test_copies_under_other_names_share_a_group(tree):
    dataset, report = load(tree, n_train=0)
    groups_of = {i.id: i.group for i in dataset.items}
    copy = [f"test/{ACNE}/rosacea-555.jpg", f"train/{ACNE}/rosacea-100.jpg"]
    assert copy in report["exact_duplicates"] and groups_of[copy[0]] == groups_of[copy[1]]


def test_classes_are_balanced_and_the_test_list_is_the_seeds(tree):
    dataset, report = load(tree)
    assert len(dataset.of("train")) + len(dataset.of("dev")) == 40 and len(dataset.of("test")) == 8
    counts = Counter(i.disease for i in dataset.items if i.split in ("train", "dev"))
    assert max(counts.values()) - min(counts.values()) <= 2
    assert report["test_images"] == load(tree, n_train=24, n_dev=0)[1]["test_images"]
    assert report["test_images"] != load(tree, seed=1)[1]["test_images"]


def test_the_folder_is_found_below_the_mount_and_others_are_refused(tree, tmp_path):
    assert dermnet.find_root(tree.parent) == tree
    (tmp_path / "train" / "cats").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    with pytest.raises(DermError, match="23 folders"):
        load(tmp_path)


def test_thumbnails_find_what_hashes_are_asked_to_miss(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(30, 200, (3, 24, 24, 3), dtype=np.uint8)
    images = np.stack([*images, images[0] + 20])  # brighter
    vectors = photographs.thumbnails(images)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert splits.near_vectors(vectors, 0.01).tolist() == [0, 1, 2, 0]
    frame = sources.pd.DataFrame({"perceptual": np.arange(4, dtype=np.uint64) * 2**40 - 1})
    assert (
        len(set(sources.twins(frame, images, 0, 0))) == 4
        and len(set(sources.twins(frame, images, 0, 0.01))) == 3
    )


def test_flat_pictures_have_finite_thumbnails():
    assert np.isfinite(photographs.thumbnails(np.full((2, 24, 24, 3), 7, np.uint8))).all()
