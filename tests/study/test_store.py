"""The store under damage, kills, full disks and company."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.files import Journal, atomic, read_frame, write_frame, write_json
from derm_compress.model.recipe import Recipe
from derm_compress.study.store import Store

STAGE, KEY, ONE, TWO = "01_s", "5a" * 32, "1" * 64, "2" * 64
WORKER = f"""
import sys, time
from pathlib import Path
from derm_compress.files import Journal, write_json
from derm_compress.study.store import Store
store = Store(Path(sys.argv[1]))
pause = float(sys.argv[2])
print("up", flush=True)
folder, finished = store.begin("{STAGE}", "{KEY}")
if not finished:
    print("computing", flush=True)
    for part in range(6):
        if not (folder / f"{{part}}.json").exists():
            journal = Journal(folder / "journal" / f"{{part}}.jsonl")
            for item in range(20):
                if str(item) not in journal.done:
                    journal.add(str(item), part * item)
                    time.sleep(pause)
            write_json(folder / f"{{part}}.json", journal.done)
    store.commit("{STAGE}", "{KEY}", {{}})
print("done", flush=True)
"""


def worker(root, pause):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(root), str(pause)], stdout=subprocess.PIPE, text=True
    )


def finished_store(root) -> Store:
    store = Store(root)
    folder, _ = store.begin(STAGE, KEY)
    write_json(folder / "a.json", {"x": 1})
    write_frame(folder / "deep" / "b.parquet", pd.DataFrame({"y": [1, 2]}))
    write_json(folder / "measured.json", {"seconds": random.random()})
    Journal(folder / "journal" / "j.jsonl").add("1", 1)
    store.commit(STAGE, KEY, {"seconds": 1})
    return store


def test_a_finished_artifact_lists_its_files_and_is_read_again(tmp_path):
    store = finished_store(tmp_path)
    manifest = store.manifest(STAGE, KEY)
    assert set(manifest["files"]) == {"a.json", "deep/b.parquet", "measured.json"}
    assert store.complete(STAGE, KEY) and store.begin(STAGE, KEY) == (tmp_path / STAGE / KEY, True)
    assert not store.work(STAGE, KEY).exists()
    again = finished_store(tmp_path / "again").manifest(STAGE, KEY)
    assert (
        again["results"] == manifest["results"] and again["files"] != manifest["files"]
    )  # what was measured differs


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "damage", "word"),
    [
        ("a.json", _cut, "a.json was changed"),
        (
            "deep/b.parquet",
            lambda p: p.write_bytes(p.read_bytes().replace(b"y", b"z", 1)),
            "b.parquet was changed",
        ),
        ("deep/b.parquet", lambda p: p.unlink(), "b.parquet is missing"),
        ("manifest.json", lambda p: p.unlink(), "manifest.json is missing"),
        ("manifest.json", _cut, "manifest.json is unreadable"),
        ("manifest.json", lambda p: p.write_text("[]"), "manifest.json is unreadable"),
    ],
)
def test_damage_is_named_and_never_used(tmp_path, capsys, file, damage, word):
    store = finished_store(tmp_path)
    cut_short = file == "manifest.json" and damage is _cut
    damage(store.entry(STAGE, KEY) / file)
    if cut_short:
        _cut(
            store.entry(STAGE, KEY) / file
        )  # the last byte is a line end, without which it is still whole
    assert word in store.fault(STAGE, KEY)
    folder, finished = store.begin(STAGE, KEY)
    assert word in capsys.readouterr().out and not finished and not any(folder.iterdir())
    with pytest.raises(
        DermError, match=rf"{KEY}/a.json is not in .*: run notebooks/{STAGE}.ipynb again"
    ):
        store.resolve(f"{STAGE}/{KEY}/a.json")
    files.release(store.lock(STAGE, KEY))


def test_a_recipe_finds_finished_files_and_this_process_own(tmp_path):
    store, ref = Store(tmp_path), f"{STAGE}/{KEY}/a.json"
    folder, _ = store.begin(STAGE, KEY)
    write_json(folder / "a.json", 1)
    assert store.resolve(ref) == folder / "a.json"
    code = "import sys; from derm_compress.study.store import Store"
    code += "; Store(sys.argv[1]).resolve(sys.argv[2])"
    asked = [sys.executable, "-c", code, str(tmp_path), ref]
    assert "DermError" in subprocess.run(asked, capture_output=True, text=True).stderr
    store.commit(STAGE, KEY, {})
    assert store.resolve(ref) == tmp_path / STAGE / KEY / "a.json"


@pytest.mark.parametrize(
    "ref",
    [
        "../runs/x",
        f"../runs/{KEY}/x",
        f"{STAGE}/../../runs/x",
        f"{STAGE}/{KEY}.work/a.json",
        f"{STAGE}/{KEY}/../{KEY}/a.json",
        f"/{STAGE}/{KEY}/a.json",
        f"01_S/{KEY}/a.json",
        f"{STAGE}/{KEY[:-1]}/a.json",
        STAGE,
        "",
    ],
)
def test_a_reference_that_names_no_artifact_is_refused_before_any_file_is_touched(tmp_path, ref):
    store = finished_store(tmp_path / "store")
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "pointer.json").touch()
    (tmp_path / "runs" / "x.old").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DermError, match="names no artifact|leads out of its artifact"):
        store.resolve(ref)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_recipe_that_leads_out_of_the_store_is_refused_where_it_is_read(tmp_path):
    recipe = Recipe("pico", "0", 8).then("adapter", ref="../runs/x", sha256="0", kept=[0])
    with pytest.raises(DermError, match=r"\.\./runs/x"):
        Recipe.from_json(recipe.to_json())


def test_nothing_remains_of_a_write_that_fails(tmp_path):
    with pytest.raises(ValueError), atomic(tmp_path / "x") as part:
        part.mkdir()
        (part / "half").write_text("half")
        raise ValueError
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", float("nan"))
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    target = tmp_path / "answers.parquet"
    (tmp_path / f".part-{os.getpid()}-answers.parquet").symlink_to("/dev/full")
    with pytest.raises(
        DermError, match="the disk is full while writing .*answers.parquet: free some space"
    ):
        write_frame(target, pd.DataFrame({"x": range(10000)}))
    assert not any(tmp_path.iterdir())
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    journal = Journal()
    journal._path = tmp_path / "journal.jsonl"
    with pytest.raises(DermError, match="the disk is full"):
        journal.add("1", 1)
    assert journal.done == {}


def test_a_full_disk_in_a_librarys_words(tmp_path):
    with pytest.raises(DermError, match="the disk is full"), atomic(tmp_path / "adapter"):
        raise RuntimeError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )


def test_frames_and_json_come_back_as_they_were(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": [0.5, float("nan")]}, index=[5, 6])
    write_frame(tmp_path / "f.parquet", frame)
    pd.testing.assert_frame_equal(read_frame(tmp_path / "f.parquet"), frame.reset_index(drop=True))
    write_json(
        tmp_path / "j.json", {"b": pd.Series([1, 2]).to_numpy(), "a": pd.Series([1.5]).iloc[0]}
    )
    assert (tmp_path / "j.json").read_text() == json.dumps({"a": 1.5, "b": [1, 2]}, indent=1) + "\n"


def test_a_journal_cut_anywhere_is_a_prefix_and_goes_on(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    for item in range(4):
        journal.add(str(item), {"text": "é\n" * item})
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        done = Journal(path).done
        assert done == {str(i): {"text": "é\n" * i} for i in range(len(done))}
        assert len(done) == whole[:length].count(b"\n")
        Journal(path).add("next", 1)
        assert Journal(path).done == done | {"next": 1}
    path.write_bytes(whole[:20] + bytes(40))  # what a power cut can leave
    assert len(Journal(path).done) <= 1


def test_killed_at_any_moment_it_goes_on_to_the_same_result(tmp_path):
    finished_by = worker(tmp_path / "calm", 0).communicate()[0]
    assert "done" in finished_by
    expected = Store(tmp_path / "calm").manifest(STAGE, KEY)["results"]
    chance = random.Random(0)
    store, kills = Store(tmp_path / "wild"), 0
    for _ in range(60):
        process = worker(store.root, 0.002)
        assert process.stdout.readline() == "up\n"
        time.sleep(chance.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        kills += "done" not in process.communicate()[0]
        if store.entry(STAGE, KEY).exists():
            break
        assert store.fault(STAGE, KEY) == "absent"
    assert (
        kills >= 2
        and store.fault(STAGE, KEY) == ""
        and store.manifest(STAGE, KEY)["results"] == expected
    )


def test_the_second_of_two_waits_and_computes_nothing(tmp_path):
    first = worker(tmp_path, 0.005)
    assert [first.stdout.readline() for _ in range(2)] == ["up\n", "computing\n"]
    second = worker(tmp_path, 0).communicate()[0]
    assert second.splitlines() == [
        "up",
        f"{STAGE}: another process computes the same; waiting for it",
        "done",
    ]
    assert first.communicate()[0] == "done\n"


def test_a_lock_can_be_refused_and_is_given_back_by_a_kill(tmp_path):
    first = worker(tmp_path, 0.02)
    assert [first.stdout.readline() for _ in range(2)] == ["up\n", "computing\n"]
    lock = Store(tmp_path).lock(STAGE, KEY)
    assert not files.hold(lock) and not files.held(lock)
    first.kill()
    first.communicate()
    assert files.hold(lock) and files.hold(lock) and files.held(lock)
    files.release(lock)
    assert not files.held(lock)


class TestMounted:
    """A second store, below the first, that is never written to."""

    @pytest.fixture
    def stores(self, tmp_path):
        below = Store(tmp_path / "mounted")
        work, _ = below.begin("01_a", ONE)
        (work / "x.json").write_text("1")
        below.commit("01_a", ONE, {})
        work, _ = below.begin("02_b", TWO)
        files.Journal(work / "journal" / "j.jsonl").add("one", 1)
        files.release(below.lock("02_b", TWO))
        return Store(tmp_path / "own", [tmp_path / "mounted"]), below

    def test_what_is_finished_is_used_where_it_is(self, stores):
        store, below = stores
        folder, finished = store.begin("01_a", ONE)
        assert (
            finished
            and folder == below.own("01_a", ONE)
            and store.resolve(f"01_a/{ONE}/x.json").read_text() == "1"
        )
        assert not store.own("01_a", ONE).exists()

    def test_what_is_begun_goes_on_in_a_copy(self, stores, capsys):
        store, below = stores
        before = {p: p.read_bytes() for p in below.root.rglob("*") if p.is_file()}
        folder, finished = store.begin("02_b", TWO)
        journal = files.Journal(folder / "journal" / "j.jsonl")
        assert (
            not finished
            and journal.done == {"one": 1}
            and "goes on from" in capsys.readouterr().out
        )
        journal.add("two", 2)
        store.commit("02_b", TWO, {})
        assert store.own("02_b", TWO).is_dir()
        assert {p: p.read_bytes() for p in below.root.rglob("*") if p.is_file()} == before

    def test_what_is_damaged_is_named_and_computed_anew(self, stores, capsys):
        store, below = stores
        (below.own("01_a", ONE) / "x.json").write_text("2")
        folder, finished = store.begin("01_a", ONE)
        assert (
            not finished
            and folder == store.work("01_a", ONE)
            and "it is not used" in capsys.readouterr().out
        )
        (folder / "x.json").write_text("1")
        store.commit("01_a", ONE, {})
        assert (
            store.complete("01_a", ONE) and (below.own("01_a", ONE) / "x.json").read_text() == "2"
        )

    def test_what_is_adopted_stands_alone(self, stores):
        store, below = stores
        for path in below.root.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        for stage, key in (("01_a", ONE), ("02_b", TWO), ("03_c", "0" * 64)):
            store.adopt(stage, key)
        alone = Store(store.root)
        assert alone.complete("01_a", ONE) and not alone.own("03_c", "0" * 64).exists()
        folder, _ = alone.begin("02_b", TWO)
        journal = files.Journal(folder / "journal" / "j.jsonl")
        journal.add("two", 2)
        assert journal.done == {"one": 1, "two": 2}
        for path in below.root.rglob("*"):
            path.chmod(0o755)

    def test_of_several_the_furthest_is_gone_on_with(self, stores, tmp_path):
        further = Store(tmp_path / "further", [tmp_path / "mounted"])
        work, _ = further.begin("02_b", TWO)
        files.Journal(work / "journal" / "j.jsonl").add("two", 2)
        for roots in (["mounted", "further"], ["further", "mounted"]):
            store = Store(tmp_path / f"own-{roots[0]}", [tmp_path / root for root in roots])
            folder, _ = store.begin("02_b", TWO)
            assert files.Journal(folder / "journal" / "j.jsonl").done == {"one": 1, "two": 2}

    def test_it_cannot_be_forced_away(self, stores):
        with pytest.raises(DermError, match="detach"):
            stores[0].discard("01_a", ONE)
