"""Files under kills, full disks, damage and in places that take none."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.files import (
    Journal,
    atomic,
    read_frame,
    read_note,
    write_frame,
    write_json,
    write_note,
)


def test_nothing_remains_of_a_write_that_fails(tmp_path):
    with pytest.raises(ValueError), atomic(tmp_path / "x") as part:
        part.mkdir()
        (part / "half").write_text("half")
        raise ValueError
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", float("nan"))
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    target, journal = tmp_path / "answers.parquet", tmp_path / "journal.jsonl"
    (tmp_path / f".part-{platform.node()}-{os.getpid()}-answers.parquet").symlink_to("/dev/full")
    said = "the disk is full while writing .*answers.parquet: free some space"
    with pytest.raises(DermError, match=said):
        write_frame(target, pd.DataFrame({"x": range(10000)}))
    with pytest.raises(DermError, match="the disk is full"), atomic(target):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # safetensors' words
    assert not any(tmp_path.iterdir())
    journal.symlink_to("/dev/full")
    kept = Journal()
    kept.path = journal
    with pytest.raises(DermError, match="the disk is full"):
        kept.add("1", 1)
    assert kept.done == {}


def test_a_place_that_takes_no_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for write in (
        lambda: write_json(tmp_path / "file" / "deep" / "x.json", 1),
        lambda: write_json(tmp_path / "folder", 1),
        lambda: write_json(tmp_path / ("x" * 300), 1),
        lambda: files.hold(tmp_path / "file" / "lock"),
        lambda: Journal(tmp_path / "file" / "x.jsonl").add("1", 1),
    ):
        with pytest.raises(DermError, match="cannot write .*: (not|is|file|no) ") as caught:
            write()
        assert "\n" not in str(caught.value)
    with pytest.raises(IsADirectoryError), atomic(tmp_path / "x"):
        Path("/etc").read_text()  # what is read elsewhere is another matter
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_frames_and_json_come_back_as_they_were(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": [0.5, float("nan")]}, index=[5, 6])
    write_frame(tmp_path / "f.parquet", frame)
    pd.testing.assert_frame_equal(read_frame(tmp_path / "f.parquet"), frame.reset_index(drop=True))
    series = pd.Series([1, 2])
    write_json(tmp_path / "j.json", {"b": series.to_numpy(), "a": series.iloc[0]})
    assert (tmp_path / "j.json").read_text() == json.dumps({"a": 1, "b": [1, 2]}, indent=1) + "\n"


# Notes and journals


def test_a_note_with_any_changed_byte_is_named_once_and_empty(tmp_path, capsys):
    path, note = tmp_path / "note.json", {"key": "a1", "seconds": 1.5, "cached": None}
    write_note(path, note)
    assert read_note(path) == note and read_note(tmp_path / "none.json") == {}
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        told = read_note(path)
        assert not told or told.items() >= note.items()  # its checksum's own name may be hit
        path.write_bytes(whole[:place])
        assert read_note(path) in ({}, note), place
    told = capsys.readouterr().out
    assert told.count("damaged: ") == 1 and "note.json: it is not used, and made anew" in told
    path.write_text(json.dumps(note))  # as before there were checksums
    assert read_note(path) == note
    for other in ("[]", "null", '"text"', "{"):
        path.write_text(other)
        assert read_note(path) == {}


def test_a_note_is_whole_whatever_its_keys_are(tmp_path):
    write_note(tmp_path / "n.json", {"bits": {4: (1, 2)}, 7: pd.Series([0.5]).to_numpy()})
    assert read_note(tmp_path / "n.json") == {"bits": {"4": [1, 2]}, "7": [0.5]}


def rows(count):
    return {str(i): {"text": "é\n" * i, "score": i / 8} for i in range(count)}


@pytest.fixture
def journal(tmp_path):
    """A journal of four rows, by its path."""
    kept = Journal(tmp_path / "j.jsonl")
    for key, row in rows(4).items():
        kept.add(key, row)
    return tmp_path / "j.jsonl"


def test_a_journal_cut_anywhere_is_a_prefix_and_goes_on(journal, capsys):
    whole = journal.read_bytes()
    for length in range(len(whole) + 1):
        journal.write_bytes(whole[:length])
        done = Journal(journal).done
        assert done == rows(whole[:length].count(b"\n"))
        Journal(journal).add("next", 1)
        assert Journal(journal).done == done | {"next": 1}
    assert capsys.readouterr().out == ""  # a kill is no damage


def test_a_journal_loses_a_damaged_line_alone_and_says_so(journal, capsys):
    whole = journal.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    for place in range(0, ends[2]):
        journal.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        line = whole[:place].count(b"\n")
        lost = {str(line), str(line + 1)} if place in ends else {str(line)}  # two became one
        done = Journal(journal).done
        assert done == {key: row for key, row in rows(4).items() if key not in lost}, place
        assert f"j.jsonl, line {line + 1}: it is made anew" in capsys.readouterr().out
        assert Journal(journal).done == done and not capsys.readouterr().out  # it was mended
    journal.write_bytes(whole[: ends[0] + 1] + bytes(40) + b"\n")  # what a power cut can leave
    assert Journal(journal).done == rows(1)


def test_a_journal_from_before_there_were_checksums_is_read(tmp_path):
    (tmp_path / "j.jsonl").write_text('["1", {"a": 1}]\n["2", null]\n')
    assert Journal(tmp_path / "j.jsonl").done == {"1": {"a": 1}, "2": None}


def test_a_lock_can_be_refused_and_is_given_back_by_a_kill(tmp_path):
    lock = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from derm_compress.files import hold"
    code += "; print(hold(Path(sys.argv[1])), flush=True); input()"
    asked = [sys.executable, "-c", code, str(lock)]
    first = subprocess.Popen(asked, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "True\n"
    assert not files.hold(lock) and not files.held(lock)
    first.kill()
    first.communicate()
    assert files.hold(lock) and files.hold(lock) and files.held(lock)
    files.release(lock)
    assert not files.held(lock)
