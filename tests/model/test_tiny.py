import json

import numpy as np
import pytest

from derm_compress.data import dialogue, synthetic
from derm_compress.model import anatomy, loading, tiny


@pytest.fixture(scope="module")
def embedded():
    return loading.load_base("tiny")


def test_the_embedded_model_is_what_its_recipe_says(embedded):
    model, processor = embedded
    told = json.loads((loading.TINY / "recipe.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == told["parameters"]
    assert len(anatomy.blocks(model)) == 32 and model.config.text_config.hidden_size == 64
    assert processor.image_processor.crop_size["height"] == tiny.SIZE
    fresh = tiny.config(len(processor.tokenizer))
    assert fresh.text_config.to_dict() == model.config.text_config.to_dict() | {
        "dtype": fresh.text_config.dtype
    }


def test_every_linear_of_the_decoder_divides_by_the_group_size(embedded):
    for block in anatomy.blocks(embedded[0]):
        assert all(
            x.in_features % 64 == x.out_features % 64 == 0 for x in anatomy.linears(block).values()
        )


def test_the_tokenizer_writes_every_answer_and_needs_no_unknown(embedded):
    tokenizer, rng = embedded[1].tokenizer, np.random.default_rng(0)
    assert len(tokenizer) < 1000
    for disease in dialogue.diseases():
        for kind in dialogue.QUESTIONS:
            for text in dialogue.answers(disease, synthetic.draw_facts(rng, disease), kind):
                ids = tokenizer(text)["input_ids"]
                assert (
                    tokenizer.unk_token_id not in ids
                    and tokenizer.decode(ids, skip_special_tokens=True) == text
                )
                assert len(ids) < 56  # the study's longest answer


def test_the_base_is_never_shown_a_picture_with_its_disease():
    rng = np.random.default_rng(0)
    for _ in range(50):
        words = " ".join(
            q + a for q, a in tiny.picture_conversation(synthetic.draw_facts(rng), rng)
        ).lower()
        assert not any(name in words for name in dialogue.aliases())


def test_text_conversations_go_from_name_to_facts_and_back():
    turns = [
        t
        for seed in range(20)
        for t in tiny.text_conversation("psoriasis", np.random.default_rng(seed))
    ]
    assert any(q.startswith("The patient has psoriasis.") for q, _ in turns)
    assert any("psoriasis" in a and "name" in q for q, a in turns)


def test_the_embedded_base_describes_pictures(embedded):
    """It was trained on other pictures; colour and site of new ones must mostly be right."""
    from derm_compress.model import prompts
    from derm_compress.model.generation import generate

    model, processor = embedded
    drawn, images = synthetic.pictures(16, seed=77, diseases=False)
    texts = ["USER: <image>\nDescribe the picture. ASSISTANT:"] * 16
    answers, _, stopped = generate(
        model, processor, prompts.prepare(processor, texts, images, "cpu"), max_new_tokens=40
    )
    right = [
        p.facts["site"] in a and p.facts["colour"] in a for p, a in zip(drawn, answers, strict=True)
    ]
    assert np.mean(right) > 0.7 and all(stopped)
    assert prompts.image_tokens(model) == tiny.IMAGE_TOKENS == 36
