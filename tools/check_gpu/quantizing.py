"""Quantizers of the embedded models: rounded, packed, searched, exported."""

import copy
import time
from importlib.util import find_spec
from unittest.mock import patch

import pandas as pd
import torch
from torch.cuda import _utils

from derm_compress import evaluate, method
from derm_compress.method.iterate import Source
from derm_compress.method.quantization import checkpoint, gemv, packed, scaling, wanted
from derm_compress.method.quantization.grids import grid_of
from derm_compress.method.quantization.methods import Form, forms
from derm_compress.method.quantization.quantize import quantize
from derm_compress.model import loading, variants
from derm_compress.model.graphs import Recorded
from derm_compress.model.recipe import Recipe, shared
from tools.check_gpu import Skip, check, rig

BLOCKS = (0, 9, 20, 31)  # of tiny's, which a search reads
NF4, PLAIN = ["bitsandbytes", "awq_nf4"], ["rtn", "rtn_symmetric", "awq", "awq-clip", "awq-text"]


@check(60)
def int4_kernel(device, folder):
    """torch's int4 kernel gives what decoded weights give, and keeps every code."""
    linear = torch.nn.Linear(1024, 512, bias=False, device=device).requires_grad_(False)
    small = grid_of(Form("rtn"), 0).packed(linear, None)
    if not packed.has_kernel(small.grid, small.shape, small.codes.device):
        raise Skip("torch has no int4 kernel for this device")
    x, codes = torch.randn(5, 1024, device=device), small.encoded()[0].clone()
    far = rig.apart(small(x), x @ small.dequantized().T)
    assert small.steps is not None and torch.equal(small.encoded()[0], codes), "codes have changed"
    assert far < 0.02, f"{far} apart"
    return f"within {far:.1e}"


@check(90)
def gemv_kernel(device, folder):
    """The kernel for a T4 compiles, gives what decoded weights give, and sooner than decoding."""
    rig.need_gpu(device)
    linear = torch.nn.Linear(4096, 11008, bias=False, device=device, dtype=torch.float16)
    times = {"fp16": microseconds(linear, linear.weight[:1])}
    small = grid_of(Form("rtn", 4, 128)).packed(linear.requires_grad_(False))
    if packed.has_kernel(small.grid, small.shape, small.codes.device):
        times["torch's int4"] = microseconds(copy.deepcopy(small), linear.weight[:1])
    rig.be_t4(device)
    known = small.zeros.dtype
    _utils._nvrtc_compile(gemv.source(gemv.MOST, 128, known), "product", "75")
    for tokens in (1, 3, gemv.MOST):
        x = torch.randn(tokens, 4096, device=device, dtype=torch.float16)
        far = rig.apart(small(x).float(), x.float() @ small.dequantized().T)
        assert small.by_kernel, "it was not compiled"
        assert far < 1e-3, f"{tokens} tokens are {far} apart"
        times[f"{tokens} tokens"] = microseconds(small, x)
    packed.use_kernels(small, False)
    times["decoded"] = microseconds(small, x)
    assert times["1 tokens"] < times["decoded"] / 2, times
    return f"microseconds: {times}"


def microseconds(module, x) -> float:
    """A call's, of fifty that are recorded together."""
    recorded = Recorded(lambda x: tuple(module(x) for _ in range(50)), "timing")
    for _ in range(3):
        recorded(x)
    torch.cuda.synchronize()
    began = time.perf_counter()
    recorded(x)
    torch.cuda.synchronize()
    return round(1e6 * (time.perf_counter() - began) / 50, 1)


@check(200)
def quantizers(device, folder):
    """Every grid rounds as on the CPU, and packed linears give what rounded ones give."""
    data, said = rig.drawn(1, 2), []
    model, processor = loading.load_base("pico", device)
    cpu, _ = loading.load_base("pico", dtype=model.dtype)
    asked = forms(["rtn", "rtn_symmetric"], [4, 3, 2, 8], 64)
    if rig.has_nf4(device):
        asked += [Form("bitsandbytes"), Form("bitsandbytes", double=True)]
    if find_spec("hqq"):
        asked += forms(["hqq"], [4, 3], 64)
    for form in asked:
        full = quantize(copy.deepcopy(model), form)
        there = quantize(copy.deepcopy(cpu), form)
        alike = [
            torch.isclose(a.cpu(), b, atol=2e-3 * float(b.abs().max())).flatten()
            for a, b in zip(full.parameters(), there.parameters(), strict=True)
        ]
        equal = float(torch.cat(alike).float().mean())
        small = quantize(copy.deepcopy(model), form, packed=True)
        packed.use_kernels(small, False)
        far = rig.apart(rig.logits(small, processor, data), rig.logits(full, processor, data))
        assert equal > 0.99 and far < 0.02, f"{form.name}: {equal} are the CPU's, {far} apart"
        said.append(f"{form.name} {far:.0e}")
    return f"packed from rounded: {', '.join(said)}"


def searched(folder, device: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the search's rows, variants) of a few of tiny's blocks; folder/scales holds their scales."""
    recipe, data = rig.tiny_recipe().pruned(BLOCKS), rig.drawn(3, 1)
    sources = pd.DataFrame([variants.variant(variants.ORIGINAL, recipe)])
    every = method.wanted_forms([variants.ORIGINAL], [], PLAIN + NF4 * rig.has_nf4(device), [4], 64)
    for name in ("scales", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    where = {"store": rig.Stored(folder), "device": device, "scratch": folder / "scratch"}
    asked = every, sources, data.of("train"), data.images
    method.search_scales(folder / "scales", *asked, batch_size=6, **where)
    rows = pd.read_parquet(folder / "scales" / "search.parquet")
    return rows, wanted.quantized_variants(sources, every, f"{rig.KEY}/scales")


@check(300)
def searches(device, folder):
    """A search with one block at a time on a GPU finds the CPU's scales, and is kept by block."""
    (found, _), (cpu, _) = searched(folder, device), searched(folder / "cpu", "cpu")
    with patch.object(scaling, "search_block", side_effect=AssertionError("searched anew")):
        assert searched(folder, device)[0].equals(found), "what is kept is something else"
    alike = float((found.alpha == cpu.alpha).mean())
    far = float((found.loss / cpu.loss.clip(lower=1e-9) - 1).abs().median())
    assert len(found) and found.block.nunique() == len(BLOCKS) and alike > 0.8 and far < 0.05
    return f"{alike:.2f} of the exponents are the CPU's, losses within {far:.1e}"


@check(200)
def put_back(device, folder):
    """One model becomes each quantized variant as a new one would, and itself again, bit by bit."""
    store, quantize = rig.Stored(folder), {"quantize": method.quantize_step}
    recipes = [Recipe.from_json(recipe) for recipe in searched(folder, device)[1].recipe]
    source = Source(shared(recipes), store, device, **quantize)
    for recipe in [*recipes, source.begin]:
        made, _ = source.take(recipe)
        expected, _ = method.materialize(recipe, store, device, **quantize)
        pairs = zip(made.parameters(), expected.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), recipe.steps[-1]
    return f"{len(recipes)} variants of one load"


@check(300)
def exports(device, folder):
    """Exported folders open on the device and give the logits of their recipes."""
    store, data, said = rig.Stored(folder), rig.drawn(1, 2), {}
    for row in searched(folder, device)[1].itertuples():
        path = evaluate.export_model(row.recipe, store, folder / row.quantizer)
        model, processor = checkpoint.load(path, device)
        packed.use_kernels(model, False)
        how = {"quantize": method.quantize_step}
        full, _ = method.materialize(Recipe.from_json(row.recipe), store, device, **how)
        made, expected = (rig.logits(one, processor, data) for one in (model, full))
        said[row.quantizer] = round(rig.apart(made, expected), 4)
    assert set(said) >= set(PLAIN) and max(said.values()) < 0.03, said
    return f"apart {said}"
