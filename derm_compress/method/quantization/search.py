"""Searches over a whole decoder: one calibration pass serves every form asked for.

The result of a form is a dict of tensors ("block.group": s [in]; "block.name": clip indices [out,
in / g]) and rows (block, group, alpha, loss, loss_rtn). With a scratch folder a killed search goes
on at its block.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from derm_compress.files import atomic
from derm_compress.method.quantization import autoawq, calibration, scaling
from derm_compress.method.quantization.quantize import targets

ROWS = ["block", "group", "alpha", "loss", "loss_rtn"]


def search_forms(model, batches, forms, *, device=None, scratch=None):
    """{name: (tensors, rows)} of forms {name: Form}; the model is left as it was.

    device: where blocks run, one at a time, if not where the model is. scratch: a folder for
    finished blocks and for hidden states, which then take no memory. Forms of method `autoawq` are
    searched by AutoAWQ's own quantizer.
    """
    theirs = {name: form for name, form in forms.items() if form.kind.scaling == "autoawq"}
    ours = {name: form for name, form in forms.items() if name not in theirs}
    batches = list(batches) if theirs else batches  # read again for each of them
    for form in forms.values():  # refuses before anything is computed
        targets(model, form)
    for form in theirs.values():
        autoawq.check(model, batches, form)
    found = _search(model, batches, ours, device, scratch) if ours else {}
    return found | {name: autoawq.search(model, batches, form) for name, form in theirs.items()}


def search_one(model, batches, form, **how):
    """(tensors, rows) of one form, as search_forms() finds them."""
    return search_forms(model, batches, {form.name: form}, **how)[form.name]


def _search(model, batches, forms, device, scratch):
    done = {}
    if scratch:
        scratch = Path(scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        done = {
            int(file.stem.partition("-")[2]): file for file in scratch.glob("block-*.safetensors")
        }
    found = {name: ({}, []) for name in forms}
    passes = calibration.collect(model, batches, device=device, folder=scratch, skip=done)
    for block, statistics in passes:
        if block in done:
            made = _read(done[block])
        else:
            made = _search_block(model, block, statistics, forms)
            if scratch:
                _write(scratch / f"block-{block}.safetensors", made)
        for name, (tensors, rows) in made.items():
            found[name][0].update(tensors)
            found[name][1].extend(rows)
    return found


def _search_block(model, block, statistics, forms):
    made = {}
    for name, form in forms.items():
        tensors, rows = scaling.search_block(model, block, statistics, form)
        made[name] = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, rows
    return made


def _write(path, made):
    rows = json.dumps({name: rows for name, (_, rows) in made.items()}).encode()
    held = {"rows": torch.frombuffer(bytearray(rows), dtype=torch.uint8)}
    for name, (tensors, _) in made.items():
        held |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    with atomic(path) as part:
        save_file(held, part)


def _read(path):
    held = load_file(path)
    rows = json.loads(bytes(held.pop("rows").tolist()))
    made = {name: ({}, found) for name, found in rows.items()}
    for key, tensor in held.items():
        name, _, inner = key.partition("/")
        made[name][0][inner] = tensor
    return made
