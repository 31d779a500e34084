"""Every table of the made-up full study, byte by byte as it is kept in golden/.

Where a table is meant to change, `PYTHONPATH=tests python tests/report/test_golden.py` makes the
files anew; read the difference before committing it.
"""

import tempfile
from pathlib import Path

import fabricate
import pytest

from derm_compress.report import tables
from derm_compress.report.results import load_results

GOLDEN = Path(__file__).with_name("golden")


def made_tables():
    """{file name: csv text} of everything that a full study's report has."""
    with tempfile.TemporaryDirectory() as folder:
        files = fabricate.stage_files(full=True)
        results = load_results(fabricate.write_run(Path(folder), files=files, notebooks=False))
    built = tables.build(results)
    return {f"{stem}.csv": tables.to_csv(frame) for stem, frame in built.items()}


@pytest.fixture(scope="module")
def made():
    return made_tables()


def test_the_tables_are_those_that_are_kept(made):
    assert sorted(made) == sorted(path.name for path in GOLDEN.glob("*.csv"))


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.csv")))
def test_a_table_is_byte_by_byte_as_it_was(made, name):
    assert made[name] == (GOLDEN / name).read_text("utf-8")


if __name__ == "__main__":
    for path in GOLDEN.glob("*.csv"):
        path.unlink()
    for name, text in made_tables().items():
        (GOLDEN / name).write_text(text, "utf-8", newline="\n")
