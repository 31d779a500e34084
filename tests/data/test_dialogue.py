import numpy as np
import pytest

from derm_compress.data import dialogue, synthetic

BOOK = dialogue.book()["diseases"]


def test_the_papers_eight_diseases_have_a_source_each():
    assert len(BOOK) == 8 and set(BOOK) == set(synthetic.DISEASES)
    assert all("doi:" in entry["source"] for entry in BOOK.values())


@pytest.mark.parametrize("disease", BOOK)
@pytest.mark.parametrize("kind", ["treatment", "features"])
def test_every_paraphrase_states_all_facts(disease, kind):
    entry = BOOK[disease][kind]
    assert len(entry["answers"]) >= 2
    for text in entry["answers"]:
        for fact, phrases in entry["facts"].items():
            assert any(phrase in text.lower() for phrase in phrases), (fact, text)


def test_test_questions_never_say_this_disease():
    assert all("the disease" in dialogue.question(k) for k in dialogue.QUESTIONS)
    trained = [q for kind in dialogue.book()["training_questions"].values() for q in kind]
    assert any("this disease" in q for q in trained)


def test_a_conversation_asks_all_three_questions_in_random_order():
    rng = np.random.default_rng(0)
    facts = synthetic.draw_facts(rng, "psoriasis")
    first = {dialogue.conversation("psoriasis", facts, rng)[0][0].split()[3] for _ in range(40)}
    assert first == {"name", "treatment", "clinical"}
    turns = dialogue.conversation("psoriasis", facts, rng)
    assert len(turns) == 3 and len({q for q, _ in turns}) == 3


def test_the_features_answer_carries_the_pictures_facts():
    facts = synthetic.draw_facts(np.random.default_rng(1), "melanoma")
    for text in dialogue.answers("melanoma", facts, "features"):
        assert facts["colour"] in text and facts["site"] in text and facts["border"] in text
    assert dialogue.answers("melanoma", {}, "features") == BOOK["melanoma"]["features"]["answers"]
