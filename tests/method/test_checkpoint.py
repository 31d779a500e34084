"""Packed checkpoints: AutoAWQ reads ours and we its; a new process gives the same logits."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_llava import scales_of
from transformers import LlavaForConditionalGeneration

from derm_compress.errors import DermError
from derm_compress.evaluate.export import export_model, prune_folder, to_half
from derm_compress.method.pruning.plan import published_plan
from derm_compress.method.quantization import checkpoint, codes, grids, methods, packed
from derm_compress.method.quantization.grids import IntegerGrid
from derm_compress.method.quantization.methods import Form
from derm_compress.method.quantization.quantize import quantize, quantized_linears
from derm_compress.model import anatomy, loading, memory, shapes
from derm_compress.model.recipe import Recipe

IDS = torch.arange(5, 25).view(1, -1)
READER = """
import sys, torch, bitsandbytes.nn.modules as bnb
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration
from derm_compress.method.quantization import checkpoint, packed
torch.set_num_threads(1)
bnb.has_avx512bf16 = lambda: False  # some CPUs would repack NF4 and compute in bfloat16
for argument in sys.argv[1:]:
    how, path = argument.split("=", 1)
    if how == "bitsandbytes":
        model = LlavaForConditionalGeneration.from_pretrained(path).eval()
    else:
        model, _ = checkpoint.load(path)
        packed.use_kernels(model, False)
    with torch.no_grad():
        save_file({"x": model(input_ids=torch.arange(5, 25).view(1, -1)).logits}, path + "/logits")
"""
FORMS = {  # and who made the layout that each takes
    Form("awq", 4, clip=True): "awq",
    Form("awq", 3): "derm_compress",
    Form("awq_gptq", 4): "awq",
    Form("rtn_symmetric", 4): "awq",
    Form("hqq", 4): "derm_compress",
    Form("bitsandbytes", 4): "bitsandbytes",
    Form("bitsandbytes", 4, double=True): "bitsandbytes",
    Form("awq_nf4", 4): "bitsandbytes",
    Form("rtn", 4, block_bits={1: 2, 2: 3}): "derm_compress",
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saved(pico, form, folder):
    """The packed model, which a folder now holds, and what its config says of quantization."""
    model, processor = pico
    scales = scales_of(model, [{"input_ids": IDS}], form)
    quantize(model, form, scales=scales, packed=True)
    assert checkpoint.save(model, folder) in ("autoawq", "bitsandbytes", "own")
    processor.save_pretrained(folder)
    packed.use_kernels(model, False)
    return model, json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """{form: (what its config says, logits here, logits in a new process)}."""
    folders = {form: tmp_path_factory.mktemp(form.name) for form in FORMS}
    here = {}
    for form, folder in folders.items():
        model, told = saved(loading.load_base("pico"), form, folder)
        here[form] = told, logits(model)
    arguments = [f"{FORMS[form]}={folder}" for form, folder in folders.items()]
    words = [sys.executable, "-W", "ignore", "-c", READER, *arguments]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        form: (*here[form], load_file(folder / "logits")["x"]) for form, folder in folders.items()
    }


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_new_process_gives_the_same_logits(reloaded, form):
    told, here, there = reloaded[form]
    assert told["quant_method"] == FORMS[form] and torch.equal(here, there)
    nf4 = FORMS[form] == "bitsandbytes"
    skipped = told["llm_int8_skip_modules" if nf4 else "modules_to_not_convert"]
    assert {"vision_tower", "lm_head"} <= set(skipped)


def test_a_layout_of_our_own_is_not_opened_with_random_linears_by_others(pico, tmp_path):
    """Plain Transformers warns of an unknown quantization alone, and fills what is not there."""
    saved(pico, Form("rtn", 3), tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert quantized_linears(checkpoint.load(tmp_path)[0])["decoder"] == 56


def test_a_quantized_folder_is_not_pruned(recipe, store, tmp_path):
    quantized = recipe.then("quantize", **Form("rtn").step)
    export_model(quantized.to_json(), store, tmp_path / "q")
    files = [path for path in (tmp_path / "q").iterdir() if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}
    with pytest.raises(DermError, match="is quantized; prune the model that it was made of"):
        prune_folder(str(tmp_path / "q"), published_plan(), 1, tmp_path / "out")


def test_gemm_layout_is_exact_for_all_codes():
    every = torch.arange(16, dtype=torch.uint8).repeat(8).view(16, 8).roll(3, 1)
    assert torch.equal(codes.unpack_eight(codes.pack_eight(every)), every)
    assert codes.pack_eight(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 15]])).item() == 0xF5316420 - 2**32


@pytest.fixture
def reference():
    pytest.importorskip("awq", reason="autoawq is for Linux")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    return WQLinear_GEMM, dequantize_gemm


def test_autoawq_reads_what_is_written_here(reference, pico, tmp_path):
    kind, dequantize = reference
    model, _ = saved(pico, Form("rtn"), tmp_path)
    name, theirs = "layers.3.mlp.down_proj", kind(4, 64, 192, 64, False, "cpu")
    prefix = f"language_model.model.{name}."
    state = load_file(tmp_path / "model.safetensors").items()
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in state if k.startswith(prefix)})
    found = dequantize(theirs.qweight, theirs.qzeros, theirs.scales, 4, 64).T
    ours = anatomy.decoder(model).get_submodule(name)
    assert torch.equal(found, ours.dequantized().half())


def test_what_autoawq_packs_is_read_here(reference):
    kind, dequantize = reference
    linear, grid = torch.nn.Linear(128, 64, bias=False).half(), IntegerGrid(4, 64)
    encoded = _, scales, zeros = grid.encode(linear.weight.data)
    linear.weight.data = grid.decode(*encoded).half()
    how = {"scales": scales.T.contiguous(), "zeros": zeros.T.contiguous()}
    theirs = kind.from_linear(linear, 4, 64, **how)
    found = codes.from_gemm(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found, encoded, strict=True))
    expected = dequantize(theirs.qweight, theirs.qzeros, theirs.scales, 4, 64).T
    assert torch.equal(grid.decode(*found).half(), expected)


def test_export_of_a_recipe_and_its_card(recipe, store, tmp_path):
    quantized = recipe.then("prune", kept=[0, 1, 2, 5]).then("quantize", **Form("rtn").step)
    export_model(quantized.to_json(), store, tmp_path / "packed")
    export_model(quantized.to_json(), store, tmp_path / "plain", packed=False)
    assert "checkpoint.load" in (tmp_path / "packed" / "README.md").read_text()
    model, processor = checkpoint.load(tmp_path / "packed")
    assert quantized_linears(model)["decoder"] == 28 and processor.tokenizer
    packed.use_kernels(model, False)
    assert torch.equal(logits(model), logits(checkpoint.load(tmp_path / "plain")[0]))


def test_incomplete_and_foreign_folders_are_refused(pico, tmp_path):
    saved(pico, Form("rtn"), tmp_path)
    file, path = tmp_path / "model.safetensors", tmp_path / "config.json"
    state, config = load_file(file), json.loads(path.read_text())

    def refused(said, **changed):
        told = config["quantization_config"] | changed
        path.write_text(json.dumps(config | {"quantization_config": told}))
        with pytest.raises(DermError, match=said):
            checkpoint.load(tmp_path)

    gone = "language_model.model.layers.2.input_layernorm.weight"
    save_file({k: v for k, v in state.items() if k != gone}, file)
    refused("1 weights are missing")
    save_file(state | {"language_model.model.layers.9.up": torch.ones(2)}, file)
    refused("1 weights have no place")
    refused("'gemv'.*this package reads", version="gemv")
    refused("'gptq'", quant_method="gptq")


def test_what_cannot_be_saved_is_refused(pico, tmp_path):
    with pytest.raises(DermError, match="no linear is packed"):
        checkpoint.save(pico[0], tmp_path)
    with pytest.raises(DermError, match="grid 'int8' has no files"):
        checkpoint.save(quantize(pico[0], Form("llm_int8", 8)), tmp_path)


@dataclass(frozen=True)
class Codebook(IntegerGrid):
    """Made up: 4-bit codes whose values are squares, which no linear kernel knows."""

    kind: ClassVar = "codebook"
    affine: ClassVar = False
    layout: ClassVar = "own"

    def levels(self, weight, ends=None):
        scales = weight.unflatten(-1, (-1, self.group_size)).abs().amax(-1, keepdim=True)
        scales = scales.half().float()
        shares = weight.unflatten(-1, (-1, self.group_size)) / scales
        roots = shares.sign() * shares.abs().sqrt() * 7
        return (roots.round() + 8).clamp(1, 15), scales, torch.full_like(scales, 8)

    def decode(self, codes, scales, zeros):
        roots = (codes.unflatten(-1, (-1, self.group_size)).float() - 8) / 7
        return (roots.sign() * roots.square() * scales.float()[..., None]).flatten(-2)

    def rounded(self, weight, ends=None):
        return self.decode(*self.encode(weight))


@pytest.fixture
def codebook(monkeypatch):
    """A method on a grid of its own, as whoever adds one would."""
    monkeypatch.setitem(grids.GRIDS, "codebook", Codebook)
    monkeypatch.setattr(methods.Method, "format", lambda *_, **__: memory.Format(4, 64, 4))
    made = methods.Method("squares", "squares", "codebook", widths=(4,))
    monkeypatch.setitem(methods.METHODS, "squares", made)
    return Form("squares")


def test_a_grid_that_is_not_linear_goes_the_whole_way(pico, codebook, tmp_path):
    expected = logits(quantize(copy.deepcopy(pico[0]), codebook))
    model, told = saved(pico, codebook, tmp_path)
    packed.use_kernels(model, True)  # it has none, though its width and groups would do
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert packed.kernel_share(model) == 0 and told["quant_method"] == "derm_compress"
    assert {form["kind"] for form in told["modules"].values()} == {"codebook"}
    assert torch.equal(logits(checkpoint.load(tmp_path)[0]), logits(model))


def test_a_grid_that_is_not_known_is_refused_by_name(pico, codebook, tmp_path, monkeypatch):
    saved(pico, codebook, tmp_path)
    monkeypatch.delitem(grids.GRIDS, "codebook")
    with pytest.raises(DermError, match="is on grid 'codebook'; this package reads integer, hqq"):
        checkpoint.load(tmp_path)
    with pytest.raises(DermError, match="grid 'codebook' is not one of integer, hqq, nf4, int8"):
        checkpoint.save(pico[0], tmp_path / "b")
    with pytest.raises(DermError, match="squares asks for grid 'codebook'; grids are integer"):
        quantize(loading.load_base("pico")[0], codebook)


def test_a_grid_says_for_itself_what_it_is():
    with pytest.raises(TypeError, match="grid Silent does not say its kind, affine, layout"):

        class Silent(IntegerGrid):
            """Inherits a linear decode that it may not have."""

    with pytest.raises(DermError, match="quantizer q: how grid 'codebook' is stored"):
        methods.Method("q", "q", "codebook")


def test_counts_by_part_are_checked_on_loading(pico, tmp_path):
    saved(pico, Form("bitsandbytes"), tmp_path)
    counts = quantized_linears(checkpoint.load(tmp_path)[0])
    assert counts == {part: 56 * (part == "decoder") for part in counts}
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    # Transformers would round tower and projector
    told["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    path.write_text(json.dumps(told))
    with pytest.raises(DermError, match="linears of its vision_tower are quantized, not 0"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("form", (Form("rtn", 4), Form("rtn", 3), Form("bitsandbytes"), None))
def test_a_half_export_is_as_large_as_planned_and_answers_alike(store, tmp_path, form):
    base, _ = loading.load_base("tiny")
    recipe = Recipe("tiny", anatomy.fingerprint(base), 32).pruned(range(24))
    if form:
        recipe = recipe.then("quantize", **form.step)
    made = {}
    for name, half in (("float32", False), ("float16", True)):
        folder = export_model(recipe.to_json(), store, tmp_path / name, half=half)
        assert json.loads((folder / "config.json").read_text())["dtype"] == name
        assert ("half precision" in (folder / "README.md").read_text()) == half
        model, _ = checkpoint.load(folder)
        packed.use_kernels(model, False)
        made[name] = logits(model)
    assert (made["float16"] - made["float32"]).norm() < 0.02 * made["float32"].norm()
    arch = shapes.architecture(base.config)
    stored = form.format() if form else memory.Format()
    plan = memory.plan_weights(arch, blocks_removed=8, form=stored)
    stored = [
        t for f in (tmp_path / "float16").glob("*.safetensors") for t in load_file(f).values()
    ]
    assert sum(t.nbytes for t in stored) == pytest.approx(sum(plan.values()) * 2**30, rel=0.02)


def test_weights_that_overflow_half_precision_are_not_exported_in_it(pico):
    pico[0].lm_head.weight.data[0, 0] = 1e5
    said = "lm_head.weight overflows torch.float16; export without --half"
    with pytest.raises(DermError, match=said):
        to_half(pico[0])
