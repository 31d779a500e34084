from types import SimpleNamespace

import pytest
import torch
from asking import about
from letters import PICTURES, QUESTIONS, Words, altered, inputs_of, speaker

from derm_compress.data import dialogue
from derm_compress.method.importance.rankings import Ranking
from derm_compress.model import anatomy, shapes
from derm_compress.model.cache import SlotCache
from derm_compress.model.reading import Prompts, Reading
from derm_compress.model.units import Unit
from derm_compress.model.writing import Step
from derm_compress.study.needs import Needs

TOLD = [[7, 8, 9], [], [11], [12, 13, 14, 15, 16, 17], [18, 19], [20]]
SECOND = "meta"  # stands for another GPU: what mixes its tensors with others' is refused
UNITS = [Unit.of(name) for name in (0, 2, "1.attention", "3.mlp")]


@pytest.fixture(scope="module")
def small():
    return speaker()


@pytest.fixture(scope="module")
def read(small):
    """Two questions about each of three pictures, continued by tokens of different number."""
    with torch.inference_mode():
        prompts = Prompts.of(Words(), PICTURES[0], QUESTIONS, "cpu")
        kinds = [*QUESTIONS] * 3
        return Reading(small, prompts, PICTURES, [0, 0, 1, 1, 2, 2], kinds, TOLD, UNITS)


@torch.inference_mode()
def test_what_a_spread_model_reads_is_where_its_blocks_are():
    model = speaker()
    for i, block in enumerate(anatomy.blocks(model)):
        block._hf_hook = SimpleNamespace(execution_device=SECOND if i > 1 else "cpu")
        block.to(block._hf_hook.execution_device)
    for last in (anatomy.decoder(model).norm, model.lm_head):
        last.to(SECOND)
    prompts = Prompts.of(Words(), PICTURES[0], QUESTIONS, "cpu")
    asked = PICTURES, [0, 0, 1, 1, 2, 2], [*QUESTIONS] * 3, TOLD
    read = Reading(model, prompts, *asked)
    cache = SlotCache(4, read.begin + 20)
    cache.fill(slice(0, 4), read.held(read.cache, torch.arange(4)))
    places = torch.full((4, 1), read.begin + 10)
    tokens, _ = Step(model, cache)(torch.ones_like(places), places, None)
    where = [keys.device.type for keys, _ in cache.held.values()]
    assert where == ["cpu"] * 2 + [SECOND] * (len(where) - 2) and len(where) > 2
    assert {scores.device.type for scores in read.predictions(read.last)} == {SECOND}
    assert tokens.shape == (4, 1)


def whole(model, row):
    """The ordinary forward pass over one row's prompt and continuation, with its cache."""
    inputs = inputs_of([*QUESTIONS.values()][row % 2], PICTURES[row // 2])
    inputs["input_ids"] = torch.cat(
        [inputs["input_ids"], torch.tensor([TOLD[row]], dtype=torch.long)], 1
    )
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model(**inputs, use_cache=True, output_hidden_states=True)


@pytest.mark.parametrize("unit", [None, *UNITS])
def test_a_reading_is_that_of_the_model_without_the_unit(small, read, unit):
    """Hidden states, logits at the told tokens' places and the cache, row by row."""
    with torch.inference_mode():
        x, memory = read.without(unit)
        states, scores = anatomy.decoder(small).norm(x), read.predictions(x)
        held = dict(read.held(memory, torch.arange(len(TOLD))))
        with altered(small, unit):
            for row, told in enumerate(TOLD):
                expected, asked = whole(small, row), read.asked[row] + len(told)
                last = expected.hidden_states[-1][0]
                assert torch.allclose(states[row, :asked], last[read.begin :], atol=1e-5)
                assert len(scores[row]) == len(told) + 1
                assert torch.allclose(scores[row], expected.logits[0, -len(told) - 1 :], atol=1e-4)
                for layer, pair in held.items():
                    cached = expected.past_key_values.layers[layer]
                    for part, other in zip(pair, (cached.keys, cached.values), strict=True):
                        assert torch.allclose(
                            part[row, :, : read.begin + asked], other[0], atol=1e-5
                        )


@pytest.mark.parametrize("ranking", ("output_similarity", "perplexity-sublayers"))
def test_a_reading_holds_what_is_planned(small, read, ranking):
    """Bytes alive with what one unit needs, units going from the last to the first."""
    asked, arch = Ranking.of(ranking), shapes.architecture(small.config)
    units, most = asked.units(arch.blocks), 0
    prompts = Prompts.of(Words(), PICTURES[0], QUESTIONS, "cpu")
    with torch.inference_mode():
        reading = Reading(
            small, prompts, PICTURES, [0, 0, 1, 1, 2, 2], [*QUESTIONS] * 3, TOLD, units
        )
        for unit in sorted(units, reverse=True):
            x, without = reading.without(unit)
            assert torch.allclose(x, read.without(unit)[0] if unit in UNITS else x, atol=1e-6)
            caches = [
                held for own in (reading.cache, without) for held in (own.held, own.prefix.held)
            ]
            tensors = [part for held in caches for pair in held.values() for part in pair]
            tensors += [x for states in reading.states for x in states.values()]
            alive = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
            most = max(most, sum(alive.values()))
            reading.forget(unit)
    tokens = 3 * reading.begin, len(TOLD) * reading.places.rest.shape[1]
    costs = Needs({"rankings": ["last"]}, arch)
    costs.kinds = len(QUESTIONS)
    # joined keys and values are gone again when a block is through
    joined = 2 * arch.cache_width * (2 * costs.kinds * tokens[0] + tokens[1])
    planned = 2 * costs.held(asked, *tokens) - 4 * joined  # in fp32
    assert 0.9 * planned < most <= planned


def test_units_do_change_what_is_read(read):
    with torch.inference_mode():
        states = [read.without(unit)[0] for unit in (None, *UNITS)]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(states) for b in states[:i])


def test_the_common_beginning_holds_the_picture_and_no_more_than_all_share(pico, dataset):
    model, processor = pico
    questions = {kind: dialogue.question(kind) for kind in dialogue.QUESTIONS}
    prompts = Prompts.of(processor, dataset.images[0], questions, "cpu")
    assert (prompts.prefix == model.config.image_token_id).sum() == 36
    for kind in questions:
        inputs = about(processor, dataset.images, kind)
        assert prompts.prefix.tolist() + prompts.rest[kind] == inputs["input_ids"][0].tolist()
    assert len({rest[0] for rest in prompts.rest.values()}) > 1
    with torch.inference_mode():
        expected = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        found = prompts.embedded(model, dataset.images[:2])[
            :, prompts.prefix == model.config.image_token_id
        ]
    assert torch.allclose(found[0], expected, atol=1e-5) and not torch.allclose(
        found[1], expected, atol=1e-2
    )


def test_one_question_is_common_but_for_its_last_token(pico, dataset):
    prompts = Prompts.of(pico[1], dataset.images[0], {"any": "What is it?"}, "cpu", text_only=True)
    ids = pico[1].tokenizer("USER: What is it? ASSISTANT:")["input_ids"]
    assert (prompts.prefix.tolist(), prompts.rest) == (ids[:-1], {"any": ids[-1:]})
    assert prompts.embedded(pico[0], dataset.images[:2]).isfinite().all()
