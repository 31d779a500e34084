"""The notebooks as text: what each has and what none may have. They run in test_smoke.py."""

import ast
import itertools
import json
import re

import pytest
from runs import NOTEBOOKS, ROOT, read_run

from derm_compress import data, evaluate, method, model, report
from derm_compress.study import params

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAGES = [
    "01_data",
    "02_finetune",
    "03_layer_importance",
    "04_pruning",
    "05_sft",
    "06_activation_analysis",
    "07_quantization",
    "08_evaluation",
    "09_allocation",
]
EIGHT, LAST = STAGES[:-1], STAGES[-1]


def cells(path):
    read = json.loads(path.read_text("utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"]), cell) for cell in read]


def test_the_notebooks_are_there():
    assert [p.stem for p in PATHS] == STAGES


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
class TestEvery:
    def test_opens_with_question_inputs_outputs_and_cost(self, path):
        kind, text, _ = cells(path)[0]
        assert kind == "markdown" and re.match(rf"# {path.stem[:2]} .*\?", text)
        for word in ("**Question.**", "**Inputs.**", "**Outputs.**", "**Cost.**"):
            assert word in text

    def test_has_findings_limits_and_an_end(self, path):
        texts = [text for kind, text, _ in cells(path) if kind == "markdown"]
        assert sum(t.startswith("## Findings") for t in texts) == 1
        assert sum(t.startswith("## Limits") for t in texts) == 1
        assert cells(path)[-1][1] == "stage.finish()"

    def test_is_short_enough_to_be_read(self, path):
        assert len(cells(path)) <= 30

    def test_what_is_not_for_reading_is_folded(self, path):
        folded = [cell["metadata"] for kind, _, cell in cells(path)[1:3]]
        assert [told["tags"] for told in folded] == [["setup"], ["parameters"]]
        assert all(told["jupyter"]["source_hidden"] for told in folded)

    def test_tells_before_it_does(self, path):
        kinds = [kind for kind, _, _ in cells(path)[3:]]
        assert ("code", "code") not in itertools.pairwise(kinds)

    def test_takes_few_names_and_from_the_folders_faces(self, path):
        tree = ast.parse("\n".join(text for kind, text, _ in cells(path) if kind == "code"))
        taken = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        ours = [n for n in taken if n.module.partition(".")[0] == "derm_compress"]
        assert {n.module for n in ours} <= {"derm_compress", "derm_compress.study"}
        assert sum(len(n.names) for n in ours) <= 10

    def test_every_name_that_it_takes_is_offered(self, path):
        tree = ast.parse("\n".join(text for kind, text, _ in cells(path) if kind == "code"))
        folders = {"models": model, "data": data, "method": method}
        folders |= {"evaluate": evaluate, "report": report}
        used = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        taken = [n for n in used if isinstance(n.value, ast.Name) and n.value.id in folders]
        assert taken
        for name in taken:
            assert name.attr in folders[name.value.id].__all__, ast.unparse(name)

    def test_code_cells_are_short(self, path):
        code = [(text, cell) for kind, text, cell in cells(path)[3:] if kind == "code"]
        lengths = sorted(len(text.splitlines()) for text, _ in code)
        assert lengths[-1] <= 25 and lengths[len(lengths) // 2] <= 8
        for text, cell in code:
            for node in ast.walk(ast.parse(text)):
                assert not isinstance(node, ast.ClassDef)
                if isinstance(node, ast.FunctionDef):  # an equation, in a cell that only shows
                    assert node.end_lineno - node.lineno < 12
                    assert "figure" in cell["metadata"]["tags"]

    def test_the_method_is_shown_and_checked_against_the_package(self, path):
        shown = "\n".join(t for _, t, c in cells(path) if "figure" in c["metadata"].get("tags", []))
        assert path.stem == "01_data" or "assert " in shown

    def test_no_result_is_typed_into_its_text(self, path):
        """After the first cell, prose holds no scores; the paper's own stand where it is named."""
        for kind, text, _ in cells(path)[1:]:
            text = re.sub(r"https?://\S+", "", text)
            if kind == "markdown" and "paper" not in text.lower():
                assert not re.search(r"\d+(\.\d+)? ?%|\d+\.\d+", text), text


def test_the_graph_is_what_the_cells_read():
    graph = params.graph(NOTEBOOKS)
    assert list(graph) == STAGES
    assert set(graph[EIGHT[-1]]) == set(EIGHT[:-1])
    assert set(graph[LAST]) == {"01_data", "03_layer_importance", "04_pruning", "05_sft"}
    assert set(graph["06_activation_analysis"]) == {"01_data", "04_pruning", "05_sft"}
    assert "06_activation_analysis" not in graph["07_quantization"]


def test_a_judge_that_cannot_work_is_refused_before_anything_is_answered():
    code = [text for kind, text, _ in cells(PATHS[-2]) if kind == "code"]
    (judge,) = [i for i, text in enumerate(code) if "evaluate.choose_judge(" in text]
    assert "answer_variants" not in "".join(code[:judge])
    assert "answer_variants" in "".join(code[judge + 1 :])


def test_the_judge_has_every_parameter_that_names_it():
    code = "".join(text for kind, text, _ in cells(PATHS[-2]) if kind == "code")
    named = [name for name in NOTEBOOKS[EIGHT[-1]].schema if name.startswith("judge")]
    assert len(named) == 6 and all(f"=stage.p.{name}," in code for name in named[1:])


def test_what_a_judge_leaves_unread_is_asked_again_wherever_it_is_kept():
    code = "\n".join(text for kind, text, _ in cells(PATHS[-2]) if kind == "code")
    steps = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)]
    again = [n for n in steps if "lacking" in {keyword.arg for keyword in n.keywords}]
    assert {n.args[0].value for n in again} == {"judge_controls", "answers", "predictions"}


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_run_file_is_valid_named_by_its_stem_and_says_its_command(path):
    assert read_run(path.stem)["run"] == path.stem
    assert re.search("make report|run params/", path.read_text().splitlines()[0])
