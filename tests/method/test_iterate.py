"""Variants in turn, and what is measured on each: activations, scales, errors of quantizing."""

import pandas as pd
import pytest
import torch

from derm_compress.errors import DermError
from derm_compress.method.activation_analysis import activation_statistics, activation_surface
from derm_compress.method.assemble import materialize
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization import search
from derm_compress.method.quantization.block_errors import each_quantized
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.method.quantization.search import search_scales
from derm_compress.method.quantization.wanted import asked, quantized_variants
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe

PLAN = Plan("output_similarity", (3, 5, 2, 6, 4), (0, 1, 7), 8, "f" * 16)
REF = f"07_quantization/{'a' * 64}"


@pytest.fixture
def variants(recipe):
    return variants_of.pruned(recipe, [PLAN, PLAN], [1, 3], [1, 3])


@pytest.fixture
def how(dataset):
    read = {"items": dataset.of("train")[:2], "images": dataset.images}
    return read | {"batch_size": 6, "device": "cpu"}


def test_quantized_variants_run_from_search_to_errors(variants, store, how, tmp_path):
    sources = variants[1:2]
    folder = tmp_path / REF
    folder.mkdir(parents=True)
    wanted = asked(sources.variant, ["awq", "rtn", "awq-text"], [3], 64)
    search_scales(folder, wanted, sources, store=store, **how)
    found = pd.read_parquet(folder / "search.parquet")
    both = found.pivot(index=["variant", "block", "group"], columns="form", values="loss")
    assert set(found.block) == {0, 1, 2, 4, 5, 6, 7}  # as before it
    assert len(both) == 28 and (both["awq3"] != both["awq3-text"]).all()
    quantized = quantized_variants(sources, wanted[wanted.form != "awq3-text"], REF)
    turns = [*each_quantized(quantized, store=store, known=[], **how)]
    errors = pd.concat([found for _, found in turns])
    assert errors.groupby("variant").size().tolist() == [7, 7]
    assert (errors.relative_error > 0).all()
    recipe = Recipe.from_json(quantized.set_index("variant").recipe["pruned-1|awq3"])
    one, two = (materialize(recipe, store, quantize=quantize_step)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(("size", "names"), [(48, ["awq", "rtn"]), (16, ["awq", "bitsandbytes"])])
def test_group_sizes_are_refused_before_a_search(
    variants, store, how, tmp_path, monkeypatch, size, names
):
    monkeypatch.setattr(search, "search_forms", lambda *_, **__: pytest.fail("a search"))
    with pytest.raises(DermError, match="group_size: "):
        wanted = asked(["original"], names, [4], size)
        search_scales(tmp_path, wanted, variants, store=store, **how)


def test_activations_carry_the_blocks_before_pruning(variants, store, how):
    told = activation_statistics(variants[:3], store=store, **how)
    assert set(told[told.variant == "pruned-3"].block) == {0, 1, 4, 6, 7}
    del how["batch_size"]
    where = {"block": 16, "projection": "q_proj", "store": store}
    surface = activation_surface(variants[:3], **where, **how)
    assert set(surface.block) == {3} and set(surface.variant) == {"original"}  # others lack it
    assert surface.channel.max() == 63 and (surface.value >= 0).all()
