import pandas as pd
import pytest
import torch
from test_models import inputs_of, logits

from derm_compress import generate, importance, models, prune
from derm_compress.errors import DermError

PLAN = prune.Plan("output_similarity", (3, 5, 2, 6, 4), (0, 1, 7), 8, "f" * 16)


def test_removing_nothing_changes_nothing(pico, dataset):
    model, processor = pico
    batch = inputs_of(processor, dataset)
    before = logits(model, batch)
    with prune.without(model, []):
        assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("n", range(6))
def test_removal_is_the_residual_stream_without_the_blocks(pico, dataset, n):
    """Taking blocks out equals making them add nothing, in logits, bit for bit; and it is undone afterwards."""
    model, processor = pico
    batch = inputs_of(processor, dataset)
    before = logits(model, batch)
    with prune.without(model, PLAN.removed(n)):
        assert len(models.blocks(model)) == model.config.text_config.num_hidden_layers == 8 - n
        assert [b.self_attn.layer_idx for b in models.blocks(model)] == list(range(8 - n))
        removed = logits(model, batch)
        assert generate.generate(model, processor, batch, max_new_tokens=4)[1] == [4, 4]
    assert torch.equal(logits(model, batch), before)
    with torch.no_grad():
        for index in PLAN.removed(n):
            models.blocks(model)[index].self_attn.o_proj.weight.zero_()
            models.blocks(model)[index].mlp.down_proj.weight.zero_()
    assert torch.equal(logits(model, batch), removed)


def test_plans_refuse_what_they_were_not_made_for():
    PLAN.check(blocks=8, fingerprint="f" * 16)
    with pytest.raises(DermError, match="fingerprint"):
        PLAN.check(blocks=8, fingerprint="0" * 16)
    with pytest.raises(DermError, match="made for a model of 8 blocks"):
        PLAN.check(blocks=32, fingerprint="f" * 16)
    with pytest.raises(DermError, match="0 to 5"):
        PLAN.kept(6)
    assert PLAN.kept(2) == (0, 1, 2, 4, 6, 7)
    assert prune.Plan.from_dict(PLAN.to_dict()) == PLAN


@pytest.mark.parametrize("kept", [[], [0, 0, 1], [2, 1], [0, 8]])
def test_impossible_positions_are_refused(pico, kept):
    with pytest.raises(DermError, match="rising positions"):
        prune.apply(pico[0], kept)


def test_ranks_protect_and_break_ties_by_position():
    frame = importance.score_frame("x", [5.0, 1.0, 2.0, 2.0, 0.5], [0, 4])
    plan = importance.plan(frame, fingerprint="abc")
    assert plan.order == (1, 2, 3) and plan.protected == (0, 4)


def scores(**by_depth):
    return pd.DataFrame([{"blocks_removed": int(k[1:]), "score": v} for k, v in by_depth.items()])


def test_the_operating_point_is_where_a_third_is_gone():
    big = prune.Plan("x", tuple(range(2, 31)), (0, 1, 31), 32, "f")
    papers = scores(d0=80.12, d2=73.15, d4=65.75, d6=62.5, d7=57.25, d9=36.25)
    assert prune.choose(papers, big) | {"why": ""} == {"operating": 6, "deeper": 9, "why": ""}
    cliff = prune.choose(scores(d0=80, d4=79, d8=26), big)
    assert (cliff["operating"], cliff["deeper"]) == (6, 9) and "no depth" in cliff["why"]
    floor = prune.choose(scores(d0=25, d4=25), big)
    assert (floor["operating"], floor["deeper"]) == (6, 9) and "no score" in floor["why"]
    assert prune.choose(papers, big, fixed=8)["operating"] == 8


def test_depths_keep_the_papers_fractions():
    assert prune.depths([2, 4, 16, 20], PLAN) == [1, 4, 5]
