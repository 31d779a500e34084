"""What people, models and servers write: a result or one clear line, whatever it is.

`pytest tests/test_fuzz.py --hypothesis-profile long` tries 2,000 of each kind.
"""

import copy
import io
import json
import unicodedata
from contextlib import redirect_stdout
from functools import partial

import pytest
import yaml
from blotches import plant
from hypothesis import assume, given
from hypothesis import strategies as st
from runs import KNOWN, NOTEBOOKS, ROOT

from derm_compress.data.load import SOURCES, load_source
from derm_compress.data.request import Request
from derm_compress.errors import LONGEST, DermError
from derm_compress.evaluate.judges.client import completion
from derm_compress.evaluate.judges.prompts import judge_prompt
from derm_compress.files import read_json
from derm_compress.method.assemble import materialize
from derm_compress.method.pruning.plan import published_plan, read_plan
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model import anatomy, loading, prompts, shapes
from derm_compress.model.recipe import Recipe
from derm_compress.study import checks, params, run

WORDS = ["", " ", "awq", "tiny", "pico", "no/such", "meta", "cpu", "a=b", "../x", "~", "é\u202e\n"]
WORDS += ["output_similarity", "random-0", "1e-4", "nan", "published", "2", "12.attention"]

numbers = st.integers(-3, 40) | st.sampled_from([2**31, 2**70, 0.5, 1e300, float("nan")])
leaves = st.none() | st.booleans() | numbers | st.sampled_from(WORDS) | st.text(max_size=8)
names = st.sampled_from(["order", "blocks", "steps", "ref", "", "model_type", "step"])
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def answered(attempt, *given):
    """What is made of it, or None after one clear line."""
    try:
        with redirect_stdout(io.StringIO()):
            return attempt(*given)
    except DermError as error:
        line = str(error)
        assert line.strip() and len(line) <= LONGEST, line
        assert not any(unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") for char in line)


def places(value, here=()):
    """The paths of all parts of a JSON value, but its whole."""
    parts = []
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        yield (*here, key)
        yield from places(part, (*here, key))


@st.composite
def changed(draw, value, most=2):
    """A JSON value of which up to `most` parts are others, or gone."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, most))):
        known = list(places(value))
        if not known:
            break
        *way, last = draw(st.sampled_from(known))
        inner = value
        for key in way:
            inner = inner[key]
        if draw(st.integers(0, 3)):
            inner[last] = draw(values)
        else:
            del inner[last]
    return value


def damaged(text):
    """A text as it is, mostly; else cut short, or with something in it."""
    cut = st.integers(0, len(text)).map(lambda at: text[:at])
    put = st.tuples(st.integers(0, len(text)), st.text(max_size=4))
    inserted = put.map(lambda put: text[: put[0]] + put[1] + text[put[0] :])
    return st.integers(0, 5).flatmap(lambda n: {4: cut, 5: inserted}.get(n, st.just(text)))


# csv files

COLUMNS = ["image", "label", "Image ", "LABEL", "patient_id", "lesion", "patient", "isic_id", ""]
CELLS = [*(f"{i:02}.jpg" for i in range(12)), "03", "./04.JPG", "img\\05.jpg", "../06.jpg"]
CELLS += ["melanoma", "rosacea", "Psoriasis", "nevus", "unknown", "P1", "P2", "1", "1.0", "0", ""]
CELLS += ['"', "a,b", "{'eczema': 0.6}", "{", "=1+1", "\x1b[31m", "n/a"]
requests = st.fixed_dictionaries(
    {},
    optional={
        "source": st.sampled_from(SOURCES[1:]),
        "image_column": st.sampled_from(COLUMNS),
        "image_suffix": st.sampled_from(["", ".jpg", "/../x"]),
        "label_column": st.sampled_from(COLUMNS),
        "onehot_columns": st.lists(st.sampled_from(COLUMNS), max_size=2),
        "group_columns": st.lists(st.sampled_from(COLUMNS), max_size=2),
        "subgroup_columns": st.lists(st.sampled_from(COLUMNS), max_size=2),
        "label_map": st.lists(st.sampled_from(["nevus = melanoma", "x", "=", "a = b"]), max_size=2),
        "exclude_labels": st.lists(st.sampled_from(["*", "nevus", "melanoma"]), max_size=2),
        "max_unreadable": st.sampled_from([0.0, 0.5, 1.0]),
        "table": st.sampled_from(["", "x.csv", "labels.csv", "..", "00.jpg", "/etc/passwd"]),
    },
)


@st.composite
def tables(draw):
    """The bytes of a csv of the pictures and their labels, of which a few cells are others."""
    more = draw(st.lists(st.sampled_from(COLUMNS), max_size=2))
    rows = [["image", "label", *more]]
    for i, file in enumerate(CELLS[:12]):
        rows.append([file, ("melanoma", "rosacea")[i % 2], *draw(cells_of(len(more)))])
    for _ in range(draw(st.integers(0, 3))):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, len(row) - 1))] = draw(st.sampled_from(CELLS))
    separator = draw(st.sampled_from([",", ";", "\t", "|"]))
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(map(separator.join, rows))
    coding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    return draw(damaged(text)).encode(coding, "replace")


def cells_of(n):
    return st.lists(st.sampled_from(["P1", "P2", "1", "0", ""]), min_size=n, max_size=n)


@pytest.fixture(scope="module")
def photographs(folder):
    return plant(folder / "photographs", 12)


@given(content=tables(), asked=st.just({}) | requests)
def test_a_csv_is_a_data_set_or_one_line(content, asked, photographs):
    (photographs / "labels.csv").write_bytes(content)
    how = {"source": "folder", "n_train": 4, "n_test": 2, "image_size": 12, **asked}
    made = answered(load_source, Request(data_root=photographs, **how))
    if made:
        assert made[0].of("test") and {"counts", "excluded"} <= set(made[1])
        json.dumps(made[1], allow_nan=False)


# Run files and --set

known_names = st.sampled_from([*KNOWN, "seeds", 3, None, "run ", "sweep"])
likely = st.sampled_from(sorted(KNOWN)).flatmap(
    lambda name: st.tuples(st.just(name), st.just(KNOWN[name].default) | values)
)
settings_of_runs = st.lists(likely, max_size=3).map(dict) | st.dictionaries(known_names, values)


def planned(path):
    """What is checked before a kernel starts, all stages being yet to be computed."""
    for plan in run.plan_runs(path, {}, ROOT, NOTEBOOKS):
        checks.check(plan, NOTEBOOKS)
    return plan


@given(asked=settings_of_runs, data=st.data())
def test_a_run_file_is_a_plan_or_one_line(asked, data, folder):
    path = folder / "x.yaml"
    asked = {"run": "x", "artifact_root": str(folder), **asked}
    text = yaml.safe_dump(asked, allow_unicode=True, sort_keys=False)
    path.write_text(data.draw(damaged(text)), "utf-8", "replace")
    answered(planned, path)


@given(st.lists(st.sampled_from([*KNOWN, *WORDS, "=", " ", ",", "[", "{", "1", ": "])).map("".join))
def test_what_is_set_on_the_command_line_is_a_value_or_one_line(text):
    answered(lambda: params.check_texts(params.assignments([text]), KNOWN, "--set"))


# Plans and recipes

PLANS = [published_plan().to_dict(), {"criterion": "x", "order": [3, "1.mlp"], "protected": []}]
PLANS[1] |= {"blocks": 5, "starts": [], "scores": [1.0, 2]}


@given(told=changed(PLANS[0]) | changed(PLANS[1]) | values, data=st.data())
def test_a_pruning_plan_is_one_or_one_line(told, data, folder):
    path = folder / "plan.json"
    path.write_text(data.draw(damaged(json.dumps(told))), "utf-8", "replace")
    plan = answered(read_plan, str(path))
    for n in range(plan.most + 1 if plan else 0):
        assert len(plan.removed(n)) == n
        assert set(plan.kept(n)) <= set(range(plan.blocks)) and plan.absent(n) is not None


@pytest.fixture(scope="module")
def recipe():
    model, _ = loading.load_base("pico")
    made = Recipe("pico", anatomy.fingerprint(model), len(anatomy.blocks(model)))
    made = made.pruned([0, 1, 2, 4, 5, 6, 7], ["2.mlp"])
    made = made.then("quantize", method="rtn", bits=4, group_size=32)
    return json.loads(made.to_json())


class Nothing:
    """A store that has nothing."""

    def resolve(self, ref):
        raise DermError(f"reference {ref!r}: nothing is stored there")


@given(data=st.data())
def test_a_recipe_is_a_model_or_one_line(data, recipe):
    text = data.draw(damaged(json.dumps(data.draw(changed(recipe)))))
    read = answered(Recipe.from_json, text)
    if read:
        assert answered(Recipe.from_json, read.to_json()) == read
        answered(partial(materialize, quantize=quantize_step), read, Nothing())


# What servers and models bring

MESSAGE = {"content": '{"reason": "r", "score": 3}', "reasoning_content": None}
CHOICE = {"index": 0, "finish_reason": "stop", "message": MESSAGE}
RESPONSE = {"model": "m", "choices": [CHOICE], "usage": {"completion_tokens": 9}}
parts = st.lists(st.sampled_from([{"type": "text", "text": '{"score": 3}'}, "</think>", None]))


@given(told=changed(RESPONSE) | values, content=st.none() | parts | st.text(), data=st.data())
def test_a_judges_response_is_a_score_or_an_error(told, content, data):
    if content is not None:
        told = {"choices": [{"message": {"content": content}}]}
    text = data.draw(damaged(json.dumps(told)))
    reply = completion(text.encode("utf-8", "replace"))
    told = judge_prompt("paper").read(reply, "an answer")
    assert (told.score is None) != (told.error == "") and told.score in (None, 3)
    told.reply.encode("utf-8"), told.error.encode("utf-8")


PIECES = [
    "{% for message in messages %}", "{% endfor %}", "{{ message['role'] }}: ", "<|im_start|>",
    "{% for part in message['content'] %}", "{% if part['type'] == 'text' %}", "{% endif %}",
    "{{ part['text'] }}", "{% else %}", "<image>\n", "{% if add_generation_prompt %}", "ASSISTANT:",
    "{{ eos_token }}", "{{ bos_token }}", "{{ raise_exception('no system role') }}", "\n", "{{",
    "{{ messages[0]['content'][9]['text'] }}", "{{ message.content.__class__.mro() }}", " ",
    "{{ strftime_now('%d %b') }}", "{{ none.x }}", "{% set x = namespace() %}", "{% include 'a' %}",
    "{{ message['content'] | trim }}", "{{ 1 / 0 }}", "{% generation %}", "{{ message | tojson }}",
]  # fmt: skip
TEMPLATE = (loading.TINY / "chat_template.jinja").read_text("utf-8")


def model_folder(folder, name, **files):
    """The tiny model's folder under another name, some of its files as given; weights are links."""
    made = folder / name
    made.mkdir(exist_ok=True)
    for file in loading.TINY.iterdir():
        path = made / file.name
        if file.name in files:
            path.write_text(files[file.name], "utf-8", "replace")
        elif not path.exists():
            path.symlink_to(file)
    return str(made)


def conversed(path):
    """A model that is taken renders what it is asked and taught alike."""
    _, processor = loading.check_model(path)
    turns = [("What is it?", "A rash."), ("And why?", "It itches.")]
    ids, labels = prompts.encode(processor, turns, image_tokens=36)
    assert len(ids) == len(labels) and (labels != prompts.IGNORED).any()
    return prompts.ends(processor)


@given(damaged(TEMPLATE) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_a_chat_template_is_rendered_or_one_line(folder, template):
    assume(template.count("{% for") <= 4)  # loops in loops take all time, as any program can
    answered(conversed, model_folder(folder, "template", **{"chat_template.jinja": template}))


def measured(path):
    loading.check_model(path)
    return shapes.architecture(loading.config_of(path))


@given(told=changed(read_json(loading.TINY / "config.json"), 1), data=st.data())
def test_a_models_config_is_an_architecture_or_one_line(folder, told, data):
    text = data.draw(damaged(json.dumps(told)))
    found = answered(measured, model_folder(folder, "config", **{"config.json": text}))
    assert found is None or found.blocks > 0
