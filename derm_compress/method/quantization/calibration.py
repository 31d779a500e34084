"""What a quantizer's searches need to know of each linear's inputs: one pass, block after block, of a fixed size.

What prompts about one picture share, the picture above all, is computed once and counts as often as it is read. A model
too large for the GPU stays on the CPU, with the block at hand on the GPU; hidden states between blocks wait in a folder
where one is given, so that memory does not grow with the number of tokens.
"""

import contextlib
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from derm_compress.errors import DermError
from derm_compress.method.quantization.folding import GROUPS
from derm_compress.model import anatomy
from derm_compress.model.cache import Memory, visible


@dataclass(frozen=True)
class InputStatistics:
    """Mean |x| [in] of a group's inputs X [tokens, in], and the cheaper factor of Eq. 7: X, or H = X^T X [in, in].

    Tokens may weigh differently; X is then what gives the weighted H. What rows share is one token of more weight.
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
            return torch.stack(
                [part[:, i * size : (i + 1) * size] for i, part in enumerate(self.gram.split(size))]
            )
        groups = self.inputs.unflatten(1, (-1, size)).transpose(0, 1)
        return groups.transpose(1, 2) @ groups


class InputSums:
    """Streaming sums of one group's inputs: X itself until there are as many tokens as channels, from then on H."""

    def __init__(self):
        self.held, self.gram, self.total, self.mass, self.tokens = [], None, 0.0, 0.0, 0

    def add(self, x, weight=None):
        """Take in x [tokens, in], float32, each token weighing weight [tokens] or 1."""
        self.tokens, self.mass = (
            self.tokens + len(x),
            self.mass + (len(x) if weight is None else weight.sum()),
        )
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
            passes = [
                _passes(model, batch, folder and folder / f"batch-{i}")
                for i, batch in enumerate(batches)
            ]
        if not passes:
            raise DermError(
                "quantize: no batch was given; pass at least one batch of the processor's output"
            )
        for index, block in enumerate(anatomy.blocks(model)):
            with _on(device, home, [block]):
                sums = _through(block, passes, watch=index not in skip)
                yield index, _checked(index, sums)
    finally:
        model.train(training)
        for passing in folder.glob("batch-*") if folder else ():
            passing.unlink()


def _around(model):
    """What runs before the blocks."""
    parts, decoder = anatomy.parts(model), anatomy.decoder(model)
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
    """Tokens of a batch on their way through the decoder: hidden states [rows, tokens, width] and what goes with them.

    With a path no tensor of it stays in memory: `path`-hidden is written anew by every block, `path`-others once.
    """

    def __init__(self, hidden, others, path):
        self._path, self._others, held = path, others, []
        if path:
            self._others = _mapped(
                others, torch.Tensor, lambda t: held.append(t) or Slot(len(held) - 1)
            )
            save_file(
                {str(i): t.cpu().clone().contiguous() for i, t in enumerate(held)}, f"{path}-others"
            )
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
        """The block's arguments, the tokens' weights (None: all 1), the rows of the pass before that these follow."""
        kept = load_file(f"{self._path}-others") if self._path else {}
        held = _mapped(self._others, Slot, lambda slot: kept[str(int(slot))])
        return _mapped(held, torch.Tensor, lambda tensor: tensor.to(device))


@torch.inference_mode()
def enter(model, batch):
    """Run what is before the blocks on a batch: hidden states [rows, tokens, width], the blocks' other arguments."""
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
    """The picture of each row by number: one for all where there are no pixels, its own where rows have several."""
    pixels, rows = batch.get("pixel_values"), len(batch["input_ids"])
    if pixels is None or len(pixels) != rows:
        return [0] * rows if pixels is None else list(range(rows))
    numbers = {}
    return [numbers.setdefault(row.cpu().float().numpy().tobytes(), len(numbers)) for row in pixels]


def _first(picture):
    """The first row of each picture."""
    return [picture.index(number) for number in range(max(picture) + 1)]


@torch.inference_mode()
def _passes(model, batch, path):
    """A batch's beginning, which rows about one picture share, and what follows in each row."""
    hidden, _ = enter(model, batch)
    picture, device, rotary = pictures(batch), hidden.device, anatomy.decoder(model).rotary_emb
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().to(device)
    weight = batch.get("token_weights", torch.ones(real.shape)).to(device, torch.float32)
    every = batch["input_ids"].to(device), hidden, weight
    ids, rows, weights = ([x[own] for x, own in zip(of, real, strict=True)] for of in every)
    count = _alike(ids) if len(set(picture)) < len(picture) else 0
    picture = torch.tensor(picture, device=device)
    rest, own = (pad_sequence([x[count:] for x in of], batch_first=True) for of in (rows, weights))
    seen = torch.arange(count + rest.shape[1], device=device)
    parts = [
        (rest, own, seen[count:], None, None)
    ]  # no mask is causal: what stands behind a row, padding, is unseen
    if count:
        shared = torch.zeros(int(picture.max()) + 1, count, device=device)
        shared.index_add_(0, picture, torch.stack([w[:count] for w in weights]))
        begins = torch.stack([rows[row][:count] for row in _first(picture.tolist())])
        mask = visible((seen <= seen[count:, None])[None, None], hidden.dtype)
        parts = [
            (begins, shared, seen[:count], None, None),
            (rest, own, seen[count:], mask, picture),
        ]
    made = []
    for i, (x, w, places, mask, row) in enumerate(parts):
        arguments = {
            "position_embeddings": rotary(x, position_ids=places[None]),
            "attention_mask": mask,
        }
        others = arguments, None if (w == 1).all() else w, row
        made.append(Pass(x, others, path and path.with_name(f"{path.name}-{i}")))
    return made


def _alike(rows):
    """How many of the first tokens all rows have in common; fewer than any row has."""
    most = max(0, min(map(len, rows)) - 1)
    begins = torch.stack([row[:most] for row in rows])
    return int((begins == begins[0]).all(0).cumprod(0).sum())


@torch.inference_mode()
def _through(block, passes, *, watch):
    """Send every batch through a block; {group: InputSums} of what its linears read."""
    there, weight = anatomy.linears(block), None  # fewer where a sublayer was removed
    sums = {
        group: InputSums() for group, (_, names) in GROUPS.items() if watch and names[0] in there
    }

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
        for batch in passes:
            memory = None
            for one in batch:
                arguments, weight, row = one.others(device)
                memory = Memory(memory, row)
                out = block(one.hidden.to(device), past_key_values=memory, **arguments)
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
        if not all(
            anatomy.finite(t) for t in (one.mean_abs, one.inputs, one.gram) if t is not None
        ):
            raise DermError(
                f"quantize: NaN or infinite inputs at block.group {index}.{group}; check the model's dtype"
            )
    return found
