"""Model cards say what a folder is, what it is not for, whose data it saw and how it opens."""

import json
import re

import fabricate
import pytest
import yaml

from derm_compress.evaluate import cards, metrics
from derm_compress.model.recipe import Recipe

BASE = Recipe("tiny", "f" * 64, 32)
PRUNED = BASE.pruned([0, 1, 5, 31])
AWQ = PRUNED.then("quantize", method="awq", bits=4, group_size=64)


def sections(recipe, **how):
    card = cards.model_card(recipe, 4, **how)
    return dict(re.findall(r"^## (.+?)\n\n(.+?)(?=\n\n## |\Z)", card, re.S | re.M))


def test_a_card_has_every_section_and_a_readable_head():
    how = {"layout": "autoawq", "known": cards.Facts("tiny", source="synthetic")}
    card = cards.model_card(AWQ, 4, **how)
    assert yaml.safe_load(card.split("---")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
    }
    assert "4 of 32 decoder blocks" in card
    found = sections(AWQ, **how)
    assert list(found) == [
        "How it was made",
        "Intended use",
        "Not a medical device",
        "Limits",
        "Data and licences",
        "How to load",
    ]
    made = found["How it was made"]
    assert "[0, 1, 5, 31]" in made and "awq, 4 bits in groups of 64" in made
    assert "no photographs" in found["Data and licences"]


@pytest.mark.parametrize(
    "recipe, layout, opened",
    [
        (AWQ, "own", "checkpoint.load"),
        (AWQ, "", "AutoProcessor.from_pretrained"),
        (PRUNED, "", "AutoProcessor.from_pretrained"),
        (BASE.pruned([0, 1], ["0.attention"]), "", "loading.load_base"),
    ],
)
def test_a_card_opens_its_folder_with_code_that_parses(recipe, layout, opened):
    code = sections(recipe, layout=layout)["How to load"]
    lines = re.search(r"```python\n(.+?)```", code, re.S).group(1)
    compile(lines, "card", "exec")
    assert opened in lines and "processor" in lines


@pytest.mark.parametrize(
    "layout, words",
    [
        ("autoawq", "vLLM and other readers of AWQ take it, which was not"),
        ("autoawq", "(a T4) has no int4 kernel"),
        ("own", "own layout"),
        ("bitsandbytes", "AVX512-BF16"),
    ],
)
def test_a_packed_card_says_who_else_reads_it_and_what_is_slow(layout, words):
    assert words in sections(AWQ, layout=layout)["How to load"]
    assert words not in sections(AWQ)["How to load"]


def test_a_models_marks_are_no_rubrics():
    said = sections(BASE, known=cards.Facts("tiny", judge="qwen (paper)"))["Limits"]
    assert "marks of a judging model, qwen (paper)" in said and "counts stated facts" not in said
    assert "counts stated facts" in sections(BASE)["Limits"]


@pytest.mark.parametrize(
    "source, words", [("pad-ufes-20", "CC BY 4.0"), ("dermnet", "non-commercial"), ("", "see the")]
)
def test_a_card_names_the_data_and_the_bases_licence(source, words):
    base = Recipe("/data/models/llava-1.5-7b-hf", "f" * 64, 32)
    card = cards.model_card(base, 32, known=cards.Facts(source=source))
    assert words in card and "license: llama2" in card and "/data" not in card
    assert "license: other" in cards.model_card(Recipe("somebody/else", "f" * 64, 32), 32)


def test_a_card_quotes_the_score_that_the_run_has(tmp_path):
    fabricate.write_run(tmp_path, notebooks=False)
    artifacts, variants = tmp_path / "artifacts", fabricate.variants()
    recipes = [json.dumps({"base": name}) for name in variants.variant]
    (table,) = (artifacts / "store/08_evaluation").glob("*/variants.parquet")
    variants.assign(recipe=recipes).to_parquet(table)
    known = cards.facts('{"base": "pruned-6"}', artifacts, "tiny")
    assert (known.variant, known.source, known.score.n) == ("pruned-6", "synthetic", 59 * 3)
    said = sections(BASE, known=known)["Limits"]
    assert f"{known.score.score:.1f} %" in said and "`pruned-6`" in said
    assert f"floor is {metrics.FLOOR:.0f}" in said
    none = cards.facts('{"base": "unknown"}', artifacts, "tiny")
    assert none == cards.Facts("tiny", source="synthetic")
    assert "interval" not in sections(BASE, known=none)["Limits"]
    assert cards.facts("{}", tmp_path, "nothing") == cards.Facts("nothing")
