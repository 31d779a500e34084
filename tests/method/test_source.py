"""One model becomes every variant in place, and is itself again, bit by bit."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from derm_compress.errors import DermError
from derm_compress.method import iterate
from derm_compress.method.assemble import materialize
from derm_compress.method.iterate import Source
from derm_compress.method.quantization.quantize import (
    quantize_step,
    quantized_linears,
    scale_groups,
)
from derm_compress.model import anatomy, loading, usage, weights
from derm_compress.model.recipe import shared

REF = f"07_quantization/{'a' * 64}"
AWQ = {"method": "awq", "bits": 3, "group_size": 64, "ref": f"{REF}/scales"}
NF4 = {"method": "bitsandbytes", "bits": 4, "group_size": 64}
INT8 = {"method": "llm_int8", "bits": 8, "group_size": 64}


def adapter(folder, model):
    """Rank 1 on every linear of the blocks, as peft writes it."""
    folder.mkdir(parents=True)
    tensors, drawn = {}, torch.Generator().manual_seed(0)
    for i, block in enumerate(anatomy.blocks(model)):
        for name, linear in anatomy.linears(block).items():
            path = f"base_model.model.model.language_model.layers.{i}.{name}"
            out, into = linear.weight.shape
            tensors[f"{path}.lora_A.weight"] = torch.randn(1, into, generator=drawn) / 10
            tensors[f"{path}.lora_B.weight"] = torch.randn(out, 1, generator=drawn) / 10
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    return folder


@pytest.fixture
def recipes(pico, recipe, store, tmp_path):
    """All kinds of steps, one after another, and back to what was before them."""
    tuned = recipe.with_adapter(f"{REF}/tuned", adapter(tmp_path / REF / "tuned", pico[0]))
    pruned = tuned.pruned([0, 1, 4, 6, 7], ["4.mlp", "6.attention"])
    less, _ = materialize(pruned, store)
    healed = pruned.with_adapter(f"{REF}/healed", adapter(tmp_path / REF / "healed", less))
    drawn = torch.Generator().manual_seed(0)
    groups = scale_groups(pico[0])
    scales = {
        key: torch.rand(linears[0].in_features, generator=drawn) + 0.5
        for key, (_, linears) in groups.items()
    }
    save_file(scales, tmp_path / REF / "scales")
    int8, awq = healed.then("quantize", **INT8), tuned.then("quantize", **AWQ)
    shuffled, nf4 = tuned.pruned([7, 0, 3]), tuned.then("quantize", **NF4)
    drawn = pruned.then("reinitialize", seed=3)
    save_file({"1": 1.5 * torch.eye(64)}, tmp_path / REF / "maps")
    mended = pruned.then("replace_me", ref=f"{REF}/maps", kept=[0, 1, 4, 6, 7])
    return [tuned, pruned, healed, int8, awq, shuffled, nf4, drawn, mended, pruned, tuned]


@pytest.fixture
def loads(monkeypatch):
    """At each load, how many models that were made before still hold weights."""
    made, counts = [], []

    def load(*args, **kwargs):
        counts.append(sum(any(True for _ in model.parameters()) for model in made))
        found = materialize(*args, **kwargs)
        made.append(found[0])
        return found

    monkeypatch.setattr(iterate, "materialize", load)
    return counts


def state(model):
    """All that a model is: tensors by name, which linears are quantized, places and config."""
    layers = [getattr(block.self_attn, "layer_idx", None) for block in anatomy.blocks(model)]
    told = quantized_linears(model), layers, model.config.to_dict()
    return {name: value.clone() for name, value in model.state_dict().items()}, told


def same(one, other):
    (tensors, told), (expected, as_told) = one, other
    assert tensors.keys() == expected.keys() and told == as_told
    return all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("packed", [False, True])
def test_it_becomes_each_variant_and_itself_again(recipes, store, loads, packed):
    quantize = partial(quantize_step, packed=packed)
    source, fresh = Source(shared(recipes), store, "cpu", quantize=quantize), {}
    for recipe in [*recipes[3:5], recipes[0]] if packed else recipes:
        model, _ = source.take(recipe)
        name = recipe.to_json()
        if name not in fresh:
            fresh[name] = state(materialize(recipe, store, quantize=quantize)[0])
        assert same(state(model), fresh[name])
    assert loads == [0]
    source.let_go()
    assert not list(model.parameters())


def test_without_room_for_a_copy_it_is_let_go_and_loaded_anew(recipes, store, loads, monkeypatch):
    monkeypatch.setattr(weights, "SMALL", 0)
    source = Source(shared(recipes), store, "cpu", quantize=quantize_step)
    taken = [state(source.take(recipe)[0]) for recipe in recipes]
    assert same(taken[0], taken[-1]) and same(taken[1], taken[-2])
    assert not same((taken[2][0], None), (taken[1][0], None))
    assert loads == [0] * 7 and source.copy is None  # whenever weights had changed


def test_a_copy_is_made_once_and_before_the_first_change(recipes, store):
    source = Source(shared(recipes), store, "cpu", quantize=quantize_step)
    copies = []
    for recipe in recipes:
        source.take(recipe)
        copies.append(source.copy)
    assert copies[:2] == [None, None] and len(set(copies[2:])) == 1
    held = sum(value.nbytes for block in source.copy.blocks for value in block.values())
    assert held / 2**30 == pytest.approx(usage.tensor_gib(anatomy.blocks(source.model)))


def test_what_is_put_back_is_seen_by_what_was_recorded(recipes, store):
    """A CUDA graph reads the memory that weights had when it was recorded."""
    source = Source(shared(recipes), store, "cpu", quantize=quantize_step)
    tuned, nf4 = recipes[0], recipes[6]
    places = [
        [weight.data_ptr() for weight in source.take(recipe)[0].parameters()]
        for recipe in (tuned, nf4, tuned)
    ]
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize(
    ("free", "held"),
    [
        (27.0, True),  # Kaggle's, once everything is imported
        (15.0, False),
    ],
)
def test_the_host_holds_a_copy_of_7b_alone(monkeypatch, free, held):
    """Never beside a large model on the CPU; on the meta device it is on no CPU, as on a GPU."""
    model, _ = loading.load_base(loading.SEVEN_B, anatomy.META)
    monkeypatch.setattr(usage, "host_gib", lambda: free)
    assert 12 < usage.tensor_gib(anatomy.blocks(model)) < usage.tensor_gib(model) < 13.3
    assert weights.fit(model) == held and not weights.fit(model, 2)


def test_a_large_model_on_the_host_has_no_copy_there(pico, monkeypatch):
    monkeypatch.setattr(usage, "host_gib", lambda: 1000.0)
    assert weights.fit(pico[0])
    monkeypatch.setattr(weights, "SMALL", 0)
    assert not weights.fit(pico[0])


def test_several_bases_are_refused(recipe):
    with pytest.raises(DermError, match="2 bases"):
        shared([recipe, replace(recipe, fingerprint="0" * 16)])
