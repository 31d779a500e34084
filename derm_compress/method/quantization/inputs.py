"""What a linear's inputs X say of an error D in its weights (Eq. 7): tr(D H D^T), H = X^T X.

D [out, in] is the weights' error. So tokens are read once, whatever is tried on the weights.
"""

from dataclasses import dataclass

import torch

from derm_compress.errors import DermError
from derm_compress.method.activations import tap
from derm_compress.model import anatomy


@dataclass(frozen=True)
class InputStatistics:
    """Mean |x| [in] of inputs X [tokens, in], and the cheaper factor of Eq. 7: X, or H [in, in].

    Tokens may weigh differently; X is then what gives the weighted H. What rows share is one token
    of more weight.
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


def input_statistics(model, batches, block, name):
    """The statistics of what one linear of a block reads, such as mlp.down_proj."""
    linears = anatomy.linears(anatomy.blocks(model)[block])
    if name not in linears:
        raise DermError(f"quantize: no linear {name!r} in block {block}; {', '.join(linears)}")
    sums = InputSums()
    tap(model, batches, {name: linears[name]}, lambda _, x: sums.add(x), inputs=True)
    return sums.statistics()
