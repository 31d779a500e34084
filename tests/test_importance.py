import numpy as np
import pandas as pd
import pytest
import torch

from derm_compress import generate, importance, models
from derm_compress.errors import DermError


@pytest.fixture(scope="module")
def embed():
    return importance.Embedder()


def test_the_embedder_is_the_published_model(embed):
    same, near, far = embed(["a red rash on the face", "a red spot on the face", "stock prices fell on Monday"])
    assert np.isclose(same @ same, 1, atol=1e-5) and same @ near > 0.6 > 0.2 > same @ far
    assert np.array_equal(embed(["a red rash on the face"])[0], same)


def test_similarity_is_the_loop_of_the_paper(pico, dataset, embed):
    """Eqs. 2-5 by hand: take the block out, generate, put it back, embed, cosine."""
    model, processor = pico
    items = dataset.of("train")[:2]
    how = {"batch_size": 6, "max_new_tokens": 5}
    frame = importance.output_similarity(model, processor, items, dataset.images, embed, **how)
    assert len(frame) == 8 * 6
    layers = list(models.blocks(model))
    before = generate.answer(model, processor, items, dataset.images, variant="x", **how).answer
    model.model.language_model.layers = torch.nn.ModuleList(layers[:3] + layers[4:])
    for i, layer in enumerate(models.blocks(model)):
        layer.self_attn.layer_idx = i
    model.config.text_config.num_hidden_layers = 7
    after = generate.answer(model, processor, items, dataset.images, variant="y", **how).answer
    told = frame[frame.block == 3]
    assert told.answer.tolist() == after.tolist()
    vectors = embed.model.encode(before.tolist()), embed.model.encode(after.tolist())
    lengths = [np.linalg.norm(v, axis=1) for v in vectors]
    cosine = (vectors[0] * vectors[1]).sum(1) / (lengths[0] * lengths[1])
    assert np.allclose(told.similarity, cosine, atol=1e-5)


def test_a_block_that_adds_nothing_scores_one_and_goes_first(pico, dataset, embed):
    model, processor = pico
    with torch.no_grad():
        models.blocks(model)[4].self_attn.o_proj.weight.zero_()
        models.blocks(model)[4].mlp.down_proj.weight.zero_()
    frame = importance.output_similarity(
        model, processor, dataset.of("train")[:2], dataset.images, embed, batch_size=6, max_new_tokens=8
    )
    mean = frame.groupby("block").similarity.mean()
    assert mean[4] == pytest.approx(1, abs=1e-6)
    scores = importance.score_frame("output_similarity", 1 - mean.to_numpy(), [0, 1, 7])
    assert importance.plan(scores, fingerprint="f").order[0] == 4


def test_magnitude_is_the_sum_of_absolute_weights(pico):
    model, _ = pico
    with torch.no_grad():
        for i, block in enumerate(models.blocks(model)):
            for p in block.parameters():
                p.zero_()
            block.mlp.up_proj.weight[0, :3] = torch.tensor([1.0, -2.0, 3.0]) * (i + 1)
    assert importance.magnitude(model).tolist() == [6.0 * (i + 1) for i in range(8)]


def test_random_is_the_seeds(pico):
    one, two, other = (importance.random(pico[0], seed) for seed in (1, 1, 2))
    assert (one == two).all() and (one != other).any()


def test_protected_blocks_count_from_both_ends(pico):
    assert importance.protected_blocks(pico[0], [0, 1, -1]) == (0, 1, 7)
    with pytest.raises(DermError, match="blocks 0 to 7"):
        importance.protected_blocks(pico[0], [8])


def test_plans_of_several_criteria():
    scores = importance.score_frames({"a": np.array([3.0, 1, 2]), "b": np.array([1.0, 2, 3])}, [0])
    plans = importance.plans(scores, fingerprint="f")
    assert plans["a"]["order"] == (1, 2) and plans["b"]["order"] == (1, 2)
    assert pd.isna(scores[scores.block == 0]["rank"]).all()
