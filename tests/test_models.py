import json

import pytest
import torch
from transformers import BertConfig, LlavaForConditionalGeneration

from derm_compress import generate, models, prune, recipes
from derm_compress.errors import DermError


def inputs_of(processor, dataset, n=2):
    items = dataset.of("test")[:n]
    texts = [generate.prompt(processor, kind) for kind in ("name", "treatment")][:n]
    return generate.prepare(processor, texts, dataset.images[[i.row for i in items]], "cpu")


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


def test_anatomy(pico):
    model, _ = pico
    assert len(models.blocks(model)) == models.PICO_BLOCKS
    assert list(models.linears(models.blocks(model)[0])) == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    counted = sum(p.numel() for part in models.parts(model).values() for p in part.parameters())
    assert counted == sum(p.numel() for p in model.parameters())


def test_the_fingerprint_tells_models_apart(pico):
    model, _ = pico
    same, _ = models.load_base("pico")
    tiny, _ = models.load_base("tiny")
    assert models.fingerprint(model) == models.fingerprint(same) != models.fingerprint(tiny)
    with torch.no_grad():
        models.blocks(model)[3].mlp.up_proj.weight.mul_(1.01)
    assert models.fingerprint(model) != models.fingerprint(same)


def test_a_recipe_survives_json_and_knows_its_blocks(recipe):
    deeper = recipe.then("prune", kept=[0, 1, 2, 5, 7])
    assert recipes.Recipe.from_json(deeper.to_json()) == deeper
    assert deeper.kept() == (0, 1, 2, 5, 7) and recipe.kept() == tuple(range(8))


def test_a_recipe_for_another_model_is_refused(recipe, store):
    other = recipes.Recipe("tiny", recipe.fingerprint, 32)
    with pytest.raises(DermError, match="fingerprint"):
        models.materialize(other, store)


def test_exported_and_reloaded_pruned_model_is_the_same_model(recipe, store, dataset, tmp_path):
    pruned = recipe.then("prune", kept=[0, 1, 3, 4, 7])
    model, processor = models.materialize(pruned, store)
    models.export_model(pruned.to_json(), store, tmp_path / "out")
    again, told = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    batch = inputs_of(processor, dataset)
    assert torch.equal(logits(model, batch), logits(again.eval(), batch))
    texts = [generate.generate(m, processor, batch, max_new_tokens=8) for m in (model, again)]
    assert texts[0] == texts[1]
    uncached = again.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=False)
    cached = again.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, uncached)
    assert "Not a medical device" in (tmp_path / "out" / "README.md").read_text()


def test_export_does_not_overwrite(recipe, store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(DermError, match="not empty"):
        models.export_model(recipe.to_json(), store, tmp_path / "full")


def test_missing_weights_are_refused(pico, tmp_path):
    model, processor = pico
    state = {k: v for k, v in model.state_dict().items() if "layers.5.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    processor.save_pretrained(tmp_path)
    with pytest.raises(DermError, match="1 weights are missing"):
        models.load_base(str(tmp_path))


def test_a_deeper_config_than_weights_is_refused(pico, tmp_path):
    """What a pruned checkpoint with an unfixed config looks like: from_pretrained alone fills it with random blocks."""
    model, processor = pico
    prune.apply(model, range(6))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DermError, match="missing"):
        models.load_base(str(tmp_path))


def test_another_architecture_and_an_empty_folder_are_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(DermError, match="bert model; this study needs a LLaVA"):
        models.load_base(str(tmp_path / "bert"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DermError, match="no readable config"):
        models.load_base(str(tmp_path / "empty"))


def test_a_cut_weights_file_is_refused(pico, tmp_path):
    model, processor = pico
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DermError, match="cannot be loaded"):
        models.load_base(str(tmp_path))


def test_more_weights_than_the_config_has_room_for_are_refused(pico, tmp_path):
    model, processor = pico
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DermError, match="no place"):
        models.load_base(str(tmp_path))


def test_pickled_weights_are_never_read(pico, tmp_path):
    model, processor = pico
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DermError, match="cannot be loaded"):
        models.load_base(str(tmp_path))


def test_recipes_out_of_order_are_refused(recipe, store):
    quantized = recipe.then("quantize", method="rtn", bits=4, group_size=64)
    with pytest.raises(DermError, match="quantize comes last"):
        models.materialize(quantized.then("prune", kept=[0, 1]), store)
    twice = recipe.then("prune", kept=[0, 1, 2]).then("prune", kept=[0, 5])
    with pytest.raises(DermError, match="pruned before"):
        models.materialize(twice, store)


def test_pictures_of_another_size_are_refused(pico, dataset):
    models.check_picture_size(pico[1], dataset.images)
    with pytest.raises(DermError, match="image_size: 72"):
        models.check_picture_size(pico[1], dataset.images[:, :36, :36])
