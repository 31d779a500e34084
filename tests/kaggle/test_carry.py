"""A run in parts of one size: whole again elsewhere, or refused with the part to copy anew."""

import json
import tarfile
from types import SimpleNamespace

import pytest
import toy

from derm_compress.errors import DermError
from derm_compress.files import file_digest, write_note
from derm_compress.kaggle import carry


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def packed(tmp_path):
    """A folder, and its parts of 10,000 bytes."""
    folder, into = tmp_path / "folder", tmp_path / "parts"
    for name, size in (("a/b/large", 45_678), ("a/small", 3), ("empty", 0)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(i % 251 for i in range(size)))
    into.mkdir()
    carry.split(folder, into, 10_000, "x")
    return folder, into


def test_parts_are_of_one_size_and_make_the_folder_again(packed, tmp_path):
    folder, into = packed
    made = sorted(into.glob("part-*"))
    assert len(made) > 4 and {path.stat().st_size for path in made[:-1]} == {10_000}
    assert 0 < made[-1].stat().st_size <= 10_000
    assert carry.listed(into)["run"] == "x"
    (tmp_path / "again").mkdir()
    carry.join(into, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def cut(into):
    path = into / "part-0002"
    path.write_bytes(path.read_bytes()[:-1])


def swap(into):
    (into / "part-0001").rename(into / "held")
    (into / "part-0002").rename(into / "part-0001")
    (into / "held").rename(into / "part-0002")


def edit(into):
    toy.edit(into / carry.LIST, "part-0003", "part-0009")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "part-0002 was changed or cut short"),
        (swap, "part-0001 was changed"),
        (lambda into: (into / "part-0003").unlink(), "part-0003 is missing"),
        (edit, "parts.json is damaged"),
        (lambda into: (into / carry.LIST).unlink(), "holds no parts.json"),
    ],
)
def test_a_wrong_part_is_named_and_nothing_is_written(packed, tmp_path, damage, words):
    damage(packed[1])
    (tmp_path / "again").mkdir()
    with pytest.raises(DermError, match=words):
        carry.join(packed[1], tmp_path / "again")
    assert not [*(tmp_path / "again").iterdir()]


def test_parts_that_lead_elsewhere_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with tarfile.open(tmp_path / "part-0000", "w") as archive:
        archive.add(tmp_path / "file", "../outside")
    write_note(tmp_path / carry.LIST, {"parts": {"part-0000": file_digest(tmp_path / "part-0000")}})
    (tmp_path / "again").mkdir()
    with pytest.raises(DermError, match="outside"):
        carry.join(tmp_path, tmp_path / "again")
    assert not (tmp_path / "outside").exists()


def test_a_run_goes_on_elsewhere_from_its_parts(tmp_path):
    one, two = (toy.project(tmp_path / name) for name in ("one", "two"))
    carried, study = tmp_path / "carried", ("run", "params/tiny.yaml")
    assert toy.call(one, *study, "--only", "01").returncode == 0
    (one / "artifacts/judged").mkdir()
    (one / "artifacts/judged/marks.jsonl").write_text("[1]\n")
    done = toy.call(one, "pack", "tiny", str(carried), "--part-mb", "1")
    assert done.stdout.splitlines()[:2] == ["01_data finished", "1 parts"], done.stderr
    assert sorted(path.name for path in carried.iterdir()) == ["part-0000", carry.LIST]
    done = toy.call(two, "unpack", str(carried))
    assert done.stdout.splitlines() == ["01_data finished"], done.stderr
    assert (two / "artifacts/judged/marks.jsonl").read_text() == "[1]\n"
    kept = [contents(root / "artifacts/store/01_data") for root in (one, two)]
    assert kept[0] == kept[1]
    assert json.loads((two / "artifacts/runs/tiny/01_data.json").read_text())["key"]
    listed = toy.call(two, *study, "--list").stdout
    assert [line.split()[-1] for line in listed.splitlines()] == ["cached", "compute", "compute"]
    again = toy.call(two, "unpack", str(carried))
    assert again.returncode == 2 and "nothing in it is new to run tiny" in again.stderr
    assert not [*(two / "artifacts").glob(".part-*")]


def test_what_has_come_further_takes_the_place_of_what_was_begun(tmp_path):
    key = "a" * 64
    here, come = tmp_path / "here", tmp_path / "come"
    plan = SimpleNamespace(run="x", artifacts=here, notebooks=["01_data"], keys={"01_data": key})
    items = [root / f"store/01_data/{key}.work/journal/items.jsonl" for root in (here, come)]
    for path, lines in zip(items, (2, 3), strict=True):
        path.parent.mkdir(parents=True)
        path.write_text("[1]\n" * lines)
    assert carry.take(plan, come) == ["01_data begun"]
    assert items[0].read_text() == "[1]\n" * 3
    items[1].write_text("[1]\n")
    with pytest.raises(DermError, match="nothing in it is new"):
        carry.take(plan, come)
    assert items[0].read_text() == "[1]\n" * 3
