"""The report in headless Chromium, where there is one, at a desk's width and at a phone's."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
PAGES = ["tiny/index.html", "tiny/notebooks/04_pruning.html", "index.html"]
ASKED = """
const all = (query, d) => [...d.querySelectorAll(query)], frames = all("iframe", document);
const look = f => {
  const told = {}, d = f.contentDocument, w = f.contentWindow, root = d.documentElement;
  all("details", d).forEach(e => { e.open = true; });
  told.scroll = root.scrollWidth; told.width = w.innerWidth;
  const asked = w.performance.getEntriesByType("resource").map(r => r.name);
  told.requests = asked.filter(n => !n.startsWith("data:"));
  told.scripts = d.scripts.length; told.hit = Boolean(w.planted || window.planted);
  told.images = all("img", d).map(i => [i.alt, i.naturalWidth]);
  told.captions = all("table", d).map(t => t.caption ? t.caption.textContent : "");
  told.loose = all("table, img, pre", d).filter(e => {
    let box = e;
    while (box && w.getComputedStyle(box).overflowX === "visible") box = box.parentElement;
    const over = e.getBoundingClientRect().right > w.innerWidth + 1;
    return over && (!box || box === root || box === d.body);
  }).map(e => e.outerHTML.slice(0, 80));
  told.text = d.body.innerText.includes("<script>");
  const marked = [".right", ".wrong"].map(query => d.querySelector(query));
  told.looks = marked.map(e => e && w.getComputedStyle(e).textDecorationLine);
  told.small = all("img.figure", d).map(i => i.getBoundingClientRect().width);
  return told;
};
onload = () => setTimeout(() => { o.textContent = JSON.stringify(frames.map(look)); }, 200);
"""


@pytest.fixture(scope="module")
def seen(root, tmp_path_factory):
    """{(page, width): what the browser says of it}."""
    folder, wanted = (
        tmp_path_factory.mktemp("frames"),
        [(page, width) for page in PAGES for width in (1280, 390)],
    )
    frames = "".join(
        f'<iframe src="file://{root}/reports/{page}" style="border:0;height:800px;width:{width}px">'
        "</iframe>"
        for page, width in wanted
    )
    (folder / "frames.html").write_text(f"<body>{frames}<pre id=o></pre><script>{ASKED}</script>")
    local = [
        "--allow-file-access-from-files",
        "--disable-web-security",
        "--virtual-time-budget=5000",
    ]
    command = [
        CHROMIUM,
        *QUIET,
        *local,
        f"--user-data-dir={folder}/profile",
        "--window-size=1400,900",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{folder}/frames.html"], capture_output=True, timeout=300
    )
    found = re.search(r'<pre id="o">(.+?)</pre>', done.stdout.decode(), re.S)
    assert found, done.stderr.decode()[-2000:]
    return dict(zip(wanted, json.loads(html.unescape(found.group(1))), strict=True))


def test_nothing_scrolls_sideways(seen):
    for where, told in seen.items():
        assert told["scroll"] <= told["width"] and told["width"] == where[1], where
        assert not told["loose"], where


def test_no_request_leaves_the_page_and_no_script_runs(seen):
    for where, told in seen.items():
        assert not told["requests"] and not told["scripts"] and not told["hit"], where


def test_what_a_model_said_stays_text(seen):
    assert (
        seen["tiny/index.html", 1280]["text"]
        and seen["tiny/notebooks/04_pruning.html", 390]["text"]
    )


def test_every_picture_is_drawn_and_says_what_it_shows_and_every_table_too(seen):
    told = seen["tiny/index.html", 390]
    assert len(told["images"]) >= 9 and len(told["captions"]) >= 15
    for where, one in seen.items():
        drawn = where[0] != PAGES[1]  # the made-up notebook's picture is none
        assert all(alt and (width or not drawn) for alt, width in one["images"]), where
        assert all(one["captions"]), where


def test_facts_differ_by_more_than_colour_and_figures_stay_readable_on_a_phone(seen):
    assert seen["tiny/index.html", 390]["looks"] == ["underline", "line-through"]
    assert min(seen["tiny/index.html", 390]["small"]) >= 360  # 8 points are 10 pixels then
    assert max(seen["tiny/index.html", 1280]["small"]) == 560


def test_the_policy_stops_a_request_that_a_page_would_make(root, tmp_path):
    """An image from elsewhere in such a page is not fetched, and a script in it does not run."""
    page = (root / "reports/tiny/index.html").read_text()
    planted = "<main><img id=x src='file:///elsewhere.png'><script>document.title='ran'</script>"
    (tmp_path / "page.html").write_text(page.replace("<main>", planted, 1))
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path}/page.html"], capture_output=True, timeout=120
    )
    assert "<title>ran" not in done.stdout.decode() and b"Content Security Policy" in done.stderr
