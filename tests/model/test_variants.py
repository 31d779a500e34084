"""Units, recipes and the frame of variants: how the study's models are named and written down."""

import json
from random import Random

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from derm_compress.errors import DermError
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe, check_ref
from derm_compress.model.units import Unit, left

ORIGINAL = Recipe("pico", "f" * 16, 8)
KEY = "a" * 64
CHOICE = {"criterion": "angular", "operating": 2, "deeper": 3}
UNITS = st.builds(Unit, st.integers(0, 40), st.sampled_from(["", "attention", "mlp"]))


@given(UNITS)
def test_a_unit_is_what_its_text_says(unit):
    assert Unit.of(str(unit)) == Unit.of(json.loads(json.dumps(unit.plain))) == unit
    assert len(unit.sublayers) == (1 if unit.part else 2)
    assert {sublayer // 2 for sublayer in unit.sublayers} == {unit.block}


def test_units_sort_by_where_they_begin():
    order = ["0.attention", "0", "0.mlp", "2.attention", "2", "2.mlp", "10"]
    shuffled = [Unit.of(text) for text in order]
    Random(0).shuffle(shuffled)
    assert [str(unit) for unit in sorted(shuffled)] == order


@pytest.mark.parametrize("text", ["", "x", "-1", "1.", "1.norm", "1.5", 1.5, True, None])
def test_what_is_no_unit_is_refused(text):
    with pytest.raises(ValueError, match="no unit"):
        Unit.of(text)


def test_a_block_without_both_sublayers_is_gone():
    removed = map(Unit.of, ["1.mlp", "1.attention", 3, "0.mlp"])
    assert left(5, removed) == ((0, 2, 4), (Unit(0, "mlp"),))


def test_a_recipe_survives_json_and_knows_what_is_left():
    made = ORIGINAL.pruned([0, 1, 2, 5, 7], [Unit(2, "mlp")])
    made = made.then("quantize", method="rtn", bits=4, group_size=64)
    assert Recipe.from_json(made.to_json()) == made
    assert made.kept() == (0, 1, 2, 5, 7) and made.absent() == (Unit(2, "mlp"),)
    assert ORIGINAL.kept() == tuple(range(8)) and ORIGINAL.absent() == ()


@pytest.mark.parametrize(
    "ref",
    [
        "../runs/x",
        f"02_finetune/{KEY}/../../x",
        f"/02_finetune/{KEY}/a",
        "02_finetune/short/adapter",
        f"02_finetune/{KEY.upper()}/a",
        f"runs/{KEY}/a",
        f"02_finetune/{KEY}/a\\b",
        f"02_finetune/{KEY}//a",
        "",
        None,
    ],
)
def test_references_that_lead_elsewhere_are_refused_as_they_are_read(ref):
    recipe = ORIGINAL.then("adapter", ref=ref, sha256="0", kept=[0])
    with pytest.raises(DermError, match="is not STAGE/KEY/NAME"):
        Recipe.from_json(recipe.to_json())
    assert check_ref(f"07_quantization/{KEY}/scales/awq4/pruned-6+sft~1.safetensors")


@pytest.mark.parametrize(
    ("removed", "blocks", "depth"),
    [(6, 32, 6), (6, 24, 5), (6, 8, 2), (9, 30, 8), (1, 8, 1), (0, 8, 0)],  # 4.5 is 5; 8.4 is 8
)
def test_fractions_of_blocks_round_half_up(removed, blocks, depth):
    assert variants_of.paper_depth(removed, blocks) == depth
    assert variants_of.paper_depth(4, 32, of=12) == 11


@pytest.fixture
def known():
    rows = [variants_of.variant("original", ORIGINAL)]
    for n in (1, 2, 3):
        recipe = ORIGINAL.pruned([0, 1, *range(2 + n, 8)])
        rows.append(variants_of.variant(f"pruned-{n}", recipe, criterion="angular"))
    return pd.DataFrame(rows)


def test_a_row_says_what_its_recipe_removes():
    recipe = ORIGINAL.pruned([0, 1, 2], [Unit(0, "mlp"), Unit(1, "mlp"), Unit(2, "attention")])
    row = variants_of.variant("x|rtn4", recipe, source="x", method="rtn", bits=4)
    assert list(row) == list(variants_of.COLUMNS) and row["source"] == "x"
    removed = [row[f"{part}s_removed"] for part in ("block", "attention", "mlp")]
    assert removed == [5, 1, 2] and Recipe.from_json(row["recipe"]) == recipe
    with pytest.raises(TypeError, match="colour"):
        variants_of.variant("x", recipe, colour="red")


def test_further_depths_and_seeds_are_healed_beside_the_roles(known, tmp_path):
    asked = variants_of.to_heal(known, CHOICE, depths=[4, 8], seeds=3)  # of 32: blocks 1 and 2 of 8
    names = ["original", "pruned-2", "pruned-3", "pruned-1"]
    more = ["original~1", "pruned-2~1", "original~2", "pruned-2~2"]
    assert asked.adapter.tolist() == names + more
    assert asked.healed_variant.iloc[-1] == "pruned-2+sft~2"
    assert asked.sft_seed.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    for name in asked.adapter:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
    healed = variants_of.healed(asked, f"05_sft/{KEY}/adapters", tmp_path)
    further = ["original+sft~1", "pruned-2+sft~1", "original+sft~2", "pruned-2+sft~2"]
    assert healed.variant.tolist() == [f"{name}+sft" for name in names] + further
    assert healed.source.equals(healed.variant) and healed.healed.all()
    assert healed.sft_seed.tolist() == asked.sft_seed.tolist()
    last = Recipe.from_json(healed.recipe.iloc[-1]).steps[-1]
    assert last["ref"] == f"05_sft/{KEY}/adapters/pruned-2~2"
    assert last["kept"] == [0, 1, 4, 5, 6, 7]


def test_rivals_and_what_can_only_learn_anew_are_healed_where_asked(known):
    rival = variants_of.variant("r", ORIGINAL.pruned([0, 1, *range(4, 8)]), criterion="random-0")
    every = pd.concat([known, pd.DataFrame([rival])], ignore_index=True)
    rivals = ("random-0", "magnitude")
    asked = variants_of.to_heal(every, CHOICE, rivals=rivals, relearning=0)
    anew = ["pruned-2-shuffled", "pruned-2-reinitialized"]
    assert [*asked.adapter] == ["original", "pruned-2", "pruned-3", "r", *anew]
    order, drawn = (Recipe.from_json(text) for text in asked.recipe.iloc[-2:])
    assert drawn.steps[-1] == {"step": "reinitialize", "seed": 0}
    own = variants_of.recipe_of(known, "pruned-2")
    assert sorted(order.kept()) == [*own.kept()] == [*drawn.kept()] != [*order.kept()]
    assert asked.blocks_removed.iloc[-1] == 2
    again = variants_of.to_heal(every, CHOICE, rivals=rivals, relearning=0, distilled=True)
    assert again.iloc[:-1].equals(asked)
    heard = again.iloc[-1]
    assert heard.recipe == own.to_json() and heard.criterion == "distilled"
    assert heard.healed_variant == "pruned-2-distilled+sft" and heard.adapter == heard.variant


def test_what_is_mended_without_training_stands_beside_the_healed(known):
    rows = variants_of.mended(known, CHOICE, f"05_sft/{KEY}/maps/maps.safetensors")
    (row,) = pd.DataFrame(rows).to_dict("records")
    last = Recipe.from_json(row["recipe"]).steps[-1]
    assert last["step"] == "replace_me" and last["kept"] == [0, 1, 4, 5, 6, 7]
    every = pd.concat([known, pd.DataFrame(rows)], ignore_index=True)
    assert variants_of.roles(every, CHOICE) == variants_of.roles(known, CHOICE)
    assert variants_of.healed(known.iloc[:0], "", None, rows).variant.tolist() == [
        "pruned-2-replace_me"
    ]


def test_roles_are_found_by_what_was_removed_and_how(known):
    def row(name, n, **more):
        recipe = ORIGINAL.pruned([0, 1, *range(2 + n, 8)])
        return variants_of.variant(name, recipe, **{"criterion": "magnitude"} | more)

    more = [row("rival", 2), row("x", 2, healed=True), row("y", 2, sft_seed=1, healed=True)]
    more += [row("z", 3, criterion="angular", quantizer="rtn", bits=4)]
    every = pd.concat([pd.DataFrame(more), known])  # whatever comes first
    names = {"unpruned": "original", "operating": "pruned-2", "deeper": "pruned-3"}
    assert variants_of.roles(every, CHOICE) == names | {"rival": "rival"}
    assert variants_of.roles(every, CHOICE, healed=True) == {"rival": "x"}
    own = CHOICE | {"criterion": "magnitude"}  # then the study's own is no rival
    assert variants_of.roles(every, own) == {"unpruned": "original", "operating": "rival"}


def test_a_depth_that_was_not_pruned_is_refused(known):
    with pytest.raises(DermError, match="sft_depths: no model without 5 blocks was made"):
        variants_of.to_heal(known, CHOICE, depths=[20])


STEP = st.fixed_dictionaries(
    {"step": st.sampled_from(["prune", "adapter", "quantize", "", 3])},
    optional={
        "kept": st.one_of(st.lists(st.integers(-2, 9)), st.none(), st.text()),
        "absent": st.one_of(st.lists(st.text(max_size=8)), st.integers()),
        "ref": st.one_of(st.text(), st.just(f"05_sft/{KEY}/a")),
    },
)


@given(
    st.one_of(st.lists(st.one_of(STEP, st.integers())), st.text(), st.none()), st.integers(-1, 9)
)
def test_a_recipe_is_read_right_or_refused_in_a_line(steps, blocks):
    told = {"base": "pico", "fingerprint": "f", "blocks": blocks, "steps": steps}
    try:
        recipe = Recipe.from_json(json.dumps(told))
    except DermError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert set(recipe.kept()) <= set(range(recipe.blocks))
        assert all(unit.block < blocks for unit in recipe.absent())
