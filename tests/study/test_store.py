"""The store under damage, kills and company."""

import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.files import Journal, write_frame, write_json
from derm_compress.model.recipe import Recipe
from derm_compress.study.store import Store, copy

STAGE, KEY, ONE, TWO = "01_s", "5a" * 32, "1" * 64, "2" * 64
STAGES = ("01_a", "02_b", "03_c")
WORKER = f"""
import sys, time
from pathlib import Path
from derm_compress.files import Journal, write_json
from derm_compress.study.store import Store
store = Store(Path(sys.argv[1]), ["{STAGE}"])
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
    asked = [sys.executable, "-c", WORKER, str(root), str(pause)]
    return subprocess.Popen(asked, stdout=subprocess.PIPE, text=True)


def finished_store(root) -> Store:
    store = Store(root, [STAGE])
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
    assert again["results"] == manifest["results"]
    assert again["files"] != manifest["files"]  # what was measured differs


def replaced(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


DAMAGE = [
    ("a.json", lambda path: path.write_bytes(path.read_bytes()[:-1]), "a.json was changed"),
    ("deep/b.parquet", replaced(b"y", b"z"), "b.parquet was changed"),
    ("deep/b.parquet", lambda path: path.unlink(), "b.parquet is missing"),
    ("a link.json", lambda path: path.symlink_to("a.json"), "a link.json is a link"),
    ("deep/out", lambda path: path.symlink_to("/etc"), "out is a link"),
    ("a.json", lambda path: path.unlink() or path.symlink_to("b.json"), "a.json is a link"),
    ("more.json", lambda path: path.touch(), "more.json is not in its manifest"),
    (".DS_Store", lambda path: path.touch(), ""),
    ("manifest.json", lambda path: path.unlink(), "manifest.json is missing"),
    ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is damaged"),
    ("manifest.json", replaced(b'"seconds": 1', b'"seconds": 2'), "manifest.json is damaged"),
    ("manifest.json", replaced(b'"results": "', b'"results": "0'), "manifest.json is damaged"),
    ("manifest.json", replaced(b"a.json", b"../../a"), "manifest.json is damaged"),
]


@pytest.mark.parametrize(("file", "damage", "word"), DAMAGE)
def test_damage_is_named_and_never_used(tmp_path, capsys, file, damage, word):
    store = finished_store(tmp_path)
    entry = store.entry(STAGE, KEY)
    damage(entry / file)
    if not word:
        assert store.fault(STAGE, KEY) == ""
        return
    assert word in store.fault(STAGE, KEY) and entry.exists()
    folder, finished = store.begin(STAGE, KEY)
    assert word in capsys.readouterr().out and not finished and not any(folder.iterdir())
    with pytest.raises(DermError, match=rf"{KEY}/a.json is not in .*: run notebooks/{STAGE}"):
        store.resolve(f"{STAGE}/{KEY}/a.json")
    assert entry.with_name(f"{KEY}.old").is_dir()  # until there is a new one
    store.commit(STAGE, KEY, {})
    assert [path.name for path in entry.parent.iterdir()] == [KEY]


def test_a_recipe_finds_finished_files_and_this_process_own(tmp_path):
    store, ref = Store(tmp_path, [STAGE]), f"{STAGE}/{KEY}/a.json"
    folder, _ = store.begin(STAGE, KEY)
    write_json(folder / "a.json", 1)
    assert store.resolve(ref) == folder / "a.json"
    code = "import sys; from derm_compress.study.store import Store"
    code += f"; Store(sys.argv[1], ['{STAGE}']).resolve(sys.argv[2])"
    asked = [sys.executable, "-c", code, str(tmp_path), ref]
    assert "DermError" in subprocess.run(asked, capture_output=True, text=True).stderr
    store.commit(STAGE, KEY, {})
    assert store.resolve(ref) == tmp_path / STAGE / KEY / "a.json"


def test_a_copy_is_writable_and_follows_no_link(tmp_path):
    (tmp_path / "from" / "inner").mkdir(parents=True)
    (tmp_path / "from" / "inner" / "x").write_text("x")
    (tmp_path / "from" / "leads out").symlink_to("/etc")
    (tmp_path / "from" / "inner").chmod(0o555)
    copy(tmp_path / "from", tmp_path / "to")
    (tmp_path / "to" / "inner" / "y").touch()
    assert sorted(path.name for path in (tmp_path / "to").rglob("*")) == ["inner", "x", "y"]


def test_a_link_is_never_followed(tmp_path):
    """Planted in what is finished or begun, it leads to no file of this machine."""
    (tmp_path / "secret").write_text("s")
    store = finished_store(tmp_path / "store")
    (store.entry(STAGE, KEY) / "deep" / "x").symlink_to(tmp_path / "secret")
    work = store.work(STAGE, KEY)
    work.mkdir()
    (work / "x").symlink_to(tmp_path / "secret")
    for ref in ("deep/x", "x"):
        with pytest.raises(DermError, match="is not in"):
            Store(store.root, [STAGE]).resolve(f"{STAGE}/{KEY}/{ref}")
    folder, _ = store.begin(STAGE, KEY)
    with pytest.raises(DermError, match="is not in"):
        store.resolve(f"{STAGE}/{KEY}/x")
    assert folder == work and not any(work.iterdir())
    assert (tmp_path / "secret").read_text() == "s"


NOWHERE = ["../runs/x", f"../runs/{KEY}/x", f"{STAGE}/../../runs/x", f"{STAGE}/{KEY}.work/a.json"]
NOWHERE += [f"{STAGE}/{KEY}/../{KEY}/a.json", f"/{STAGE}/{KEY}/a.json", f"01_S/{KEY}/a.json"]
NOWHERE += [f"{STAGE}/{KEY[:-1]}/a.json", f"99_made_up/{KEY}/a.json", STAGE, ""]


@pytest.mark.parametrize("ref", NOWHERE)
def test_a_reference_that_names_no_artifact_is_refused_before_any_file_is_touched(tmp_path, ref):
    store = finished_store(tmp_path / "store")
    (tmp_path / "runs" / "x.old").mkdir(parents=True)
    (tmp_path / "runs" / "x").mkdir()
    (tmp_path / "store" / "99_made_up" / KEY).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DermError, match="names no artifact|leads out of its artifact"):
        store.resolve(ref)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_recipe_that_leads_out_of_the_store_is_refused_where_it_is_read():
    recipe = Recipe("pico", "0", 8).then("adapter", ref="../runs/x", sha256="0", kept=[0])
    with pytest.raises(DermError, match=r"\.\./runs/x"):
        Recipe.from_json(recipe.to_json())


def test_killed_at_any_moment_it_goes_on_to_the_same_result(tmp_path):
    assert "done" in worker(tmp_path / "calm", 0).communicate()[0]
    expected = Store(tmp_path / "calm", [STAGE]).manifest(STAGE, KEY)["results"]
    chance, kills = random.Random(0), 0
    store = Store(tmp_path / "wild", [STAGE])
    for tries in range(60):
        process = worker(store.root, 0.002)
        assert process.stdout.readline() == "up\n"
        time.sleep(chance.uniform(0, 0.12 + tries / 100))  # more where a machine is slow
        process.send_signal(signal.SIGKILL)
        kills += "done" not in process.communicate()[0]
        if store.entry(STAGE, KEY).exists():
            break
        assert store.fault(STAGE, KEY) == "absent"
    assert kills >= 2 and store.fault(STAGE, KEY) == ""
    assert store.manifest(STAGE, KEY)["results"] == expected


def test_the_second_of_two_waits_and_computes_nothing(tmp_path):
    first = worker(tmp_path, 0.005)
    assert [first.stdout.readline() for _ in range(2)] == ["up\n", "computing\n"]
    second = worker(tmp_path, 0).communicate()[0].splitlines()
    waits = f"{STAGE}: another process computes the same; waiting for it"
    assert second == ["up", waits, "done"]
    assert first.communicate()[0] == "done\n"


class TestMounted:
    """A second store, below the first, that is never written to."""

    @pytest.fixture
    def stores(self, tmp_path):
        below = Store(tmp_path / "mounted", STAGES)
        work, _ = below.begin("01_a", ONE)
        (work / "x.json").write_text("1")
        below.commit("01_a", ONE, {})
        work, _ = below.begin("02_b", TWO)
        Journal(work / "journal" / "j.jsonl").add("one", 1)
        files.release(below.lock("02_b", TWO))
        return Store(tmp_path / "own", STAGES, [tmp_path / "mounted"]), below

    def test_what_is_finished_is_used_where_it_is(self, stores):
        store, below = stores
        assert store.begin("01_a", ONE) == (below.own("01_a", ONE), True)
        assert store.resolve(f"01_a/{ONE}/x.json").read_text() == "1"
        assert not store.own("01_a", ONE).exists()

    def test_what_is_begun_goes_on_in_a_copy(self, stores, capsys):
        store, below = stores
        before = {p: p.read_bytes() for p in below.root.rglob("*") if p.is_file()}
        store.adopt("02_b", TWO)
        folder, finished = store.begin("02_b", TWO)
        journal = Journal(folder / "journal" / "j.jsonl")
        assert not finished and journal.done == {"one": 1}
        assert "goes on from" in capsys.readouterr().out
        journal.add("two", 2)
        store.commit("02_b", TWO, {})
        assert store.own("02_b", TWO).is_dir()
        assert {p: p.read_bytes() for p in below.root.rglob("*") if p.is_file()} == before

    def test_what_is_damaged_is_named_and_computed_anew(self, stores, capsys):
        store, below = stores
        (below.own("01_a", ONE) / "x.json").write_text("2")
        folder, finished = store.begin("01_a", ONE)
        assert not finished and folder == store.work("01_a", ONE)
        assert "it is not used" in capsys.readouterr().out
        (folder / "x.json").write_text("1")
        store.commit("01_a", ONE, {})
        assert store.complete("01_a", ONE)
        assert (below.own("01_a", ONE) / "x.json").read_text() == "2"

    def test_what_is_adopted_stands_alone(self, stores):
        store, below = stores
        for stage, key in (("01_a", ONE), ("02_b", TWO), ("03_c", "0" * 64)):
            store.adopt(stage, key)
        alone = Store(store.root, STAGES)
        assert alone.complete("01_a", ONE) and not alone.own("03_c", "0" * 64).exists()
        folder, _ = alone.begin("02_b", TWO)
        assert Journal(folder / "journal" / "j.jsonl").done == {"one": 1}

    def test_of_several_the_furthest_is_gone_on_with(self, stores, tmp_path):
        further = Store(tmp_path / "further", STAGES, [tmp_path / "mounted"])
        further.adopt("02_b", TWO)
        work, _ = further.begin("02_b", TWO)
        Journal(work / "journal" / "j.jsonl").add("two", 2)
        for roots in (["mounted", "further"], ["further", "mounted"]):
            below = [tmp_path / root for root in roots]
            store = Store(tmp_path / f"own-{roots[0]}", STAGES, below)
            store.adopt("02_b", TWO)
            folder, _ = store.begin("02_b", TWO)
            assert Journal(folder / "journal" / "j.jsonl").done == {"one": 1, "two": 2}

    def test_it_cannot_be_forced_away(self, stores):
        with pytest.raises(DermError, match="detach"):
            stores[0].discard("01_a", ONE)
