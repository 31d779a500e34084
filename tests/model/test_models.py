import dataclasses
import json

import pytest
import torch
from asking import inputs_of, logits
from PIL import Image
from safetensors.torch import save_file
from transformers import BertConfig, LlavaForConditionalGeneration

from derm_compress.__main__ import main
from derm_compress.data import dialogue
from derm_compress.errors import DermError
from derm_compress.evaluate import cards
from derm_compress.evaluate.export import export_model
from derm_compress.method.assemble import materialize
from derm_compress.model import anatomy, loading, removal
from derm_compress.model.generation import generate
from derm_compress.model.recipe import Recipe
from derm_compress.model.units import Unit


def test_anatomy(pico):
    model, _ = pico
    assert len(anatomy.blocks(model)) == loading.PICO_BLOCKS
    assert list(anatomy.linears(anatomy.blocks(model)[0])) == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    counted = sum(p.numel() for part in anatomy.parts(model).values() for p in part.parameters())
    assert counted == sum(p.numel() for p in model.parameters())


def test_the_fingerprint_tells_models_apart(pico):
    model, _ = pico
    same, _ = loading.load_base("pico")
    tiny, _ = loading.load_base("tiny")
    assert anatomy.fingerprint(model) == anatomy.fingerprint(same) != anatomy.fingerprint(tiny)
    with torch.no_grad():
        anatomy.blocks(model)[3].mlp.up_proj.weight.mul_(1.01)
    assert anatomy.fingerprint(model) != anatomy.fingerprint(same)


def test_a_recipe_survives_json_and_knows_its_blocks(recipe):
    deeper = recipe.then("prune", kept=[0, 1, 2, 5, 7])
    assert Recipe.from_json(deeper.to_json()) == deeper
    assert deeper.kept() == (0, 1, 2, 5, 7) and recipe.kept() == tuple(range(8))


def test_a_recipe_for_another_model_is_refused(recipe, store):
    other = Recipe("tiny", recipe.fingerprint, 32)
    with pytest.raises(DermError, match="fingerprint"):
        materialize(other, store)


def test_exported_and_reloaded_pruned_model_is_the_same_model(recipe, store, dataset, tmp_path):
    pruned = recipe.then("prune", kept=[0, 1, 3, 4, 7])
    model, processor = materialize(pruned, store)
    export_model(pruned.to_json(), store, tmp_path / "out")
    again, told = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    batch = inputs_of(processor, dataset)
    assert torch.equal(logits(model, batch), logits(again.eval(), batch))
    texts = [generate(m, processor, batch, max_new_tokens=8) for m in (model, again)]
    assert texts[0] == texts[1]
    uncached = again.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False)
    cached = again.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, uncached)
    assert "Not a medical device" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_some_sublayers_reloads_through_this_package_alone(
    recipe, store, dataset, tmp_path
):
    """Transformers would fill the folder's gaps with random weights, so it shall not open it at all."""
    pruned = recipe.pruned([0, 1, 3, 4, 7], ["0.attention", "3.mlp"])
    model, processor = materialize(pruned, store)
    out = export_model(pruned.to_json(), store, tmp_path / "out")
    again, _ = loading.load_base(str(out))
    batch = inputs_of(processor, dataset)
    assert torch.equal(logits(model, batch), logits(again, batch))
    assert removal.lacking(again) == (Unit(0, "attention"), Unit(2, "mlp"))
    texts = [generate(m, processor, batch, max_new_tokens=8) for m in (model, again)]
    assert texts[0] == texts[1]
    with pytest.raises(OSError, match="no file named model.safetensors"):
        LlavaForConditionalGeneration.from_pretrained(out)
    card = (out / "README.md").read_text()
    assert (
        "lain Transformers cannot open this folder" in card and "without 0.attention, 3.mlp" in card
    )
    assert "LlavaForConditionalGeneration" not in card and "Not a medical device" in card


@pytest.mark.parametrize(
    ("absent", "words"),
    [(["0.attention"], "weights are missing"), (["0.attention", "2.mlp", "1.mlp"], "no place")],
)
def test_a_folder_whose_weights_and_sublayers_disagree_is_refused(
    recipe, store, tmp_path, absent, words
):
    pruned = recipe.pruned([0, 1, 3, 4, 7], ["0.attention", "3.mlp"])
    out = export_model(pruned.to_json(), store, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"absent_sublayers": absent}))
    with pytest.raises(DermError, match=words):
        loading.load_base(str(out))


@pytest.mark.parametrize("absent", [[], ["2.mlp"]])
def test_a_cards_code_opens_its_folder_and_asks_about_a_picture(
    recipe, store, dataset, tmp_path, absent, capsys
):
    out = export_model(recipe.pruned([0, 1, 2, 7], absent).to_json(), store, tmp_path / "out")
    Image.fromarray(dataset.images[0]).save(tmp_path / "picture.jpg")
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("this-folder", str(out)).replace(
        "picture.jpg", str(tmp_path / "picture.jpg")
    )
    exec(compile(code, "card", "exec"), {})
    assert dialogue.question("name") in capsys.readouterr().out


def test_the_export_command_says_what_plain_transformers_cannot_open(
    recipe, store, tmp_path, monkeypatch, capsys
):
    for name, absent in (("whole", []), ("parts", ["2.mlp"])):
        found = recipe.pruned([0, 1, 2, 7], absent).to_json(), store
        monkeypatch.setattr("derm_compress.study.plan.find_recipe", lambda _, found=found: found)
        assert (
            main(["export", f"pico/{name}", str(tmp_path / name), *["--half"] * bool(absent)]) == 0
        )
    lines, read = (
        capsys.readouterr().out.splitlines(),
        "; README.md there says what it is and how it opens",
    )
    assert lines == [f"pico/{n} -> {tmp_path / n}{read}" for n in ("whole", "parts")] + [
        cards.NOT_PLAIN
    ]
    told = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("whole", "parts")]
    assert [config["dtype"] for config in told] == ["float32", "float16"]


def adapter(folder, model, names):
    """A rank-1 adapter of ones on these linears, as peft writes it."""
    folder.mkdir()
    weights = {}
    for name in names:
        out, into = model.get_submodule(name).weight.shape
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.full((1, into), 0.01)
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.full((out, 1), 0.01)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    return folder


def test_adapters_belong_to_the_sublayers_they_were_trained_on(recipe, store, tmp_path):
    halved = recipe.pruned([0, 1, 2, 7], ["2.mlp"])
    model, _ = materialize(halved, store)
    name = "model.language_model.layers.2.self_attn.o_proj"
    folder = adapter(tmp_path / "a", model, [name])
    merged, _ = materialize(halved.with_adapter("a", folder), store)
    change = merged.get_submodule(name).weight - model.get_submodule(name).weight
    assert torch.allclose(change, torch.full_like(change, 1e-4), atol=1e-6)
    whole, blocks_alone = (
        recipe.with_adapter("a", folder),
        recipe.pruned([0, 1, 2, 7]).with_adapter("a", folder),
    )
    for trained, words in (
        (whole, r"7\], the model has \[0, 1, 2, 7\];"),
        (blocks_alone, "other attentions and MLPs"),
    ):
        with pytest.raises(DermError, match=words):
            materialize(
                dataclasses.replace(halved, steps=(*halved.steps, trained.steps[-1])), store
            )
    with pytest.raises(DermError, match="other attentions and MLPs"):
        materialize(
            recipe.pruned([0, 1, 2, 7]).then(**halved.with_adapter("a", folder).steps[-1]), store
        )


def test_export_does_not_overwrite(recipe, store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(DermError, match="not empty"):
        export_model(recipe.to_json(), store, tmp_path / "full")


def test_missing_weights_are_refused(pico, tmp_path):
    model, processor = pico
    state = {k: v for k, v in model.state_dict().items() if "layers.5.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    processor.save_pretrained(tmp_path)
    with pytest.raises(DermError, match="1 weights are missing"):
        loading.load_base(str(tmp_path))


def test_a_deeper_config_than_weights_is_refused(pico, tmp_path):
    """What a pruned checkpoint with an unfixed config looks like: from_pretrained alone fills it with random blocks."""
    model, processor = pico
    removal.apply(model, range(6))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DermError, match="missing"):
        loading.load_base(str(tmp_path))


def test_another_architecture_and_an_empty_folder_are_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(DermError, match="bert model; this study needs a LLaVA"):
        loading.load_base(str(tmp_path / "bert"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DermError, match="no readable config"):
        loading.load_base(str(tmp_path / "empty"))


def test_a_cut_weights_file_is_refused(pico, tmp_path):
    model, processor = pico
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DermError, match="cannot be loaded"):
        loading.load_base(str(tmp_path))


def test_more_weights_than_the_config_has_room_for_are_refused(pico, tmp_path):
    model, processor = pico
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DermError, match="no place"):
        loading.load_base(str(tmp_path))


def test_pickled_weights_are_never_read(pico, tmp_path):
    model, processor = pico
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DermError, match="cannot be loaded"):
        loading.load_base(str(tmp_path))


def test_recipes_out_of_order_are_refused(recipe, store):
    quantized = recipe.then("quantize", method="rtn", bits=4, group_size=64)
    with pytest.raises(DermError, match="quantize comes last"):
        materialize(quantized.then("prune", kept=[0, 1]), store)
    twice = recipe.then("prune", kept=[0, 1, 2]).then("prune", kept=[0, 5])
    with pytest.raises(DermError, match="pruned before"):
        materialize(twice, store)


def test_pictures_of_another_size_are_refused(pico, dataset):
    loading.check_picture_size(pico[1], dataset.images)
    with pytest.raises(DermError, match="image_size: 72"):
        loading.check_picture_size(pico[1], dataset.images[:, :36, :36])
