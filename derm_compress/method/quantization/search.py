"""Searches for scales and clipping over a whole decoder: one calibration pass serves every form asked for.

The result of a form is a dict of tensors ("block.group": s [in]; "block.name": clip indices [out, in / g]) and rows
(block, group, alpha, loss, loss_rtn). With a scratch folder a killed search goes on at its block.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from derm_compress.files import atomic
from derm_compress.method.quantization import autoawq, calibration, quantize, scaling
from derm_compress.model import anatomy

ROWS = ["block", "group", "alpha", "loss", "loss_rtn"]


def search(model, batches, forms, *, device=None, scratch=None):
    """{name: (tensors, rows)} of forms {name: Form}, by this package's search; the model is left as it was.

    device: where blocks run, one at a time, if not where the model is. scratch: a folder for finished blocks and for
    hidden states, which then take no memory.
    """
    grids = {
        name: _grids(model, form) for name, form in forms.items()
    }  # refuses before anything is computed
    found, scratch = {name: ({}, []) for name in forms}, scratch and Path(scratch)
    if scratch:
        scratch.mkdir(parents=True, exist_ok=True)
    done = {
        block
        for block in range(len(anatomy.blocks(model)))
        if scratch and _file(scratch, block).exists()
    }
    passes = calibration.collect(model, batches, device=device, folder=scratch, skip=done)
    for block, statistics in passes:
        made = (
            _read(_file(scratch, block))
            if block in done
            else _search_block(model, block, statistics, forms, grids)
        )
        if scratch and block not in done:
            _write(_file(scratch, block), made)
        for name, (tensors, rows) in made.items():
            found[name][0].update(tensors)
            found[name][1].extend(rows)
    return found


def search_forms(model, batches, forms, *, device=None, scratch=None):
    """As search(), with the forms of method `autoawq` searched by AutoAWQ's own quantizer."""
    theirs = {
        name: form for name, form in forms.items() if quantize.METHODS[form.method][1] == "autoawq"
    }
    ours = {name: form for name, form in forms.items() if name not in theirs}
    batches = list(batches) if theirs else batches  # read again for each of them
    for form in theirs.values():
        autoawq.check(model, batches, form)
    found = search(model, batches, ours, device=device, scratch=scratch) if ours else {}
    for name, form in theirs.items():
        found[name] = autoawq.search(model, batches, form)
    return found


def search_one(
    model, batches, *, method="awq", bits, group_size, device=None, scratch=None, **options
):
    """(tensors, rows) of one form."""
    form = quantize.Form(method, bits, group_size, **options)
    return search_forms(model, batches, {"": form}, device=device, scratch=scratch)[""]


def _grids(model, form):
    """[{name: grid} by block] of the decoder's linears that a form quantizes."""
    found = [{} for _ in anatomy.blocks(model)]
    for target in quantize.targets(model, form):
        if target.part == "decoder":
            block, _, name = target.name.partition(".")
            found[int(block)][name] = target.grid
    return found


def _search_block(model, block, statistics, forms, grids):
    made = {}
    for name, form in forms.items():
        how = {"scaled": form.scaled, "duo": form.duo, "clip": form.clip}
        tensors, rows = scaling.search_block(model, block, statistics, grids[name][block], **how)
        made[name] = {key: t.cpu().contiguous() for key, t in tensors.items()}, rows
    return made


def _file(scratch, block):
    return scratch / f"block-{block}.safetensors"


def _write(path, made):
    tensors = {
        f"{name}/{key}": t for name, (tensors, _) in made.items() for key, t in tensors.items()
    }
    rows = json.dumps({name: rows for name, (_, rows) in made.items()}).encode()
    tensors["rows"] = torch.frombuffer(bytearray(rows), dtype=torch.uint8)
    with atomic(path) as part:
        save_file(tensors, part)


def _read(path):
    tensors = load_file(path)
    made = {
        name: ({}, rows) for name, rows in json.loads(bytes(tensors.pop("rows").tolist())).items()
    }
    for key, tensor in tensors.items():
        name, _, inner = key.partition("/")
        made[name][0][inner] = tensor
    return made
