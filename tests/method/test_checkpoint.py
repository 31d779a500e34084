"""Packed checkpoints: AutoAWQ reads ours and we its; every format reloads in a new process to the same logits."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from derm_compress.errors import DermError
from derm_compress.evaluate.export import export_model, prune_folder, to_half
from derm_compress.method.pruning.plan import published_plan
from derm_compress.method.quantization import checkpoint, gemm, packed, quantize
from derm_compress.method.quantization.grids import IntegerGrid
from derm_compress.method.quantization.packed import PackedLinear
from derm_compress.method.quantization.search import search_one
from derm_compress.model import anatomy, loading, memory, shapes
from derm_compress.model.recipe import Recipe

IDS = torch.arange(5, 25).view(1, -1)
READER = """
import sys, torch, bitsandbytes.nn.modules as bnb
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration
from derm_compress.method.quantization import checkpoint, packed
torch.set_num_threads(1)
bnb.has_avx512bf16 = lambda: False  # some CPUs would repack NF4 at its first forward and compute in bfloat16
for argument in sys.argv[1:]:
    how, path = argument.split("=", 1)
    if how == "plain":
        model = LlavaForConditionalGeneration.from_pretrained(path).eval()
    else:
        model, _ = checkpoint.load(path)
        packed.use_kernels(model, False)
    with torch.no_grad():
        save_file({"x": model(input_ids=torch.arange(5, 25).view(1, -1)).logits}, path + "/logits")
"""
FORMS = {
    "awq4": ("package", "awq", {"method": "awq", "bits": 4, "clip": True}),
    "awq3": ("package", "derm_compress", {"method": "awq", "bits": 3}),
    "mixed": (
        "package",
        "derm_compress",
        {"method": "rtn", "bits": 4, "block_bits": {1: 2, 2: 3, 3: 16}},
    ),
    "symmetric": ("package", "awq", {"method": "rtn_symmetric", "bits": 4}),
    "exceptions": ("package", "awq", {"method": "rtn", "bits": 4, "keep": ("*.down_proj", "2.*")}),
    "projector": (
        "package",
        "derm_compress",
        {"method": "rtn", "bits": 8, "parts": ("decoder", "projector")},
    ),
    "nf4": ("plain", "bitsandbytes", {"method": "bitsandbytes", "bits": 4}),
    "nf4_double": ("plain", "bitsandbytes", {"method": "bitsandbytes", "bits": 4, "double": True}),
    "awq_nf4": ("plain", "bitsandbytes", {"method": "awq_nf4", "bits": 4}),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def made(pico, form, **how):
    model = pico[0]
    searched = quantize.Form(group_size=64, **form).searched
    scales = search_one(model, [{"input_ids": IDS}], group_size=64, **form)[0] if searched else None
    return quantize.quantize(model, group_size=64, scales=scales, **form, **how)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """{name: (folder, logits here, logits in a new process)} of every form."""
    folders, here = {name: tmp_path_factory.mktemp(name) for name in FORMS}, {}
    for name, (_, _, form) in FORMS.items():
        pico = loading.load_base("pico")
        model = made(pico, form, packed=True)
        checkpoint.save(model, folders[name])
        pico[1].save_pretrained(folders[name])
        packed.use_kernels(model, False)
        here[name] = logits(model)
    arguments = [f"{FORMS[name][0]}={folder}" for name, folder in folders.items()]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        name: (folder, here[name], load_file(folder / "logits")["x"])
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("name", FORMS)
def test_a_new_process_gives_the_same_logits(reloaded, name):
    folder, here, there = reloaded[name]
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == FORMS[name][1]
    skipped = told[
        "llm_int8_skip_modules" if FORMS[name][0] == "plain" else "modules_to_not_convert"
    ]
    assert {"vision_tower", "lm_head"} <= set(skipped)
    assert torch.equal(here, there)


def test_a_layout_of_our_own_is_not_opened_with_random_linears_by_others(pico, tmp_path):
    """Plain Transformers warns of an unknown quantization alone, and fills what it does not find at random."""
    checkpoint.save(made(pico, {"method": "rtn", "bits": 3}, packed=True), tmp_path)
    pico[1].save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert quantize.quantized_linears(checkpoint.load(tmp_path)[0])["decoder"] == 56


def test_a_quantized_folder_is_not_pruned(recipe, store, tmp_path):
    export_model(
        recipe.then("quantize", method="rtn", bits=4, group_size=64).to_json(),
        store,
        tmp_path / "q",
    )
    assert {
        path.stat().st_mode & 0o777 for path in (tmp_path / "q").iterdir() if path.is_file()
    } == {0o644}
    with pytest.raises(DermError, match="is quantized; prune the model that it was made of"):
        prune_folder(str(tmp_path / "q"), published_plan(), 1, tmp_path / "out")


def test_stored_bytes_are_the_planned_ones(pico, tmp_path):
    model = made(pico, {"method": "rtn", "bits": 4}, packed=True)
    checkpoint.save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    held = sum(
        t.nbytes for name, t in stored.items() if name.endswith(("qweight", "qzeros", "scales"))
    )
    weights = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear)
    )
    assert held == pytest.approx(weights * (0.5 + 2.5 / 64), rel=0.02)


def test_gemm_layout_is_exact_for_all_codes():
    codes = torch.arange(16, dtype=torch.uint8).repeat(8).view(16, 8).roll(3, 1)
    assert torch.equal(gemm.unpack_eight(gemm.pack_eight(codes)), codes)
    assert gemm.pack_eight(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 15]])).item() == 0xF5316420 - 2**32


@pytest.fixture
def reference():
    pytest.importorskip("awq", reason="autoawq is for Linux")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    return WQLinear_GEMM, dequantize_gemm


def test_autoawq_reads_what_is_written_here(reference, pico, tmp_path):
    kind, dequantize = reference
    model = made(pico, {"method": "rtn", "bits": 4}, packed=True)
    checkpoint.save(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "layers.3.mlp.down_proj"
    theirs, ours = (
        kind(4, 64, 192, 64, False, "cpu"),
        model.model.language_model.get_submodule(name),
    )
    prefix = f"language_model.model.{name}."
    theirs.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    found = dequantize(theirs.qweight, theirs.qzeros, theirs.scales, 4, 64).T
    assert torch.equal(found, ours.dequantized().half())


def test_what_autoawq_packs_is_read_here(reference):
    kind, dequantize = reference
    linear, grid = torch.nn.Linear(128, 64, bias=False).half(), IntegerGrid(4, 64)
    codes, scales, zeros = grid.encode(linear.weight.data)
    linear.weight.data = grid.decode(codes, scales, zeros).half()
    theirs = kind.from_linear(
        linear, 4, 64, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    found = gemm.from_gemm(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found, (codes, scales, zeros), strict=True))
    mine = grid.decode(*found).half()
    assert torch.equal(mine, dequantize(theirs.qweight, theirs.qzeros, theirs.scales, 4, 64).T)


def test_export_of_a_recipe_and_its_card(recipe, store, tmp_path):
    quantized = recipe.then("prune", kept=[0, 1, 2, 5]).then(
        "quantize", method="rtn", bits=4, group_size=64
    )
    export_model(quantized.to_json(), store, tmp_path / "packed")
    export_model(quantized.to_json(), store, tmp_path / "plain", packed=False)
    assert "checkpoint.load" in (tmp_path / "packed" / "README.md").read_text()
    model, processor = checkpoint.load(tmp_path / "packed")
    assert quantize.quantized_linears(model)["decoder"] == 28 and processor.tokenizer
    packed.use_kernels(model, False)
    assert torch.equal(logits(model), logits(checkpoint.load(tmp_path / "plain")[0]))


def test_incomplete_and_foreign_folders_are_refused(pico, recipe, store, tmp_path):
    quantized = recipe.then("quantize", method="rtn", bits=4, group_size=64)
    export_model(quantized.to_json(), store, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    gone = "language_model.model.layers.2.input_layernorm.weight"
    save_file({k: v for k, v in state.items() if k != gone}, file)
    with pytest.raises(DermError, match="1 weights are missing"):
        checkpoint.load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DermError, match="'gemv'.*this package reads"):
        checkpoint.load(tmp_path / "out")
    config["quantization_config"]["quant_method"] = "gptq"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DermError, match="'gptq'"):
        checkpoint.load(tmp_path / "out")
    with pytest.raises(DermError, match="LLM.int8"):
        checkpoint.save(made(pico, {"method": "llm_int8", "bits": 8}), tmp_path)
    with pytest.raises(DermError, match="no linear is packed"):
        checkpoint.save(loading.load_base("pico")[0], tmp_path)


@pytest.mark.parametrize("part", ("projector", "head"))
@pytest.mark.parametrize(("method", "bits"), [("rtn", 4), ("rtn", 8), ("bitsandbytes", 4)])
def test_a_folder_with_another_part_alone_quantized_is_read_in_any_precision(
    pico, tmp_path, method, bits, part
):
    ids = torch.full((1, 36), pico[0].config.image_token_index)
    feed = {"input_ids": ids, "pixel_values": torch.ones(1, 3, 72, 72)}
    model = made(pico, {"method": method, "bits": bits, "parts": (part,)}, packed=True)
    checkpoint.save(model, tmp_path)
    pico[1].save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = {name: t.half() if name.endswith(".bias") else t for name, t in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    found, _ = checkpoint.load(tmp_path)
    assert (
        quantize.quantized_linears(found)[part] > 0 == quantize.quantized_linears(found)["decoder"]
    )
    with torch.no_grad():
        expected, logits_there = (one(**feed).logits for one in (model, found))
    assert torch.allclose(logits_there, expected, atol=1e-2)


HALVED = {
    "awq_layout": {"method": "rtn", "bits": 4},
    "own_layout": {"method": "rtn", "bits": 3},
    "nf4": {"method": "bitsandbytes", "bits": 4},
}


@pytest.mark.parametrize("name", [*HALVED, "unquantized"])
def test_a_half_export_is_as_large_as_planned_and_answers_alike(store, tmp_path, name):
    base, _ = loading.load_base("tiny")
    recipe = Recipe("tiny", anatomy.fingerprint(base), 32).pruned(range(24))
    recipe = recipe.then("quantize", group_size=64, **HALVED[name]) if name in HALVED else recipe
    for folder, half in (("full", False), ("half", True)):
        export_model(recipe.to_json(), store, tmp_path / folder, half=half)
    told = [
        json.loads((tmp_path / folder / "config.json").read_text())["dtype"]
        for folder in ("full", "half")
    ]
    assert told == ["float32", "float16"]
    assert [
        "half precision" in (tmp_path / f / "README.md").read_text() for f in ("full", "half")
    ] == [False, True]
    full, half = (checkpoint.load(tmp_path / folder)[0] for folder in ("full", "half"))
    for model in (full, half):
        packed.use_kernels(model, False)
    assert (logits(half) - logits(full)).norm() < 0.02 * logits(full).norm()
    plan = memory.plan_weights(
        shapes.architecture(base.config), blocks_removed=8, **_format(recipe.steps[-1])
    )
    stored = [t for f in (tmp_path / "half").glob("*.safetensors") for t in load_file(f).values()]
    assert sum(t.nbytes for t in stored) == pytest.approx(sum(plan.values()) * 2**30, rel=0.02)


def _format(step):
    return {key: step[key] for key in ("method", "bits", "group_size") if key in step}


def test_weights_that_overflow_half_precision_are_not_exported_in_it(pico):
    pico[0].lm_head.weight.data[0, 0] = 1e5
    with pytest.raises(
        DermError, match="lm_head.weight overflows torch.float16; export without --half"
    ):
        to_half(pico[0])
