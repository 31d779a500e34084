"""Made-up finished runs, and the report of one whose models say what would harm a page."""

import fabricate
import pytest

from derm_compress.report import render


@pytest.fixture(scope="session")
def results():
    return fabricate.finished()


@pytest.fixture(scope="session")
def full():
    """With all rivals."""
    return fabricate.finished(full=True)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A project with a rendered report."""
    root = tmp_path_factory.mktemp("a project with spaces")
    said = f"It is psoriasis or melanoma. {fabricate.EVIL}"
    fabricate.write_run(root, files=fabricate.stage_files(words=said))
    render.render("tiny", root=root)
    render.render_index(root)
    return root
