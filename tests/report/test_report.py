"""The report of a fabricated run: complete, self-contained, inert, no trace of this machine."""

import json
import re
import shutil
import socket
import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import fabricate
import pandas as pd
import pytest

from derm_compress.errors import DermError
from derm_compress.evaluate.judges import rubric
from derm_compress.report import comparison, notebook_html, render
from derm_compress.report.parts import PARTS, QUESTION
from derm_compress.report.results import items_hash

ROOT = Path(__file__).parents[2]


def tags(path):
    """All tags of a page, with their attributes."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(path.read_text())
    return found


@pytest.fixture
def home(root):
    return root / "reports" / "tiny"


@pytest.fixture
def undrawn(monkeypatch):
    """A report without figures, which take most of its time."""
    monkeypatch.setattr(render.figures, "draw_all", lambda facts: {})


def pages(home):
    found = [home / "index.html", home.parent / "index.html", *(home / "notebooks").glob("*.html")]
    assert len(found) == 10
    return found


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_holds_its_parts_and_what_scores_rest_on(home):
    files = {path.relative_to(home).as_posix() for path in contents(home)}
    ends = {"figures": ("png", "svg", "csv"), "tables": ("csv", "md")}
    for stem in PARTS.keys() - fabricate.UNASKED:
        assert stem == "extra_seeds" or any(
            {f"{folder}/{stem}.{end}" for end in ends[folder]} <= files for folder in ends
        ), stem
    assert {f"notebooks/{stage}.html" for stage in fabricate.UPSTREAM} <= files
    assert sum(map(len, contents(home).values())) < 6e6
    record = json.loads((home / "run.json").read_text())
    assert record["environment"]["python"] and set(record["stages"]) == set(fabricate.UPSTREAM)
    assert record["stages"]["01_data"]["cached"] is True
    info = record["run_info"]
    assert info["seconds"] == 321.5 and info["rubric_sha256"] == rubric.frozen_hash()
    assert info["test_items_sha256"] == items_hash(fabricate.items())[:16]


def test_the_page_follows_the_papers_order_below_the_answer(home):
    text = (home / "index.html").read_text()
    first = [f'<section id="{name}">' for name in ("answer", "claims", "decisions")]
    first += [f'<section id="{name}">' for name in ("without_each_block", "sure")]
    first += [f'<section id="{name}">' for name in ("references", "appendix")]
    asked = [part for part in PARTS.values() if part.stem not in fabricate.UNASKED]
    shown = [f'<details id="{part.stem}"' for part in asked if not part.first]
    found = [part for part in shown if part in text]
    places = [text.index(part) for part in (QUESTION, *first, *found)]
    assert len(found) == len(shown) - 1 and places == sorted(places)
    assert text.index("0123456789abcdef") > places[-1]  # provenance comes last


class Words(HTMLParser):
    """Words that a reader sees: `main`, before the appendix; `whole`, once all its parts are
    unfolded. Long tables, folded once more within a part, are not counted."""

    def __init__(self, text):
        super().__init__()
        self.depth, self.hidden, self.whole, self.main = 0, 0, 0, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.depth += tag == "details"
        self.depth -= tag == "summary"  # seen while its part is folded
        self.hidden += tag in ("style", "title")

    def handle_endtag(self, tag):
        self.depth -= tag == "details"
        self.depth += tag == "summary"
        self.hidden -= tag in ("style", "title")

    def handle_data(self, data):
        before, appendix, after = data.partition("Appendix: every table")
        self.count(before)
        if appendix:
            self.main = self.whole
        self.count(after)

    def count(self, text):
        if self.depth < 2 and not self.hidden:
            text = re.sub(
                r"\]\([^)]*\)|[|*]|---|(?m:^[-#]+ )", " ", text
            )  # Markdown's links and tables
            self.whole += len(text.split())


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    """The report of a study with every rival, without its figures."""
    root = tmp_path_factory.mktemp("full")
    fabricate.write_run(root, "full", files=fabricate.stage_files(full=True), notebooks=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render.figures, "draw_all", lambda facts: {})
        return render.render("full", root=root)


@pytest.mark.parametrize("name", ["index.html", "README.md"])
def test_a_reader_is_through_in_ten_minutes(full_page, name):
    committed = sorted(ROOT.glob("reports/*/tables/claims.csv"))
    for folder in [full_page.parent, *(path.parents[1] for path in committed)]:
        words = Words((folder / name).read_text("utf-8"))
        assert 600 < words.main <= 1500 and words.whole <= 5000, (folder, words.main, words.whole)


def test_a_full_study_shows_every_part_and_folds_long_tables(full_page):
    text, readme = full_page.read_text(), (full_page.parent / "README.md").read_text()
    for file in full_page.parent.glob("tables/*.csv"):
        part, rows = PARTS[file.stem], len(pd.read_csv(file))
        tag = "section" if part.first else "details"
        section = text.split(f'<{tag} id="{part.stem}">')[1].split(f"<{tag} id=")[0]
        folded = f"<details><summary>All {rows} rows</summary>"
        assert (folded in section) == (rows > part.shown)
        assert part.question in readme or part.stem == "answer"
        assert len(part.look.split()) > 6, "each table says what to look at"
    assert readme.count("<details>") == readme.count("</details>")


def test_no_page_has_scripts_or_reaches_out(home):
    forbidden = {"script", "iframe", "object", "embed", "link", "form", "base", "video", "audio"}
    for path in pages(home):
        text = path.read_text()
        assert "default-src 'none'" in text and "url(" not in text.split("</head>")[0]
        for tag, attributes in tags(path):
            assert tag not in forbidden | {"svg"}, path
            assert not any(name.startswith("on") or name == "srcset" for name in attributes)
            assert attributes.get("src", "data:image/").startswith("data:image/"), (path, tag)
            assert not attributes.get("href", "").lower().startswith(("javascript", "data")), path


def test_what_was_planted_stays_text(home):
    assert "&lt;script&gt;top.planted" in (home / "index.html").read_text()
    for path in (home / "notebooks").glob("*.html"):
        text = path.read_text()
        assert text.count("&lt;script&gt;") >= 3 and "&lt;iframe" in text and "alert(2)" not in text
    for path in [home / "README.md", *(home / "figures").glob("*.svg")]:
        assert "<script" not in path.read_text(), path


def test_every_image_and_table_says_what_it_is(home):
    for path in pages(home):
        found = tags(path)
        assert all(attributes.get("alt") for tag, attributes in found if tag == "img"), path
        names = [tag for tag, _ in found]
        assert all(names[i + 1] == "caption" for i, tag in enumerate(names) if tag == "table"), path
    readme = (home / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert all(link.startswith("https://") or (home / link).exists() for link in links)
    assert readme.count("![") >= 9 and "| blocks removed |" in readme


def test_no_trace_of_this_machine(home, root):
    forbidden = [str(root), str(root.parent), f"{Path.home()}/", f"{tempfile.gettempdir()}/"]
    forbidden += ["/usr/", "/home/"]
    forbidden += [socket.gethostname()] if len(socket.gethostname()) > 4 else []
    for path, content in contents(home.parent).items():
        if path.suffix != ".png":
            text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", content.decode())
            assert not [word for word in forbidden if word in text], path


def test_paths_are_hidden_and_addresses_are_not(tmp_path):
    clean = notebook_html.cleaner(tmp_path)
    assert clean(f'File "{tmp_path}/derm_compress/x.py"') == 'File "./derm_compress/x.py"'
    assert clean("/opt/conda/lib/torch/nn.py") == "…/nn.py"
    assert clean("C:\\Users\\me\\a.py") == "…/a.py"
    same = "see https://doi.org/10.1000/a/b and notebooks/04_pruning.ipynb, 3 / 4, and/or/not"
    assert clean(same) == same
    data = {"image/png": "aa/bb/cc/dd", "text/plain": ["/srv/data/a.png"]}
    assert clean(data) == {"image/png": "aa/bb/cc/dd", "text/plain": ["…/a.png"]}


def test_a_notebook_is_shown_without_setup_its_parameters_folded(home):
    text = (home / "notebooks" / "03_layer_importance.html").read_text()
    assert "<h1>03 A question?</h1>" in text and text.count("<math") == 2
    assert not re.search(r"set\d+aside", text) and "import runpy" not in text
    folded = text.split("<summary>Parameters</summary>")[1].split("</details>")[0]
    assert "seed: int = 0" in folded and "&lt;script&gt;" in folded
    assert "read ./artifacts/x" in text and "derm_compress/x.py" in text and "td {}" not in text


def test_equations_become_mathml_and_code_does_not():
    aside = []
    text = "a $x_1$ b\n$$\\arg\\min_s L$$\n`$HOME` and 5 \\$ and $y$"
    text = notebook_html.set_aside(text, aside)
    assert len(aside) == 3 and all(html.startswith("<math") for html in aside)
    assert 'display="block"' in aside[1] and ">arg<" in aside[1] and "\\arg" not in aside[1]
    assert "`$HOME`" in text and "5 \\$" in text


def test_a_report_is_made_anew_byte_by_byte_or_stays_as_it_was(root, home, monkeypatch):
    before = contents(home)
    render.render("tiny", root=root)
    assert contents(home) == before

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render.figures, "draw_all", lambda facts: {})
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(DermError, match="disk is full while writing .*tiny"):
        render.render("tiny", root=root)
    assert contents(home) == before
    assert {path.name for path in home.parent.iterdir()} == {"tiny", "index.html"}


def git(root, *command):
    return subprocess.run(["git", *command], cwd=root, check=True, capture_output=True, text=True)


def few_variants():
    """What stage 08 leaves, of four models."""
    few = ["original", "pruned-6", "pruned-6+sft", "pruned-6+sft|awq4"]
    left = fabricate.stage_files()["08_evaluation"]
    return {n: f[f.variant.isin(few)] if "variant" in f else f for n, f in left.items()}


def test_a_committed_report_stays_where_only_times_differ(tmp_path, undrawn):
    files = {stage: {} for stage in fabricate.UPSTREAM} | {"08_evaluation": few_variants()}
    home, mine = tmp_path / "reports" / "tiny", tmp_path / "artifacts" / "runs" / "tiny" / "report"

    def rendered(**how):
        fabricate.write_run(tmp_path, files=files, notebooks=False)
        return render.render("tiny", root=tmp_path, **how).parent

    assert rendered(keep=True) == home  # git does not know it
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "reports")
    before, times = contents(home), files["08_evaluation"]["measured/latency"]
    slower = times.assign(decode_ms_per_token=9 * times.decode_ms_per_token)
    files["08_evaluation"]["measured/latency"] = slower
    assert rendered(keep=True) == mine and contents(home) == before
    column = pd.read_csv(mine / "tables" / "table4_efficiency.csv").decode_ms_per_token
    assert column.max() == slower.decode_ms_per_token[slower.batch == 1].max()
    assert rendered() == home  # asked for by name
    answers = files["08_evaluation"]["predictions"]
    one = answers.score.where(answers.index != answers.index[0], 5 - answers.score)
    files["08_evaluation"]["predictions"] = answers.assign(score=one)
    assert rendered(keep=True) == home and git(tmp_path, "diff", "--name-only").stdout


def test_results_are_the_same_where_only_what_was_measured_differs(home, tmp_path):
    how = {"dtype": str, "keep_default_na": False}
    built = {path.stem: pd.read_csv(path, **how) for path in (home / "tables").glob("*.csv")}

    def same_with(stem, column, row):
        changed = {stem: built[stem].copy()}
        changed[stem].loc[row, column] += "1"
        folder = tmp_path / f"{stem}-{column}-{row}"
        folder.mkdir()
        for name, frame in (built | changed).items():
            frame.to_csv(folder / f"{name}.csv", index=False)
        return render.same_results(built, folder)

    faster = built["claims"].claim.str.contains("faster").argmax()
    assert same_with("table2_sft", "seconds", 0) and same_with("table4_efficiency", "prefill_ms", 0)
    assert same_with("claims", "ours", faster)
    for stem, column, row in (
        ("table1_pruning", "vram_gib", 1),
        ("table3_quantization", "relative_error", 0),
        ("claims", "verdict", 0),
        ("claims", "paper", faster),
        ("claims", "ours", faster - 1),
    ):
        assert not same_with(stem, column, row), (stem, column)


@pytest.mark.parametrize("last", [1, 3, 4, 6])
def test_a_run_that_has_not_ended_is_shown_as_far_as_it_is(tmp_path, last, undrawn):
    stages = list(fabricate.UPSTREAM)[:last]
    fabricate.write_run(tmp_path, "part", stages=stages, notebooks=False)
    text = render.render("part", root=tmp_path).read_text()
    assert ("No stage has left" in text) == (last < 4) and stages[-1] in text


def test_a_damaged_note_or_notebook_is_named_with_what_makes_it_anew(tmp_path, undrawn):
    with pytest.raises(DermError, match="run nothing has no finished stage"):
        render.render("nothing", root=tmp_path)
    fabricate.write_run(tmp_path, stages=["01_data", "02_finetune"])
    run = tmp_path / "artifacts" / "runs" / "tiny"
    index = render.render("tiny", root=tmp_path)
    for text in ("{", "[]", '{"run": 1, "checksum": "no"}'):
        (run / "run_info.json").write_text(text)
        assert render.render("tiny", root=tmp_path).exists()
        (index.parent / "run.json").write_text(text)
        assert "run.json is damaged" in render.render_index(tmp_path).read_text()
    for name, advice in (
        ("notebooks/02_finetune.ipynb", "delete it"),
        ("02_finetune.json", "run params/tiny.yaml makes it anew"),
    ):
        whole = (run / name).read_text()
        for text in ("", "{", "[]", '{"cells": 3}', whole[:99]):
            (run / name).write_text(text)
            with pytest.raises(DermError, match=f"{name} .*{advice}"):
                render.render("tiny", root=tmp_path)
        (run / name).write_text(whole)


def test_all_runs_are_compared(root, tmp_path):
    assert "No run has a report yet" in render.render_index(tmp_path).read_text()
    folders = {name: tmp_path / "reports" / name for name in "ab"}
    for folder in folders.values():
        shutil.copytree(root / "reports" / "tiny", folder)
    for stem in ("table4_efficiency", "claims"):
        (folders["b"] / "tables" / f"{stem}.csv").unlink()
    file = folders["b"] / "tables" / "table1_pruning.csv"
    other = pd.read_csv(file)
    other[other.blocks_removed != 4].assign(score=other.score + 1).to_csv(file, index=False)
    text = render.render_index(tmp_path).read_text()
    assert text.count('href="a/index.html"') == 1 == text.count('href="b/index.html"')
    assert text.count("with the same training") == 2 and "Prune + SFT + Quant" in text
    assert len(re.findall(r"<h2>Table [1-5]", text)) == 5
    first = comparison.beside(folders, "table1_pruning", ["fraction_removed"], "score")
    assert first.loc[2, "a"].startswith("69.4 (") and first.loc[2, "b"] == ""
    assert first.loc[1, "b"].startswith("78.3 (")
    assert first.iloc[:, 0].tolist()[:3] == ["0", "0.0625", "0.125"]
    claims = re.findall(r": (\d+)", comparison.counts(folders["a"]))
    assert sum(map(int, claims)) == 14 and comparison.counts(folders["b"]) == ""
