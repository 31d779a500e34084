import numpy as np
import pandas as pd
import pytest
import torch

from derm_compress.errors import DermError
from derm_compress.evaluate import variants as variants_
from derm_compress.evaluate.variants import (
    activation_statistics,
    activation_surface,
    answer_controls,
    answer_variants,
    each_model,
    quantization_errors,
    scaled_channels,
    scores,
    search_scales,
    shuffled_rows,
)
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.assemble import materialize
from derm_compress.method.quantization import search
from derm_compress.method.quantization import wanted as wanted_frames
from derm_compress.model import anatomy
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe

PLAN = Plan("output_similarity", (3, 5, 2, 6, 4), (0, 1, 7), 8, "f" * 16)
HOW = {"device": "cpu", "batch_size": 12, "max_new_tokens": 3}

SCALES = f"07_quantization/{'a' * 64}/scales"


def variants(recipe):
    return variants_of.pruned(recipe, [PLAN, PLAN], [1, 3], [1, 3])


def test_variants_name_depth_criterion_and_recipe(recipe):
    frame = variants(recipe)
    names = [
        "original",
        "pruned-1",
        "pruned-3",
        "pruned-1-output_similarity",
        "pruned-3-output_similarity",
    ]
    assert frame.variant.tolist() == names and frame.blocks_removed.tolist() == [0, 1, 3, 1, 3]
    quantized = wanted_frames.quantized_variants(
        frame, wanted_frames.asked(frame.variant[:2], ["awq", "rtn"], [4], 64), SCALES
    )
    assert quantized.variant.tolist() == [
        "original|awq4",
        "original|rtn4",
        "pruned-1|awq4",
        "pruned-1|rtn4",
    ]
    steps = [Recipe.from_json(r).steps[-1] for r in quantized.recipe]
    assert steps[0]["ref"] == f"{SCALES}/awq4/original.safetensors" and "ref" not in steps[1]
    with pytest.raises(DermError, match="pruned-9"):
        variants_of.named(frame, ["pruned-9"])


def test_every_model_is_the_one_its_recipe_says(recipe, store):
    seen = {}
    for name, model, _ in each_model(variants(recipe), store, "cpu", "x"):
        seen[name] = [id(b) for b in anatomy.blocks(model)], len(anatomy.blocks(model))
    assert [n for _, n in seen.values()] == [8, 7, 5, 7, 5]
    whole = seen["original"][0]
    assert seen["pruned-3"][0] == [whole[i] for i in (0, 1, 4, 6, 7)]


@pytest.fixture
def alive(monkeypatch):
    """How many models that were made before still hold weights, at each load."""
    made, counts, real = [], [], materialize

    def load(*args, **kwargs):
        counts.append(sum(any(True for _ in model.parameters()) for model in made))
        made.append((found := real(*args, **kwargs))[0])
        return found

    monkeypatch.setattr(variants_, "materialize", load)
    return counts


def test_a_model_is_let_go_before_the_next_is_loaded(
    recipe, store, dataset, tmp_path, monkeypatch, alive
):
    frame, images = variants(recipe)[:2], dataset.images
    how = {"items": dataset.of("train")[:1], "images": images, "batch_size": 3, "device": "cpu"}
    search_scales(
        tmp_path, wanted_frames.asked(frame.variant, ["awq"], [4], 64), frame, store, **how
    )
    assert alive == [0, 0]
    monkeypatch.setattr(variants_, "COPIED", 0)  # quantized models are made anew, as large ones are
    alive.clear()
    rounded = wanted_frames.quantized_variants(
        frame[:1],
        wanted_frames.asked(["original"], ["llm_int8", "bitsandbytes", "rtn"], [4], 64),
        SCALES,
    )
    assert len(list(each_model(rounded, store, "cpu", "x"))) == 3
    assert alive == [0, 1, 1, 1]  # beside the source that they share


def test_shared_prefix_equals_materialized_alone(recipe, store, dataset):
    frame = variants(recipe)
    items = dataset.of("test")[:2]
    together = answer_variants(frame, items=items, images=dataset.images, store=store, **HOW)
    alone = answer_variants(frame[2:3], items=items, images=dataset.images, store=store, **HOW)
    assert together[together.variant == "pruned-3"].answer.tolist() == alone.answer.tolist()
    assert (together.score == 1).all() and set(together.judge) == {"rubric"}


def test_controls_show_other_pictures_and_keep_the_reference(recipe, store, dataset):
    items = dataset.of("test")
    rows = shuffled_rows(items, 0)
    disease = {i.row: i.disease for i in dataset.items}
    assert all(disease[row] != item.disease for row, item in zip(rows, items, strict=True))
    controls = answer_controls(
        variants(recipe), items=items[:2], images=dataset.images, seed=0, store=store, **HOW
    )
    assert controls.groupby("variant").size().to_dict() == {"blank": 6, "shuffled": 6}
    assert set(controls.disease) == {i.disease for i in items[:2]}


def test_quantized_variants_run_from_search_to_errors(recipe, store, dataset, tmp_path):
    frame = variants(recipe)[:2]
    how = {
        "items": dataset.of("train")[:2],
        "images": dataset.images,
        "batch_size": 6,
        "device": "cpu",
    }
    (tmp_path / "scales").mkdir()
    wanted = wanted_frames.asked(frame.variant, ["awq", "rtn", "awq-text"], [3], 64)
    search_scales(tmp_path / "scales", wanted, frame, store, **how)
    found = pd.read_parquet(tmp_path / "scales" / "search.parquet")
    both = found.pivot(index=["variant", "block", "group"], columns="form", values="loss")
    assert set(found[found.variant == "pruned-1"].block) == {
        0,
        1,
        2,
        4,
        5,
        6,
        7,
    }  # original indices
    assert len(both) == 60 and (both["awq3"] != both["awq3-text"]).all()
    channels = scaled_channels(tmp_path / "scales", "awq3", frame, store, **how)
    assert (
        channels.groupby("variant").block.nunique().tolist() == [8, 7]
        and (channels.scale > 0).all()
    )
    assert scaled_channels(tmp_path / "scales", "awq9", frame, store, **how).empty
    wanted = wanted[wanted.form != "awq3-text"]
    quantized = wanted_frames.quantized_variants(frame, wanted, store.ref("scales"))
    errors = quantization_errors(quantized, frame, store, **how)
    assert (
        errors.groupby("variant").size().tolist() == [8, 8, 7, 7]
        and (errors.relative_error > 0).all()
    )
    recipe_of = quantized.set_index("variant").recipe
    one, two = (
        materialize(Recipe.from_json(recipe_of["original|awq3"]), store)[0] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(("size", "names"), [(48, ["awq", "rtn"]), (16, ["awq", "bitsandbytes"])])
def test_group_sizes_are_refused_before_a_search(
    recipe, store, dataset, tmp_path, monkeypatch, size, names
):
    monkeypatch.setattr(search, "search_forms", lambda *_, **__: pytest.fail("a search"))
    how = {
        "items": dataset.of("train")[:1],
        "images": dataset.images,
        "batch_size": 3,
        "device": "cpu",
    }
    frame = variants(recipe)[:1]
    with pytest.raises(DermError, match="group_size: "):
        search_scales(
            tmp_path, wanted_frames.asked(frame.variant, names, [4], size), frame, store, **how
        )


def test_activations_carry_original_block_numbers(recipe, store, dataset):
    frame = variants(recipe)[:3]
    how = {"items": dataset.of("train")[:1], "images": dataset.images, "device": "cpu"}
    told = activation_statistics(frame, store, batch_size=3, **how)
    assert set(told[told.variant == "pruned-3"].block) == {0, 1, 4, 6, 7}
    surface = activation_surface(frame, store, block=16, projection="q_proj", **how)
    assert set(surface.block) == {3} and set(surface.variant) == {
        "original"
    }  # both plans remove block 3
    assert surface.channel.max() == 63 and (surface.value >= 0).all()


def test_scores_say_how_deep_each_variant_is():
    answers = pd.DataFrame(
        {"variant": ["a", "a"], "item": ["1", "2"], "question": ["name"] * 2, "score": [4.0, 1.0]}
    )
    told = scores(answers, pd.DataFrame({"variant": ["a"], "blocks_removed": [5]}))
    assert told.blocks_removed[0] == 5 and np.isclose(told.score[0], 62.5)
