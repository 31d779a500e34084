"""Criteria against direct computations on the pico model."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from derm_compress.data import dialogue
from derm_compress.errors import DermError
from derm_compress.files import file_digest
from derm_compress.method.importance import scoring
from derm_compress.method.importance.calibration import Calibration
from derm_compress.method.importance.embedder import Embedder, packaged
from derm_compress.model import anatomy, prompts, removal
from derm_compress.model.generation import generate
from derm_compress.model.units import SUBLAYERS, Unit

UNITS = [Unit.of(unit) for unit in (0, 3, 6, "3.attention", "3.mlp")]


@pytest.fixture(scope="module")
def embed():
    return Embedder()


@pytest.fixture
def calibration(pico, dataset):
    items = dataset.of("train")[:2]
    return Calibration(*pico, items, dataset.images, batch_size=3, max_new_tokens=5)


def frame(calibration, name, units=UNITS):
    """{(unit, item): mean over questions} of a criterion."""
    told = {}
    for row in getattr(scoring, name)(calibration, units):
        told.setdefault((row["unit"], row["item"]), []).append(row["value"])
    return {key: float(np.mean(values)) for key, values in told.items()}


def told_inputs(c, item, *, text_only=False):
    """(inputs, labels) of each question with its reference answer, without padding."""
    tokenizer = c.processor.tokenizer
    for kind in dialogue.QUESTIONS:
        text = prompts.prompt(c.processor, kind, text_only=text_only)
        images = None if text_only else [c.images[item.row]]
        before = c.processor(text=text, images=images, return_tensors="pt")["input_ids"].shape[1]
        text += f" {dialogue.reference(item.disease, item.facts, kind)}{tokenizer.eos_token}"
        inputs = c.processor(text=text, images=images, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :before] = -100
        yield inputs, labels


def loss_sum(c, item, **how):
    """Negative log-likelihood of an item's answers, and their tokens, by Transformers' loss."""
    pairs = [
        (c.model(**i, labels=x).loss, int((x != -100).sum()))
        for i, x in told_inputs(c, item, **how)
    ]
    return sum(loss * n for loss, n in pairs), sum(n for _, n in pairs)


def states(c, item):
    """Hidden states [sublayers + 1, tokens, width] around every sublayer, for each question."""
    seen, hooks = [], []
    for block in anatomy.blocks(c.model):
        hooks.append(block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])))
        hooks.append(
            block.self_attn.register_forward_hook(lambda *a: seen.append(seen[-1] + a[-1][0][0]))
        )
    hooks.append(
        anatomy.decoder(c.model).norm.register_forward_pre_hook(
            lambda _, args: seen.append(args[0][0])
        )
    )
    with torch.no_grad():
        for inputs, _ in told_inputs(c, item):
            seen.clear()
            c.model(**inputs)
            yield torch.stack(seen)
    for hook in hooks:
        hook.remove()


def said(c, item):
    """Answers to all questions about one picture, as anybody would generate them."""
    texts = [prompts.prompt(c.processor, kind) for kind in dialogue.QUESTIONS]
    inputs = prompts.prepare(c.processor, texts, c.images[[item.row] * len(texts)], c.device)
    return generate(c.model, c.processor, inputs, max_new_tokens=c.max_new_tokens)[0]


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_the_embedder_is_the_published_model(embed):
    assert file_digest(packaged() / "model.safetensors") == MINILM_SHA256
    same, near, far = map(
        embed, ["a red rash on the face", "a red spot on the face", "stock prices fell on Monday"]
    )
    assert np.isclose(same @ same, 1, atol=1e-5) and same @ near > 0.6 > 0.2 > same @ far
    assert embed("a red rash on the face") is same


@pytest.mark.parametrize("name", ["no/such/model", "/no/such/folder"])
def test_a_sentence_transformer_that_is_not_there_is_one_line(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DermError, match=r"cannot be loaded \(.*\); set embedder") as error:
        Embedder(name)("text")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("unit", ["3", "3.attention", "3.mlp"])
def test_output_similarity_is_the_loop_of_the_paper(calibration, embed, unit):
    c = dataclasses.replace(calibration, embed=embed)
    # a random attention hardly matters
    anatomy.blocks(c.model)[3].self_attn.o_proj.weight.data *= 10
    found = frame(c, "output_similarity", [Unit.of(unit)])
    for item in c.items:
        whole = said(c, item)  # y_i = M(x_i)
        with removal.without(c.model, [unit]):
            ablated = said(c, item)  # Eq. 2
        cosine = np.mean([embed(y) @ embed(z) for y, z in zip(whole, ablated, strict=True)])
        assert found[Unit.of(unit), item.id] == pytest.approx(1 - cosine, abs=1e-5)  # Eqs. 3-5
    assert max(found.values()) > 0.01


@pytest.mark.parametrize("text_only", [False, True])
def test_perplexity_is_the_loss_of_the_pruned_model(calibration, text_only):
    c = dataclasses.replace(calibration, text_only=text_only)
    rows = list(scoring.perplexity(c, UNITS))
    assert len(rows) == len(UNITS) * 2 * 3
    for unit in UNITS:
        with removal.without(c.model, [unit]), torch.no_grad():
            pairs = [told_inputs(c, item, text_only=text_only) for item in c.items]
            wanted = [
                c.model(**inputs, labels=labels).loss.item()
                for pair in pairs
                for inputs, labels in pair
            ]
        assert np.allclose(
            [row["value"] for row in rows if row["unit"] == unit], wanted, rtol=1e-5, atol=0
        )


def test_text_only_prompts_hold_no_image_and_see_none(calibration):
    image = calibration.model.config.image_token_id
    text = dataclasses.replace(calibration, text_only=True)
    assert image in calibration.prompts().prefix and image not in text.prompts().prefix
    dark = dataclasses.replace(text, images=np.zeros_like(text.images))
    assert (
        frame(text, "perplexity") == frame(dark, "perplexity") != frame(calibration, "perplexity")
    )


def test_block_influence_is_the_cosine_over_real_tokens(calibration):
    """The questions' common beginning counts once, padding not at all."""
    found, common = frame(calibration, "block_influence"), len(calibration.prompts().prefix)
    for item in calibration.items:
        read = list(states(calibration, item))
        assert len({seen.shape[1] for seen in read}) > 1, "answers of one length need no padding"
        tokens = torch.cat([seen[:, common if i else 0 :] for i, seen in enumerate(read)], 1)
        for unit in UNITS:
            before, after = unit.span
            wanted = 1 - F.cosine_similarity(tokens[before], tokens[after], dim=-1).mean().item()
            assert found[unit, item.id] == pytest.approx(wanted, abs=1e-5)


def test_angular_distance_is_the_angle_at_the_last_token(calibration):
    rows = list(scoring.angular(calibration, UNITS))
    for item in calibration.items:
        last = torch.stack([seen[:, -1] for seen in states(calibration, item)]).double()
        for unit in UNITS:
            (row,) = [row for row in rows if (row["unit"], row["item"]) == (unit, item.id)]
            before, after = unit.span
            ends = [after] if unit.part else range(after, 17, 2)
            cosine = [F.cosine_similarity(last[:, before], last[:, end], dim=-1) for end in ends]
            wanted = [(c.arccos() / torch.pi).mean().item() for c in cosine]
            assert len(row["runs"]) == (1 if unit.part else 8 - unit.block)
            assert np.allclose(row["runs"], wanted, atol=1e-5) and row["value"] == row["runs"][0]


def test_taylor_is_an_ordinary_backward_pass(calibration):
    c, found = calibration, frame(calibration, "taylor")
    for item in c.items:
        c.model.zero_grad()
        total, count = loss_sum(c, item)
        (total / count).backward()
        for unit in UNITS:
            held = scoring.sublayer_weights(c.model)[slice(*unit.span)]
            weights = [p for parts in held for p in parts]
            wanted = sum((p * p.grad).abs().double().sum().item() for p in weights)
            assert found[unit, item.id] == pytest.approx(wanted, rel=1e-5)


def test_taylor_holds_one_gradient_at_a_time_and_leaves_no_trace(calibration):
    model, live = calibration.model, []
    frozen = anatomy.blocks(model)[2].mlp.up_proj.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = [p for block in anatomy.blocks(model) for p in block.parameters() if p is not frozen]
    hooks = [
        p.register_post_accumulate_grad_hook(
            lambda _: live.append(sum(p.grad is not None for p in model.parameters()))
        )
        for p in weights
    ]
    frame(calibration, "taylor", [Unit(2)])
    for hook in hooks:
        hook.remove()
    assert len(live) == 2 * len(weights) and set(live) == {1}
    assert {
        name: p.requires_grad for name, p in model.named_parameters()
    } == before and not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_taylor_is_done_with_a_block_before_the_gradient_is_two_below(calibration):
    """Gradients that wait for a second use of their weights would all be held at once."""
    model, seen = calibration.model, []

    def entered(block):
        def hook(module, args):
            if args[0].requires_grad and not torch.is_inference_mode_enabled():
                args[0].register_hook(lambda _: seen.append(("gradient", block)))

        return hook

    hooks = [b.register_forward_pre_hook(entered(n)) for n, b in enumerate(anatomy.blocks(model))]
    for n, block in enumerate(anatomy.blocks(model)):
        hooks += [
            p.register_post_accumulate_grad_hook(lambda _, n=n: seen.append(("weight", n)))
            for p in block.parameters()
        ]
    one = dataclasses.replace(calibration, items=calibration.items[:1])
    frame(one, "taylor", [Unit(2)])
    for hook in hooks:
        hook.remove()
    for block in range(2, 8):
        last = max(i for i, event in enumerate(seen) if event == ("weight", block))
        assert last < seen.index(("gradient", block - 1))


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ("", [36, 31, 45, 14, 45, 25, 27, 20]),
        (".attention", [30, 1, 3, 2, 9, 7, 3, 8]),
        (".mlp", [6, 30, 42, 12, 36, 18, 24, 12]),
    ],
)
def test_magnitude_is_the_sum_of_absolute_weights(calibration, part, wanted):
    attentions, mlps = [30, 1, 3, 2, 9, 7, 3, 8], [1, 5, 7, 2, 6, 3, 4, 2]
    with torch.no_grad():
        for block, a, m in zip(anatomy.blocks(calibration.model), attentions, mlps, strict=True):
            for p in block.parameters():
                p.zero_()
            block.self_attn.q_proj.weight[1, 1] = -(a - 1)
            block.input_layernorm.weight[0] = 1.0
            block.mlp.up_proj.weight[0, :2] = torch.tensor([1.0, -2.0]) * m
            block.post_attention_layernorm.weight[5] = 3.0 * m
    found = frame(calibration, "magnitude", [Unit.of(f"{b}{part}") for b in range(8)])
    assert [found[unit, "train-00000"] for unit in sorted({unit for unit, _ in found})] == wanted


def test_random_is_the_seeds(calibration):
    c = dataclasses.replace(calibration, items=calibration.items[:1])
    other = dataclasses.replace(c, seed=1)
    blocks = [Unit(block) for block in range(8)]
    for units in (blocks, [Unit(block, part) for block in (0, 7) for part in SUBLAYERS]):
        one, two, three = (frame(asked, "random", units) for asked in (c, c, other))
        assert one == two != three and len(set(one.values())) == len(units)
    assert frame(c, "random", [Unit(2), Unit(5)]).items() < frame(c, "random", blocks).items()


def test_last_takes_the_deepest_first(calibration):
    c = dataclasses.replace(calibration, items=calibration.items[:1])
    units = [Unit(2), Unit(3), Unit(3, "mlp"), Unit(6)]
    found = frame(c, "last", units)
    order = [unit for unit, _ in sorted(found, key=found.get)]
    assert order == [Unit(6), Unit(3, "mlp"), Unit(3), Unit(2)]
