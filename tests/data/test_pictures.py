"""Files are found by names as people write them, through links and in archives, never outside."""

import unicodedata
import zipfile

import pytest
from blotches import picture, plant, read

from derm_compress.data import pictures
from derm_compress.errors import DermError
from derm_compress.files import walk


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return pictures.Pictures(root)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("sub/ISIC_1.jpg", "sub/ISIC_1.jpg"),
        ("ISIC_1.jpg", "sub/ISIC_1.jpg"),
        ("ISIC_1", "sub/ISIC_1.jpg"),
        ("isic_1", "sub/ISIC_1.jpg"),
        ("ISIC_1.JPG", "sub/ISIC_1.jpg"),
        ("sub\\ISIC_1.jpg", "sub/ISIC_1.jpg"),
        ("./sub//ISIC_1.jpg", "sub/ISIC_1.jpg"),
        ("SCAN", "images/scan.TIF"),
        ("photos/sub/ISIC_1.jpg", "sub/ISIC_1.jpg"),  # as written from the folder above
        (unicodedata.normalize("NFC", "Müller.png"), unicodedata.normalize("NFD", "Müller.png")),
        ("b.jpg", "images/b.jpg"),  # not masks/b.jpg
        ("B.jpg", "images/b.jpg"),
        ("ISIC_1.png", ""),  # another kind of file, perhaps a mask
        ("ISIC_", ""),
        ("../photos/sub/ISIC_1.jpg", ""),
        ("C:\\photos\\ISIC_1.jpg", ""),
        ("/sub/ISIC_1.jpg", ""),
        ("", ""),
    ],
)
def test_names_as_people_write_them(tmp_path, asked, found):
    composed = unicodedata.normalize("NFD", "Müller.png")
    names = ("sub/ISIC_1.jpg", "images/scan.TIF", composed, "images/b.jpg", "masks/b.jpg")
    assert tree(tmp_path / "photos", *names).one(asked)[0] == found


def test_several_files_of_one_name_are_told_and_copies_are_one(tmp_path):
    there = tree(tmp_path, "one/a.jpg", "two/a.jpg", "one/c.jpg", "one/C.jpg")
    assert there.one("a.jpg") == ("", "several files have this name: one/a.jpg, two/a.jpg")
    assert there.one("C.jpg")[0] == "one/C.jpg"  # case decides where both are there
    (tmp_path / "two" / "a.jpg").write_text("one/a.jpg")
    assert there.one("a.jpg")[0] == "one/a.jpg"


def test_links_are_followed_and_loops_end(tmp_path):
    root, outside = tmp_path / "data", tmp_path / "elsewhere"
    root.mkdir()
    outside.mkdir()
    for name in ("train", "test"):
        (outside / name).mkdir()
        picture(len(name)).save(outside / name / f"{name}.jpg")
        (root / name).symlink_to(outside / name, target_is_directory=True)
    (outside / "train" / "up").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to(root / "self")
    (root / "broken").symlink_to(outside / "nothing")
    names = {name for name, _ in walk(root)}
    assert {"train/train.jpg", "test/test.jpg"} <= names and len(names) < 10


def archive(path, root, prefix=""):
    with zipfile.ZipFile(path, "w") as opened:
        for name, file in walk(root):
            opened.write(file, prefix + name)
    return path


@pytest.mark.parametrize("prefix", ["", "photos/"])
def test_a_zip_is_read_like_its_folder(tmp_path, prefix):
    root = plant(tmp_path / "photos", patient=[f"p{i // 2}" for i in range(20)])
    there, _ = read(root)
    packed, _ = read(archive(tmp_path / "photos.zip", root, prefix))
    assert packed.items == there.items and (packed.images == there.images).all()


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg", "C:\\evil.jpg"]
)
def test_an_archive_that_leads_outside_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.writestr(name, "x")
    with pytest.raises(DermError, match="leads out of the archive"):
        read(tmp_path / "a.zip")


def test_bombs_locks_and_what_is_no_archive_are_refused(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a.jpg", b"\0" * 2**20)
    monkeypatch.setattr(pictures, "LARGEST", 2**19)
    with pytest.raises(DermError, match=r"'a.jpg' would unpack to 1 MiB; unpack what you trust"):
        read(bomb)
    monkeypatch.undo()
    content = bytearray(bomb.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the bit that says encrypted
    bomb.write_bytes(content)
    with pytest.raises(DermError, match="is encrypted"):
        read(bomb)
    bomb.write_text("no archive")
    with pytest.raises(DermError, match="neither a folder nor a zip archive"):
        read(bomb)


def test_two_rows_of_one_file_are_refused_however_they_spell_it(tmp_path):
    root = plant(tmp_path)
    text = (root / "labels.csv").read_text().replace("01.jpg", "./00.JPG")
    (root / "labels.csv").write_text(text)
    with pytest.raises(DermError, match=r"row 3 repeats image '00.jpg' of row 2"):
        read(root)


def test_pictures_in_folders_by_label_need_no_csv(tmp_path):
    for i in range(20):
        path = tmp_path / "all" / ("melanoma", "Acne Rosacea")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    dataset, report = read(tmp_path)
    assert {item.disease for item in dataset.items} == {"melanoma", "rosacea"}
    assert report["read_as"]["table"] == "its folders" and len(dataset.items) == 20
