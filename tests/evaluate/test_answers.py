"""Answers of variants and of the two controls, and the depth scores that are made of them."""

import fabricate
import numpy as np
import pandas as pd
import pytest
import torch
from asking import inputs_of

from derm_compress.data import dialogue
from derm_compress.evaluate import answers, metrics, schema
from derm_compress.evaluate.answers import (
    answer,
    answer_controls,
    answer_variants,
    shuffled_rows,
    table_variants,
)
from derm_compress.evaluate.losses import answer_losses
from derm_compress.files import Journal
from derm_compress.method.pruning.plan import Plan
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize
from derm_compress.model import removal
from derm_compress.model import variants as variants_of
from derm_compress.model.anatomy import image_tokens
from derm_compress.model.generation import generate
from derm_compress.model.prompts import encode
from derm_compress.model.units import Unit
from tools.check_gpu import rig

PLAN = Plan("output_similarity", (3, 5, 2, 6, 4), (0, 1, 7), 8, "f" * 16)
HOW = {"device": "cpu", "batch_size": 12, "max_new_tokens": 3}


@pytest.fixture
def variants(recipe):
    return variants_of.pruned(recipe, [PLAN], [1, 3])


def test_end_of_sequence_counts_and_ends_an_answer(pico, dataset):
    model, processor = pico
    with torch.no_grad():
        model.model.language_model.norm.weight.zero_()
    inputs = inputs_of(processor, dataset, 1)
    # all logits are equal now, and the first of them is <unk>: the answer runs away
    assert generate(model, processor, inputs, max_new_tokens=3)[1:] == ([3], [False])
    processor.tokenizer.eos_token = "<unk>"
    assert generate(model, processor, inputs, max_new_tokens=3)[1:] == ([1], [True])


def test_a_shared_model_answers_as_one_made_alone(variants, store, dataset):
    how = {"items": dataset.of("test")[:2], "images": dataset.images, "store": store, **HOW}
    together, alone = answer_variants(variants, **how), answer_variants(variants[2:], **how)
    assert together[together.variant == "pruned-3"].answer.tolist() == alone.answer.tolist()
    assert list(together) == [*schema.ANSWER, *schema.SCORE] and set(together.judge) == {"rubric"}


def test_a_round_that_was_cut_off_is_asked_again_as_it_was(pico, dataset, tmp_path, monkeypatch):
    path, seen, way = tmp_path / "j", [], answers.picture_replies

    def watched(model, processor, items, *more, **how):
        seen.append(([item.id for item in items], how["batch_size"]))
        return way(model, processor, items, *more, **how)

    monkeypatch.setattr(answers, "picture_replies", watched)
    items, pictures = dataset.of("test")[:5], dataset.images
    how = {"variant": "v", "batch_size": 2, "max_new_tokens": 3}
    first = answer(*pico, items, pictures, journal=Journal(path), **how)
    ids = [item.id for item in items]
    rounds = [(ids[:2], 2), (ids[2:4], 2), (ids[4:], 2)]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:8]))  # a round is whole, one is begun
    again = answer(*pico, items, pictures, journal=Journal(path), **how)
    assert seen == [*rounds, *rounds[1:]] and again.equals(first) and len(again) == 15
    assert path.read_bytes() == b"".join(lines)


FORMS = {
    "rounded": (Form("rtn", 4), False),
    "packed": (Form("rtn", 3), True),  # torch's int4 kernel would compute in bfloat16
}


@pytest.mark.parametrize(("form", "batch_size"), [(None, 2), ("rounded", 4), ("packed", 12)])
def test_answers_are_those_of_generate(pico, dataset, form, batch_size):
    """Of a whole model, and of one that lacks a block, the first attention and an MLP."""
    model, processor = pico
    if form:
        how = dict(zip(("form", "packed"), FORMS[form], strict=True))
        quantize(model, **how)
    asked = processor, dataset.of("test")[:4]
    how = {"images": dataset.images, "batch_size": batch_size, "max_new_tokens": 12}
    for removed in ([], [Unit(2), Unit(0, "attention"), Unit(5, "mlp")]):
        with removal.without(model, removed):
            told = answers.picture_replies(model, *asked, **how)
            assert told == rig.plain_replies(model, *asked, **how)
            assert len(told) == 12 and len({said["answer"] for said in told.values()}) > 3


def test_controls_show_other_pictures_and_keep_the_reference(variants, store, dataset):
    items = dataset.of("test")
    disease = {item.row: item.disease for item in dataset.items}
    rows = shuffled_rows(items, 0)
    assert all(disease[row] != item.disease for row, item in zip(rows, items, strict=True))
    how = {"items": items[:2], "images": dataset.images, "store": store, **HOW}
    controls = answer_controls(variants, seed=0, **how)
    assert controls.groupby("variant").size().to_dict() == {"blank": 6, "shuffled": 6}
    assert set(controls.disease) == {item.disease for item in items[:2]}


def test_losses_are_those_of_transformers_whatever_the_batch(pico, recipe, store, dataset):
    known, items = variants_of.pruned(recipe, [], []), dataset.of("train")[:2]
    how = {"store": store, "device": "cpu"}
    found = answer_losses(known, items, dataset.images, batch_size=12, **how)
    assert list(found) == ["variant", "method", "item", "question", "loss"] and len(found) == 6
    alone = answer_losses(known, items, dataset.images, batch_size=3, **how)
    assert np.allclose(found.loss, alone.loss, rtol=1e-4)
    model, processor = pico
    turns = [
        (dialogue.question("name"), dialogue.reference(items[0].disease, items[0].facts, "name"))
    ]
    ids, labels = encode(processor, turns, image_tokens=image_tokens(model.config))
    pixels = processor.image_processor([dataset.images[items[0].row]], return_tensors="pt")
    feed = {"input_ids": ids[None], "labels": labels[None], "pixel_values": pixels["pixel_values"]}
    assert found.loss[0] == pytest.approx(model(**feed).loss.item(), rel=1e-4)


def test_models_of_the_same_training_and_maybe_the_same_bytes_are_judged_too():
    known = fabricate.variants()
    control = known[known.variant == "original+sft"].iloc[0].to_dict()
    narrow = [fabricate.quantized(control, "awq", bits) for bits in (3, 2)]
    again = fabricate.quantized(control | {"sft_seed": 1, "variant": "original+sft~1"}, "awq", 3)
    mixed = fabricate.quantized(control, "awq-mixed", 2.5)
    known = pd.concat([known, pd.DataFrame([*narrow, again, mixed])], ignore_index=True)
    choice = {"criterion": "output_similarity", "operating": 6, "deeper": 9}
    named = table_variants(known, choice).variant
    assert named.is_unique and "pruned-6-shuffled+sft|awq4" not in set(named)
    more = {"original+sft|awq3", "original+sft|awq2", "pruned-9+sft|awq4"}
    assert set(named) & {*more, "original+sft~1|awq3", "original+sft|awq-mixed2.5"} == more


def test_depth_scores_say_how_deep_each_variant_is():
    answers = pd.DataFrame({"variant": ["a", "a"], "score": [4.0, 1.0]})
    told = metrics.depth_scores(answers, pd.DataFrame({"variant": ["a"], "blocks_removed": [5]}))
    assert told.to_dict("records") == [{"variant": "a", "blocks_removed": 5, "score": 62.5}]


def test_frames_of_answers_have_one_schema_also_without_a_row():
    empty = schema.together([], schema.ANSWER)
    assert empty.dtypes.astype(str).to_dict() == schema.ANSWER
    row = {"variant": "a", "item": "i", "question": "name", "score": 1.0}
    frames = [pd.DataFrame([row]), pd.DataFrame([row | {"score": 4.0}, row | {"item": "j"}])]
    assert schema.latest(frames).score.tolist() == [4, 1]
