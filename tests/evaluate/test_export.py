"""Exported folders: the same model again, a card whose code runs, nothing half loaded."""

import json

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration

from derm_compress.__main__ import main
from derm_compress.data import dialogue
from derm_compress.errors import DermError
from derm_compress.evaluate import cards
from derm_compress.evaluate.export import export_model
from derm_compress.model import loading, removal
from derm_compress.model.units import Unit

KEPT, ABSENT = [0, 1, 3, 4, 7], ["0.attention", "3.mlp"]


def test_a_model_without_some_sublayers_reloads_through_this_package_alone(recipe, store, tmp_path):
    """Transformers would fill the gaps with random weights, so it shall not open the folder."""
    out = export_model(recipe.pruned(KEPT, ABSENT).to_json(), store, tmp_path / "out")
    again, _ = loading.load_base(str(out))
    assert removal.lacking(again) == (Unit(0, "attention"), Unit(2, "mlp"))
    with pytest.raises(OSError, match="no file named model.safetensors"):
        LlavaForConditionalGeneration.from_pretrained(out)
    card = (out / "README.md").read_text()
    assert "lain Transformers cannot open this folder" in card
    assert "without 0.attention, 3.mlp" in card and "Not a medical device" in card
    assert "LlavaForConditionalGeneration" not in card


@pytest.mark.parametrize(
    ("absent", "words"),
    [(["0.attention"], "weights are missing"), (["0.attention", "2.mlp", "1.mlp"], "no place")],
)
def test_a_folder_whose_weights_and_sublayers_disagree_is_refused(
    recipe, store, tmp_path, absent, words
):
    out = export_model(recipe.pruned(KEPT, ABSENT).to_json(), store, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"absent_sublayers": absent}))
    with pytest.raises(DermError, match=words):
        loading.load_base(str(out))


@pytest.mark.parametrize("absent", [[], ["2.mlp"]])
def test_a_cards_code_opens_its_folder_and_asks_about_a_picture(
    recipe, store, dataset, tmp_path, absent, capsys
):
    out = export_model(recipe.pruned([0, 1, 2, 7], absent).to_json(), store, tmp_path / "out")
    picture = tmp_path / "picture.jpg"
    Image.fromarray(dataset.images[0]).save(picture)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("this-folder", str(out)).replace("picture.jpg", str(picture))
    exec(compile(code, "card", "exec"), {})
    assert dialogue.question("name") in capsys.readouterr().out


def test_the_export_command_says_what_plain_transformers_cannot_open(
    recipe, store, tmp_path, monkeypatch, capsys
):
    for name, absent, half in (("whole", [], []), ("parts", ["2.mlp"], ["--half"])):
        found = recipe.pruned([0, 1, 2, 7], absent).to_json(), store
        monkeypatch.setattr("derm_compress.study.plan.find_recipe", lambda _, found=found: found)
        assert main(["export", f"pico/{name}", str(tmp_path / name), *half]) == 0
    whole, parts, warned = capsys.readouterr().out.splitlines()
    assert whole.startswith(f"pico/whole -> {tmp_path / 'whole'}; README.md")
    assert parts.startswith(f"pico/parts -> {tmp_path / 'parts'}; README.md")
    assert warned == cards.NOT_PLAIN
    told = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("whole", "parts")]
    assert [config["dtype"] for config in told] == ["float32", "float16"]


def test_export_does_not_overwrite(recipe, store, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DermError, match="not empty"):
        export_model(recipe.to_json(), store, tmp_path)
