"""The calibration pass: every linear's input statistics, block after block.

What prompts about one picture share, the picture above all, is computed once and counts as often as
it is read. A model too large for the GPU stays on the CPU, with the block at hand on the GPU. What
all prompts have come to waits there, too: at 7B 6 MiB a picture, 0.1 GiB for 16 of them.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from derm_compress.errors import DermError
from derm_compress.method.quantization.quantize import group_linears
from derm_compress.method.quantization.scaling import InputSums
from derm_compress.model import anatomy
from derm_compress.model.cache import PrefixCache, visible
from derm_compress.model.reading import picture_features


def collect(model, batches, *, device=None, skip=(), instead=None):
    """Yield (block index, {group: InputStatistics}) for each block of the decoder in turn.

    Batches are the processor's output; positions outside the attention mask do not count, and
    token_weights, if a batch has them, weigh the others. device: where blocks run, one at a time,
    if it is not the model's. skip: blocks that run but yield {} (their results are kept from
    before). instead: a function of the index that gives the module whose output the next block
    reads, once the statistics are used; without one it is the block.
    """
    training, home = model.training, model.device
    device = torch.device(device or home)
    parts, decoder = anatomy.parts(model), anatomy.decoder(model)
    before = parts["vision_tower"], parts["projector"], decoder.embed_tokens, decoder.rotary_emb
    model.eval()
    try:
        with _on(device, home, before):
            passes = [split(model, batch) for batch in batches]
        if not passes:
            said = "no batch was given; pass at least one batch of the processor's output"
            raise DermError(f"quantize: {said}")
        for index, block in enumerate(anatomy.blocks(model)):
            with _on(device, home, [block]):
                watched = () if index in skip else anatomy.groups(block)
                here = [list(parts) for parts in passes] if instead else passes
                sums = _through(block, here, watched)
                yield index, _statistics(index, sums)
                if instead:
                    _through(instead(index), passes, ())
    finally:
        model.train(training)


@contextlib.contextmanager
def _on(device, home, modules):
    """Some modules of a model on another device for a while."""
    for module in modules if device != home else ():
        module.to(device)
    try:
        yield
    finally:
        for module in modules if device != home else ():
            module.to(home)


@dataclass(frozen=True)
class Part:
    """Tokens of a batch on their way through the blocks.

    cos, sin: of their places. mask: None is causal. weight of the tokens: None is 1 each. row:
    which row of the part before each follows, if any does.
    """

    hidden: torch.Tensor  # [rows, tokens, width]
    cos: torch.Tensor
    sin: torch.Tensor
    weight: torch.Tensor | None
    mask: torch.Tensor | None = None
    row: torch.Tensor | None = None


def pictures(batch):
    """The picture of each row by number; one for all rows without any."""
    if "pixel_values" not in batch:
        return [0] * len(batch["input_ids"])
    rows, numbers = batch["pixel_values"].cpu().float().numpy(), {}
    return [numbers.setdefault(row.tobytes(), len(numbers)) for row in rows]


def _first(picture):
    """The first row of each picture."""
    return [picture.index(number) for number in range(max(picture) + 1)]


@torch.inference_mode()
def enter(model, batch):
    """Hidden states [rows, tokens, width] before the first block; a picture is looked at once."""
    embed = model.get_input_embeddings()
    ids = batch["input_ids"].to(embed.weight.device)
    hidden = embed(ids)
    if "pixel_values" in batch:
        picture = pictures(batch)
        features = picture_features(model, batch["pixel_values"][_first(picture)].to(ids.device))
        hidden[ids == model.config.image_token_id] = features[picture].flatten(0, 1)
    return hidden


@torch.inference_mode()
def split(model, batch):
    """A batch before the first block: what rows about one picture share, if anything, and the rest.

    A list of Parts.
    """
    hidden, picture = enter(model, batch), pictures(batch)
    device = hidden.device
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
    begins = torch.stack([rows[row][:count] for row in _first(picture)])
    picture = torch.tensor(picture, device=device)
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


def _part(model, hidden, weight, places, **more):
    cos, sin = anatomy.decoder(model).rotary_emb(hidden, position_ids=places[None])
    return Part(hidden, cos, sin, None if (weight == 1).all() else weight, **more)


@torch.inference_mode()
def _through(block, passes, watched):
    """Send every batch through a block; {group: InputSums} of what the watched linears read."""
    sums, weight, handles = {}, None, []

    def see(group, _, args):
        if weight is None:
            sums[group].add(args[0].flatten(0, 1).float())
        else:
            real = weight > 0
            sums[group].add(args[0][real].float(), weight[real])

    for group in watched:
        first, *_ = group_linears(block, group).values()
        sums[group] = InputSums()
        handles.append(first.register_forward_pre_hook(partial(see, group)))
    try:
        for batch in passes:
            memory = None
            for i, part in enumerate(batch):
                weight, memory = part.weight, PrefixCache(memory, part.row)
                out = block(
                    part.hidden,
                    position_embeddings=(part.cos, part.sin),
                    attention_mask=part.mask,
                    past_key_values=memory,
                )
                batch[i] = replace(part, hidden=out[0] if isinstance(out, tuple) else out)
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
