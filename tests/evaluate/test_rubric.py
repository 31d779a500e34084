import numpy as np
import pandas as pd
import pytest

from derm_compress.data import dialogue, synthetic
from derm_compress.evaluate.judges import rubric


@pytest.mark.parametrize("disease", dialogue.diseases())
@pytest.mark.parametrize("kind", dialogue.QUESTIONS)
def test_every_accepted_paraphrase_gets_full_marks(disease, kind):
    facts = synthetic.draw_facts(np.random.default_rng(4), disease)
    reference = dialogue.reference(disease, facts, kind)
    for told in dialogue.answers(disease, facts, kind):
        assert rubric.rate(told, reference, kind)[0] == 4, told


@pytest.mark.parametrize(
    "answer", ["", "the the the", "This is something.", "<script>alert(1)</script>"]
)
def test_nothing_right_gets_the_lowest_score(answer):
    assert rubric.rate(answer, "This is psoriasis.", "name")[0] == 1


def test_the_wrong_name_or_two_names_lose():
    assert rubric.rate("This is melanoma.", "This is psoriasis.", "name")[0] == 1
    assert rubric.rate("This is psoriasis or melanoma.", "This is psoriasis.", "name")[0] == 2
    assert rubric.rate("It is plaque psoriasis.", "This is psoriasis.", "name")[0] == 4


def test_naming_every_disease_gains_nothing():
    everything = "This is " + ", ".join(dialogue.diseases())
    assert rubric.rate(everything, "This is psoriasis.", "name")[0] == 1


def test_more_right_facts_never_score_less():
    reference = dialogue.reference("psoriasis", {}, "treatment")
    told = [
        "",
        "Phototherapy.",
        "Phototherapy and vitamin D.",
        "Phototherapy, vitamin D and a corticosteroid.",
    ]
    scores = [rubric.rate(text, reference, "treatment")[0] for text in told]
    assert scores == sorted(scores) and scores[0] == 1 and scores[-1] == 4


def test_an_answer_that_never_ends_loses_a_point_but_not_below_one():
    assert rubric.rate("This is psoriasis.", "This is psoriasis.", "name", stopped=False)[0] == 3
    assert rubric.rate("no", "This is psoriasis.", "name", stopped=False)[0] == 1


def test_whole_words_only():
    assert rubric.stated("The surface is smooth on the trunk", "features") == {
        "surface: smooth",
        "site: trunk",
    }


def test_explanations_name_the_facts():
    why = rubric.rate("This is melanoma.", "This is psoriasis.", "name")[1]
    assert "missing: psoriasis" in why and "wrong: melanoma" in why


def test_the_frame_keeps_every_answer():
    row = {"answer": "x", "reference": "This is psoriasis.", "question": "name", "stopped": True}
    rated = rubric.score_by_rubric(pd.DataFrame([row, row | {"answer": "psoriasis"}]))
    assert rated.score.tolist() == [1.0, 4.0] and set(rated.judge) == {"rubric"}


def test_the_frozen_rubric_is_the_published_one():
    """Change the rubric only together with this hash, before any test answer is looked at again."""
    assert rubric.frozen_hash() == "67c24f3131e6ba07"
