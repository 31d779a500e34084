"""Taking blocks and sublayers out of a model, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from derm_compress.errors import DermError
from derm_compress.model import anatomy, units
from derm_compress.model.units import Unit

PARTS = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}


class Absent(nn.Module):
    """Stands for a removed attention or MLP, which adds nothing to the residual stream."""

    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states)


class AbsentAttention(Absent):
    def forward(self, hidden_states, **_):
        return super().forward(hidden_states), None


def apply(model, kept: Sequence[int], absent: Iterable[Unit | str] = ()) -> None:
    """Keep the blocks at these positions, in this order, without the `absent` sublayers, in place.

    Config, `layer_idx` and weights agree afterwards: without the renumbering cached generation
    fails, without the config a reload gets random blocks.
    """
    layers = anatomy.blocks(model)
    if not kept or len(kept) > len(set(kept)) or not set(kept) <= set(range(len(layers))):
        raise DermError(
            f"pruning: kept blocks {list(kept)} are not positions among {len(layers)} blocks, each "
            "once"
        )
    for unit in map(Unit.of, absent):
        module, norm = PARTS[unit.part]
        stand_in = AbsentAttention() if unit.part == "attention" else Absent()
        layers[unit.block].set_submodule(module, stand_in)
        layers[unit.block].set_submodule(norm, nn.Identity())
    _set_blocks(model, [layers[i] for i in kept])


def _set_blocks(model, layers: Sequence[nn.Module]) -> None:
    attentions = [layer.self_attn for layer in layers if not isinstance(layer.self_attn, Absent)]
    if not attentions:
        raise DermError("pruning: a model without any attention cannot generate; keep one")
    for i, attention in enumerate(attentions):
        attention.layer_idx = i  # a cache counts attentions, and asks the first for its length
    decoder = anatomy.decoder(model)
    decoder.layers = nn.ModuleList(layers)
    for config in (model.config.text_config, decoder.config):
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: len(layers)]


def lacking(model) -> tuple[Unit, ...]:
    """Sublayers that a model's blocks lack, by position."""
    found = []
    for i, block in enumerate(anatomy.blocks(model)):
        for part, (module, _) in PARTS.items():
            if isinstance(block.get_submodule(module), Absent):
                found.append(Unit(i, part))
    return tuple(found)


def apply_step(model, step: dict, kept: Sequence[int]) -> None:
    """Apply a recipe's prune step to a model of these original blocks."""
    if gone := sorted(set(step["kept"]) - set(kept)):
        raise DermError(f"recipe: blocks {gone} are to be kept but were pruned before")
    told = set(step.get("absent", ()))
    before = [unit.at(kept[unit.block]) for unit in lacking(model)]
    gone = [str(unit) for unit in before if unit.block in step["kept"] and str(unit) not in told]
    if gone:
        raise DermError(
            f"recipe: {gone} were removed before; a later prune step lists them as absent too"
        )
    whole = [Unit(i) for i, block in enumerate(kept) if block not in step["kept"]]
    absent = [unit.at(kept.index(unit.block)) for unit in map(Unit.of, step.get("absent", ()))]
    _, absent = units.left(len(kept), whole + absent)
    apply(model, [kept.index(block) for block in step["kept"]], absent)


@contextmanager
def put_back(model) -> Iterator[None]:
    """What is removed from the model meanwhile is put back at the end."""
    layers = list(anatomy.blocks(model))
    modules = [dict(layer.named_children()) for layer in layers]
    types = getattr(anatomy.decoder(model).config, "layer_types", None)
    try:
        yield
    finally:
        for layer, held in zip(layers, modules, strict=True):
            for name, module in held.items():
                layer.set_submodule(name, module)
        _set_blocks(model, layers)
        if types:
            model.config.text_config.layer_types = types
            anatomy.decoder(model).config.layer_types = types


@contextmanager
def without(model, removed: Iterable[Unit | int | str]) -> Iterator[None]:
    """The model with these units taken out, put back at the end."""
    with put_back(model):
        apply(model, *units.left(len(anatomy.blocks(model)), map(Unit.of, removed)))
        yield
