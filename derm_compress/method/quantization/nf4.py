"""The NF4 codebook, through bitsandbytes: a grid of its own, and what QLoRA's base is frozen in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from derm_compress.method.quantization.groups import Grid, check_linear, clipped
from derm_compress.model import anatomy

QLORA_GROUP = 64


@dataclass(frozen=True)
class NF4Grid(Grid):
    """The NF4 codebook in blocks along the input dimension, through bitsandbytes.

    A block has an fp32 absmax; `double` holds 256 of them in 8 bits each with an fp32 constant.
    """

    group_size: int
    double: bool = False
    bits: int = 4
    kind: ClassVar = "nf4"
    affine: ClassVar = False
    layout: ClassVar = "bitsandbytes"

    @classmethod
    def of(cls, form, bits):
        return cls(form.group_size, form.double)

    @property
    def _format(self):
        form = {"quant_type": "nf4", "compress_statistics": self.double}
        return form | {"blocksize": self.group_size}

    def rounded(self, weight, ends=None):
        """Weight [..., in] on the grid, in its own dtype."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = clipped(weight, ends, self.group_size)
        flat = weight.flatten(0, -2).contiguous()
        return dequantize_4bit(*quantize_4bit(flat, **self._format)).view(weight.shape)

    def packed(self, linear, ends=None):
        """The linear as bitsandbytes' Linear4bit."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        made = Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = clipped(linear.weight.data, ends, self.group_size)
        made.weight = Params4bit(weight, **self._format).to(linear.weight.device)
        # not by module=made: a cycle, which holds memory until it is collected
        made.quant_state = made.weight.quant_state
        made.bias = linear.bias
        made.compute_dtype = linear.weight.dtype
        made.compute_type_is_set = True
        # On AVX512-BF16 CPUs its first forward would repack the weight in place and compute in
        # bfloat16: other numbers, and no way to save them afterwards.
        made.support_avx512bf16_for_cpu = False
        return made


def freeze(model):
    """Every linear of the decoder's blocks in NF4, packed, in place: what adapters are put on."""
    grid = NF4Grid(QLORA_GROUP)
    for index, block in enumerate(anatomy.blocks(model)):
        for name, linear in anatomy.linears(block).items():
            check_linear(linear, f"block {index} {name}", grid.group_size)
            block.set_submodule(name, grid.packed(linear))
            block.get_submodule(name).grid = grid
