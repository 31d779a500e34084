"""Quantization: a quantizer is a grid (grids.py) times a scaling times clipping (awq.py), asked for as a Form.

Grids: integers, hqq's integers, NF4, LLM.int8's. Scaling: none, activation-aware (Eqs. 6-8), or AutoAWQ's own choice
(reference.py). The decoder's linears are quantized; vision tower, projector and head where a form asks for them.
"""

from dataclasses import dataclass, field, fields
from fnmatch import fnmatch

import torch
from safetensors.torch import load_file
from torch import nn

from derm_compress.errors import DermError
from derm_compress.method.activations import tap
from derm_compress.method.quantization import folding
from derm_compress.method.quantization.codes import PLANES
from derm_compress.method.quantization.forms import BLOCKS, TAKES, WIDTHS
from derm_compress.method.quantization.grids import HQQGrid, Int8Grid, IntegerGrid, NF4Grid
from derm_compress.model import anatomy

KEPT = 16  # "bits" of a linear that stays as it is
METHODS = {  # the kind of grid, and who chooses its scales
    "awq": ("integer", "search"),
    "autoawq": ("integer", "autoawq"),
    "rtn": ("integer", None),
    "rtn_symmetric": ("symmetric", None),
    "bitsandbytes": ("nf4", None),
    "awq_nf4": ("nf4", "search"),
    "hqq": ("hqq", None),
    "llm_int8": ("int8", None),
}


@dataclass(frozen=True)
class Form:
    """What to quantize to. As a recipe's step: these fields by name, where they differ from the defaults.

    duo: scales also know the weights' magnitudes. clip: groups may be clipped. double: NF4's absmax in 8 bits.
    block_bits: {block of the model at hand: bits} where they differ from `bits`, 16 to leave a block as it is. keep:
    patterns of linears left as they are ("*.down_proj", "31.*"). parts: as in models.parts; beyond the decoder without
    scaling or clipping.
    """

    method: str
    bits: int = 4
    group_size: int = 64
    duo: bool = False
    clip: bool = False
    double: bool = False
    block_bits: dict = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("decoder",)

    def __post_init__(self):
        if self.method not in METHODS:
            raise DermError(
                f"quantize: unknown method {self.method!r}; use one of {', '.join(METHODS)}"
            )
        if foreign := [
            o
            for o, methods in TAKES.items()
            if getattr(self, o, False) and self.method not in methods
        ]:
            has = [
                option
                for option, methods in TAKES.items()
                if self.method in methods and hasattr(self, option)
            ]
            told = f"{self.method} has no {' or '.join(foreign)}"
            raise DermError(f"quantize: {told}; options of it: {', '.join(has) or 'none'}")
        if texts := [name for name in ("keep", "parts") if isinstance(getattr(self, name), str)]:
            raise DermError(
                f"quantize: {texts[0]} is {getattr(self, texts[0])!r}; write a list, also of one"
            )
        blocks = {
            int(block): bits for block, bits in self.block_bits.items()
        }  # JSON's keys are strings
        object.__setattr__(self, "block_bits", blocks)
        for bits in {self.bits, *blocks.values()} - {KEPT}:
            self._check(bits)

    def _check(self, bits):
        has = WIDTHS.get(self.method, tuple(PLANES))
        sizes = BLOCKS.get(self.method)
        if bits not in has or (sizes and self.group_size not in sizes):
            told = f"{has[0]} bits" if len(has) == 1 else f"bits of {has}"
            told += f" in blocks of {sizes}" if sizes else ""
            raise DermError(
                f"quantize: {self.method} has {told}; not {bits} bits in groups of {self.group_size}"
            )

    @staticmethod
    def of(step):
        """The form of a recipe's step."""
        known = {f.name for f in fields(Form)}
        if unknown := set(step) - known - {"step", "ref"}:
            raise DermError(
                f"quantize: a recipe's step has unknown fields {sorted(unknown)}; known: {sorted(known)}"
            )
        return Form(
            **{
                key: tuple(v) if isinstance(v, list) else v
                for key, v in step.items()
                if key in known
            }
        )

    @property
    def kind(self):
        return METHODS[self.method][0]

    @property
    def scaled(self):
        return METHODS[self.method][1] is not None

    @property
    def searched(self):
        """Whether it needs a search on calibration inputs."""
        return self.scaled or self.clip

    def grid(self, block=None):
        """The grid of a block's linears; None where they stay as they are."""
        bits = self.block_bits.get(block, self.bits)
        if bits == KEPT:
            return None
        if self.kind == "nf4":
            return NF4Grid(self.group_size, self.double)
        if self.kind == "int8":
            return Int8Grid()
        if self.kind == "hqq":
            return HQQGrid(bits, self.group_size)
        return IntegerGrid(bits, self.group_size, self.kind == "symmetric")


@dataclass(frozen=True)
class Target:
    """A linear to quantize: its name ("block.name" in the decoder), where it hangs, its grid."""

    part: str
    name: str
    parent: nn.Module
    attribute: str
    grid: object

    @property
    def linear(self):
        return getattr(self.parent, self.attribute)


def targets(model, form):
    """The linears that a form quantizes; DermError where it fits another model, or weights are no numbers."""
    _check_places(model, form)
    found = []
    for part, block, name, parent in _linears(model, form.parts):
        where, grid = _place(block, name), form.grid(block)
        if grid is not None and not any(fnmatch(where, pattern) for pattern in form.keep):
            found.append(Target(part, where, parent, name.rpartition(".")[2], grid))
            _check_weight(found[-1], where if block is None else f"block {block} {name}")
    if not found:
        raise DermError(
            "quantize: the form leaves every linear as it is; see its block_bits, keep and parts"
        )
    return found


def _check_places(model, form):
    if gone := set(form.parts) - set(anatomy.parts(model)):
        raise DermError(
            f"quantize: no part {sorted(gone)}; parts are {', '.join(anatomy.parts(model))}"
        )
    if beyond := [b for b in form.block_bits if not 0 <= b < len(anatomy.blocks(model))]:
        raise DermError(
            f"quantize: bits are given for blocks {beyond}; the model has {len(anatomy.blocks(model))}"
        )
    if not form.keep:
        return
    places = [_place(block, name) for _, block, name, _ in _linears(model, form.parts)]
    if unmet := [
        pattern for pattern in form.keep if not any(fnmatch(place, pattern) for place in places)
    ]:
        like = ", ".join(places[:1])
        raise DermError(
            f"quantize: keep has {unmet[0]!r}, which no linear is called; names are like {like}"
        )


def _check_weight(target, what):
    if not anatomy.finite(target.linear.weight):
        raise DermError(
            f"quantize: weights of {target.name} are NaN, infinite or both; check the model's files"
        )
    into, size = target.linear.in_features, getattr(target.grid, "group_size", 1)
    if size < 1 or into % size:
        raise DermError(
            f"quantize: group size {size} does not divide the {into} inputs of {what}; use a divisor"
        )


def _place(block, name):
    return name if block is None else f"{block}.{name}"


def _linears(model, parts):
    """(part, block, name, module it hangs in); block None and the full name outside the decoder."""
    if "decoder" in parts:
        for index, block in enumerate(anatomy.blocks(model)):
            for name in anatomy.linears(block):
                yield "decoder", index, name, block.get_submodule(name.rpartition(".")[0])
    names = {module: name for name, module in model.named_modules()}
    for part in set(parts) - {"decoder"}:
        for inner, module in anatomy.parts(model)[part].named_modules():
            if isinstance(module, nn.Linear):
                name = names[anatomy.parts(model)[part]] + (f".{inner}" if inner else "")
                yield part, None, name, model.get_submodule(name.rpartition(".")[0])


def left_out(model, found):
    """Names ("block.name") of the decoder's linears that are not among the targets found."""
    quantized = {target.name for target in found}
    blocks = enumerate(anatomy.blocks(model))
    return {
        f"{index}.{name}" for index, block in blocks for name in anatomy.linears(block)
    } - quantized


@torch.no_grad()
def quantize(model, *, method, bits, group_size, scales=None, packed=False, **options):
    """Quantize in place and return the model; `scales` are a search's tensors (scales and clip indices), for the forms
    that need them alone; options are Form's.

    packed=False writes the rounded weights back (the same numbers, at full speed); packed=True replaces the linears by
    modules that hold only codes. LLM.int8 is always packed.
    """
    form = Form(method, bits, group_size, **options)
    found = targets(model, form)
    if (scales is not None) != form.searched:
        raise DermError(
            f"quantize: {method} "
            + ("needs the scales of a search" if form.searched else "takes none")
        )
    clips = {}
    if scales is not None:
        clips = {t.name: scales[t.name] for t in found if t.name in scales}
        folded = {key: s for key, s in scales.items() if key not in clips}
        if form.scaled or folded:
            folding.fold_scales(model, folded, left_out(model, found))
    for target in found:
        _replace(target, clips.get(target.name), packed)
    counts, expected = quantized_linears(model), dict.fromkeys(anatomy.parts(model), 0)
    for target in found:
        expected[target.part] += 1
    assert counts == expected, f"quantized linears by part: {counts}, expected {expected}"
    return model


def _replace(target, clip, packed):
    linear, grid = target.linear, target.grid
    ends = None if clip is None else folding.clip_ends(clip, grid.bits, linear.weight.device)
    if packed or isinstance(grid, Int8Grid):
        setattr(target.parent, target.attribute, grid.packed(linear, ends))
    else:
        rounded = grid.rounded(linear.weight, ends).to(linear.weight.dtype)
        if rounded.dtype != torch.float32 and not anatomy.finite(rounded):
            raise DermError(
                f"quantize: rounded weights of {target.name} overflow {rounded.dtype}; quantize in fp32"
            )
        linear.weight.copy_(rounded)
    target.linear.grid = grid


def quantized_linears(model):
    """Number of quantized linears by part of the model."""
    return {
        k: sum(hasattr(m, "grid") for m in part.modules())
        for k, part in anatomy.parts(model).items()
    }


def apply_step(model, step, store, *, packed=False):
    """Apply a recipe's step: a Form's fields and, where it was searched, `ref`: the safetensors file of its scales."""
    scales = load_file(store.resolve(step["ref"])) if step.get("ref") else None
    form = Form.of(step)
    return quantize(
        model, **{f.name: getattr(form, f.name) for f in fields(form)}, scales=scales, packed=packed
    )


def block_errors(model_fp, model_q, batches):
    """Rows (block, relative_error): ||h_q - h|| / ||h|| of each block's output h over all real tokens."""
    full, quantized = (dict(enumerate(anatomy.blocks(model))) for model in (model_fp, model_q))
    if len(full) != len(quantized):
        raise DermError(
            f"quantize: models of {len(full)} and {len(quantized)} blocks; compare equal depths"
        )
    sums, held = {block: [0.0, 0.0] for block in full}, {}

    def compare(block, x):
        h = held.pop(block).to(x.device)
        for i, part in enumerate((x - h, h)):
            sums[block][i] += part.double().square().sum().item()

    for batch in batches:
        tap(model_fp, [batch], full, held.__setitem__)
        tap(model_q, [batch], quantized, compare)
    return [
        {"block": b, "relative_error": (e / max(n, 1e-30)) ** 0.5} for b, (e, n) in sums.items()
    ]
