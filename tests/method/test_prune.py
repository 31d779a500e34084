import dataclasses
import json

import pandas as pd
import pytest
import torch
from asking import about, inputs_of, logits
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from derm_compress.__main__ import main
from derm_compress.errors import DermError
from derm_compress.evaluate.export import export_model
from derm_compress.method.assemble import materialize
from derm_compress.method.pruning.controls import removal_controls
from derm_compress.method.pruning.depths import choose_operating_point, plan_depths
from derm_compress.method.pruning.plan import Plan, published_plan, read_plan, read_plans
from derm_compress.model import anatomy, cache, loading, memory, reading, removal, shapes
from derm_compress.model import variants as variants_of
from derm_compress.model.recipe import Recipe
from derm_compress.model.units import Unit

PLAN = Plan("output_similarity", (3, 5, 2, 6, 4), (0, 1, 7), 8, "f" * 16)
RUNS = Plan("angular-contiguous", (), (0, 1, 7), 8, "f" * 16, starts=(4, 2, 3, 3, 2))
PARTS = Plan(
    "x-sublayers", ("2.mlp", "0.attention", "5.attention", "5.mlp", "1.attention", "6.mlp"), (7,), 8
)


def greedy(model, batch, *, cached=True):
    return model.generate(
        **batch, max_new_tokens=6, do_sample=False, use_cache=cached, eos_token_id=-1
    )


@torch.inference_mode()
def gated(model, batch, units, more=6):
    """Logits, and prompt and greedy answer without a cache, with gates around the units."""
    ids, x = batch["input_ids"], model.get_input_embeddings()(batch["input_ids"])
    features = model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    x[ids == model.config.image_token_id] = torch.cat(list(features))
    gates, scores = {}, []
    for unit in units:
        gates |= dict.fromkeys(range(*unit.span), torch.tensor([False]))
    for _ in range(more):
        last = reading.run(
            model, x, cache.PrefixCache(), None, torch.arange(x.shape[1])[None], gates=gates
        )
        scores.append(reading.logits(model, last))
        ids = torch.cat([ids, scores[-1][:, -1:].argmax(-1)], 1)
        x = torch.cat([x, model.get_input_embeddings()(ids[:, -1:])], 1)
    return scores[0], ids


DEPTHS = [(PLAN, 0), (PLAN, 3), (PLAN, 5), (RUNS, 1), (RUNS, 4)]
DEPTHS += [(PARTS, n) for n in range(1, 7)]


@pytest.mark.parametrize(("plan", "n"), DEPTHS)
def test_pruned_by_plan_is_gated_is_exported_and_reloaded(
    recipe, store, dataset, tmp_path, plan, n
):
    """Bit for bit in logits, and in greedy answers with a cache and without."""
    model, processor = materialize(recipe, store)
    batch = about(processor, dataset.images, "treatment")
    scores, ids = gated(model, batch, plan.removed(n))
    export_model(recipe.pruned(plan.kept(n), plan.absent(n)).to_json(), store, tmp_path / "out")
    reloaded = loading.load_base(str(tmp_path / "out"))[0]
    if not plan.absent(n):
        plain, told = LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not told["missing_keys"] and not told["unexpected_keys"]
        assert torch.equal(logits(plain, batch), scores)
    assert len(anatomy.blocks(reloaded)) == len(plan.kept(n))
    with removal.without(model, plan.removed(n)):
        for one in (model, reloaded):
            assert torch.equal(logits(one, batch), scores)
            for cached in (True, False):
                assert torch.equal(greedy(one, batch, cached=cached), ids)


def silence(model, units):
    """Makes units add nothing to the residual stream."""
    for sublayer in (s for unit in units for s in unit.sublayers):
        block = anatomy.blocks(model)[sublayer // 2]
        (block.mlp.down_proj if sublayer % 2 else block.self_attn.o_proj).weight.data.zero_()


@pytest.mark.parametrize(
    ("plan", "n"), [(PLAN, 0), (PLAN, 2), (PLAN, 5)] + [(PARTS, n) for n in range(1, 7)]
)
def test_removal_is_the_residual_stream_without_the_units(pico, dataset, plan, n):
    """Taking units out is making them add nothing, in logits, bit for bit, and in answers."""
    model, processor = pico
    batch = inputs_of(processor, dataset)
    with removal.without(model, plan.removed(n)):
        removed = logits(model, batch)
        said = [greedy(model, batch, cached=cached) for cached in (True, False)]
    silence(model, plan.removed(n))
    assert torch.equal(logits(model, batch), removed)
    assert all(torch.equal(greedy(model, batch), ids) for ids in said)


@pytest.mark.parametrize(
    "units", [[3, 5], ["0.attention", "2.mlp"], [0, "4.attention", "4.mlp", "7.mlp"]]
)
def test_what_was_taken_out_is_put_back(pico, dataset, units):
    model, processor = pico
    batch, state = inputs_of(processor, dataset), dict(model.state_dict())
    before, config = logits(model, batch), model.config.to_dict()
    with pytest.raises(KeyboardInterrupt), removal.without(model, units):
        assert not torch.equal(logits(model, batch), before) and len(model.state_dict()) < len(
            state
        )
        raise KeyboardInterrupt
    assert list(model.state_dict()) == list(state) and model.config.to_dict() == config
    assert all(
        weight.data_ptr() == state[name].data_ptr() for name, weight in model.state_dict().items()
    )
    assert [b.self_attn.layer_idx for b in anatomy.blocks(model)] == list(range(8))
    assert torch.equal(logits(model, batch), before)


def test_a_model_without_any_attention_is_refused_and_whole_again(pico):
    with (
        pytest.raises(DermError, match="without any attention"),
        removal.without(pico[0], [f"{b}.attention" for b in range(8)]),
    ):
        pass
    assert removal.lacking(pico[0]) == () and len(anatomy.blocks(pico[0])) == 8


@pytest.mark.parametrize("n", [0, 1, 4, 6])
def test_parameters_of_what_is_left_are_counted(pico, n):
    model, arch = pico[0], shapes.architecture(pico[0].config)
    row = variants_of.variant("x", Recipe("pico", "f", 8).pruned(PARTS.kept(n), PARTS.absent(n)))
    removed = {key: row[key] for key in memory.REMOVED}
    with removal.without(model, PARTS.removed(n)):
        count = sum(p.numel() for p in model.parameters())
    assert arch.parameters(*removed.values()) == count
    assert sum(memory.plan_weights(arch, **removed).values()) * memory.GIB == pytest.approx(
        2 * count
    )


@pytest.mark.parametrize("plan", ["published", "file"])
def test_a_plan_is_applied_to_a_model_folder_by_one_command(dataset, tmp_path, capsys, plan):
    model, processor = loading.load_base("tiny")
    batch, made = about(processor, dataset.images, "treatment"), published_plan()
    if plan == "file":
        made = Plan("by hand", ("3.mlp", 7, 5), (0,), 32, anatomy.fingerprint(model))
        (tmp_path / "plan.json").write_text(json.dumps(made.to_dict()))
        plan = str(tmp_path / "plan.json")
    assert main(["prune", "tiny", plan, "2", str(tmp_path / "out")]) == 0
    reloaded = loading.load_base(str(tmp_path / "out"))[0]
    assert ("cannot open" in capsys.readouterr().out) == bool(made.absent(2))
    assert len(anatomy.blocks(reloaded)) == len(made.kept(2))
    weights = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert {w.dtype for w in weights.values()} == {torch.float16}, "stored as the model was"
    with removal.without(model, made.removed(2)):
        assert torch.equal(logits(reloaded, batch), logits(model, batch))


def test_plans_that_cannot_be_applied_are_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "text.json").write_text("[1]")
    other = dataclasses.replace(published_plan(), fingerprint="0" * 16)
    (tmp_path / "other.json").write_text(json.dumps(other.to_dict()))
    for plan, count, why in (
        ("none", 2, "neither"),
        ("text.json", 2, "neither"),
        ("other.json", 2, "fingerprint"),
    ):
        plan = plan if plan == "none" else str(tmp_path / plan)
        assert main(["prune", "tiny", plan, str(count), str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert why in told and len(told.strip().splitlines()) == 1
    assert main(["prune", "tiny", "published", "15", str(tmp_path / "out")]) == 2
    assert "0 to 14" in capsys.readouterr().err and not (tmp_path / "out").exists()


NO_UNIT = [-1, "3.mpl", "five", 3.0, True]
BEYOND = [99, 0, "7.mlp"]


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"order": [told]}, f"{told!r} is no unit") for told in NO_UNIT]
    + [({"order": [told]}, r"blocks .* are to go, but protected or beyond 7") for told in BEYOND]
    + [
        ({"order": [5, 5]}, "5 stands there twice"),
        ({"order": [5, "5.mlp"]}, "5.mlp stands there twice"),
        ({"order": [], "starts": [6, 6]}, r"blocks \[7\] are to go"),
        ({"order": [], "starts": [8]}, r"blocks \[8\] are to go"),
    ],
)
def test_plans_that_name_what_cannot_go_are_refused(changed, why):
    with pytest.raises(DermError, match=f"pruning plan {PLAN.criterion}: {why}"):
        Plan.from_dict(PLAN.to_dict() | changed)


def test_one_of_a_stages_plans_is_applied_by_its_name(tmp_path, capsys):
    (tmp_path / "plans.json").write_text(
        json.dumps({plan.criterion: plan.to_dict() for plan in (PLAN, PARTS)})
    )
    assert read_plan(f"{tmp_path / 'plans.json'}:x-sublayers") == PARTS
    for name, why in (
        ("plans.json", f"name one as .*plans.json:RANKING, of {PLAN.criterion}, x"),
        ("plans.json:y", "y"),
    ):
        with pytest.raises(DermError, match=why):
            read_plan(str(tmp_path / name))


def test_a_later_step_cannot_bring_sublayers_back(recipe, store):
    halved = recipe.pruned([0, 1, 2, 5, 7], ["2.mlp", "5.attention"])
    deeper = materialize(halved.pruned([0, 1, 5], ["1.mlp", "5.attention"]), store)[0]
    assert removal.lacking(deeper) == (Unit(1, "mlp"), Unit(2, "attention"))
    with pytest.raises(DermError, match=r"\['5.attention'\] were removed before"):
        materialize(halved.pruned([0, 1, 5]), store)


def test_plans_refuse_what_they_were_not_made_for():
    PLAN.check(blocks=8, fingerprint="f" * 16)
    with pytest.raises(DermError, match="fingerprint"):
        PLAN.check(blocks=8, fingerprint="0" * 16)
    with pytest.raises(DermError, match="made for a model of 8 blocks"):
        PLAN.check(blocks=32, fingerprint="f" * 16)
    with pytest.raises(DermError, match="0 to 5"):
        PLAN.kept(6)
    assert PLAN.kept(2) == (0, 1, 2, 4, 6, 7)
    assert Plan.from_dict(PLAN.to_dict()) == PLAN


@pytest.mark.parametrize("kept", [[], [0, 0, 1], [-1, 1], [0, 8]])
def test_impossible_positions_are_refused(pico, kept):
    with pytest.raises(DermError, match="are not positions"):
        removal.apply(pico[0], kept)


def test_kept_blocks_may_stand_in_another_order(pico):
    model, processor = pico
    layers = list(anatomy.blocks(model))
    removal.apply(model, [5, 0, 2])
    assert [*anatomy.blocks(model)] == [layers[5], layers[0], layers[2]]
    assert [layer.self_attn.layer_idx for layer in anatomy.blocks(model)] == [0, 1, 2]


def scores(**by_depth):
    return pd.DataFrame([{"blocks_removed": int(k[1:]), "score": v} for k, v in by_depth.items()])


def test_the_operating_point_is_where_a_third_is_gone():
    big = Plan("x", tuple(range(2, 31)), (0, 1, 31), 32, "f")
    papers = scores(d0=80.12, d2=73.15, d4=65.75, d6=62.5, d7=57.25, d9=36.25)
    choice = choose_operating_point(papers, big)
    assert choice["criterion"] == "x" and "loses 32%" in choice["why"]
    assert (choice["operating"], choice["deeper"]) == (6, 9)
    assert choose_operating_point(papers, big, fixed=8)["operating"] == 8
    flat = Plan("x", (3, 5), (), 8)
    for told, why in (
        (scores(d0=80, d4=79, d8=26), "no depth"),
        (scores(d0=25, d4=25), "no score above"),
        (scores(d0=float("nan")), "there are no scores"),
    ):
        choice = choose_operating_point(told, big)
        assert (choice["operating"], choice["deeper"]) == (6, 9) and why in choice["why"]
        choice = choose_operating_point(told, flat)
        assert (choice["operating"], choice["deeper"]) == (2, 2)


def test_depths_beyond_a_plan_are_named(capsys):
    assert plan_depths([4, 20, 24], PLAN) == [1, 5]
    assert "goes as far as 5 units: depths [6] are left out" in capsys.readouterr().out
    with pytest.raises(
        DermError, match="as far as 5 units, and depths begin at 6; set depths lower"
    ):
        plan_depths([24, 28], PLAN)
    assert plan_depths([], PLAN) == []
    far = choose_operating_point(scores(d0=80), PLAN, fixed=28)
    assert far["operating"] == 5 and far["why"].endswith(
        "operating_blocks, as far as the plan goes"
    )


def test_stored_plans_are_read_by_name(tmp_path):
    (tmp_path / "plans.json").write_text(
        json.dumps({plan.criterion: plan.to_dict() for plan in (PLAN, RUNS, PARTS)})
    )
    assert read_plans(tmp_path, ["x-sublayers", "angular-contiguous"]) == [PARTS, RUNS]
    with pytest.raises(
        DermError, match="stage 03 has plans for angular-contiguous, output_similarity, x-sublayers"
    ):
        read_plans(tmp_path, ["taylor"])


def test_controls_remove_each_protected_block_alone_and_a_quarter_of_all_others():
    original = Recipe("pico", "f" * 64, 8)
    plan = Plan("output_similarity", (3, 5, 2, 6, 4), (0, 1, 7), 8)
    run = Plan("angular-contiguous", (), (0, 1, 7), 8, starts=(2, 4, 3))
    found = removal_controls(original, plan, run)
    gone = [set(range(8)) - set(Recipe.from_json(text).kept()) for text in found.recipe]
    told = dict(zip(found.variant, gone, strict=True))
    assert told["original-whole"] == set() and len(set(found.variant)) == len(found) == 11
    assert [told[f"original-protected-{block}"] for block in (0, 1, 7)] == [{0}, {1}, {7}]
    assert told["original-chosen"] == {3, 5} and told["original-run"] == {4, 5}
    drawn = [told[f"original-random-{draw}"] for draw in range(5)]
    assert all(len(blocks) == 2 and blocks <= {2, 3, 4, 5, 6} for blocks in drawn)
    assert len(set(map(frozenset, drawn))) > 1
    assert "run" not in set(removal_controls(original, plan, None).control)


def test_the_published_plan_is_for_32_blocks():
    plan = published_plan()
    plan.check(blocks=32, fingerprint="any")
    assert [unit.block for unit in plan.order[:7]] == [23, 4, 18, 22, 21, 24, 17]
    assert plan.most == 14 and plan.protected == (0, 1, 31) and len(plan.kept(14)) == 18
    assert plan.removed(3) == (Unit(4), Unit(18), Unit(23))
