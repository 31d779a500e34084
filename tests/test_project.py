"""The project's own files: formatting, pins, imports, what may not be committed."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from derm_compress.study import keys

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "derm_compress"


def run(*words):
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)


def test_ruff_has_nothing_to_say():
    for words in (("check", "."), ("format", "--check", ".")):
        done = run("ruff", *words)
        assert done.returncode == 0, done.stdout[-2000:]


def test_notebooks_are_stripped():
    paths = [str(p) for p in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert len(paths) == 9
    done = run("nbstripout", "--verify", "--keep-id", *paths)
    assert done.returncode == 0, done.stdout


def test_all_roads_install_the_same_pinned_set():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dependencies = project["tool"]["setuptools"]["dynamic"]["dependencies"]
    assert dependencies == {"file": ["requirements.txt"]}
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert wanted and all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .*)?", line) for line in wanted)
    assert any(line.startswith("autoawq") and 'sys_platform == "linux"' in line for line in wanted)


LIGHT = ["model/memory.py", "model/shapes.py", "model/usage.py", "evaluate/cards.py"]
LIGHT += ["evaluate/secondary.py", "evaluate/judges/controls.py"]


def test_what_reads_plans_and_renders_imports_no_torch_nor_a_judges_client(tmp_path):
    paths = [PACKAGE / name for name in LIGHT]
    for folder in ("data", "report", "study", "kaggle"):
        paths += (PACKAGE / folder).rglob("*.py")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    assert len(names) > 60
    code = f"import sys, {', '.join(names)}\n"
    code += "from derm_compress.__main__ import main\nmain(['compare'])\n"
    code += "print({'torch', 'openai', 'httpx2'} & {*sys.modules})"
    for run in ("one", "two"):
        shutil.copytree(ROOT / "reports/tiny/tables", tmp_path / "reports" / run / "tables")
        shutil.copy(ROOT / "reports/tiny/run.json", tmp_path / "reports" / run)
    env = os.environ | {"DERM_COMPRESS_ROOT": str(tmp_path)}
    how = {"cwd": ROOT, "env": env, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **how)
    index = tmp_path / "reports/index.html"
    assert done.stdout == f"{index}\nset()\n", done.stdout + done.stderr
    assert "Which signs hold" in index.read_text("utf-8")


ORDER = ("data", "model", "method", "evaluate", "report", "study", "kaggle")  # needs those before
BELOW = {"errors", "faces", "files", "progress"}


def module_graph() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, anywhere in its code."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            nodes = [*ast.walk(ast.parse(path.read_text("utf-8")))]
            assert not any(isinstance(n, ast.ImportFrom) and n.level for n in nodes), name
            graph[name] = keys.imported(nodes, PACKAGE) - {name}
    return graph


def test_imports_point_one_way_and_there_is_no_circle():
    graph = module_graph()
    assert len(graph) > 60 and sum(map(len, graph.values())) > 200
    for name, imports in graph.items():
        folder = name.partition(".")[0]
        assert folder in ORDER or folder in BELOW, name
        for other in {one.partition(".")[0] for one in imports}:
            if folder in BELOW:
                assert other in BELOW, f"{name} imports from {other}"
            elif other not in BELOW:
                assert ORDER.index(other) <= ORDER.index(folder), f"{name} imports from {other}"
    assert [*TopologicalSorter(graph).static_order()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_nothing_is_committed_that_may_not_be():
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    reports = {f.split("/")[1] for f in files if f.startswith("reports/")}
    assert reports <= {"tiny", "small", "gpu-rehearsal", "tiny-and-small.html"}
    unwanted = (".jpg", ".jpeg", ".pt", ".bin", ".pkl", ".pth")
    assert not [f for f in files if f.lower().endswith(unwanted)]
    for path in [ROOT / name for name in files if (ROOT / name).is_file()]:
        text = path.read_bytes().decode("utf-8", "ignore")
        assert not re.search(r"(?<![\w.])/(root|work|home)/\w", text), path


def traces(text: str) -> list[str]:
    """Absolute paths of a machine, and this one's name; pictures and addresses aside."""
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    tops = "root|work|home|tmp|Users|usr|opt|var|mnt|kaggle"
    found = re.findall(rf"(?<![\w.~:<…/-])/(?:{tops})/[\w.]+", text)
    host = socket.gethostname()
    if len(host) > 4 and host != "localhost":
        found += re.findall(rf"\b{re.escape(host)}\b", text)
    return found


def test_committed_reports_have_no_trace_of_a_machine():
    for name in ("tiny", "small", "gpu-rehearsal"):
        for path in (ROOT / "reports" / name).rglob("*"):
            if path.suffix in {".html", ".md", ".json", ".csv", ".svg"}:
                assert not traces(path.read_text("utf-8")), path
    for planted in ("/tmp/x", "at /Users/me", "'/opt/conda'"):
        assert traces(planted), planted
    assert not traces("https://a.org/tmp/x data:image/png;base64,a+/tmp/x= ./tmp/x")


@pytest.mark.parametrize("run", ["tiny", "small"])
def test_the_committed_reports_are_small(run):
    size = sum(p.stat().st_size for p in (ROOT / "reports" / run).rglob("*") if p.is_file())
    assert 0 < size < 6e6


@pytest.mark.parametrize("model, most, seen", [("tiny", 12e6, 0.6), ("small", 6e6, 0.9)])
def test_the_packaged_weights_are_small_and_documented(model, most, seen):
    folder = ROOT / f"derm_compress/model/{model}_llava"
    assert sum(p.stat().st_size for p in folder.iterdir()) < most
    told = yaml.safe_load((folder / "recipe.json").read_text())
    (script,) = re.findall(r"tools[./](\w+)", told["command"])
    assert (ROOT / f"tools/{script}.py").is_file() and script == f"{model}_llava"
    assert min(told["tower_accuracy"].values()) > seen


def test_what_the_readme_quotes_is_what_the_reports_say():
    reports = "".join(p.read_text("utf-8") for p in sorted((ROOT / "reports").glob("*/README.md")))
    readme = (ROOT / "README.md").read_text("utf-8")
    quotes = [line for line in readme.splitlines() if line.startswith("> ")]
    quoted = [line.removeprefix("> ").strip("*") for line in quotes]
    assert not [quote for quote in quoted if quote not in reports]
    for run in ("tiny", "small"):
        report = (ROOT / "reports" / run / "README.md").read_text("utf-8")
        (headline,) = re.findall(r"^\*\*(.+)\*\*$", report, re.M)[:1]
        assert headline in quoted


def test_python_without_docstrings_has_the_same_keys():
    code = "from derm_compress.study.plan import find_plan; print(find_plan('tiny').keys)"
    asked = [[sys.executable, *flag, "-c", code] for flag in ([], ["-OO"])]
    plain, bare = (subprocess.check_output(words, cwd=ROOT, text=True) for words in asked)
    assert plain == bare


def dense(tree: ast.AST) -> list[str]:
    """What hides several thoughts in one expression, by its line."""
    found = []
    for node in ast.walk(tree):
        inner = [*ast.walk(node)][1:]
        if isinstance(node, ast.IfExp) and any(isinstance(one, ast.IfExp) for one in inner):
            found.append(f"line {node.lineno}: a ternary in a ternary")
        if isinstance(node, ast.Lambda) and (node.args.defaults or node.args.kw_defaults):
            found.append(f"line {node.lineno}: a lambda with captured defaults")
        product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
        sides = (node.left, node.right) if product else ()
        if any(isinstance(side, ast.Compare) for side in sides):
            found.append(f"line {node.lineno}: something times a bool")
    return found


def test_code_is_not_dense():
    for text in ("a if b else c if d else e", "lambda x=y: x", "'s' * (n > 1)"):
        assert len(dense(ast.parse(text))) == 1, text
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")):
        assert not dense(ast.parse(path.read_text("utf-8"))), path
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert not dense(ast.parse("\n".join(code))), path
