"""What may go wrong with quantized models: bytes, odd weights, offloading, counts on loading, a recipe elsewhere."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_llava import asked, batch, collect_all, small_llava

from derm_compress import files
from derm_compress.errors import DermError
from derm_compress.evaluate import latency
from derm_compress.method.assemble import materialize
from derm_compress.method.quantization import calibration, checkpoint, forms, grids, quantize
from derm_compress.method.quantization.errors import quantization_errors
from derm_compress.method.quantization.scales import search_scales
from derm_compress.method.quantization.search import search_one
from derm_compress.model import anatomy, memory, prompts, shapes, usage  # fmt: skip
from derm_compress.model.recipe import Recipe

BATCHES = [batch(4, seed=1), asked()]


@pytest.fixture(scope="module")
def model():
    return small_llava(2)


@pytest.mark.parametrize(
    ("method", "bits", "options"),
    [("hqq", 4, {}), ("hqq", 3, {}), ("awq", 3, {"clip": True}), ("llm_int8", 8, {}), ("bitsandbytes", 4, {}),
     ("rtn", 4, {"block_bits": {0: 2}})],
)  # fmt: skip
def test_held_bytes_are_those_of_the_plan(model, method, bits, options):
    form = quantize.Form(method, bits, 64, **options)
    scales = (
        search_one(model, BATCHES, method=method, bits=bits, group_size=64, **options)[0]
        if form.searched
        else None
    )
    how = {"method": method, "bits": bits, "group_size": 64, "scales": scales, **options}
    made = quantize.quantize(copy.deepcopy(model), packed=True, **how)
    held = (usage.tensor_gib(made) - usage.tensor_gib(model)) * 2**30
    step = {"method": method, "bits": bits, "group_size": 64, **options}
    planned = memory.plan_weights(shapes.architecture(model.config), **forms.stored_as(step, 2))
    weights = sum(
        m.weight.numel() for b in anatomy.blocks(model) for m in anatomy.linears(b).values()
    )
    codebook = 14 * 64 if method == "bitsandbytes" else 0  # 64 bytes a linear, which no plan counts
    expected = (planned["decoder_linears"] + planned["quantization_scales"]) * 2**30 + codebook
    assert held + 4 * weights == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("value", (0.0, 0.7, -1e-6))
@pytest.mark.parametrize(
    "grid", (grids.HQQGrid(3, 64), grids.NF4Grid(64), grids.NF4Grid(64, True)), ids=str
)
def test_constant_rows_and_dead_ones_are_represented(grid, value):
    weight = torch.full((64, 128), value)
    rounded = grid.rounded(weight)
    assert (
        torch.isfinite(rounded).all() and (rounded - weight).abs().max() <= 1e-3 * abs(value) + 2e-8
    )


def test_dead_rows_of_llm_int8_stay_zero():
    linear = torch.nn.Linear(64, 8, bias=False)
    linear.weight.data[3] = 0
    with torch.no_grad():
        found = grids.Int8Grid().packed(linear)(torch.randn(2, 64))
    assert torch.isfinite(found).all() and not found[:, 3].any()


@pytest.mark.parametrize("method", sorted(quantize.METHODS))
def test_weights_that_are_no_numbers_are_refused_by_every_method_and_by_name(method):
    model = small_llava(1)
    anatomy.blocks(model)[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(DermError, match="weights of 0.mlp.up_proj are NaN"):
        quantize.targets(model, quantize.Form(method, 8 if method == "llm_int8" else 4, 64))


def test_activations_beyond_half_precision_are_refused_by_place():
    model = small_llava(2).half()
    anatomy.blocks(model)[1].mlp.up_proj.weight.data[:] = 3e4
    with pytest.raises(DermError, match="NaN or infinite inputs at block.group 1.down"):
        list(calibration.collect(model, BATCHES))


def test_offloading_moves_one_block_at_a_time_and_changes_no_statistic(model, monkeypatch):
    moved, real = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda m, d: moved.append((m, str(d))) or real(m, d))
    plain = collect_all(model, BATCHES)
    assert not moved
    found = collect_all(model, BATCHES, device="cpu:0")  # another device by name alone
    known = list(anatomy.blocks(model))
    blocks = [(known.index(m) if m in known else None, d) for m, d in moved]
    there = [pair for pair in blocks if pair[0] is not None]
    assert there == [(0, "cpu:0"), (0, "cpu"), (1, "cpu:0"), (1, "cpu")]
    assert all(torch.equal(found[key].mean_abs, one.mean_abs) for key, one in plain.items())
    assert all(torch.equal(found[key].matrix(), one.matrix()) for key, one in plain.items())


def quantized_folder(pico, folder, **form):
    made = quantize.quantize(pico[0], group_size=64, packed=True, **form)
    checkpoint.save(made, folder)
    pico[1].save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_counts_by_part_are_checked_on_loading(pico, tmp_path):
    told = quantized_folder(pico, tmp_path, method="rtn", bits=4, keep=("2.*",))
    checkpoint.load(tmp_path)
    listed = told["quantization_config"]["modules_to_not_convert"]
    told["quantization_config"]["modules_to_not_convert"] = [
        n for n in listed if ".layers.2.mlp.up_proj" not in n
    ]
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(DermError, match="49 linears of its decoder are quantized, not 50"):
        checkpoint.load(tmp_path)


def test_counts_of_a_bitsandbytes_checkpoint_are_checked_too(pico, tmp_path):
    told = quantized_folder(pico, tmp_path, method="bitsandbytes", bits=4)
    counts = quantize.quantized_linears(checkpoint.load(tmp_path)[0])
    assert counts == {part: 56 * (part == "decoder") for part in counts}
    told["quantization_config"]["llm_int8_skip_modules"] = [
        "lm_head"
    ]  # Transformers would round tower and projector
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(DermError, match="linears of its vision_tower are quantized, not 0"):
        checkpoint.load(tmp_path)


def awq_variant(recipe, store, dataset, folder):
    """A variants frame of one AWQ model, and its source's."""
    sources = pd.DataFrame(
        [{"variant": "original", "criterion": "", "healed": False, "recipe": recipe.to_json()}]
    )
    how = {
        "items": dataset.of("train")[:2],
        "images": dataset.images,
        "batch_size": 6,
        "device": "cpu",
    }
    wanted = forms.asked(["original"], ["awq"], 4, 64)
    (folder / "scales").mkdir()
    search_scales(folder / "scales", wanted, sources, store, scratch=folder / "scratch", **how)
    return forms.quantized(sources, wanted, store.ref("scales")), sources, how


ELSEWHERE = """
import hashlib, json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from derm_compress.data import synthetic
from derm_compress.method.assemble import materialize
from derm_compress.model import prompts
from derm_compress.model.recipe import Recipe
torch.set_num_threads(1)
root, text = Path(sys.argv[1]), sys.argv[2]
store = SimpleNamespace(resolve=lambda ref: root.joinpath(*ref.split("/")[2:]))
model, processor = materialize(Recipe.from_json(text), store)
dataset = synthetic.make(n_train=24, n_test=8, n_heldout=8, size=72, seed=3)
inputs = prompts.prepare(processor, [prompts.prompt(processor, "name")], dataset.images[[0]], model.device)
with torch.no_grad():
    print(hashlib.sha256(model(**inputs).logits.numpy().tobytes()).hexdigest())
"""


def test_a_quantized_recipe_answers_bit_equally_in_a_new_process(recipe, store, dataset, tmp_path):
    variants, _, _ = awq_variant(recipe, store, dataset, tmp_path)
    text = variants.recipe[0]
    model, processor = materialize(Recipe.from_json(text), store)
    inputs = prompts.prepare(
        processor, [prompts.prompt(processor, "name")], dataset.images[[0]], model.device
    )
    with torch.no_grad():
        here = hashlib.sha256(model(**inputs).logits.numpy().tobytes()).hexdigest()
    words = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(tmp_path), text]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip().splitlines()[-1:] == [here], done.stderr[-2000:]


def test_measured_weights_are_those_stored_and_errors_go_on(recipe, store, dataset, tmp_path):
    variants, sources, how = awq_variant(recipe, store, dataset, tmp_path)
    told = latency.time_variants(
        variants,
        store,
        dataset.of("test"),
        dataset.images,
        device="cpu",
        new_tokens=2,
        repeats=1,
        warmup=1,
    )
    stored = materialize(Recipe.from_json(variants.recipe[0]), store, packed=True)[0]
    assert told.weights_gib[0] == usage.tensor_gib(stored)
    journal = files.Journal(tmp_path / "errors.jsonl")
    first = quantization_errors(variants, store, journal=journal, **how)
    again = files.Journal(tmp_path / "errors.jsonl")
    broken = variants.assign(recipe=variants.recipe.str.replace("scales/awq4", "gone"))
    assert first.equals(quantization_errors(broken, store, journal=again, **how))
