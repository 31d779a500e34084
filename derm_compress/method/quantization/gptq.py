"""GPTQ: codes that make up for what rounding the inputs before did (Frantar et al. 2023).

With H = L^T L and L lower triangular, Eq. 7 is ||L D^T||^2, and row i of it knows the errors D of
inputs up to i alone. So input after input takes the codes that bring its row nearest to 0, which
are those that the paper finds through the inverse of H (arXiv:2507.18553).
"""

import copy

import torch

from derm_compress.method.quantization import scaling
from derm_compress.method.quantization.grids import grid_of
from derm_compress.method.quantization.groups import clip_ends
from derm_compress.method.quantization.methods import WHOLE
from derm_compress.method.quantization.packed import PackedLinear
from derm_compress.method.quantization.quantize import fold_block, group_linears, round_block
from derm_compress.model import anatomy

DAMPING = 0.01  # of H's mean diagonal, which is added to it: the paper's


def encode(weight, gram, grid, ends=None, *, actorder=False):
    """Weight [out, in] -> codes, scales and zeros as grid.encode gives them, for inputs of this H.

    Scales and zeros are plain rounding's, of groups clipped to the shares `ends`. actorder: the
    loudest inputs first; groups stay.
    """
    _, scales, zeros = grid.levels(weight, ends)
    scales, zeros = scales.squeeze(-1).T, zeros.squeeze(-1).T  # [in / g, out]
    order = torch.arange(len(gram), device=gram.device)
    if actorder:
        order = gram.diagonal().argsort(descending=True, stable=True)
    factor = factored(gram[order][:, order])
    rows = weight.float().T[order]
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    for i, place in enumerate(order.tolist()):
        group = place // grid.group_size
        wanted = rows[i] - factor[i, :i] @ errors[:i] / factor[i, i]
        codes[place] = grid.nearest(wanted, scales[group], zeros[group])
        errors[i] = (codes[place] - zeros[group]) * scales[group] - rows[i]
    return codes.T.to(torch.uint8), scales.T.half(), zeros.T.to(grid.zeros)


def factored(gram):
    """L, lower triangular, of H = L^T L; damped in place, so that inputs may be dead or alike."""
    gram.diagonal().add_(DAMPING * gram.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.cholesky(gram.flip(0, 1)).T.flip(0, 1).contiguous()


@torch.no_grad()
def search_block(model, index, statistics, form):
    """scaling.search_block's, and "block.name.codes", .scales and .zeros as PackedLinear has them.

    The statistics are of what quantized blocks before this one leave.
    """
    tensors, rows = scaling.search_block(model, index, statistics, form)
    scaled, rows = {row["group"]: row for row in rows}, []
    block = copy.deepcopy(anatomy.blocks(model)[index])
    fold_block(block, index, tensors)
    for group, inputs in statistics.items():
        if (s := tensors.get(f"{index}.{group}")) is not None:
            inputs = inputs.divided(s)
        gram, kept = inputs.gram_matrix(), []
        for name, linear in group_linears(block, group).items():
            if form.bits_of(index, name) == WHOLE:
                continue
            grid, weight = grid_of(form, index, name), linear.weight.float()
            ends = tensors.pop(f"{index}.{name}", None)  # which scales and zeros now say
            ends = None if ends is None else clip_ends(ends, grid.bits, weight.device)
            found = encode(weight, gram, grid, ends, actorder=form.actorder)
            made = PackedLinear.of(grid, *found)
            tensors |= {f"{index}.{name}.{key}": held for key, held in made.state_dict().items()}
            kept.append((weight, made.dequantized(), grid.rounded(weight)))
        if kept:
            weight, found, plain = map(torch.cat, zip(*kept, strict=True))
            whole = scaling.total_output(weight, inputs)
            loss, loss_rtn = (
                (inputs.row_errors(one - weight).sum() / whole).item() for one in (found, plain)
            )
            told = {"alpha": None, "loss_rtn": loss_rtn} | scaled.get(group, {})
            rows.append(told | {"block": index, "group": group, "loss": loss})
    return tensors, rows


def quantized_copy(model, form, tensors, index):
    """A copy of a block, quantized by what search_block() found for it."""
    block = copy.deepcopy(anatomy.blocks(model)[index])
    fold_block(block, index, tensors)
    round_block(block, index, form, tensors)
    return block
