"""The calibration pass: every linear's input statistics, block after block.

What prompts about one picture share, the picture above all, is computed once and counts as often as
it is read. A model too large for the GPU stays on the CPU, with the block at hand on the GPU;
hidden states between blocks wait in a folder where one is given, so that memory does not grow with
the number of tokens.
"""

import contextlib

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from derm_compress.errors import DermError
from derm_compress.method.quantization import folding
from derm_compress.method.quantization.inputs import InputSums
from derm_compress.model import anatomy
from derm_compress.model.cache import PrefixCache, visible


def collect(model, batches, *, device=None, folder=None, skip=()):
    """Yield (block index, {group: InputStatistics}) for each block of the decoder in turn.

    Batches are the processor's output; positions outside the attention mask do not count, and
    token_weights, if a batch has them, weigh the others. device: where blocks run, one at a time,
    if it is not the model's. folder: where hidden states wait until the end. skip: blocks that run
    but yield {} (their results are kept from before).
    """
    training, home = model.training, model.device
    device = torch.device(device or home)
    waiting = Waiting(folder)
    model.eval()
    try:
        with _on(device, home, _around(model)):
            passes = [
                [waiting.put((i, k), part) for k, part in enumerate(parts_of(model, batch))]
                for i, batch in enumerate(batches)
            ]
        if not passes:
            said = "no batch was given; pass at least one batch of the processor's output"
            raise DermError(f"quantize: {said}")
        for index, block in enumerate(anatomy.blocks(model)):
            with _on(device, home, [block]):
                sums = _through(block, passes, waiting, watch=index not in skip)
                yield index, _statistics(index, sums)
    finally:
        model.train(training)
        waiting.clear()


def _around(model):
    """What runs before the blocks."""
    parts, decoder = anatomy.parts(model), anatomy.decoder(model)
    return [parts["vision_tower"], parts["projector"], decoder.embed_tokens, decoder.rotary_emb]


@contextlib.contextmanager
def _on(device, home, modules):
    """Some modules of a model on another device for a while."""
    if device != home:
        for module in modules:
            module.to(device)
    try:
        yield
    finally:
        if device != home:
            for module in modules:
                module.to(home)


class Waiting:
    """Tensors by name that wait between two blocks, in memory or in files of a folder."""

    def __init__(self, folder):
        self.folder, self.held = folder, {}

    def put(self, key, tensors):
        """Keep a dict of tensors, or what is None among them, under a key, which is given back."""
        if self.folder:
            there = {k: t.cpu().contiguous() for k, t in tensors.items() if t is not None}
            draft = self.folder / "batch-draft"  # tensors may still be read from the file before
            save_file(there, draft)
            draft.replace(self._file(key))
        else:
            self.held[key] = tensors
        return key

    def take(self, key, device):
        found = load_file(self._file(key)) if self.folder else self.held[key]
        return {k: t if t is None else t.to(device) for k, t in found.items()}

    def _file(self, key):
        return self.folder / "-".join(["batch", *map(str, key)])

    def clear(self):
        for file in self.folder.glob("batch-*") if self.folder else ():
            file.unlink()


class _Reached(Exception):
    """The decoder's first block was reached: what comes after it runs block by block."""


@torch.inference_mode()
def enter(model, batch):
    """Hidden states [rows, tokens, width] before the first block, and its other arguments."""
    caught, picture = [], pictures(batch)

    def stop(_, args, kwargs):
        caught.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
        raise _Reached

    handles = [anatomy.blocks(model)[0].register_forward_pre_hook(stop, with_kwargs=True)]
    where = anatomy.decoder(model).embed_tokens.weight.device
    feed = {k: v.to(where) for k, v in batch.items() if k not in ("labels", "token_weights")}
    if "pixel_values" in feed and len(set(picture)) < len(picture):
        feed["pixel_values"] = feed["pixel_values"][_first(picture)]
        projector = anatomy.parts(model)["projector"]
        handles.append(projector.register_forward_hook(lambda _, args, out: out[picture]))
    try:
        model(**feed, use_cache=False)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught[0]


def pictures(batch):
    """The picture of each row by number: one for all without pixels, its own for several a row."""
    pixels, rows = batch.get("pixel_values"), len(batch["input_ids"])
    if pixels is None:
        return [0] * rows
    if len(pixels) != rows:
        return list(range(rows))
    numbers = {}
    return [numbers.setdefault(row.cpu().float().numpy().tobytes(), len(numbers)) for row in pixels]


def _first(picture):
    """The first row of each picture."""
    return [picture.index(number) for number in range(max(picture) + 1)]


@torch.inference_mode()
def parts_of(model, batch):
    """A batch before the first block: what rows about one picture share, if anything, and the rest.

    Either is a dict: hidden [rows, tokens, width], cos and sin of the tokens' places, mask (None:
    causal), weight of the tokens (None: all 1), row: which of the rows shared each follows (None:
    nothing is shared).
    """
    hidden, _ = enter(model, batch)
    device, picture = hidden.device, pictures(batch)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().to(device)
    weight = batch.get("token_weights", torch.ones(real.shape)).to(device, torch.float32)
    ids = _unpadded(batch["input_ids"].to(device), real)
    rows, weights = _unpadded(hidden, real), _unpadded(weight, real)
    count = _alike(ids) if len(set(picture)) < len(picture) else 0
    rest = pad_sequence([row[count:] for row in rows], batch_first=True)
    own = pad_sequence([row[count:] for row in weights], batch_first=True)
    places = torch.arange(count + rest.shape[1], device=device)
    if not count:  # what stands behind a row, padding, is unseen by causal attention
        return [_part(model, rest, own, places)]
    picture = torch.tensor(picture, device=device)
    begins = torch.stack([rows[row][:count] for row in _first(picture.tolist())])
    shared = torch.zeros(begins.shape[:2], device=device)
    shared.index_add_(0, picture, torch.stack([row[:count] for row in weights]))
    mask = visible((places <= places[count:, None])[None, None], hidden.dtype)
    return [
        _part(model, begins, shared, places[:count]),
        _part(model, rest, own, places[count:], mask=mask, row=picture),
    ]


def _unpadded(rows, real):
    return [row[own] for row, own in zip(rows, real, strict=True)]


def _alike(rows):
    """How many of the first tokens all rows have in common; fewer than any row has."""
    most = max(0, min(map(len, rows)) - 1)
    begins = torch.stack([row[:most] for row in rows])
    return int((begins == begins[0]).all(0).cumprod(0).sum())


def _part(model, hidden, weight, places, mask=None, row=None):
    cos, sin = anatomy.decoder(model).rotary_emb(hidden, position_ids=places[None])
    weight = None if (weight == 1).all() else weight
    return {"hidden": hidden, "cos": cos, "sin": sin, "mask": mask, "weight": weight, "row": row}


@torch.inference_mode()
def _through(block, passes, waiting, *, watch):
    """Send every batch through a block; {group: InputSums} of what its linears read."""
    sums, weight, handles = {}, None, []

    def hook(group):
        def see(_, args):
            x = args[0]
            if weight is None:
                sums[group].add(x.flatten(0, 1).float())
            else:
                real = weight > 0
                sums[group].add(x[real].float(), weight[real])

        return see

    for group in anatomy.groups(block) if watch else ():
        first, *_ = folding.group_linears(block, group).values()
        sums[group] = InputSums()
        handles.append(first.register_forward_pre_hook(hook(group)))
    device = next(block.parameters()).device
    try:
        for batch in passes:
            memory = None
            for key in batch:
                part = waiting.take(key, device)
                weight, memory = part.get("weight"), PrefixCache(memory, part.get("row"))
                out = block(
                    part["hidden"],
                    position_embeddings=(part["cos"], part["sin"]),
                    attention_mask=part.get("mask"),
                    past_key_values=memory,
                )
                waiting.put(key, part | {"hidden": out[0] if isinstance(out, tuple) else out})
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _statistics(index, sums):
    found = {group: one.statistics() for group, one in sums.items()}
    for group, one in found.items():
        if not one.finite():
            where = f"NaN or infinite inputs at block.group {index}.{group}"
            raise DermError(f"quantize: {where}; check the model's dtype")
    return found
