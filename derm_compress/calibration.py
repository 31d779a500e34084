"""What a quantizer's searches need to know of each linear's inputs: one pass, block after block, of a fixed size.

A model too large for the GPU stays on the CPU, with the block at hand on the GPU; hidden states between blocks wait in
a folder where one is given, so that memory does not grow with the number of tokens.
"""

import contextlib
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file

from derm_compress import models
from derm_compress.errors import DermError

GROUPS = {  # linears that read one input, and the module before them that can absorb 1 / s
    "qkv": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "o": ("self_attn.v_proj", ("self_attn.o_proj",)),
    "gate_up": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "down": ("mlp.up_proj", ("mlp.down_proj",)),
}


@dataclass(frozen=True)
class InputStatistics:
    """Mean |x| [in] of a group's inputs X [tokens, in], and the cheaper factor of Eq. 7: X, or H = X^T X [in, in].

    Tokens may weigh differently; X is then what gives the weighted H.
    """

    mean_abs: torch.Tensor
    tokens: int
    inputs: torch.Tensor | None = None
    gram: torch.Tensor | None = None

    @staticmethod
    def of(x, weight=None):
        """The statistics of inputs x [tokens, in], all at once."""
        sums = InputSums()
        sums.add(x, weight)
        return sums.statistics()

    def matrix(self):
        """H [in, in]."""
        return self.inputs.T @ self.inputs if self.gram is None else self.gram

    def row_errors(self, delta):
        """Square of Eq. 7 by output for a weight error delta [..., out, in]: rows of tr(delta H delta^T) [..., out]."""
        if self.inputs is not None:
            return (delta @ self.inputs.T).square_().sum(-1)
        return (delta @ self.gram).mul_(delta).sum(-1)

    def diagonal_blocks(self, size):
        """H's blocks [in / size, size, size] on its diagonal."""
        if self.inputs is None:
            return torch.stack([part[:, i * size : (i + 1) * size] for i, part in enumerate(self.gram.split(size))])
        groups = self.inputs.unflatten(1, (-1, size)).transpose(0, 1)
        return groups.transpose(1, 2) @ groups


class InputSums:
    """Streaming sums of one group's inputs: X itself until there are as many tokens as channels, from then on H."""

    def __init__(self):
        self.held, self.gram, self.total, self.mass, self.tokens = [], None, 0.0, 0.0, 0

    def add(self, x, weight=None):
        """Take in x [tokens, in], float32, each token weighing weight [tokens] or 1."""
        self.tokens, self.mass = self.tokens + len(x), self.mass + (len(x) if weight is None else weight.sum())
        size = x.abs()
        self.total = self.total + (size.sum(0) if weight is None else weight @ size)
        x = x if weight is None else x * weight.sqrt()[:, None]
        if self.gram is None and self.tokens < x.shape[1]:
            self.held.append(x.clone())
            return
        for part in (*self.held, x):
            self.gram = part.T @ part if self.gram is None else self.gram.addmm_(part.T, part)
        self.held = []

    def statistics(self):
        inputs = torch.cat(self.held) if self.held else None
        return InputStatistics(self.total / self.mass, self.tokens, inputs, self.gram)


def collect(model, batches, *, device=None, folder=None, skip=()):
    """Yield (block index, {group: InputStatistics}) for each block of the decoder in turn; inputs are unquantized.

    Batches are the processor's output; positions outside the attention mask do not count, and token_weights, if a
    batch has them, weigh the others. device: where blocks run, one at a time, if it is not the model's. folder: where
    hidden states wait until the end. skip: blocks that run but yield {} (their results are kept from before).
    """
    training, home = model.training, model.device
    device = torch.device(device or home)
    model.eval()
    try:
        with _on(device, home, _around(model)):
            passes = [enter(model, batch, i, folder) for i, batch in enumerate(batches)]
        if not passes:
            raise DermError("quantize: no batch was given; pass at least one batch of the processor's output")
        for index, block in enumerate(models.blocks(model)):
            with _on(device, home, [block]):
                sums = _through(block, passes, watch=index not in skip)
                yield index, _checked(index, sums)
    finally:
        model.train(training)
        for passing in folder.glob("batch-*") if folder else ():
            passing.unlink()


def _around(model):
    """What runs before the blocks."""
    parts, decoder = models.parts(model), models.decoder(model)
    return [parts["vision_tower"], parts["projector"], decoder.embed_tokens, decoder.rotary_emb]


@contextlib.contextmanager
def _on(device, home, modules):
    if device != home:
        for module in modules:
            module.to(device)
    try:
        yield
    finally:
        if device != home:
            for module in modules:
                module.to(home)


class _Reached(Exception):
    """The decoder's first block was reached: what comes after it runs block by block."""


class Slot(int):
    """Where a tensor was, by its number among those taken out."""


class Pass:
    """One batch on its way through the decoder: hidden states, the blocks' other arguments, the tokens that count.

    With a path no tensor of it stays in memory: `path`-hidden is written anew by every block, `path`-others once.
    """

    def __init__(self, hidden, arguments, weight, path):
        self._path, others = path, []
        self._others = _mapped((arguments, weight), torch.Tensor, lambda t: others.append(t) or Slot(len(others) - 1))
        self._others = self._others if path else (arguments, weight)
        if path:
            save_file({str(i): t.cpu().clone().contiguous() for i, t in enumerate(others)}, f"{path}-others")
        self.hidden = hidden

    @property
    def hidden(self):
        return load_file(f"{self._path}-hidden")["hidden"] if self._path else self._hidden

    @hidden.setter
    def hidden(self, value):
        if self._path:
            save_file({"hidden": value.cpu().contiguous()}, f"{self._path}-hidden")
        else:
            self._hidden = value

    def others(self, device):
        """(arguments, weight) on a device."""
        kept = load_file(f"{self._path}-others") if self._path else {}
        held = _mapped(self._others, Slot, lambda slot: kept[str(int(slot))])
        return _mapped(held, torch.Tensor, lambda tensor: tensor.to(device))


@torch.inference_mode()
def enter(model, batch, index, folder):
    """Run what is before the blocks on a batch."""
    caught = []

    def stop(_, args, kwargs):
        caught.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
        raise _Reached

    handle = models.blocks(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    where = models.decoder(model).embed_tokens.weight.device
    feed = {k: v.to(where) for k, v in batch.items() if k not in ("labels", "token_weights")}
    try:
        model(**feed, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    hidden, arguments = caught[0]
    weight = feed.get("attention_mask", torch.ones_like(feed["input_ids"])).float()
    weight = weight * batch["token_weights"].to(where) if "token_weights" in batch else weight
    weight = None if (weight == 1).all() else weight
    return Pass(hidden, arguments, weight, folder and folder / f"batch-{index}")


@torch.inference_mode()
def _through(block, passes, *, watch):
    """Send every batch through a block; {group: InputSums} of what its linears read."""
    there, weight = models.linears(block), None  # fewer where a sublayer was removed
    sums = {group: InputSums() for group, (_, names) in GROUPS.items() if watch and names[0] in there}

    def listen(group):
        def hook(_, args):
            if weight is None:
                sums[group].add(args[0].flatten(0, 1).float())
            else:
                real = weight > 0
                sums[group].add(args[0][real].float(), weight[real])

        return hook

    handles = [there[GROUPS[g][1][0]].register_forward_pre_hook(listen(g)) for g in sums]
    device = next(block.parameters()).device
    try:
        for one in passes:
            arguments, weight = one.others(device)
            out = block(one.hidden.to(device), **arguments)
            one.hidden = out[0] if isinstance(out, tuple) else out
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _mapped(value, kind, change):
    """The value with change() of all that is of a kind inside its dicts and tuples."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {k: _mapped(v, kind, change) for k, v in value.items()}
    return tuple(_mapped(v, kind, change) for v in value) if isinstance(value, tuple) else value


def _checked(index, sums):
    """The statistics, unless they hold NaN or infinity."""
    found = {group: one.statistics() for group, one in sums.items()}
    for group, one in found.items():
        if not all(models.finite(t) for t in (one.mean_abs, one.inputs, one.gram) if t is not None):
            raise DermError(f"quantize: NaN or infinite inputs at block.group {index}.{group}; check the model's dtype")
    return found
