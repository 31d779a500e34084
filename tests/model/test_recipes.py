"""What is healed and quantized: rows of the frame of variants, by name."""

import pandas as pd
import pytest

from derm_compress.errors import DermError
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe

ORIGINAL = Recipe("pico", "f" * 16, 8)
KEY = "a" * 64
CHOICE = {"operating": 2, "deeper": 3}


@pytest.fixture
def known():
    kept = {n: [0, 1, *range(2 + n, 8)] for n in (1, 2, 3)}
    rows = [variants_of.variant("original", ORIGINAL)]
    rows += [
        variants_of.variant(f"pruned-{n}", ORIGINAL.pruned(k), criterion="angular")
        for n, k in kept.items()
    ]
    return pd.DataFrame(rows)


def test_further_depths_and_seeds_are_healed_beside_the_roles(known, tmp_path):
    asked = variants_of.to_heal(known, CHOICE, depths=[4, 8], seeds=3)  # of 32: blocks 1 and 2 of 8
    names = ["original", "pruned-2", "pruned-3", "pruned-1"]
    more = ["original~1", "pruned-2~1", "original~2", "pruned-2~2"]
    assert asked.adapter.tolist() == names + more and asked.sft_seed.tolist() == [0] * 4 + [
        1,
        1,
        2,
        2,
    ]
    for name in asked.adapter:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
    healed = variants_of.healed(asked, f"05_sft/{KEY}/adapters", tmp_path)
    assert healed.variant.tolist() == [f"{name}+sft" for name in names] + [
        "original+sft~1", "pruned-2+sft~1", "original+sft~2", "pruned-2+sft~2"
    ]  # fmt: skip
    assert healed.sft_seed.tolist() == asked.sft_seed.tolist() and healed.healed.all()
    last = Recipe.from_json(healed.recipe.iloc[-1]).steps[-1]
    assert last["ref"] == f"05_sft/{KEY}/adapters/pruned-2~2" and last["kept"] == [0, 1, 4, 5, 6, 7]


def test_a_depth_that_was_not_pruned_is_refused(known):
    with pytest.raises(DermError, match="pruned-5"):
        variants_of.to_heal(known, CHOICE, depths=[20])
