"""Activation-aware scaling and clipping (Eqs. 6-8): which scales, and where to clip, on any grid.

Eq. 8 is activation_scale(), Eq. 6's error D = Q(W s) / s - W [out, in]. What inputs X say of it,
the square of Eq. 7, is tr(D H D^T) with H = X^T X: tokens are read once, whatever is tried on the
weights. search_scale() takes its minimum.
"""

import math
from dataclasses import dataclass

import torch

from derm_compress.method.quantization import quantize
from derm_compress.method.quantization.grids import grid_of
from derm_compress.method.quantization.groups import clip_shares
from derm_compress.model import anatomy

ALPHAS = tuple(i / 20 for i in range(20))  # Eq. 8's exponents
FLOOR = 1e-4  # no channel counts as quieter than this share of the loudest, which bounds s
SAMPLE = 128  # rows that choose FINALISTS of larger weights; all rows decide among these
FINALISTS = 2
UNCLIPPED = anatomy.QUERIES_AND_KEYS
CHUNK = 2**19  # weights rounded at a time on a CPU: what its caches hold


@dataclass(frozen=True)
class InputStatistics:
    """Mean |x| [in] of inputs X [tokens, in], and the cheaper factor of Eq. 7: X, or H [in, in].

    Where tokens weigh differently X is what gives the weighted H.
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

    def row_errors(self, delta):
        """Square of Eq. 7 by output for weight errors delta [..., out, in]: [..., out]."""
        if self.inputs is not None:
            return (delta @ self.inputs.T).square_().sum(-1)
        return (delta @ self.gram).mul_(delta).sum(-1)

    def diagonal_blocks(self, size):
        """H's blocks [in / size, size, size] on its diagonal."""
        if self.inputs is None:
            places = [slice(i, i + size) for i in range(0, len(self.gram), size)]
            return torch.stack([self.gram[place, place] for place in places])
        groups = self.inputs.unflatten(1, (-1, size)).transpose(0, 1)
        return groups.transpose(1, 2) @ groups

    def gram_matrix(self):
        """H [in, in]."""
        return self.inputs.T @ self.inputs if self.gram is None else self.gram

    def divided(self, s):
        """The statistics of inputs divided by s [in]."""
        inputs = None if self.inputs is None else self.inputs / s
        gram = None if self.gram is None else self.gram / (s[:, None] * s)
        return InputStatistics(self.mean_abs / s, self.tokens, inputs, gram)

    def finite(self):
        held = (self.mean_abs, self.inputs, self.gram)
        return all(anatomy.finite(tensor) for tensor in held if tensor is not None)


class InputSums:
    """Streaming sums of inputs: X itself until it is as large as H, from then on H."""

    def __init__(self):
        self.tokens, self.mass, self.total = 0, 0.0, 0.0
        self.held, self.gram = [], None

    def add(self, x, weight=None):
        """Take in x [tokens, in], float32, each token weighing weight [tokens] or 1."""
        self.tokens += len(x)
        self.mass = self.mass + (len(x) if weight is None else weight.sum())
        size = x.abs()
        self.total = self.total + (size.sum(0) if weight is None else weight @ size)
        if weight is not None:
            x = x * weight.sqrt()[:, None]
        if self.gram is None and self.tokens < x.shape[1]:
            self.held.append(x.clone())
            return
        for part in (*self.held, x):
            self.gram = part.T @ part if self.gram is None else self.gram.addmm_(part.T, part)
        self.held = []

    def statistics(self):
        inputs = torch.cat(self.held) if self.held else None
        return InputStatistics(self.total / self.mass, self.tokens, inputs, self.gram)


def activation_scale(mean_abs, alpha, magnitude=None):
    """Eq. 8: s = s_X^alpha [..., in] for alpha (or alphas [n, 1]), over sqrt(max * min) of each.

    A dead channel counts as FLOOR of the loudest. The duo form divides by magnitude^(1 - alpha).
    """
    loudest = mean_abs.max()
    s_x = (mean_abs / loudest).clamp(min=FLOOR) if loudest > 0 else torch.ones_like(mean_abs)
    s = s_x**alpha
    if magnitude is not None:
        s = (s / (magnitude ** (1 - alpha) + FLOOR)).clamp(min=FLOOR)
    return s / (s.amax(-1, keepdim=True) * s.amin(-1, keepdim=True)).sqrt()


def weight_magnitude(weight, group_size):
    """Mean over outputs of |w| relative to the largest of its group [in], for the duo form."""
    groups = weight.float().abs().unflatten(1, (-1, group_size))
    return (groups / (groups.amax(2, keepdim=True) + 1e-6)).flatten(1).mean(0)


def search_scale(weight, inputs, grid, *, duo=False, sample=SAMPLE):
    """Eq. 8's s that minimises Eq. 7 for weight [out, in]: s, alpha, loss, loss of rounding.

    Losses are relative: the square of Eq. 7 over ||X W^T||^2. Of more than `sample` rows, evenly
    spaced ones choose FINALISTS, which all rows then decide between. Where plain rounding is best
    alpha is 0; of the duo form, in which no exponent stands for it, NaN.
    """
    magnitude = weight_magnitude(weight, grid.group_size) if duo else None
    alphas = torch.tensor(ALPHAS, device=weight.device)
    scales = activation_scale(inputs.mean_abs, alphas[:, None], magnitude)
    plain, order = torch.ones_like(scales[:1]), torch.arange(len(ALPHAS), device=scales.device)
    if len(weight) > sample:
        rows = weight[:: -(-len(weight) // sample)]
        order = scale_losses(rows, scales, inputs, grid).argsort(stable=True)[:FINALISTS]
    tried = torch.cat([plain, scales[order]])
    losses = scale_losses(weight, tried, inputs, grid) / total_output(weight, inputs)
    best = int(losses[1:].argmin())
    if losses[0] < losses[1 + best]:
        return plain[0], math.nan if duo else 0.0, losses[0].item(), losses[0].item()
    return tried[1 + best], ALPHAS[int(order[best])], losses[1 + best].item(), losses[0].item()


def scale_losses(weight, scales, inputs, grid):
    """Square of Eq. 7 for weight [out, in] under each of scales [n, in]."""
    losses = torch.zeros(len(scales), dtype=torch.float64, device=weight.device)
    for part in _parts(weight, len(scales)):
        rounded = grid.rounded(part * scales[:, None]).div_(scales[:, None])
        losses += inputs.row_errors(rounded.sub_(part)).sum(1, dtype=torch.float64)
    return losses


def total_output(weight, inputs):
    """||X W^T||^2, never 0."""
    parts = _parts(weight, 1)
    total = sum(inputs.row_errors(part).sum(dtype=torch.float64) for part in parts)
    return total.clamp(min=1e-30)


def _parts(weight, copies):
    limit = CHUNK if weight.device.type == "cpu" else 64 * CHUNK
    return weight.float().split(max(1, limit // (copies * weight.shape[1])))


def search_clip(weight, s, inputs, grid):
    """Index [out, in / g] into clip_shares for each group of weight * s [out, in].

    The error of a group's own output, by H's diagonal block, chooses; a row whose whole error does
    not fall by it (Eq. 7) is left as it is.
    """
    by_group = s.view(-1, grid.group_size)
    outer = by_group[:, :, None] * by_group[:, None, :]
    blocks = inputs.diagonal_blocks(grid.group_size) / outer
    return torch.cat([_clip_rows(part, s, blocks, inputs, grid) for part in _parts(weight * s, 16)])


def _clip_rows(part, s, blocks, inputs, grid):
    ends = clip_shares(grid.bits, part.device)[:, None, None]  # [clips, 1, 1, 2]
    groups = grid.rounded(part[None], ends).sub_(part).unflatten(-1, (-1, grid.group_size))
    by_group = groups.permute(2, 0, 1, 3).flatten(1, 2)  # [groups, clips x out, g]
    errors = (by_group @ blocks).mul_(by_group).sum(2).view(len(blocks), len(ends), -1)
    chosen = errors.argmin(1).T  # [out, groups]
    best = groups.gather(0, chosen[None, ..., None].expand(1, *groups.shape[1:]))[0]
    before, after = inputs.row_errors(torch.stack([groups[0], best]).flatten(2).div_(s))
    return chosen.masked_fill((after >= before)[:, None], 0).to(torch.uint8)


@torch.no_grad()
def search_block(model, index, statistics, form):
    """One block's tensors ("block.group": s, "block.name": clip index) and a row a group.

    statistics: {group: InputStatistics}. Groups are searched apart: 1 / s in the rows of the linear
    before leaves their rounding as it is, for every group of a grid lies within one row.
    """
    block, grid = anatomy.blocks(model)[index], grid_of(form, index)
    tensors, rows = {}, []
    for group, inputs in statistics.items():
        linears = quantize.group_linears(block, group)
        s = torch.ones_like(inputs.mean_abs)
        if form.scaled and quantize.absorber(block, group) is not None:
            weight = torch.cat([linear.weight for linear in linears.values()]).float()
            s, alpha, loss, plain = search_scale(weight, inputs, grid, duo=form.duo)
            tensors[f"{index}.{group}"] = s
            told = {"alpha": alpha, "loss": loss, "loss_rtn": plain}
            rows.append({"block": index, "group": group, **told})
        clipped = {name: one.weight for name, one in linears.items() if name not in UNCLIPPED}
        if form.clip and clipped:
            found = search_clip(torch.cat(list(clipped.values())).float(), s, inputs, grid)
            parts = found.split([len(weight) for weight in clipped.values()])
            tensors |= {f"{index}.{name}": part for name, part in zip(clipped, parts, strict=True)}
    return tensors, rows
