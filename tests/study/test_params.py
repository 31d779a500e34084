"""Parameter cells as schema, and every way a parameter can be wrong."""

import json

import pytest
import toy
from runs import KNOWN, planned

from derm_compress.errors import DermError
from derm_compress.study import params

CELL = """\
run: str = "default"  # name of the run
rate: float = 1.0e-3  # learning rate [1e-6..1]
blocks: int = 6  # removed blocks [0..32]
depths: list = [2, 4]  # depths of the table [0..32]
model: str = "tiny"  # which model [tiny|pico]
free: list = []  # anything
steps: int = 100  # steps [1..]
shuffle: bool = False
"""


@pytest.fixture
def schema():
    return params.read_schema(CELL, "cell")


def test_the_cell_is_the_schema(schema):
    assert list(schema) == ["run", "rate", "blocks", "depths", "model", "free", "steps", "shuffle"]
    assert (schema["rate"].low, schema["rate"].high) == (1e-6, 1.0)
    assert schema["model"].choices == ("tiny", "pico") and schema["depths"].element == "int"
    assert (schema["steps"].low, schema["steps"].high) == (1, None)


@pytest.mark.parametrize(
    "line",
    [
        "x = 1",
        "x: int = 1 + y",
        "x: dict = {}",
        "x: list = [{}]",
        "x: list[int] = [1]",
        "print(1)",
        "x: int",
        "a.b: int = 1",
    ],
)
def test_other_lines_in_the_cell_are_refused(line):
    with pytest.raises(DermError, match="cell: write `name: type = value"):
        params.read_schema(line, "cell")


def test_a_name_stands_once_in_the_cell():
    with pytest.raises(DermError, match="cell: x is given twice"):
        params.read_schema("x: int = 1\nx: int = 2", "cell")


@pytest.mark.parametrize(
    "line", ['x: int = "a"', "x: int = 9  # [1..5]", 'x: str = "c"  # [a|b]', "x: bool = 1"]
)
def test_a_default_obeys_its_own_rule(line):
    with pytest.raises(DermError, match="cell, default: x is"):
        params.read_schema(line, "cell")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate: 1e-4", ["rate is '1e-4'", "1.0e-4", "float 1e-06..1"]),
        ("rate: 2", ["rate is 2;", "1e-06..1"]),
        ("rate: .nan", ["rate is nan"]),
        ("blocks: 6.0", ["blocks is 6.0", "int 0..32"]),
        ("blocks: true", ["blocks is True"]),
        ("blocks: -1", ["blocks is -1"]),
        ("depths: four", ["depths is 'four'", "list of int 0..32"]),
        ("depths: [2, 40]", ["depths is 40"]),
        ("depths: [2, '4']", ["depths is '4'"]),
        ("model: Tiny", ["model is 'Tiny'", "str out of tiny, pico"]),
        ("shuffle: 1", ["shuffle is 1", "bool"]),
        ("free: [{a: 1}]", ["free is {'a': 1}"]),
        ("dephts: [2]", ["dephts is no parameter", "nearest: depths"]),
        ("zzz: 1", ["zzz is no parameter", "known: run, rate, blocks"]),
        ("on: 1", ["True is no parameter"]),
        ("run: ../x", ["run is '../x'"]),
        ("run: [x", ["cannot be read as YAML"]),
        ("- run", ["expected lines of"]),
        ("blocks: 1\nrate: 1.0\nblocks: 2", ["blocks is given twice"]),
        ("? [run]\n: x", ["cannot be read as YAML"]),
        ("[" * 3000, ["cannot be read as YAML"]),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, schema, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(DermError) as caught:
        params.read_params(path, schema)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_right_values_take_their_type(tmp_path, schema):
    path = tmp_path / "x.yaml"
    path.write_text("depths: 4\nfree: a, b\n")  # a bare value is a list of one
    assert params.read_params(path, schema) == {"depths": [4], "free": ["a, b"]}
    path.write_text("rate: 1\nfree: [a, 1, 2.5]\ndepths: []\n")
    values = params.read_params(path, schema)
    assert (
        values == {"rate": 1.0, "free": ["a", 1, 2.5], "depths": []}
        and type(values["rate"]) is float
    )


RANKINGS = ["angular-contiguous-iterative", "magnitude-text", "random", "random-²", "taylr", "-3"]


@pytest.mark.parametrize("value", RANKINGS)
def test_a_rule_of_the_package_is_asked_before_anything_runs(value):
    line = 'rank: list = ["last"]  # how [method.importance.rankings.rankings]'
    parameter = params.read_schema(line, "cell")["rank"]
    right = ["taylor-text", "random-3", "published"]
    assert parameter.check(right, "here") == right
    with pytest.raises(DermError, match=f"here: rank: ranking '{value}'"):
        parameter.check(["last", value], "here")


def test_a_rule_that_names_its_parameter_names_it_once():
    line = "label_map: list = []  # how [data.labels.read_map]"
    parameter = params.read_schema(line, "cell")["label_map"]
    assert parameter.check("x = melanoma", "here") == ["x = melanoma"]
    with pytest.raises(DermError, match="^here: label_map: write `spelling = disease`"):
        parameter.check("x", "here")


def test_the_studys_defaults_obey_their_rules():
    ruled = [parameter for parameter in KNOWN.values() if parameter.rule]
    assert len(ruled) >= 3
    for parameter in ruled:
        parameter.ask_rule(parameter.default, "default")


def test_a_missing_file_lists_its_neighbours(tmp_path, schema):
    (tmp_path / "tiny.yaml").write_text("run: tiny")
    with pytest.raises(DermError, match=r"no parameter file .*tyni.yaml; its folder has tiny.yaml"):
        params.read_params(tmp_path / "tyni.yaml", schema)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rate", "1e-4", 1e-4),
        ("rate", "x", "x"),
        ("blocks", "9", 9),
        ("blocks", "[", "["),
        ("depths", "2,4", [2, 4]),
        ("depths", "[2, 4]", [2, 4]),
        ("depths", "", []),
        ("model", "007", "007"),
        ("shuffle", "true", True),
    ],
)
def test_values_from_the_command_line(schema, name, text, value):
    assert schema[name].from_text(text) == value


def test_notebooks_share_a_parameter_only_if_it_is_the_same(tmp_path):
    root = toy.project(tmp_path)
    notebooks = params.read_notebooks(root)
    assert list(notebooks) == ["01_data", "02_left", "03_right"]
    assert params.graph(notebooks) == {
        "01_data": (),
        "02_left": ("01_data",),
        "03_right": ("01_data",),
    }
    toy.edit(root / "notebooks" / "02_left.ipynb", "[0..1000]", "[0..99]")
    with pytest.raises(DermError, match="01_data and 02_left declare seed with another"):
        params.read_notebooks(root)


@pytest.mark.parametrize("damage", ["magic", "untagged", "no json"])
def test_what_is_no_stage_is_named(tmp_path, damage):
    root = toy.project(tmp_path)
    book = root / "notebooks" / "02_left.ipynb"
    content = json.loads(book.read_text())
    content["cells"][3]["source"] = ["%matplotlib inline"] if damage == "magic" else ["x = 1"]
    content["cells"][1]["metadata"]["tags"] = [] if damage == "untagged" else ["parameters"]
    book.write_text(json.dumps(content)[: 50 if damage == "no json" else None])
    with pytest.raises(
        DermError, match=r"notebooks/02_left.ipynb is not a notebook of plain Python"
    ):
        params.read_notebooks(root)


def test_an_optional_stage_is_left_out_until_it_is_asked_for():
    off, on = (planned(budget_gib=budgets) for budgets in ([], [3.4]))
    assert set(on.notebooks) - set(off.notebooks) == {"09_allocation"}
    assert off.keys == {stage: on.keys[stage] for stage in off.keys}
    assert str(params.left_out("09_allocation")).endswith("set budget_gib, as --set budget_gib=3.4")
