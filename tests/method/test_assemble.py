"""A recipe becomes the model it names, or is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from derm_compress.errors import DermError
from derm_compress.method.assemble import materialize
from derm_compress.model.recipe import Recipe


def test_a_recipe_for_another_model_is_refused(recipe, store):
    with pytest.raises(DermError, match="fingerprint"):
        materialize(Recipe("tiny", recipe.fingerprint, 32), store)


def test_recipes_out_of_order_are_refused(recipe, store):
    quantized = recipe.then("quantize", method="rtn", bits=4, group_size=64)
    with pytest.raises(DermError, match="quantize comes last"):
        materialize(quantized.pruned([0, 1]), store)
    with pytest.raises(DermError, match="nothing was given that does"):
        materialize(quantized, store)
    with pytest.raises(DermError, match="pruned before"):
        materialize(recipe.pruned([0, 1, 2]).pruned([0, 5]), store)


def test_reinitialized_blocks_have_random_weights_and_all_else_is_kept(recipe, store):
    (model, _), (before, _) = (
        materialize(made, store) for made in (recipe.then("reinitialize", seed=3), recipe)
    )
    again, _ = materialize(recipe.then("reinitialize", seed=3), store)
    deviation = model.config.text_config.initializer_range
    trained = before.state_dict()
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name])
        if ".language_model.layers." not in f".{name}":
            assert torch.equal(weights, trained[name])
        elif weights.dim() == 1:
            assert (weights == 1).all()
        else:
            assert not torch.equal(weights, trained[name])
            assert weights.std().item() == pytest.approx(deviation, rel=0.2)


def adapter(folder, model, name):
    """A rank-1 adapter of ones on one linear, as peft writes it."""
    folder.mkdir()
    out, into = model.get_submodule(name).weight.shape
    weights = {
        f"base_model.model.{name}.lora_A.weight": torch.full((1, into), 0.01),
        f"base_model.model.{name}.lora_B.weight": torch.full((out, 1), 0.01),
    }
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    return folder


def test_adapters_belong_to_the_sublayers_they_were_trained_on(recipe, store, tmp_path):
    blocks, name = [0, 1, 2, 7], "model.language_model.layers.2.self_attn.o_proj"
    halved = recipe.pruned(blocks, ["2.mlp"])
    model, _ = materialize(halved, store)
    folder = adapter(tmp_path / "a", model, name)
    merged, _ = materialize(halved.with_adapter("a", folder), store)
    change = merged.get_submodule(name).weight - model.get_submodule(name).weight
    assert torch.allclose(change, torch.full_like(change, 1e-4), atol=1e-6)

    whole, without = recipe.with_adapter("a", folder), recipe.pruned(blocks)
    other, parts = "trained on other attentions and MLPs", halved.with_adapter("a", folder)
    for model, trained, words in (
        (halved, whole, r"7\], the model has \[0, 1, 2, 7\];"),
        (halved, without.with_adapter("a", folder), other),
        (without, parts, other),
    ):
        with pytest.raises(DermError, match=words):
            materialize(replace(model, steps=(*model.steps, trained.steps[-1])), store)
