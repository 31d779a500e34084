"""data, sources, photographs and groups: bad input in one clear line, safe pictures, splits that never leak."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from derm_compress.data import dialogue, items, photographs, sources, splits
from derm_compress.data.folders import Columns
from derm_compress.errors import DermError

PAD = Path(__file__).parents[3] / "shared" / "pad-ufes-20"
needs_pad = pytest.mark.skipif(
    not PAD.is_dir(), reason="the sample of pad-ufes-20 is not beside the project"
)
SIZES = {"n_train": 0, "n_test": 4, "size": 24, "min_side": 16}


def picture(seed, size=(60, 48), mode="RGB"):
    """A blotchy picture unlike that of any other seed."""
    blotches = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blotches).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """20 photographs of two diseases with a csv; returns a function that rewrites the csv's columns."""
    names = [f"{i:02}.jpg" for i in range(20)]
    for i, name in enumerate(names):
        picture(i).save(tmp_path / name, quality=95)
    table = pd.DataFrame({"image": names, "label": ["melanoma", "rosacea"] * 10})

    def write(**columns):
        table.assign(**columns).to_csv(tmp_path / "labels.csv", index=False)
        return tmp_path

    write()
    return write


def load(root, source="folder", **options):
    return sources.load_source(source, **SIZES | {"data_root": root} | options)


def failure(root, **options):
    with pytest.raises(DermError) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# What is kept


def test_folder_gives_items_images_and_counts(folder):
    dataset, report = load(folder(label=["Melanoma ", "ACNE_rosacea"] * 10))
    assert dataset.images.shape == (20, 24, 24, 3) and len(dataset.of("test")) == 4
    assert report["counts"]["test"] == {"melanoma": 2, "rosacea": 2}
    assert Counter(item.disease for item in dataset.items) == {"melanoma": 10, "rosacea": 10}
    item = next(item for item in dataset.items if item.id == "07.jpg")
    expected = photographs.fit(Image.open(folder() / "07.jpg"), 24)
    assert np.array_equal(dataset.images[item.row], expected)
    assert json.loads(json.dumps(report)) == report


def test_saved_bytes_are_equal_whatever_the_order_of_the_csv(folder, tmp_path_factory):
    root, digests = folder(), []
    for _ in range(2):
        out = tmp_path_factory.mktemp("out")
        dataset, _ = load(root, n_dev=2)
        items.save_dataset(out, dataset)
        files = [out / "items.parquet", out / "images.safetensors"]
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
        table = pd.read_csv(root / "labels.csv")
        table.iloc[::-1].to_csv(root / "labels.csv", index=False)
    assert digests[0] == digests[1]
    again = items.load_dataset(out)
    assert again.items == dataset.items and np.array_equal(again.images, dataset.images)
    assert {item.split for item in again.items} == {"train", "dev", "test"}


def test_seed_decides_the_split(folder):
    tests = [{item.id for item in load(folder(), seed=seed)[0].of("test")} for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


def test_facts_and_types_survive_the_disk(tmp_path):
    item = items.Item("a", "train", "rosacea", "g", 0, {"site": "face"}, "synthetic")
    items.save_dataset(tmp_path, items.Dataset((item,), np.zeros((1, 4, 4, 3), np.uint8)))
    assert items.load_dataset(tmp_path).items == (item,)
    (tmp_path / "images.safetensors").unlink()
    with pytest.raises(DermError, match="images.safetensors is missing"):
        items.load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "a"}, "twice"),
        ({"split": "test"}, "leak"),
        ({"row": 2}, "no picture 2"),
        ({"split": "x"}, "split 'x'"),
    ],
)
def test_a_dataset_refuses_what_would_mislead(change, message):
    first = items.Item("a", "train", "rosacea", "g", 0, {}, "folder")
    second = replace(first, id="b", row=1)
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert items.Dataset((first, second), images)
    with pytest.raises(DermError, match=message):
        items.Dataset((first, replace(second, **change)), images)
    with pytest.raises(DermError, match="uint8"):
        items.Dataset((first,), images / 255)


def test_no_torch_is_imported():
    code = "import sys, derm_compress.data.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Bad folders and tables


def test_missing_or_empty_folder(tmp_path):
    assert "does not exist" in failure(tmp_path / "nowhere")
    assert "is empty" in failure(tmp_path)
    assert "needs data_root" in failure(None)
    (tmp_path / "a.jpg").touch()
    assert "exactly one csv" in failure(tmp_path)
    assert "metadata.csv" in failure(tmp_path, source="pad-ufes-20")
    assert "unknown source 'dermnett'; allowed: synthetic" in failure(tmp_path, source="dermnett")


def failure_of_table(folder, text, **options):
    root = folder()
    (root / "labels.csv").write_bytes(text)
    return failure(root, **options)


def test_bad_tables(folder):
    assert "no column 'label'; its columns: image, sort" in failure_of_table(
        folder, b"image,sort\n00.jpg,x\n"
    )
    assert "no column 'patient_id'" in failure(folder(), columns=Columns(groups=("patient_id",)))
    assert "no csv in UTF-8" in failure_of_table(folder, b"image,label\n\xff\xfe,x\n")
    assert "no csv in UTF-8" in failure_of_table(folder, b"")
    assert "no image left" in failure_of_table(folder, b"image,label\n")
    repeated = failure_of_table(
        folder, b"image,label\n00.jpg,rosacea\n01.jpg,melanoma\n00.jpg,rosacea\n"
    )
    assert "labels.csv row 4 repeats image '00.jpg'" in repeated


def test_unknown_label_names_label_row_and_the_allowed(folder):
    labels = ["melanoma", "rosacea"] * 9 + ["wart\nx", "rosacea"]
    message = failure(folder(label=labels))
    assert "row 20: unknown label 'wart\\nx'" in message and "seborrheic keratosis" in message
    _, report = load(folder(label=labels), exclude_labels=["Wart X"])
    assert report["excluded"] == {"wart\nx": 1} and sum(report["counts"]["train"].values()) == 15


def test_excluding_a_disease_excludes_its_aliases(folder):
    dataset, report = load(
        folder(label=["malignant melanoma", "rosacea"] * 10), exclude_labels=["melanoma"]
    )
    assert {item.disease for item in dataset.items} == {"rosacea"} and report["excluded"] == {
        "malignant melanoma": 10
    }


def test_labels_can_be_passed(folder):
    dataset, _ = load(folder(label=["A", "b"] * 10), labels={"a": "psoriasis", "B": "rosacea"})
    assert {item.disease for item in dataset.items} == {"psoriasis", "rosacea"}


# Bad pictures


def damage(root):
    """Four files that are no photographs, each with the reason that the report must give."""
    (root / "00.jpg").write_bytes((root / "00.jpg").read_bytes()[:1000])
    picture(0, size=(1, 1)).save(root / "01.jpg")
    (root / "02.jpg").write_text("not a picture")
    (root / "03.jpg").unlink()
    return {
        "00.jpg": "truncated",
        "01.jpg": "too small",
        "02.jpg": "not an image",
        "03.jpg": "not in the data folder",
    }


def test_unreadable_files_are_listed_or_stop_the_run(folder):
    root = folder()
    reasons = damage(root)
    dataset, report = load(root, max_unreadable=0.2)  # 4 of 20: the share is not exceeded
    assert len(dataset.items) == 16
    assert [bad["image"] for bad in report["unreadable"]] == list(reasons)
    for bad in report["unreadable"]:
        assert reasons[bad["image"]] in bad["reason"] and str(root) not in bad["reason"]
    message = failure(root, max_unreadable=0.19)
    assert "4 of 20 images cannot be read" in message and "00.jpg (" in message


def test_no_image_left_in_a_class(folder):
    root = folder(label=["melanoma", *["rosacea"] * 19])
    (root / "00.jpg").write_text("no picture")
    message = failure(root, max_unreadable=0.5)
    assert "no image left of melanoma" in message and "00.jpg" in message


def test_files_outside_the_folder_are_not_read(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "secret.jpg"
    picture(50).save(outside)
    names = [
        str(outside),
        f"../{outside.parent.name}/secret.jpg",
        *(f"{i:02}.jpg" for i in range(2, 20)),
    ]
    _, report = load(folder(image=names), max_unreadable=0.2)
    assert {bad["reason"] for bad in report["unreadable"]} == {"not in the data folder"}
    assert len(report["unreadable"]) == 2


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "RGBA", "P", "L", "LA", "1", "I;16"])
def test_all_kinds_of_pixels_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    source = picture(1) if mode != "I;16" else picture(1, mode="L")
    if mode == "I;16":
        Image.fromarray(np.asarray(source).astype(np.uint16) * 256 + 128).save(path)
    else:
        source.convert(mode).save(path)
    image = photographs.read_rgb(path, size=24)
    assert image.mode == "RGB" and image.size == source.size
    expected = source.convert("L" if mode in ("L", "LA", "I;16") else "RGB").convert("RGB")
    error = np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean()
    assert error < {"P": 20, "1": 130, "CMYK": 3}.get(mode, 0.01)


def test_transparency_is_white(tmp_path):
    clear = Image.new("RGBA", (40, 40), (10, 20, 30, 0))
    clear.paste((10, 20, 30, 255), (0, 0, 20, 40))
    clear.save(tmp_path / "a.png")
    clear.convert("P").save(tmp_path / "p.png", transparency=clear.convert("P").getpixel((30, 30)))
    image = photographs.read_rgb(tmp_path / "a.png", size=24)
    assert image.getpixel((5, 5)) == (10, 20, 30) and image.getpixel((30, 30)) == (255, 255, 255)
    assert photographs.read_rgb(tmp_path / "p.png", size=24).getpixel((30, 30)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    source = picture(2)
    source.save(tmp_path / "a.png", exif=exif)
    image = photographs.read_rgb(tmp_path / "a.png", size=24)
    assert np.array_equal(np.asarray(image), np.asarray(source.rotate(-90, expand=True)))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_huge_picture_is_read_in_bounded_memory(tmp_path, suffix):
    path = tmp_path / f"huge.{suffix}"
    small = picture(3, size=(120, 90), mode="L")
    options = {"compress_level": 1} if suffix == "png" else {}
    small.resize((12000, 9000), Image.Resampling.NEAREST).save(path, **options)
    code = (
        "import re, sys; from pathlib import Path; from derm_compress.data import photographs as p;"
        "image = p.read_rgb(Path(sys.argv[1]), size=24); p.fit(image, 24).tofile(sys.argv[2]);"
        "status = Path('/proc/self/status'); print(min(image.size));"
        "print(re.search(r'VmHWM:\\s*(\\d+)', status.read_text())[1] if status.exists() else 0)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "pixels")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shortest, peak = map(int, done.stdout.split())  # pixels, kB (0: not known on this system)
    assert shortest >= 96 and peak / 1024 < {"jpg": 150, "png": 300}[suffix]
    pixels = np.fromfile(tmp_path / "pixels", np.uint8).reshape(24, 24, 3).astype(float)
    assert np.abs(pixels - photographs.fit(small.convert("RGB"), 24)).mean() < 3


def test_a_damaged_png_is_refused(tmp_path):
    picture(1).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[-13] ^= 1  # in the checksum of the pixels
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(SyntaxError, match="broken PNG"):
        photographs.read_rgb(tmp_path / "a.png", size=24)


def test_a_strip_is_refused_before_it_is_blown_up(tmp_path):
    picture(4, size=(33, 3000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="too long"):
        photographs.read_rgb(tmp_path / "a.png", size=24)


@pytest.mark.parametrize("shape", [(400, 400), (486, 351), (97, 131), (50, 61)])
def test_fit_equals_clips_processor(shape):
    clip = pytest.importorskip(
        "transformers.models.clip.image_processing_pil_clip"
    ).CLIPImageProcessorPil
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    edges = {"size": {"shortest_edge": 72}, "crop_size": {"height": 72, "width": 72}}
    values = clip(**edges, do_rescale=False, do_normalize=False)(image, return_tensors="np")[
        "pixel_values"
    ][0]
    assert np.array_equal(photographs.fit(image, 72), values.transpose(1, 2, 0))


# Duplicates and groups


def test_duplicates_are_found_reported_and_kept_together(folder):
    root = folder(label=["melanoma"] * 10 + ["rosacea"] * 10)
    Image.open(root / "00.jpg").save(
        root / "05.jpg", format="PNG"
    )  # the same pixels in another file
    Image.open(root / "01.jpg").resize((90, 72)).save(root / "06.jpg", quality=60)  # alike
    Image.open(root / "02.jpg").save(
        root / "12.jpg", format="PNG"
    )  # the same, labelled differently
    for seed in range(5):
        dataset, report = load(root, seed=seed, n_test=8)
        where = {item.id: item for item in dataset.items}
        for one, other in (("00", "05"), ("01", "06"), ("02", "12")):
            assert where[f"{one}.jpg"].group == where[f"{other}.jpg"].group == f"{one}.jpg"
        assert where["02.jpg"].split == where["12.jpg"].split == "train"
    assert report["exact_duplicates"] == [["00.jpg", "05.jpg"], ["02.jpg", "12.jpg"]]
    assert report["perceptual_duplicates"] == [["01.jpg", "06.jpg"]]
    assert report["label_conflicts"] == [["02.jpg", "12.jpg"]]


def test_patients_and_lesions_join_in_chains(folder):
    patient = ["p1", "p1", "p2", *[""] * 17]
    lesion = ["", "l1", "l1", "l2", "l2", *[""] * 15]
    dataset, report = load(folder(patient=patient, lesion=lesion))
    group = {item.id: item.group for item in dataset.items}
    assert [group[f"{i:02}.jpg"] for i in range(6)] == ["00.jpg"] * 3 + ["03.jpg"] * 2 + ["05.jpg"]
    assert report["largest_group"] == 3 and report["groups"] == 17


def test_perceptual_hash_knows_a_picture_again():
    bits = [photographs.perceptual_hash(picture(seed)) for seed in range(40)]
    again = photographs.perceptual_hash(picture(7).resize((200, 160)))
    assert (bits[7] ^ again).bit_count() <= 4
    assert min((bits[i] ^ bits[j]).bit_count() for i in range(40) for j in range(i)) > 8
    ramps = [
        Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) * k, (32, 1))) for k in range(1, 9)
    ]
    assert (
        len({photographs.perceptual_hash(ramp) for ramp in ramps}) == 1
    )  # rounding noise has no bits


def test_near_links_by_distance_and_equals_the_plain_loop():
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**64, 250, dtype=np.uint64)
    flips = np.array(
        [
            sum(1 << int(b) for b in rng.choice(64, k, replace=False))
            for k in rng.integers(0, 7, 800)
        ]
    )
    hashes = rng.choice(seeds, 800) ^ flips.astype(np.uint64)
    labels = splits.near(hashes, 4)
    for i in range(0, 800, 7):  # a linked pair shares its label
        linked = np.bitwise_count(hashes ^ hashes[i]) <= 4
        assert (labels[linked] == labels[i]).all()
    for label in range(0, labels.max() + 1, 9):  # and nobody stands in a group without a link to it
        member = hashes[labels == label]
        distance = np.bitwise_count(member[:, None] ^ member[None])
        assert len(member) == 1 or ((distance <= 4).sum(1) > 1).all()
    chain = np.array([0, 0b1111, 0b11111111, 2**64 - 1], np.uint64)
    assert len(set(splits.near(chain, 4))) == 2 and len(set(splits.near(chain, 3))) == 4


# Splits


def patients(seed, n=400, classes=8):
    """Groups of one to three images of a class; every tenth has one of another class too."""
    rng = np.random.default_rng(seed)
    draw = [(rng.integers(classes, size=2), rng.integers(1, 4)) for _ in range(n)]
    return {
        f"g{i}": Counter([f"c{c}"] * k + [f"c{d}"] * (i % 10 == 0))
        for i, ((c, d), k) in enumerate(draw)
    }


def per_split(found, home):
    return {
        name: sum((found[g] for g in home if home[g] == name), Counter()) for name in items.SPLITS
    }


@pytest.mark.parametrize("seed", range(5))
def test_split_sizes_balance_and_shares(seed):
    found = patients(seed)
    sizes = {"test": 39, "heldout": 120, "dev": 40, "train": 300}
    home = splits.split(found, sizes=sizes, seed=seed)
    got = per_split(found, home)
    assert {name: got[name].total() for name in ("test", "heldout", "dev")} == {
        "test": 39,
        "heldout": 120,
        "dev": 40,
    }
    assert got["train"].total() == 300 - 40
    for name in items.SPLITS:
        assert max(got[name].values()) - min(got[name].values()) <= 6  # groups hold up to 4 images
    assert home == splits.split(dict(reversed(found.items())), sizes=sizes, seed=seed)


def test_single_images_split_exactly_even():
    found = {f"g{i:03}": Counter([f"c{i % 8}"]) for i in range(400)}
    got = per_split(found, splits.split(found, sizes={"test": 39}, seed=3))
    assert sorted(got["test"].values()) == [4] + [5] * 7 and got["train"].total() == 361


def test_small_classes_keep_their_share_for_training():
    found = {
        f"{name}{i}": Counter([name])
        for name, n in {"a": 30, "b": 3, "c": 1}.items()
        for i in range(n)
    }
    got = per_split(found, splits.split(found, sizes={"test": 20, "heldout": 20}, seed=0))
    assert got["test"] == {"a": 15, "b": 1} and not got["heldout"]
    assert got["train"] == {"a": 15, "b": 2, "c": 1}
    half = {f"g{i}": Counter([f"c{i}"]) for i in range(4)}
    assert set(splits.split(half, sizes={"test": 2}, seed=0, train_only=half).values()) == {"train"}


def test_report_says_what_is_less_than_asked(folder):
    labels = ["melanoma", *["rosacea"] * 19]
    _, report = load(folder(label=labels), n_test=12, n_heldout=5, n_train=100)
    assert report["notes"] == [
        "asked for 100 train images, got 11",
        "asked for 12 test images, got 9",
        "asked for 5 heldout images, got 0",
        "no test image of melanoma",
    ]
    assert "no image left for the test set" in failure(folder(patient=["p"] * 20))


def test_images_beyond_all_sizes_are_left_out(folder):
    root = folder()
    dataset, report = load(root, n_train=6)
    assert report["unused"] == 10 and len(dataset.items) == len(dataset.images) == 10
    for item in dataset.items:
        expected = photographs.fit(Image.open(root / item.id), 24)
        assert np.array_equal(dataset.images[item.row], expected)


# Real and drawn sources


@needs_pad
def test_pad_ufes_20_sample():
    dataset, report = sources.load_source(
        "pad-ufes-20", data_root=PAD, n_train=0, n_heldout=3, size=48
    )
    assert report["excluded"] == {"NEV": 13, "SCC": 10} and report["unreadable"] == []
    total = sum((Counter(counts) for counts in report["counts"].values()), Counter())
    four = {
        "actinic keratosis": 32,
        "basal cell carcinoma": 39,
        "melanoma": 3,
        "seborrheic keratosis": 12,
    }
    assert total == four and set(four) <= set(dialogue.diseases())
    assert len(dataset.of("test")) == 39 and report["counts"]["train"]["melanoma"] == 2
    table = pd.read_csv(PAD / "metadata.csv", dtype=str).set_index("img_id")
    for key in ("patient_id", "lesion_id"):
        homes = {(table.loc[item.id, key], item.split) for item in dataset.items}
        assert len(homes) == len({value for value, _ in homes})


def test_pad_layout_with_png_in_parts_needs_its_columns(tmp_path):
    rows = []
    for i in range(12):
        part = tmp_path / f"imgs_part_{i % 2}"
        part.mkdir(exist_ok=True)
        picture(i, mode="RGBA").save(part / f"PAT_{i}.png")
        rows.append((f"PAT_{i}.png", f"PAT_{i // 2}", str(i), ["MEL", "BCC", "NEV"][i // 2 % 3]))
    table = pd.DataFrame(rows, columns=["img_id", "patient_id", "lesion_id", "diagnostic"])
    table.to_csv(tmp_path / "metadata.csv", index=False)
    dataset, report = load(tmp_path, source="pad-ufes-20")
    assert (
        len(dataset.items) == 8
        and report["excluded"] == {"NEV": 4}
        and report["largest_group"] == 2
    )
    table.drop(columns="patient_id").to_csv(tmp_path / "metadata.csv", index=False)
    assert "no column 'patient_id'" in failure(tmp_path, source="pad-ufes-20")


def test_synthetic_with_development_set():
    sizes = {"n_train": 40, "n_test": 8, "n_heldout": 16, "n_dev": 8}
    dataset, report = sources.load_source("synthetic", size=24, seed=0, **sizes)
    assert [len(dataset.of(name)) for name in items.SPLITS] == [32, 8, 8, 16]
    assert set(report["counts"]["dev"].values()) == {1} and report["notes"] == []
    assert report["exact_duplicates"] == [] and all(item.facts for item in dataset.items)
