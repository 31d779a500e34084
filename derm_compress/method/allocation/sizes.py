"""What an allocation takes, to the byte, and what a budget leaves to the decoder's linears.

As reports count: weights, and what one question about a picture needs while it is answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from derm_compress.errors import DermError
from derm_compress.method.quantization.codes import PLANES
from derm_compress.method.quantization.methods import METHODS, WHOLE
from derm_compress.model.memory import FP16, GIB, Format, plan_peak
from derm_compress.model.shapes import Architecture, llava_7b
from derm_compress.model.units import Unit, left

LINEARS = ("decoder_linears", "quantization_scales")


def linear_bytes(shape: Sequence[int], bits: int, method: str, group_size: int) -> tuple[int, int]:
    """Bytes of the codes of a linear [out, in], and of its groups' scales and zeros."""
    out, into = shape
    if bits == WHOLE:
        return FP16 * out * into, 0
    kind, groups = METHODS[method], out * into // group_size
    if kind.grid == "integer" and not kind.symmetric:  # zeros are packed as codes are
        scales = FP16 * groups + planes(groups, bits)
    else:
        scales = int(kind.format(bits, group_size).group_bytes) * groups
    return planes(out * into, bits), scales


def planes(count: int, bits: int) -> int:
    """Bytes of so many codes, as codes.pack() gives them."""
    return sum(-(-count * width // 8) for _, width in PLANES[bits])


def removed_counts(blocks: int, removed: Sequence[Unit]) -> dict[str, int]:
    """Whole blocks that go, and attentions and MLPs from blocks that stay."""
    kept, absent = left(blocks, removed)
    parts = [unit.part for unit in absent]
    counts = {"attentions_removed": parts.count("attention"), "mlps_removed": parts.count("mlp")}
    return {"blocks_removed": blocks - len(kept)} | counts


def around(arch: Architecture, removed: Sequence[Unit], *, packed: bool = True) -> dict[str, int]:
    """Bytes by component of everything but the decoder's linears.

    packed: whether any of them is, so that one at a time is decoded.
    """
    form = Format(4) if packed else Format()
    plan = plan_peak(arch, form=form, **removed_counts(arch.blocks, removed))
    return {part: round(GIB * gib) for part, gib in plan.items() if part not in LINEARS}


def planned_bytes(
    arch: Architecture,
    removed: Sequence[Unit],
    bits: Mapping[str, int],
    method: str,
    group_size: int,
) -> dict[str, int]:
    """Bytes by component; those of allocation.RUNNING are in no file."""
    found = dict.fromkeys(LINEARS, 0)
    for name, width in bits.items():
        shape = arch.linears[name.partition(".")[2]]
        for part, size in zip(LINEARS, linear_bytes(shape, width, method, group_size), strict=True):
            found[part] += size
    packed = any(width != WHOLE for width in bits.values())
    return found | around(arch, removed, packed=packed)


def own_budgets(budget_gib: Sequence[float], arch: Architecture) -> dict[float, int]:
    """{GiB of LLaVA-1.5-7B: bytes of this model}; DermError for what is no budget."""
    if wrong := [gib for gib in budget_gib if type(gib) not in (int, float)]:
        raise DermError(f"budget_gib: {wrong[0]!r} is no number of GiB")
    arch_7b = llava_7b()
    return {float(gib): own_budget(gib, arch, arch_7b) for gib in sorted(set(budget_gib))}


def own_budget(gib: float, arch: Architecture, arch_7b: Architecture) -> int:
    """Bytes for this model where LLaVA-1.5-7B has `gib`: linears get the same share of 16 bits.

    DermError where 7B's other parts leave them nothing.
    """
    room = gib * GIB - sum(around(arch_7b, ()).values())
    share = room / (FP16 * arch_7b.decoder_linears())
    if share <= 0:
        least = sum(around(arch_7b, ()).values()) / GIB
        raise DermError(f"budget_gib: {gib:g} is less than the {least:.2f} around 7B's blocks")
    own = sum(around(arch, ()).values())
    return own + int(share * FP16 * arch.decoder_linears())
