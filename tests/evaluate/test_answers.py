"""Answers of variants and of the two controls, and the depth scores that are made of them."""

import numpy as np
import pandas as pd
import pytest
import torch
from asking import inputs_of

from derm_compress.data import dialogue
from derm_compress.evaluate import answers, metrics, schema
from derm_compress.evaluate.answers import answer, answer_controls, answer_variants, shuffled_rows
from derm_compress.evaluate.losses import answer_losses
from derm_compress.files import Journal
from derm_compress.method.pruning.plan import Plan
from derm_compress.model import variants as variants_of
from derm_compress.model.anatomy import image_tokens
from derm_compress.model.generation import generate
from derm_compress.model.prompts import encode

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


def test_a_batch_that_was_cut_off_is_asked_again_as_it_was(pico, dataset, tmp_path, monkeypatch):
    path, sizes, generate = tmp_path / "j", [], answers.generate

    def counted(model, processor, inputs, **how):
        sizes.append(len(inputs["input_ids"]))
        return generate(model, processor, inputs, **how)

    monkeypatch.setattr(answers, "generate", counted)
    asked = dataset.of("test")[:4], dataset.images
    how = {"variant": "v", "batch_size": 2, "max_new_tokens": 3}
    first = answer(*pico, *asked, journal=Journal(path), **how)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    again = answer(*pico, *asked, journal=Journal(path), **how)
    assert sizes == [2] * (6 + 5) and again.equals(first)
    assert path.read_bytes() == b"".join(lines)


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
