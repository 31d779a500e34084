"""What would be ignored is refused, and what a folder lacks is named with what to do."""

import os
import zipfile

import dermnet_tree
import layouts
import pytest
from blotches import picture, plant

from derm_compress.data import load
from derm_compress.data.request import Request
from derm_compress.errors import DermError


def said(root, source="folder", **asked):
    """What stops a survey, or what it has left out."""
    try:
        found = load.survey(Request(source, root, **asked))
    except DermError as error:
        return str(error)
    return found.problems[0] if found.problems else found.told["excluded"]


@pytest.mark.parametrize(
    ("source", "asked", "told"),
    [
        ("synthetic", {"label_column": "dx"}, "label_column: not read by source synthetic"),
        ("synthetic", {"phash_distance": 2}, "phash_distance: not read by source synthetic"),
        ("synthetic", {"exclude_labels": ["nv"], "table": "a.csv"}, "table, exclude_labels: not "),
        ("ham10000", {"image_column": "id"}, "image_column: not read by source ham10000; leave it"),
        ("ham10000", {"image_suffix": ".png"}, "leave it out, or set source: folder"),
        ("scin", {"onehot_columns": ["MEL"]}, "onehot_columns: not read by source scin"),
        ("scin", {"dermatitis": "narrow"}, "dermatitis: not read by source scin; leave it out"),
        ("dermnet", {"label_map": ["x = melanoma"]}, "label_map: not read by source dermnet"),
        ("dermnet", {"group_columns": ["patient"]}, "group_columns: not read by source dermnet"),
        ("folder", {"dermatitis": "narrow"}, "dermatitis: not read by source folder; leave it out"),
        ("folder", {"label_column": ""}, "label_column: name the column of the labels"),
        ("folder", {"image_column": ""}, "image_column: name the column of the pictures' files"),
    ],
)
def test_a_parameter_that_would_be_ignored_is_refused(tmp_path, source, asked, told):
    plant(tmp_path)
    with pytest.raises(DermError) as caught:
        load.load_source(Request(source, tmp_path, **asked))
    assert told in str(caught.value)


def test_what_a_source_reads_is_taken(tmp_path):
    plant(tmp_path)
    asked = {"exclude_labels": ["*"], "label_map": ["melanoma = psoriasis"], "phash_distance": 0}
    assert said(tmp_path, **asked, image_suffix="", onehot_columns=[]) == {}


def test_rows_that_a_preset_leaves_out_are_found_whatever_the_case(tmp_path):
    layouts.fitzpatrick17k(tmp_path)
    table = tmp_path / "fitzpatrick17k.csv"
    table.write_text(table.read_text().replace(",qc,", ",QC ,").replace("3 Wrongly", "3 wrongly"))
    assert said(tmp_path, "fitzpatrick17k")["QC: 3 wrongly labelled"] == 1


def test_dermnet_leaves_out_by_the_same_rule_as_a_csv(tmp_path):
    dermnet_tree.plant(tmp_path)
    plain = said(tmp_path, "dermnet")
    left = said(tmp_path, "dermnet", exclude_labels=["Lichen_Planus", "eczema ", "*"])
    assert left["lichen planus"] > 10
    assert left.keys() - plain.keys() == {"lichen planus", "dermatitis"}
    told = said(tmp_path, "dermnet", exclude_labels=["rosacia"])
    assert "exclude_labels: 'rosacia' is in no row of its files; nearest: 'rosacea'" in told


def shots(root):
    picture(0).save(root / "a.jpg")


def two_lists(root):
    plant(root)
    (root / "more.csv").write_text("image,label\n")


def workbook(root):
    shots(root)
    (root / "labels.xlsx").write_bytes(b"PK")


def dead_links(root):
    for i in range(3):
        (root / f"{i}.jpg").symlink_to("/nowhere/else.jpg")


def dead_pictures(root):
    plant(root)
    (root / "00.jpg").unlink()
    (root / "00.jpg").symlink_to("/nowhere/00.jpg")


def dead_class(root):
    plant(root / "melanoma")
    (root / "melanoma" / "labels.csv").unlink()
    (root / "rosacea").symlink_to("/nowhere/rosacea")


FOLDERS = [
    (shots, "holds 1 image, and nothing says what they show: add a csv with the columns image and"),
    (two_lists, "needs exactly one csv .* .csv there: labels.csv, more.csv.; choose .*table=lab"),
    (workbook, "lists its images in labels.xlsx; save it as csv beside it"),
    (dead_links, "holds 3 links to nowhere, such as 0.jpg -> /nowhere/else.jpg"),
    (dead_class, "the link rosacea leads nowhere ./nowhere/rosacea.; mend it"),
    (lambda root: (root / "notes.txt").touch(), "holds no images .* and no csv that lists any"),
]


@pytest.mark.parametrize(("make", "told"), FOLDERS)
def test_what_a_folder_lacks_is_named(tmp_path, make, told):
    make(tmp_path)
    with pytest.raises(DermError, match=told):
        load.survey(Request("folder", tmp_path))


def test_pictures_whose_links_lead_nowhere_are_missing_for_that(tmp_path):
    dead_pictures(tmp_path)
    (missing,) = [row for row in load.survey(Request("folder", tmp_path)).rows if not row.path]
    assert (missing.id, missing.why) == ("00.jpg", "a link that leads nowhere")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "labels.csv", "labels.csv")
    rows = load.survey(Request("folder", tmp_path / "a.zip")).rows
    assert {row.why for row in rows} == {"not in the data folder"}


def test_a_place_that_is_no_folder_says_which_would_be(tmp_path):
    told = said(plant(tmp_path / "folder") / "labels.csv")
    assert "set data_root to its folder, and table to labels.csv" in told
    os.symlink("/nowhere/at/all", tmp_path / "link")
    assert "link is a link to /nowhere/at/all, where nothing is" in said(tmp_path / "link")
