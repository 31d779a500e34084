"""ReplaceMe: exact where blocks are linear, nearer where they are not, and part of the weights."""

import copy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from asking import inputs_of, logits
from safetensors.torch import load_file
from small_llava import batch, small_llava
from torch import nn
from transformers import LlavaForConditionalGeneration

from derm_compress.errors import DermError
from derm_compress.evaluate.export import export_model
from derm_compress.method.activations import tap
from derm_compress.method.assemble import materialize
from derm_compress.method.pruning import fuse, replace_me
from derm_compress.model import anatomy, loading, prompts, removal
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import mended, variant

FOUR = Recipe("x", "f" * 16, 4)
CALIBRATION, UNSEEN = [batch(6, seed=i) for i in range(2)], batch(4, seed=9)


class LinearBlock(nn.Module):
    """x + x W^T, of the parts that pruning and ReplaceMe look for."""

    def __init__(self, width, seed):
        super().__init__()
        self.self_attn, self.mlp = removal.AbsentAttention(), nn.Module()
        self.mlp.down_proj = nn.Linear(width, width, bias=False)
        drawn = torch.Generator().manual_seed(seed)
        self.mlp.down_proj.weight.data.normal_(0, width**-0.5, generator=drawn)

    def forward(self, hidden_states, **_):
        return hidden_states + self.mlp.down_proj(hidden_states)


def end(model, feed):
    """The state behind the last block, of real tokens."""
    seen = []
    tap(model, [feed], {"": anatomy.blocks(model)[-1]}, lambda _, x: seen.append(x))
    return torch.cat(seen)


def errors(model, recipe, seen, feed, **how):
    """Relative errors of the state behind the last block, pruned and mended, and the maps."""
    pruned, whole = copy.deepcopy(model), end(model, feed)
    removal.apply(pruned, recipe.kept(), recipe.absent())
    plain = end(pruned, feed)
    maps = replace_me.mend(model, seen, recipe, **how)
    found = [((each - whole).norm() / whole.norm()).item() for each in (plain, end(model, feed))]
    return *found, maps


def test_linear_blocks_are_replaced_exactly():
    model = small_llava(4)
    for i in (1, 2, 3):
        anatomy.blocks(model)[i] = LinearBlock(64, seed=i)
    plain, left, maps = errors(model, FOUR.pruned([0, 1]), CALIBRATION, UNSEEN, ridge=1e-9)
    assert list(maps) == ["1"] and plain > 0.3 and left < 1e-4


def test_trained_blocks_are_mended_gap_after_gap_for_other_pictures_too(dataset):
    model, processor = loading.load_base("tiny")
    read = {"images": dataset.images, "batch_size": 12, "device": "cpu"}
    seen, (unseen,) = (
        list(prompts.calibration_batches(processor, items, **read))
        for items in (dataset.of("train")[:6], dataset.of("test")[:2])
    )
    recipe = Recipe("tiny", "f" * 16, 32)
    recipe = recipe.pruned([i for i in range(32) if i not in (5, 6, 12, 13)])
    plain, left, maps = errors(model, recipe, seen, unseen)
    assert list(maps) == ["4", "11"] and left < 0.9 * plain


def test_a_strong_ridge_is_plain_removal():
    gram, cross = torch.eye(4), torch.randn(4, 4)
    assert torch.allclose(replace_me.nearest(gram, cross, ridge=1e9), torch.eye(4), atol=1e-6)
    assert torch.allclose(replace_me.nearest(gram, cross, ridge=0), torch.eye(4) + cross)


def test_a_map_is_folded_into_weight_and_bias():
    block, x = LinearBlock(8, 0), torch.randn(5, 8)
    block.mlp.down_proj.bias = nn.Parameter(torch.randn(8))
    M, T = block.mlp.down_proj(x), torch.randn(8, 8)
    fuse.fuse(block, T)
    assert torch.allclose(block.mlp.down_proj(x), M @ T, atol=1e-5)
    block.half()
    with pytest.raises(DermError, match="overflow torch.float16"):
        fuse.fuse(block, T * 1e6)


@pytest.mark.parametrize(
    ("kept", "absent", "found"),
    [
        ([0, 3], [], {0: 2}),
        ([0, 2], [], {0: 1, 2: 3}),  # the last run reaches the end
        ([1, 2, 3], [], {}),  # nothing stands before the first block
        ([0, 2], ["0.mlp", "2.attention"], {2: 3}),
        ([0, 1, 2, 3], [], {}),
    ],
)
def test_runs_are_what_is_gone_behind_a_block_with_an_mlp(kept, absent, found):
    assert replace_me.runs(FOUR.pruned(kept, absent)) == found


def test_shapes_alone_have_no_maps(recipe, tmp_path):
    how = {"store": None, "device": anatomy.META}
    replace_me.fit_maps(tmp_path, recipe.pruned([0, 1, 7]), [], None, **how)
    assert load_file(tmp_path / "maps.safetensors") == {}


def test_what_is_fitted_is_kept_reloads_and_is_exported(recipe, store, dataset, tmp_path):
    pruned = recipe.pruned([0, 1, 2, 5, 7])
    items = dataset.of("train")[:2]
    replace_me.fit_maps(tmp_path, pruned, items, dataset.images, store=store, device="cpu")
    known = pd.DataFrame([variant("pruned-3", pruned, criterion="x")])
    choice = {"criterion": "x", "operating": 3, "deeper": 4}
    (row,) = mended(known, choice, store.ref("maps.safetensors"))
    assert row["variant"] == "pruned-3-replace_me" and not row["healed"]

    made = Recipe.from_json(row["recipe"])
    (model, processor), (plain, _) = (materialize(each, store) for each in (made, pruned))
    before = plain.state_dict()
    changed = [name for name, one in model.state_dict().items() if not one.equal(before[name])]
    layers = "model.language_model.layers"
    assert changed == [f"{layers}.{i}.mlp.down_proj.weight" for i in (2, 3)]  # of 8: 2 and 5
    out = export_model(row["recipe"], store, tmp_path / "out")
    again = LlavaForConditionalGeneration.from_pretrained(out).eval()
    inputs = inputs_of(processor, dataset)
    assert logits(again, inputs).equal(logits(model, inputs))
    assert "mended by ReplaceMe" in (out / "README.md").read_text()

    other = replace(made, steps=(recipe.pruned([0, 1, 2, 4, 7]).steps[0], made.steps[1]))
    with pytest.raises(DermError, match=r"fitted to blocks \[0, 1, 2, 5, 7\], the model has"):
        materialize(other, store)
