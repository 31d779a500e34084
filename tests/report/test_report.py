"""The whole report of a fabricated run: complete, self-contained, inert, without a trace of this machine."""

import base64
import json
import re
import shutil
import socket
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import fabricate
import pandas as pd
import pytest

from derm_compress.errors import DermError
from derm_compress.evaluate.judges import rubric
from derm_compress.report import comparison, notebook_html, parts, render, tables
from derm_compress.report import figures as figures_
from derm_compress.study import run

PRUNING = comparison.KEYS["table1_pruning"][1:]


class Page(HTMLParser):
    """All tags of a page, with their attributes; the text of captions."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("a project with spaces")
    fabricate.write_run(root, files=fabricate.stage_files(words=fabricate.EVIL))
    render.render("tiny", root=root)
    render.render_index(root)
    return root


@pytest.fixture(scope="module")
def home(root):
    return root / "reports" / "tiny"


def pages(home):
    found = [
        home / "index.html",
        home.parent / "index.html",
        *sorted((home / "notebooks").glob("*.html")),
    ]
    assert len(found) == 10
    return found


def test_everything_is_there_and_small(home):
    stems = {"table1_pruning", "table2_sft", "table3_quantization", "table4_efficiency", "table5_ablation",
             "extra_criteria", "extra_criteria_tests", "extra_cliffs", "extra_agreement", "extra_calibration_size",
             "extra_measured", "extra_baselines", "extra_judges", "extra_verdicts", "extra_side_by_side",
             "extra_contradictions", "extra_planner", "extra_latency", "extra_quantization_tests", "extra_equal_bytes",
             "extra_errors", "extra_comparisons", "extra_power", "extra_diagnosis", "extra_secondary"}  # fmt: skip
    assert {path.name for path in (home / "tables").iterdir()} == {
        f"{s}.{end}" for s in stems for end in ("csv", "md")
    }
    figures = {path.name for path in (home / "figures").iterdir()}
    assert {
        f"{stem}.{end}" for stem in parts.PARTS if stem[:3] == "fig" for end in ("png", "svg")
    } <= figures
    assert {path.stem for path in (home / "notebooks").iterdir()} == set(fabricate.UPSTREAM)
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 6e6
    record = json.loads((home / "run.json").read_text())
    assert record["run_info"]["seconds"] == 321.5 and record["environment"]["python"]
    assert record["run_info"]["rubric_sha256"] == rubric.frozen_hash()
    assert record["run_info"]["test_items_sha256"] == tables.items_hash(fabricate.items())[:16]
    assert record["run_info"]["test_items_sha256"] in (home / "index.html").read_text()
    assert record["stages"]["01_data"]["cached"] is True and set(record["stages"]) == set(
        fabricate.UPSTREAM
    )


FULL_ALONE = ("extra_sublayers", "extra_seeds")


def test_the_page_follows_the_papers_order_below_the_answer(home):
    text = (home / "index.html").read_text()
    places = [
        text.index(f'<section id="{stem}">') for stem in parts.PARTS if stem not in FULL_ALONE
    ]
    assert places == sorted(places) and '<section id="extra_sublayers">' not in text
    assert (
        text.index(parts.QUESTION)
        < text.index("quantization alone")
        < text.index("<img")
        < text.index("<table>")
    )
    assert text.index("<table>") < places[0] and text.index("0123456789abcdef") > places[-1]


def test_a_full_study_shows_every_part_and_folds_long_tables(tmp_path, home):
    fabricate.write_run(tmp_path, "full", files=fabricate.stage_files(full=True), notebooks=False)
    page = render.render("full", root=tmp_path)
    text, readme = page.read_text(), (page.parent / "README.md").read_text()
    places = [text.index(f'<section id="{stem}">') for stem in parts.PARTS]
    assert places == sorted(places)
    for stem in ("extra_agreement", "extra_criteria"):
        rows = len((page.parent / "tables" / f"{stem}.csv").read_text().splitlines()) - 1
        section = text.split(f'<section id="{stem}">')[1].split("</section>")[0]
        assert (
            rows > parts.LONG_TABLE
            and f"<details><summary>All {rows} rows</summary><div" in section
        ), stem
        assert f"<details><summary>All {rows} rows</summary>\n\n" in readme and "<img" in section
    assert "<details>" not in text.split('<section id="table1_pruning">')[1].split("</section>")[0]
    small = (home / "index.html").read_text()
    first, known = (
        len(t.split("<section")[0]) - len(t.split("base64,")[1].split('"')[0])
        for t in (text, small)
    )
    assert abs(first - known) < 200  # the first screen does not grow with the rankings
    assert (
        readme.count("<details>")
        == readme.count("</details>")
        == text.count("<details><summary>All") - 1
    )


def test_no_page_has_scripts_or_reaches_out(home):
    for path in pages(home):
        page = Page(path.read_text())
        names = {tag for tag, _ in page.tags}
        assert not names & {
            "script",
            "iframe",
            "object",
            "embed",
            "link",
            "form",
            "base",
            "video",
            "audio",
            "svg",
        }, path
        for tag, attributes in page.tags:
            assert not any(name.startswith("on") or name == "srcset" for name in attributes), (
                path,
                tag,
                attributes,
            )
            assert attributes.get("src", "data:image/").startswith("data:image/"), (path, tag)
            assert not attributes.get("href", "").lower().startswith(("javascript", "data")), path
        assert (
            "default-src 'none'" in path.read_text()
            and "url(" not in path.read_text().split("</head>")[0]
        )


def test_what_was_planted_stays_text(home):
    assert "&lt;script&gt;alert" in (home / "index.html").read_text()
    for path in pages(home)[2:]:
        text = path.read_text()
        assert text.count("&lt;script&gt;") >= 3 and "&lt;iframe" in text and "alert(2)" not in text
    assert "<script" not in (home / "README.md").read_text()
    for path in (home / "figures").glob("*.svg"):
        assert "<script" not in path.read_text(), path


def test_every_image_and_table_says_what_it_is(home):
    for path in pages(home):
        tags = Page(path.read_text()).tags
        assert all(attributes.get("alt") for tag, attributes in tags if tag == "img"), path
        names = [tag for tag, _ in tags]
        assert all(names[i + 1] == "caption" for i, tag in enumerate(names) if tag == "table"), path
    assert [tag for tag, _ in Page((home / "index.html").read_text()).tags].count("img") >= 9


def test_no_trace_of_this_machine(home, root):
    forbidden = [
        str(root),
        str(root.parent),
        str(Path.home()) + "/",
        tempfile.gettempdir() + "/",
        "/usr/",
        "/home/",
    ]
    forbidden += [socket.gethostname()] if len(socket.gethostname()) > 4 else []
    texts = [
        path
        for path in home.parent.rglob("*")
        if path.suffix in {".html", ".md", ".json", ".csv", ".svg"}
    ]
    assert len(texts) > 40
    for path in texts:
        text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text())
        assert not [word for word in forbidden if word in text], path


def test_paths_are_hidden_and_addresses_are_not(tmp_path):
    clean = notebook_html.cleaner(tmp_path)
    assert clean(f'File "{tmp_path}/derm_compress/x.py"') == 'File "./derm_compress/x.py"'
    assert (
        clean("/opt/conda/lib/torch/nn.py") == "…/nn.py"
        and clean("C:\\Users\\me\\a.py") == "…/a.py"
    )
    same = "see https://doi.org/10.1000/a/b and notebooks/04_pruning.ipynb, 3 / 4, and/or/not"
    assert clean(same) == same
    data = {"image/png": "aa/bb/cc/dd", "text/plain": ["/srv/data/a.png"]}
    assert clean(data) == {"image/png": "aa/bb/cc/dd", "text/plain": ["…/a.png"]}


def test_equations_become_mathml_and_code_does_not():
    formulas = []
    text = notebook_html.set_aside(
        "a $x_1$ b\n$$\\arg\\min_s L$$\n`$HOME` and 5 \\$ and $y$", formulas
    )
    assert (
        len(formulas) == 3
        and all(f.startswith("<math") for f in formulas)
        and 'display="block"' in formulas[1]
    )
    assert (
        "`$HOME`" in text
        and "5 \\$" in text
        and ">arg<" in formulas[1]
        and "\\arg" not in formulas[1]
    )


def test_a_notebook_keeps_its_text_its_equations_and_its_trace(home):
    text = (home / "notebooks" / "03_layer_importance.html").read_text()
    assert (
        "<h1>03 A question?</h1>" in text
        and text.count("<math") == 2
        and "formula0aside" not in text
    )
    assert "read ./artifacts/x" in text and "derm_compress/x.py" in text and "<style>td" not in text


def test_the_readme_shows_tables_and_figures(home):
    text = (home / "README.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (home / link).exists(), link
    assert text.count("![") >= 9 and "| blocks removed |" in text and "quantization alone" in text


def test_a_failed_rendering_leaves_the_report_before(root, home, monkeypatch):
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render, "picture", lambda _: None)
    monkeypatch.setattr(render, "notebook_body", lambda *_: "")
    monkeypatch.setattr(figures_.Drawing, "save", fail)
    with pytest.raises(DermError, match="disk is full while writing .*tiny"):
        render.render("tiny", root=root)
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before
    assert {path.name for path in home.parent.iterdir()} == {"tiny", "index.html"}


def test_rendering_again_gives_the_same_bytes(root, home):
    before = {
        path.relative_to(home): path.read_bytes() for path in home.rglob("*") if path.is_file()
    }
    render.render("tiny", root=root)
    assert {
        path.relative_to(home): path.read_bytes() for path in home.rglob("*") if path.is_file()
    } == before


def test_photographs_are_said_to_be_photographs_below_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "picture", lambda _: None)
    monkeypatch.setattr(figures_.Drawing, "save", lambda *_: None)
    for source in ("synthetic", "pad-ufes-20"):
        files = fabricate.stage_files() | {
            "01_data": {"items": fabricate.items(), "report.json": {}}
        }
        files["01_data"]["report.json"] = fabricate.NOTED | {"source": source}
        fabricate.write_run(tmp_path, source, files=files, stages=["01_data"], notebooks=False)
        page = render.render(source, root=tmp_path)
        text, said = page.read_text(), "1737 photographs, 0 of them test images"
        assert (said in text.split("<section")[0]) == (source != "synthetic")
        assert (said in (page.parent / "README.md").read_text()) == (source != "synthetic")


def test_a_runs_seconds_are_those_of_the_whole_study(tmp_path):
    cached = {"a": False, "b": False}
    plan = SimpleNamespace(folder=tmp_path, notebooks=cached, keys={"a": "1", "b": "2"})
    plan.pointer = lambda stage: {"cached": cached[stage], "seconds": 100}
    assert run.study_seconds(plan, ["a"], 20)["seconds"] == 200  # b was computed by an earlier call
    whole = run.study_seconds(plan, ["a", "b"], 150)
    assert whole["seconds"] == 150 and "wall time" in whole["seconds_are"]
    (tmp_path / "run_info.json").write_text(json.dumps(whole))
    cached["a"] = True  # its notebook was shown anew, its result came from the store
    assert run.study_seconds(plan, ["a", "b"], 20) == whole
    plan.keys["b"] = "3"
    assert "sum" in run.study_seconds(plan, ["b"], 20)["seconds_are"]


@pytest.mark.parametrize("last", [1, 3, 4, 6])
def test_a_run_that_has_not_ended_is_shown_as_far_as_it_is(tmp_path, last, monkeypatch):
    stages = list(fabricate.UPSTREAM)[:last]
    fabricate.write_run(tmp_path, "part", stages=stages, notebooks=False)
    monkeypatch.setattr(figures_.Drawing, "save", lambda *_: None)
    monkeypatch.setattr(figures_.Drawing, "png", lambda _: b"")
    text = render.render("part", root=tmp_path).read_text()
    assert ("No stage has left" in text) == (last < 4) and stages[-1] in text


def test_a_run_without_stages_is_refused_by_name(tmp_path):
    with pytest.raises(DermError, match="run nothing has no finished stage"):
        render.render("nothing", root=tmp_path)


def test_all_runs_are_compared(root, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(root / "reports" / "tiny", tmp_path / "reports" / name)
    for stem in ("table4_efficiency", "extra_verdicts"):
        (tmp_path / "reports" / "b" / "tables" / f"{stem}.csv").unlink()
    other = pd.read_csv(tmp_path / "reports" / "b" / "tables" / "table1_pruning.csv")
    other[other.blocks_removed != 4].assign(score=other.score + 1).to_csv(
        tmp_path / "reports" / "b" / "tables" / "table1_pruning.csv", index=False
    )
    text = render.render_index(tmp_path).read_text()
    assert (
        text.count('href="a/index.html"') == 1 == text.count('href="b/index.html"')
        and "Prune + SFT + Quant" in text
    )
    assert text.count("quantization alone") == 2 and len(re.findall(r"<h2>Table [1-5]", text)) == 5
    first = comparison.beside(
        {n: tmp_path / "reports" / n for n in "ab"}, "table1_pruning", *PRUNING
    )
    assert (
        first.loc[2, "a"].startswith("69.4 (")
        and first.loc[2, "b"] == ""
        and first.loc[1, "b"].startswith("78.3 (")
    )
    assert first.iloc[:, 0].tolist()[:3] == ["0", "0.0625", "0.125"]
    claims = comparison.counts(tmp_path / "reports" / "a").split(" / ")
    assert sum(map(int, claims)) == 17 and comparison.counts(tmp_path / "reports" / "b") == ""


def test_pictures_are_pictures(home):
    data = re.findall(r"base64,([A-Za-z0-9+/=]+)", (home / "index.html").read_text())
    assert len(data) >= 9 and all(base64.b64decode(d).startswith(b"\x89PNG") for d in data)
