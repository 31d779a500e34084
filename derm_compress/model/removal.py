"""Depth pruning: which blocks go is data (a plan), and applying it leaves an ordinary, smaller model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from derm_compress.errors import DermError
from derm_compress.model import anatomy, units
from derm_compress.model.units import SUBLAYERS, Unit

PARTS = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}


def span(unit: Unit | int | str) -> tuple[int, int]:
    """First sublayer of a unit and the one after its last, counted over all blocks, two a block."""
    return Unit.of(unit).span


def name_of(sublayer: int) -> str:
    """The unit of one sublayer."""
    return f"{sublayer // 2}.{SUBLAYERS[sublayer % 2]}"


def left(
    blocks: int, removed: Iterable[Unit | int | str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Blocks of which something is left without these units, and the sublayers that those lack."""
    kept, absent = units.left(blocks, map(Unit.of, removed))
    return kept, tuple(map(str, absent))


class Absent(nn.Module):
    """Stands for a removed attention or MLP, which adds nothing to the residual stream; holds no weights."""

    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states)


class AbsentAttention(Absent):
    def forward(self, hidden_states, **_):
        return super().forward(hidden_states), None


def apply(model, kept: Sequence[int], absent: Sequence[str] = ()) -> None:
    """Keep the blocks at these positions, without the `absent` sublayers (by position too), in place.

    Config, `layer_idx` and weights agree afterwards: without the renumbering cached generation fails, without the
    config a reload gets random blocks.
    """
    layers = anatomy.blocks(model)
    if sorted(set(kept)) != list(kept) or not kept or kept[-1] >= len(layers):
        raise DermError(
            f"pruning: kept blocks {list(kept)} are not rising positions among {len(layers)} blocks"
        )
    for unit in map(Unit.of, absent):
        block = layers[unit.block]
        module, norm = PARTS[unit.part]
        block.set_submodule(module, AbsentAttention() if module == "self_attn" else Absent())
        block.set_submodule(norm, nn.Identity())
    _set_blocks(model, [layers[i] for i in kept])


def _set_blocks(model, layers: Sequence[nn.Module]) -> None:
    attentions = [layer.self_attn for layer in layers if not isinstance(layer.self_attn, Absent)]
    if not attentions:
        raise DermError("pruning: a model without any attention cannot generate; keep one")
    for i, attention in enumerate(
        attentions
    ):  # a cache counts attentions, and asks the first for its length
        attention.layer_idx = i
    anatomy.decoder(model).layers = nn.ModuleList(layers)
    for config in {
        id(c): c for c in (model.config.text_config, anatomy.decoder(model).config)
    }.values():
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: len(layers)]


def lacking(model) -> tuple[str, ...]:
    """Sublayers that a model's blocks lack, by position."""
    parts = [
        block.get_submodule(PARTS[name][0]) for block in anatomy.blocks(model) for name in SUBLAYERS
    ]
    return tuple(name_of(s) for s, part in enumerate(parts) if isinstance(part, Absent))


def apply_step(model, step: dict, kept: Sequence[int]) -> tuple[int, ...]:
    """Apply a recipe's step to a model of these original blocks; returns those that are left."""
    if gone := sorted(set(step["kept"]) - set(kept)):
        raise DermError(f"recipe: blocks {gone} are to be kept but were pruned before")
    before = [name_of(2 * kept[first // 2] + first % 2) for first, _ in map(span, lacking(model))]
    told = set(step.get("absent", ()))
    if gone := [unit for unit in before if unit not in told and span(unit)[0] // 2 in step["kept"]]:
        raise DermError(
            f"recipe: {gone} were removed before; a later prune step lists them as absent too"
        )
    apply(model, *left(len(kept), step_units(step, kept)))
    return tuple(step["kept"])


def step_units(step: dict, kept: Sequence[int]) -> list[Unit]:
    """What a recipe's step removes from a model of these original blocks, by position."""
    absent = [
        name_of(2 * kept.index(first // 2) + first % 2)
        for first, _ in map(span, step.get("absent", ()))
    ]
    return [i for i, block in enumerate(kept) if block not in set(step["kept"])] + absent


@contextmanager
def without(model, removed: Sequence[Unit]) -> Iterator[None]:
    """The model with these units taken out, put back at the end."""
    layers = list(anatomy.blocks(model))
    modules = [dict(layer.named_children()) for layer in layers]
    types = getattr(anatomy.decoder(model).config, "layer_types", None)
    try:
        apply(model, *left(len(layers), removed))
        yield
    finally:
        for layer, held in zip(layers, modules, strict=True):
            for name, module in held.items():
                layer.set_submodule(name, module)
        _set_blocks(model, layers)
        if types:
            model.config.text_config.layer_types = anatomy.decoder(model).config.layer_types = types
