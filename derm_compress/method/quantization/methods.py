"""The quantization methods: one entry a method, and a grid in grids.py where none fits. No torch.

A quantizer is a grid times a scaling (times clipping). Its name is the method's and the options
that differ, joined by dashes: awq, awq-duo-clip, bitsandbytes-double, awq-text (calibrated without
pictures).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from derm_compress.errors import DermError
from derm_compress.model.memory import FP16, FP32, Format


@dataclass(frozen=True)
class Method:
    """A quantization method, and what may be asked of it.

    grid: a kind that grids.grid_of knows. scaling: who chooses the scales: "search" (Eqs. 6-8),
    "autoawq", or nobody. group_sizes: empty for any. options: what a name may say beside the
    method. in_paper: of the paper's Tables 3 and 5.
    """

    name: str
    words: str
    grid: str
    scaling: str = ""
    widths: tuple[int, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    in_paper: bool = False
    citation: str = ""

    def searched(self, options: Iterable[str] = ()) -> bool:
        """Whether calibration inputs choose its scales or its clipping."""
        return bool(self.scaling) or "clip" in options

    def format(self, bits: float, group_size: int, *, double: bool = False) -> Format:
        """How its weights are stored; the scales and zero points that a group shares, in bytes."""
        match self.grid:
            case "integer":  # a zero point of as many bits as a weight
                return Format(bits, group_size, FP16 + bits / 8)
            case "symmetric":
                return Format(bits, group_size, FP16)
            case "hqq":  # its zero point is no whole number
                return Format(bits, group_size, 2 * FP16)
            case "nf4":  # an fp32 absmax; double: a byte, and an fp32 constant for 256 of them
                return Format(bits, group_size, 1 + FP32 / 256 if double else FP32)
            case "int8":  # a row's scale
                return Format(bits, 0, FP32)
        raise AssertionError(f"no format of grid {self.grid}")

    def check_options(self, options: Iterable[str]) -> None:
        """DermError for an option that it has not."""
        if foreign := [option for option in options if option not in self.options]:
            has = ", ".join(self.options) or "none"
            raise DermError(f"quantizer: {self.name} has no {foreign[0]}; options of it: {has}")

    def check_size(self, bits: int, group_size: int) -> None:
        """DermError for a width or a group size that it has not."""
        if bits not in self.widths:
            raise DermError(f"bits: {self.name} has {_listed(self.widths)}, not {bits}")
        if self.group_sizes and group_size not in self.group_sizes:
            sizes = _listed(self.group_sizes)
            raise DermError(f"group_size: {self.name} has blocks of {sizes}, not of {group_size}")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


SEARCHED = ("duo", "clip", "text")
BLOCKS = (32, 64, 128, 256)
METHODS = {
    method.name: method
    for method in (
        Method(
            "awq",
            "AWQ",
            "integer",
            "search",
            options=SEARCHED,
            in_paper=True,
            citation="arXiv:2306.00978",
        ),
        Method(
            "autoawq",
            "AutoAWQ",
            "integer",
            "autoawq",
            (4,),
            options=SEARCHED,
            citation="arXiv:2306.00978",
        ),
        Method("rtn", "round-to-nearest", "integer", options=("clip",), in_paper=True),
        Method(
            "rtn_symmetric",
            "symmetric round-to-nearest",
            "symmetric",
            options=("clip",),
            in_paper=True,
        ),
        Method(
            "bitsandbytes",
            "bitsandbytes",
            "nf4",
            widths=(4,),
            group_sizes=BLOCKS,
            options=("double",),
            in_paper=True,
            citation="arXiv:2305.14314",
        ),
        Method("awq_nf4", "AWQ-NF4", "nf4", "search", (4,), BLOCKS, (*SEARCHED, "double")),
        Method("hqq", "HQQ", "hqq", citation="https://mobiusml.github.io/hqq_blog"),
        Method("llm_int8", "LLM.int8", "int8", widths=(8,), citation="arXiv:2208.07339"),
    )
}
IN_PAPER = tuple(name for name, method in METHODS.items() if method.in_paper)


def quantizers(names: Iterable[str]) -> list[tuple[Method, tuple[str, ...]]]:
    """(method, options) of quantizers' names; DermError says what is known."""
    found = []
    for name in names:
        head, *options = name.split("-")
        if head not in METHODS:
            raise DermError(f"quantizer {name!r}: methods are {', '.join(METHODS)}")
        METHODS[head].check_options(options)
        if len(set(options)) < len(options):
            raise DermError(f"quantizer {name!r}: an option is named once")
        found.append((METHODS[head], tuple(options)))
    return found
