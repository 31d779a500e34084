"""Activation-aware scaling and clipping (paper, Eqs. 6-8): which scales, and where to clip, on any grid.

Eq. 7's square is tr(D H D^T) for a weight error D [out, in] and H = X^T X, so that tokens are read once.
"""

import math

import torch

from derm_compress.method.quantization.folding import GROUPS, _absorbs, clip_shares
from derm_compress.model import anatomy

ALPHAS = tuple(i / 20 for i in range(20))  # Eq. 8's exponents
FLOOR = 1e-4  # a channel counts as no quieter than this share of the loudest: bounds s and the folded weights
SAMPLE = 128  # rows that choose FINALISTS of larger weights; all rows decide among these
FINALISTS = 2
UNCLIPPED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
)  # their product, not they, is what attention reads
CHUNK = 2**19  # weights rounded at a time on a CPU: what its caches hold


def weight_magnitude(weight, group_size):
    """Mean over outputs of |w| relative to the largest of its group [in], for the duo form."""
    groups = weight.float().abs().unflatten(1, (-1, group_size))
    return (groups / (groups.amax(2, keepdim=True) + 1e-6)).flatten(1).mean(0)


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


def search_scale(weight, inputs, grid, *, duo=False, sample=SAMPLE):
    """Eq. 8's s that minimises Eq. 7 for weight [out, in]: s, alpha, loss, loss of plain rounding (s = 1).

    Losses are relative: the square of Eq. 7 over ||X W^T||^2. Of more than `sample` rows, evenly spaced ones choose
    FINALISTS, which all rows then decide between. Where plain rounding is best alpha is 0; of the duo form, in which
    no exponent stands for it, NaN.
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
    return sum(
        inputs.row_errors(part).sum(dtype=torch.float64) for part in _parts(weight, 1)
    ).clamp(min=1e-30)


def _parts(weight, copies):
    limit = CHUNK if weight.device.type == "cpu" else 64 * CHUNK
    return weight.float().split(max(1, limit // (copies * weight.shape[1])))


def search_clip(weight, s, inputs, grid):
    """Index [out, in / g] into clip_shares for each group of weight * s [out, in].

    The error of a group's own output, by H's diagonal block, chooses; a row whose whole error does not fall by it
    (Eq. 7) is left as it is.
    """
    blocks = inputs.diagonal_blocks(grid.group_size) / _outer(s.view(-1, grid.group_size))
    return torch.cat([_clip_rows(part, s, blocks, inputs, grid) for part in _parts(weight * s, 16)])


def _outer(rows):
    return rows[:, :, None] * rows[:, None, :]


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
def search_block(model, index, statistics, grids, *, scaled=True, duo=False, clip=False):
    """One block's tensors ("block.group": s, "block.name": clip index) and a row (alpha, losses) for each group.

    grids: {name: grid} of the linears to quantize. Groups are searched apart: folding 1 / s into the rows of the
    linear before does not change how these are rounded, as every group of a grid lies within one row.
    """
    block, tensors, rows = anatomy.blocks(model)[index], {}, []
    there = anatomy.linears(block)
    for group, (_, names) in GROUPS.items():
        names = [name for name in names if name in grids]
        if not names:
            continue
        inputs, key = statistics[group], f"{index}.{group}"
        s, grid = torch.ones_like(inputs.mean_abs), grids[names[0]]
        if scaled and _absorbs(block, there, group):
            weight = torch.cat([there[name].weight for name in names]).float()
            s, alpha, loss, plain = search_scale(weight, inputs, grid, duo=duo)
            tensors[key] = s
            rows.append(
                {"block": index, "group": group, "alpha": alpha, "loss": loss, "loss_rtn": plain}
            )
        names = [name for name in names if clip and name not in UNCLIPPED]
        weights = [there[name].weight.float() for name in names]
        found = (
            search_clip(torch.cat(weights), s, inputs, grid).split([len(w) for w in weights])
            if names
            else ()
        )
        tensors |= {f"{index}.{name}": clip for name, clip in zip(names, found, strict=True)}
    return tensors, rows
