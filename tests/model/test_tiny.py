"""The embedded model is the one its builder describes, and it sees and speaks."""

import json

import numpy as np
import pytest

from derm_compress.data import dialogue, synthetic
from derm_compress.model import anatomy, loading, prompts
from derm_compress.model.generation import generate
from tools import tiny_llava


@pytest.fixture(scope="module")
def embedded():
    return loading.load_base("tiny")


def test_the_embedded_model_is_what_its_recipe_says(embedded):
    model, processor = embedded
    told = json.loads((loading.TINY / "recipe.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == told["parameters"]
    assert processor.image_processor.crop_size["height"] == tiny_llava.SIZE
    assert anatomy.image_tokens(model.config) == tiny_llava.IMAGE_TOKENS == 36
    text, fresh = model.config.text_config, tiny_llava.config(len(processor.tokenizer)).text_config
    assert fresh.to_dict() == text.to_dict() | {"dtype": fresh.dtype}
    for block in anatomy.blocks(model):  # the study's group size
        sizes = [x for linear in anatomy.linears(block).values() for x in linear.weight.shape]
        assert all(size % 64 == 0 for size in sizes)


def test_the_tokenizer_writes_every_answer_and_needs_no_unknown(embedded):
    tokenizer, rng = embedded[1].tokenizer, np.random.default_rng(0)
    for disease in dialogue.diseases():
        for kind in dialogue.QUESTIONS:
            for text in dialogue.answers(disease, synthetic.draw_facts(rng, disease), kind):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids and len(ids) < 56  # the longest answer
                assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_base_is_never_shown_a_picture_with_its_disease():
    rng = np.random.default_rng(0)
    for _ in range(50):
        turns = tiny_llava.picture_conversation(synthetic.draw_facts(rng), rng)
        words = " ".join(question + answer for question, answer in turns).lower()
        assert not any(name in words for name in dialogue.aliases())


def test_text_conversations_go_from_name_to_facts_and_back():
    turns = []
    for seed in range(20):
        turns += tiny_llava.text_conversation("psoriasis", np.random.default_rng(seed))
    assert any(question.startswith("The patient has psoriasis.") for question, _ in turns)
    assert any("psoriasis" in answer and "name" in question for question, answer in turns)


def test_the_embedded_base_describes_pictures(embedded):
    """It was trained on other pictures; colour and site of new ones must mostly be right."""
    drawn, images = synthetic.pictures(16, seed=77, diseases=False)
    texts = ["USER: <image>\nDescribe the picture. ASSISTANT:"] * 16
    inputs = prompts.prepare(embedded[1], texts, images, "cpu")
    answers, _, stopped = generate(*embedded, inputs, max_new_tokens=40)
    right = []
    for picture, answer in zip(drawn, answers, strict=True):
        right.append(picture.facts["site"] in answer and picture.facts["colour"] in answer)
    assert np.mean(right) > 0.7 and all(stopped)


def test_the_task_has_a_ceiling_below_certainty():
    assert 0.8 < tiny_llava.bayes_accuracy(1600) < 0.97
