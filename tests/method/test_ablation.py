import dataclasses
import itertools
import weakref

import pytest
import torch
from letters import PICTURES, QUESTIONS, Words, altered, inputs_of, speaker

from derm_compress.data.items import Item
from derm_compress.method.importance.drafts import ablated_answers
from derm_compress.model import reading, removal, writing
from derm_compress.model.reading import Prompts
from derm_compress.model.units import Unit

ITEMS = [Item(f"i{row}", "train", "rosacea", f"g{row}", row, {}, "") for row in range(3)]
UNITS = [Unit.of(u) for u in (0, 1, 3, "0.mlp", "2.attention", "3.mlp", "1.attention")]
MOST = 16


def greedy(model, inputs, most, eos):
    """Token after token, each from a forward pass over all before it."""
    tokens, inputs = [], dict(inputs)
    while len(tokens) < most and (not tokens or tokens[-1] != eos):
        tokens.append(model(**inputs, use_cache=False).logits[0, -1].argmax().item())
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens[-1:]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return tokens


@pytest.fixture(scope="module")
def small():
    return speaker()


@torch.inference_mode()
def looped(model, eos, *, units=UNITS, pictures=PICTURES):
    """{(unit, item, question): tokens} of the loop over the model without each unit."""
    answers = {}
    for unit in [None, *units]:
        with altered(model, unit):
            for item, (name, question) in itertools.product(ITEMS, QUESTIONS.items()):
                inputs = inputs_of(question, pictures[item.row])
                answers[unit, item.id, name] = greedy(model, inputs, MOST, eos)
    return answers


@pytest.fixture(scope="module")
def told(small):
    """(end-of-sequence, answers without each unit) of the loop; many answers have the token."""
    answers = looped(small, None)
    count = torch.bincount(torch.tensor([t for a in answers.values() for t in set(a[2:-1])]))
    eos = (count - len(answers) / 2).abs().argmin().item()
    return eos, {key: a[: a.index(eos) + 1] if eos in a else a for key, a in answers.items()}


def written(model, *, eos, batch_size, units=UNITS, most=MOST, pictures=PICTURES):
    prompts = Prompts.of(Words(), pictures[0], QUESTIONS, "cpu")
    prompts = dataclasses.replace(prompts, ends=[] if eos is None else [eos])
    how = {"batch_size": batch_size, "max_new_tokens": most}
    rows = list(ablated_answers(model, prompts, ITEMS, pictures, units, **how))
    answers = {row.key: row for row in rows}
    assert len(answers) == len(rows) == (1 + len(units)) * len(ITEMS) * len(QUESTIONS)
    return answers


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 100])
def test_answers_are_the_loops_at_any_batch_size(small, told, batch_size):
    eos, expected = told
    rows = written(small, eos=eos, batch_size=batch_size)
    assert {key: row.tokens for key, row in rows.items()} == expected
    stopped = [row.tokens[-1] == eos for row in rows.values()]
    assert any(stopped) and any(len(t) == MOST for t in expected.values())
    going = [row for key, row in rows.items() if row.tokens != expected[None, *key[1:]]]
    assert any(rows[None, "i0", name].tokens != rows[None, "i1", name].tokens for name in QUESTIONS)
    assert len(going) > 7  # so that rows wait for a free line, and lines are used again
    for key, row in rows.items():
        draft = expected[None, *key[1:]]
        stands = [one == other for one, other in zip(draft, row.tokens, strict=False)]
        accepted = [*stands, False].index(False)
        assert row.accepted == (accepted if row.unit else 0)


def test_half_as_many_answers_are_read_as_written_and_one_reading_is_alive(
    small, told, monkeypatch
):
    readings, alive = [], []

    class Watched(reading.Reading):
        def __init__(self, model, prompts, pictures, picture, kinds, told, units):
            alive.append(sum(one() is not None for one in readings))
            readings.append(weakref.ref(self))
            counts.append((len(told), any(told)))
            super().__init__(model, prompts, pictures, picture, kinds, told, units)

    monkeypatch.setattr(writing, "Reading", Watched)
    for units, expected in ((UNITS, [(6, False), (4, True), (2, True)]), ([], [(6, False)])):
        counts = []
        written(small, eos=told[0], batch_size=6, units=units)
        assert counts == expected
    assert alive == [0] * 4


@pytest.mark.parametrize("most", [1, 2, 5])
def test_answers_end_at_the_most_tokens(small, told, most):
    eos, expected = told
    rows = written(small, eos=eos, batch_size=5, most=most)
    assert {key: row.tokens for key, row in rows.items()} == {
        key: a[:most] for key, a in expected.items()
    }


@pytest.mark.parametrize("ahead", [0, 1, 20])
def test_guesses_change_no_answer(small, told, ahead, monkeypatch):
    monkeypatch.setattr(writing.Writer, "AHEAD", ahead)
    rows = written(small, eos=told[0], batch_size=4)
    assert {key: row.tokens for key, row in rows.items()} == told[1]


def test_a_guess_is_what_followed_the_same_tokens_of_the_same_picture():
    def answer(item, *tokens):
        return writing.Answer(None, item, "q", list(tokens), 0, 0, 0)

    guesses = writing.Guesses(longest=2)
    guesses.learn(answer("a", 1, 2, 3, 4))
    guesses.learn(answer("b", 9, 2, 5, 6))
    assert guesses.after(answer("a", 8, 2), 5) == [3, 4]
    assert guesses.after(answer("b", 8, 2), 1) == [5]
    assert guesses.after(answer("b", 1, 2), 5) == [3, 4]  # a longer run elsewhere
    assert guesses.after(answer("b", 8), 5) == []


def test_answers_are_the_loops_where_the_first_attention_is_gone_already(told):
    cut, units = speaker(), [Unit(1), Unit(2, "mlp")]
    removal.apply(cut, range(4), ["0.attention"])
    expected = looped(cut, told[0], units=units)
    rows = written(cut, eos=told[0], batch_size=4, units=units)
    assert {key: row.tokens for key, row in rows.items()} == expected
    assert any(row.tokens != expected[None, *key[1:]] for key, row in rows.items())


def test_near_ties_are_counted(small, told):
    """A word whose twin has the same row in the head ties wherever it is chosen, no other does."""
    assert not any(row.near_ties for row in written(small, eos=None, batch_size=8).values())
    word = max(
        {t for a in told[1].values() for t in a},
        key=lambda t: sum(t in a for a in told[1].values()),
    )
    kept, twin = small.lm_head.weight.data.clone(), 197
    assert all(twin not in answer for answer in told[1].values())
    small.lm_head.weight.data[twin] = kept[word]
    rows = written(small, eos=None, batch_size=8)
    small.lm_head.weight.data.copy_(kept)
    ties = {key: sum(token in (word, twin) for token in row.tokens) for key, row in rows.items()}
    assert ties == {key: row.near_ties for key, row in rows.items()} and sum(ties.values()) > 10


def test_in_half_precision_answers_differ_where_words_nearly_tie_and_nowhere_else(told):
    half, pictures = speaker().half(), PICTURES.half()
    rows = written(half, eos=told[0], batch_size=4, units=UNITS[:3], pictures=pictures)
    expected = looped(half, told[0], units=UNITS[:3], pictures=pictures)
    differ = [key for key, row in rows.items() if row.tokens != expected[key]]
    assert len(differ) < 0.1 * len(rows) and all(rows[key].near_ties for key in differ)
