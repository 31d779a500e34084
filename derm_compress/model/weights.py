"""The weights of a model's blocks, held on the host and put back bit by bit."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import skip_init

from derm_compress.model import anatomy, usage

SMALL = 1.0  # GiB up to which the host holds a model twice


class Weights:
    """A copy of what the blocks hold: of the decoder alone, since no step changes the rest."""

    def __init__(self, model):
        self.blocks = [
            {name: value.to("cpu", copy=True) for name, value in block.state_dict().items()}
            for block in anatomy.blocks(model)
        ]

    @torch.no_grad()
    def put_back(self, model) -> None:
        """In place, so that what was recorded of the model (graphs.py) sees it.

        The model has all its blocks again. Where a linear was replaced, it is a linear anew.
        """
        for block, held in zip(anatomy.blocks(model), self.blocks, strict=True):
            device = next(block.parameters()).device
            for name, linear in anatomy.linears(block).items():
                if type(linear) is not nn.Linear:
                    how = {"device": device, "dtype": held[f"{name}.weight"].dtype}
                    size = linear.in_features, linear.out_features
                    plain = skip_init(nn.Linear, *size, bias=linear.bias is not None, **how)
                    block.set_submodule(name, plain)
                vars(linear).pop("grid", None)
            block.load_state_dict(held)


def fit(model, processes: int = 1) -> bool:
    """Whether the host may hold a copy: never two large models, and half a model stays free.

    processes: as many ask for one each.
    """
    size, beside = usage.tensor_gib(model), model.device.type != "cpu"
    return size <= SMALL or (beside and 1.5 * size * processes <= usage.host_gib())
