"""Quantization of the decoder's linears: a quantizer is a grid (grids.py) times a scaling.

Grids: integers (rtn, rtn_symmetric, awq), NF4 (bitsandbytes). Scaling: none, or activation-aware, Eqs. 6-8
(awq). Vision tower, projector, embedding and head stay as they are.
"""

from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from derm_compress import models
from derm_compress.activations import tap
from derm_compress.errors import DermError
from derm_compress.grids import PLANES, IntegerGrid, NF4Grid

NF4_BLOCKS = (32, 64, 128, 256)
ALPHAS = tuple(i / 20 for i in range(20))  # Eq. 8's exponents
FLOOR = 1e-4  # a channel counts as no quieter than this share of the loudest: bounds s and the folded weights
GROUPS = {  # linears that read one input, and the module before them that can absorb 1 / s
    "qkv": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "o": ("self_attn.v_proj", ("self_attn.o_proj",)),
    "gate_up": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    "down": ("mlp.up_proj", ("mlp.down_proj",)),
}


@dataclass(frozen=True)
class InputStatistics:
    """Gram matrix H = X^T X [in, in] and mean |x| [in] of a scale group's inputs X [tokens, in]."""

    gram: torch.Tensor
    mean_abs: torch.Tensor
    tokens: int


Calibration = dict[str, InputStatistics]  # by "block.group"


def scale_groups(model):
    """{"block.group": (module before, linears)} of the decoder, where s [in] fits the module before.

    Under grouped-query attention v_proj is narrower than o_proj, which then stays unscaled.
    """
    found = {}
    for index, block in enumerate(models.blocks(model)):
        for group, (before, linears) in GROUPS.items():
            before, linears = block.get_submodule(before), [block.get_submodule(name) for name in linears]
            if len(before.weight) == linears[0].in_features:
                found[f"{index}.{group}"] = before, linears
    return found


def collect_grams(model, batches) -> Calibration:
    """Statistics of every scale group's inputs: one pass, fp32 sums over the real tokens, of a fixed size."""
    watched = {key: linears[0] for key, (_, linears) in scale_groups(model).items()}
    sums = {key: [0.0, 0.0, 0] for key in watched}

    def see(key, x):
        for i, part in enumerate((x.T @ x, x.abs().sum(0), len(x))):
            sums[key][i] += part

    tap(model, batches, watched, see, inputs=True)
    for key, (gram, _, _) in sums.items():
        if not torch.isfinite(gram).all():
            raise DermError(f"quantize: NaN or infinite inputs at block.group {key}; check the model's dtype")
    return {key: InputStatistics(gram, total / n, n) for key, (gram, total, n) in sums.items()}


def output_error(delta, gram):
    """Square of Eq. 7 for a weight error delta [out, in]: tr(delta H delta^T) = ||X delta^T||^2."""
    return ((delta @ gram) * delta).sum()


def activation_scale(mean_abs, alpha):
    """Eq. 8: s = s_X^alpha [in], over sqrt(max * min); a dead channel counts as FLOOR of the loudest."""
    loudest = mean_abs.max()
    s_x = (mean_abs / loudest).clamp(min=FLOOR) if loudest > 0 else torch.ones_like(mean_abs)
    s = s_x**alpha
    return s / (s.max() * s.min()).sqrt()


def search_scale(weight, inputs, grid):
    """Eq. 8's s that minimises Eq. 7 for weight [out, in]: s, alpha, loss, loss at alpha = 0 (plain rounding).

    Losses are relative: the square of Eq. 7 over ||X W^T||^2.
    """
    scales = [activation_scale(inputs.mean_abs, alpha) for alpha in ALPHAS]
    errors = [output_error(grid.rounded(weight * s) / s - weight, inputs.gram) for s in scales]
    losses = torch.stack(errors) / output_error(weight, inputs.gram).clamp(min=1e-30)
    best = int(losses.argmin())
    return scales[best], ALPHAS[best], losses[best].item(), losses[0].item()


@torch.no_grad()
def awq_search(model, calibration, *, bits, group_size):
    """Scales {"block.group": s [in]} and a row (block, group, alpha, loss, loss_rtn) for each.

    A block's groups are searched apart: folding 1 / s into the rows of the linear before does not change how
    these are rounded, as every group of the grid lies within one row.
    """
    grid, scales, rows = fitting_grid(model, "awq", bits, group_size), {}, []
    for key, (_, linears) in scale_groups(model).items():
        weight = torch.cat([linear.weight for linear in linears]).float()
        scales[key], alpha, loss, plain = search_scale(weight, calibration[key], grid)
        block, group = key.split(".")
        rows.append({"block": int(block), "group": group, "alpha": alpha, "loss": loss, "loss_rtn": plain})
    return scales, rows


@torch.no_grad()
def fold_scales(model, scales):
    """Multiply each group's input columns by s and divide the module before by it: the same function."""
    groups = scale_groups(model)
    if {k: len(s) for k, s in scales.items()} != {k: ls[0].in_features for k, (_, ls) in groups.items()}:
        raise DermError("quantize: the scales belong to another model; run awq_search on this one")
    for key, (before, linears) in groups.items():
        s = scales[key].to(before.weight.device, torch.float32)
        folded = [(p, p.float() / s.view(-1, *[1] * (p.ndim - 1))) for p in before.parameters()]
        for parameter, value in folded + [(linear.weight, linear.weight.float() * s) for linear in linears]:
            parameter.copy_(value)
            if not torch.isfinite(parameter).all():
                raise DermError(f"quantize: scales of {key} overflow {parameter.dtype}; calibrate anew")


def fitting_grid(model, method, bits, group_size):
    """The grid of a method of Table 3, if its groups divide the inputs of every linear of the decoder."""
    if method not in ("awq", "bitsandbytes", "rtn", "rtn_symmetric"):
        raise DermError(f"quantize: unknown method {method!r}; use awq, bitsandbytes, rtn or rtn_symmetric")
    nf4 = method == "bitsandbytes"
    if bits not in ((4,) if nf4 else PLANES) or (nf4 and group_size not in NF4_BLOCKS):
        has = f"4 bits in blocks of {NF4_BLOCKS}" if nf4 else f"bits of {tuple(PLANES)}"
        raise DermError(f"quantize: {method} has {has}; not {bits} bits in groups of {group_size}")
    for index, block in enumerate(models.blocks(model)):
        for name, linear in models.linears(block).items():
            if group_size < 1 or linear.in_features % group_size:
                where = f"the {linear.in_features} inputs of block {index} {name}"
                raise DermError(f"quantize: group size {group_size} does not divide {where}; use a divisor")
    return NF4Grid(group_size) if nf4 else IntegerGrid(bits, group_size, method == "rtn_symmetric")


@torch.no_grad()
def quantize(model, *, method, bits, group_size, scales=None, packed=False):
    """Quantize the decoder's linears in place and return the model; `scales` are awq_search's, for awq alone.

    packed=False writes the rounded weights back (the same numbers, at full speed); packed=True replaces the
    linears by modules that hold only codes.
    """
    grid = fitting_grid(model, method, bits, group_size)
    if (scales is None) == (method == "awq"):
        raise DermError(f"quantize: awq needs the scales of awq_search, the others take none; got {method}")
    if scales is not None:
        fold_scales(model, scales)
    for block in models.blocks(model):
        for name, linear in models.linears(block).items():
            if packed:
                block.set_submodule(name, grid.packed(linear))
            else:
                linear.weight.copy_(grid.rounded(linear.weight))
            block.get_submodule(name).grid = grid
    counts = quantized_linears(model)
    expected = dict.fromkeys(counts, 0) | {"decoder": 7 * len(models.blocks(model))}
    assert counts == expected, f"quantized linears by part: {counts}, expected {expected}"
    return model


def quantized_linears(model):
    """Number of quantized linears by part of the model."""
    return {k: sum(hasattr(m, "grid") for m in part.modules()) for k, part in models.parts(model).items()}


def apply_step(model, step, store, *, packed=False):
    """Apply a recipe's step: method, bits, group_size and, for awq, `ref`: the safetensors file of its scales."""
    scales = load_file(store.resolve(step["ref"])) if step.get("ref") else None
    form = {key: step[key] for key in ("method", "bits", "group_size")}
    return quantize(model, **form, scales=scales, packed=packed)


def block_errors(model_fp, model_q, batches):
    """Rows (block, relative_error): ||h_q - h|| / ||h|| of each block's output h over all real tokens."""
    full, quantized = (dict(enumerate(models.blocks(model))) for model in (model_fp, model_q))
    if len(full) != len(quantized):
        raise DermError(f"quantize: models of {len(full)} and {len(quantized)} blocks; compare equal depths")
    sums, held = {block: [0.0, 0.0] for block in full}, {}

    def compare(block, x):
        h = held.pop(block).to(x.device)
        for i, part in enumerate((x - h, h)):
            sums[block][i] += part.double().square().sum().item()

    for batch in batches:
        tap(model_fp, [batch], full, held.__setitem__)
        tap(model_q, [batch], quantized, compare)
    return [{"block": b, "relative_error": (e / max(n, 1e-30)) ** 0.5} for b, (e, n) in sums.items()]
