"""A folder with a csv -> a data set: what is kept, refused, joined; published layouts; reports."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from blotches import picture, plant, read
from PIL import Image
from runs import KNOWN

from derm_compress.data import dialogue, identities, items, load, photographs, rows
from derm_compress.data.request import Request
from derm_compress.errors import DermError

PAD = Path(__file__).parents[3] / "shared" / "pad-ufes-20"
needs_pad = pytest.mark.skipif(
    not PAD.is_dir(), reason="the sample of pad-ufes-20 is not beside the project"
)


def failure(root, **asked):
    with pytest.raises(DermError) as caught:
        read(root, **asked)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def test_folder_gives_items_images_and_counts(tmp_path):
    dataset, report = read(plant(tmp_path, label=["Melanoma ", "ACNE_rosacea"] * 10))
    assert dataset.images.shape == (20, 24, 24, 3) and len(dataset.of("test")) == 4
    assert report["counts"]["test"] == {"melanoma": 2, "rosacea": 2}
    assert Counter(item.disease for item in dataset.items) == {"melanoma": 10, "rosacea": 10}


def test_saved_bytes_are_equal_whatever_the_order_of_the_csv(tmp_path):
    digests = []
    for order in ("first", "second"):
        root, out = tmp_path / "photographs", tmp_path / order
        out.mkdir()
        table = pd.read_csv(plant(root) / "labels.csv")
        if order == "second":
            table.iloc[::-1].to_csv(root / "labels.csv", index=False)
        load.write_source(out, Request("folder", root, n_train=0, n_test=4, n_dev=2, image_size=24))
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()})
    assert len(digests[0]) == 3 and digests[0] == digests[1]
    assert {item.split for item in items.load_dataset(out).items} == {"train", "dev", "test"}
    assert load.read_report(out)["asked"]["dev"] == 2


def test_seed_decides_the_split(tmp_path):
    root = plant(tmp_path)
    tests = [{item.id for item in read(root, seed=seed)[0].of("test")} for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


def test_a_request_takes_its_own_parameters():
    request = Request.of({"source": "folder", "data_root": "x", "n_dev": 7, "epochs": 3})
    assert request == Request("folder", Path.cwd() / "x", n_dev=7) and request.sizes["dev"] == 7


def test_the_notebook_offers_every_source():
    assert KNOWN["source"].choices == tuple(load.SOURCES)


def test_missing_or_empty_folder(tmp_path):
    assert "does not exist" in failure(tmp_path / "nowhere")
    assert "is empty" in failure(tmp_path)
    assert "needs data_root" in failure(None)
    (tmp_path / "a.jpg").touch()
    assert "metadata.csv" in failure(tmp_path, source="pad-ufes-20")
    assert "unknown source 'dermnett'; allowed: synthetic" in failure(tmp_path, source="dermnett")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"image,sort\n00.jpg,x\n", "no column 'label'; its columns: image, sort"),
        (b"", "labels.csv is empty"),
        (b"image,label,label\n0.jpg,x,y\n", "has column 'label' more than once: 'label', 'label'"),
        (b"image,label,Label \n0.jpg,x,y\n", "more than once: 'label', 'Label'"),
        (b"image,label\n", "no image left"),
        (
            b"image,label\n0.jpg,rosacea\n1.jpg,melanoma\n0.jpg,rosacea\n",
            "labels.csv row 4 repeats image '0.jpg' of row 2",
        ),
    ],
)
def test_bad_tables(tmp_path, table, message):
    (tmp_path / "labels.csv").write_bytes(table)
    assert message in failure(tmp_path)


def test_unreadable_files_are_listed_or_stop_the_run(tmp_path):
    root = plant(tmp_path)
    (root / "00.jpg").write_bytes((root / "00.jpg").read_bytes()[:1000])
    picture(0, size=(1, 1)).save(root / "01.jpg")
    (root / "02.jpg").write_text("not a picture")
    (root / "03.jpg").unlink()
    dataset, report = read(root, max_unreadable=0.2)  # 4 of 20: the share is not exceeded
    assert len(dataset.items) == 16
    told = {bad["image"]: bad["reason"] for bad in report["unreadable"]}
    words = ["truncated", "too small", "not an image", "not in the data folder"]
    for i, word in enumerate(words):
        assert word in told[f"0{i}.jpg"] and str(root) not in told[f"0{i}.jpg"]
    message = failure(root, max_unreadable=0.19)
    assert "4 of 20 images cannot be read" in message and "00.jpg (" in message
    request = Request("folder", root, max_unreadable=0.01)  # one that is not there is enough
    with pytest.raises(DermError, match="1 of 20 images .*: 03.jpg .not in the data folder"):
        rows.check_survey(load.survey(request), request)


def test_no_image_left_in_a_class(tmp_path):
    root = plant(tmp_path, label=["melanoma", *["rosacea"] * 19])
    (root / "00.jpg").write_text("no picture")
    message = failure(root, max_unreadable=0.5)
    assert "no image left of melanoma" in message and "00.jpg" in message


def test_files_outside_the_folder_are_not_read(tmp_path):
    picture(50).save(tmp_path / "secret.jpg")
    outside = [str(tmp_path / "secret.jpg"), "../secret.jpg"]
    names = outside + [f"{i:02}.jpg" for i in range(2, 20)]
    _, report = read(plant(tmp_path / "photographs", image=names), max_unreadable=0.2)
    assert [bad["image"] for bad in report["unreadable"]] == sorted(outside)
    assert {bad["reason"] for bad in report["unreadable"]} == {"not in the data folder"}


def test_duplicates_are_found_reported_and_kept_together(tmp_path):
    root = plant(tmp_path, label=["melanoma"] * 10 + ["rosacea"] * 10)
    Image.open(root / "00.jpg").save(root / "05.jpg", format="PNG")  # the same pixels
    Image.open(root / "01.jpg").resize((90, 72)).save(root / "06.jpg", quality=60)  # alike
    Image.open(root / "02.jpg").save(root / "12.jpg", format="PNG")  # labelled differently
    for seed in range(5):
        dataset, report = read(root, seed=seed, n_test=8)
        where = {item.id: item for item in dataset.items}
        for one, other in (("00", "05"), ("01", "06"), ("02", "12")):
            assert where[f"{one}.jpg"].group == where[f"{other}.jpg"].group == f"{one}.jpg"
        assert where["02.jpg"].split == where["12.jpg"].split == "train"
    assert report["exact_duplicates"] == [["00.jpg", "05.jpg"], ["02.jpg", "12.jpg"]]
    assert report["perceptual_duplicates"] == [["01.jpg", "06.jpg"]]
    assert report["label_conflicts"] == [["02.jpg", "12.jpg"]]


def test_thumbnails_find_what_hashes_miss():
    images = np.random.default_rng(0).integers(30, 200, (3, 24, 24, 3), dtype=np.uint8)
    images = np.stack([*images, images[0] + 20, np.full_like(images[0], 7)])  # brighter, flat
    frame = pd.DataFrame({"perceptual": np.arange(5, dtype=np.uint64)})
    assert len(set(rows.twins(frame, images, 0, 0))) == 5
    with np.errstate(all="raise"):
        assert rows.twins(frame, images, 0, 0.01).tolist() == [0, 1, 2, 0, 3]


def test_a_column_of_groups_that_is_not_there_is_named(tmp_path):
    assert "no column 'visit'" in failure(plant(tmp_path), group_columns=["visit"])


def test_report_says_what_is_less_than_asked(tmp_path):
    root = plant(tmp_path, label=["melanoma", *["rosacea"] * 19])
    assert read(root, n_test=12, n_heldout=5, n_train=100)[1]["notes"] == [
        "asked for 100 train images, got 11",
        "asked for 12 test images, got 9",
        "asked for 5 heldout images, got 0",
        "no test image of melanoma: it has one picture, and half of each class stays in training",
        *identities.unowned({}),
    ]
    message = failure(plant(tmp_path, patient=["p"] * 10 + ["q"] * 10))
    assert "no image left for the test set" in message
    assert "smallest group has 10 pictures" in message and "subgroup_columns" in message


def test_images_beyond_all_sizes_are_left_out(tmp_path):
    dataset, report = read(plant(tmp_path), n_train=6)
    assert report["unused"] == 10 and len(dataset.items) == len(dataset.images) == 10
    for item in dataset.items:
        expected = photographs.fit(Image.open(tmp_path / item.id), 24)
        assert np.array_equal(dataset.images[item.row], expected)


@needs_pad
def test_pad_ufes_20_sample():
    dataset, report = read(PAD, source="pad-ufes-20", n_test=39, n_heldout=3, image_size=48)
    assert report["excluded"] == {"NEV": 13, "SCC": 10} and report["unreadable"] == []
    total = Counter(item.disease for item in dataset.items)
    assert sorted(total.values()) == [3, 12, 32, 39] and set(total) <= set(dialogue.diseases())
    assert len(dataset.of("test")) == 39 and report["counts"]["train"]["melanoma"] == 2
    table = pd.read_csv(PAD / "metadata.csv", dtype=str).set_index("img_id")
    for key in ("patient_id", "lesion_id"):
        homes = {(table.loc[item.id, key], item.split) for item in dataset.items}
        assert len(homes) == len({value for value, _ in homes})


def test_synthetic_with_development_set():
    sizes = {"n_train": 40, "n_test": 8, "n_heldout": 16, "n_dev": 8}
    dataset, report = read(None, source="synthetic", **sizes)
    assert [len(dataset.of(name)) for name in items.SPLITS] == [32, 8, 8, 16]
    assert set(report["counts"]["dev"].values()) == {1} and report["notes"] == []
    assert report["exact_duplicates"] == [] and all(item.facts for item in dataset.items)
    assert json.loads(json.dumps(report)) == report
