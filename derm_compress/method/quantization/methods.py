"""Quantization methods, and the forms that they give weights. No torch.

A quantizer is a grid times a scaling (times clipping). Its name is the method's and the options
that differ, joined by dashes: awq, awq-duo-clip, bitsandbytes-double, awq-text. A form is a
quantizer at a width: awq4-clip. To add a method: an entry in METHODS, and a grid in grids.py where
none fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from derm_compress.errors import DermError, first_line
from derm_compress.model.memory import FP16, FP32, Format

MIXED = "mixed"  # how names end where blocks have several widths
WHOLE = 16  # bits of a linear that is not quantized
OPTIONS = ("duo", "clip", "double", "actorder", "text")  # of forms, as names have them
MAPS = ("block_bits", "linear_bits")  # a form's widths by place


@dataclass(frozen=True)
class Method:
    """A quantization method, and what may be asked of it.

    grid: a kind of grids.GRIDS, symmetric or not. scaling: who chooses the scales: "search" (Eqs.
    6-8), "autoawq", or nobody. rounding: who chooses the codes: "gptq", or each weight the nearest.
    group_sizes: empty for any. in_paper: of the paper's Tables 3 and 5.
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
    symmetric: bool = False
    rounding: str = ""

    def __post_init__(self):
        self.format(self.widths[0], 64)  # a grid that has none is told before any work

    def format(self, bits: float, group_size: int, *, double: bool = False) -> Format:
        """How its weights are stored; the scales and zero points that a group shares, in bytes."""
        match self.grid:
            case "integer" if self.symmetric:
                return Format(bits, group_size, FP16)
            case "integer":  # a zero point of as many bits as a weight
                return Format(bits, group_size, FP16 + bits / 8)
            case "hqq":  # its zero point is no whole number
                return Format(bits, group_size, 2 * FP16)
            case "nf4":  # an fp32 absmax; double: a byte, and an fp32 constant for 256 of them
                return Format(bits, group_size, 1 + FP32 / 256 if double else FP32)
            case "int8":  # a row's scale
                return Format(bits, 0, FP32)
        raise DermError(f"quantizer {self.name}: how grid {self.grid!r} is stored is not known")

    def check_options(self, options: Iterable[str]) -> None:
        if foreign := [option for option in options if option not in self.options]:
            has = ", ".join(self.options) or "none"
            raise DermError(f"quantizer: {self.name} has no {foreign[0]}; options of it: {has}")

    def check_size(self, bits: int, group_size: int) -> None:
        for what, asked, has in (
            ("bits", bits, self.widths),
            ("group_size", group_size, self.group_sizes),
        ):
            if has and asked not in has:
                known = ", ".join(map(str, has))
                raise DermError(f"{what}: {self.name} has {known}, not {asked}")


CLIP, SEARCHED = ("clip",), ("duo", "clip", "text")
GPTQ = {"options": ("clip", "actorder", "text"), "rounding": "gptq", "citation": "arXiv:2210.17323"}
BLOCKS = (32, 64, 128, 256)
AWQ, QLORA = "arXiv:2306.00978", "arXiv:2305.14314"
_ALL = (
    Method("awq", "AWQ", "integer", "search", options=SEARCHED, in_paper=True, citation=AWQ),
    Method("autoawq", "AutoAWQ", "integer", "autoawq", (4,), options=SEARCHED, citation=AWQ),
    Method("gptq", "GPTQ", "integer", **GPTQ),
    Method("awq_gptq", "AWQ-GPTQ", "integer", "search", **GPTQ),
    Method("rtn", "round-to-nearest", "integer", options=CLIP, in_paper=True),
    Method(
        "rtn_symmetric",
        "symmetric round-to-nearest",
        "integer",
        options=CLIP,
        in_paper=True,
        symmetric=True,
    ),
    Method("bitsandbytes", "bitsandbytes", "nf4", "", (4,), BLOCKS, ("double",), True, QLORA),
    Method("awq_nf4", "AWQ-NF4", "nf4", "search", (4,), BLOCKS, (*SEARCHED, "double")),
    Method("hqq", "HQQ", "hqq", citation="https://mobiusml.github.io/hqq_blog"),
    Method("llm_int8", "LLM.int8", "int8", widths=(8,), citation="arXiv:2208.07339"),
)
METHODS = {method.name: method for method in _ALL}
IN_PAPER = tuple(name for name, method in METHODS.items() if method.in_paper)


@dataclass(frozen=True)
class Form:
    """A method at a width: awq4, awq3-duo-clip, awq4-text, awq2-mixed.

    duo: scales also know the weights' magnitudes. clip: groups may be clipped. double: NF4's absmax
    in 8 bits. actorder: GPTQ begins with the loudest inputs. text: calibrated without pictures.
    block_bits: {block of the model at hand: bits} where they differ from `bits`; linear_bits:
    {"12.mlp.down_proj": bits} over both, WHOLE for one that stays as it is.
    """

    method: str
    bits: int = 4
    group_size: int = 64
    duo: bool = False
    clip: bool = False
    double: bool = False
    actorder: bool = False
    text: bool = False
    block_bits: Mapping[int, int] = field(default_factory=dict, hash=False)
    linear_bits: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.method not in METHODS:
            raise DermError(f"quantizer {self.method!r}: methods are {', '.join(METHODS)}")
        widths = {int(block): bits for block, bits in self.block_bits.items()}  # JSON's keys: texts
        object.__setattr__(self, "block_bits", widths)
        self.kind.check_options(self.options)
        for bits in {self.bits, *widths.values(), *self.linear_bits.values()} - {WHOLE}:
            self.kind.check_size(bits, self.group_size)
        if self.linear_bits and (self.scaled or self.clip):
            said = f"{self.method} searches whole blocks of one width"
            raise DermError(f"quantizer: {said}; linears of several widths take gptq, rtn or hqq")

    @staticmethod
    def of(step: Mapping) -> Form:
        """The form of a recipe's step."""
        told = {key: value for key, value in step.items() if key not in ("step", "ref")}
        known = [f.name for f in fields(Form)]
        if unknown := sorted(set(told) - set(known)):
            said = f"a recipe's step has unknown fields {unknown}; known: {known}"
            raise DermError(f"quantize: {said}")
        try:
            for name in told.keys() - {"method", *MAPS}:
                if type(told[name]) is not type(getattr(Form, name)):
                    raise TypeError(f"{name} is {told[name]!r}")
            for name in MAPS:
                for bits in told.get(name, {}).values():
                    if type(bits) is not int:
                        raise TypeError(f"{name} have {bits!r}")
            return Form(**told)
        except (AttributeError, TypeError, ValueError) as error:
            raise DermError(
                f"quantize: a recipe's step is no form ({first_line(error)})"
            ) from error

    @property
    def step(self) -> dict:
        """What a recipe's step says of it, as JSON holds it: nothing of its calibration."""
        step = {"method": self.method, "bits": self.bits, "group_size": self.group_size}
        step |= {option: True for option in self.options if option != "text"}
        if self.block_bits:
            step["block_bits"] = {str(block): bits for block, bits in self.block_bits.items()}
        if self.linear_bits:
            step["linear_bits"] = dict(self.linear_bits)
        return step

    @property
    def kind(self) -> Method:
        return METHODS[self.method]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(name for name in OPTIONS if getattr(self, name))

    @property
    def scaled(self) -> bool:
        return bool(self.kind.scaling)

    @property
    def coded(self) -> bool:
        """Whether calibration inputs choose its codes."""
        return bool(self.kind.rounding)

    @property
    def searched(self) -> bool:
        """Whether calibration inputs choose its scales, its clipping or its codes."""
        return self.scaled or self.clip or self.coded

    @property
    def quantizer(self) -> str:
        """Its name without the width: awq-clip."""
        return self._named(self.method)

    @property
    def name(self) -> str:
        """awq4-clip; the width once, where the method's name ends with it."""
        bits = str(self.bits)
        return self._named(self.method if self.method.endswith(bits) else self.method + bits)

    def _named(self, method: str) -> str:
        mixed = [MIXED] if self.block_bits or self.linear_bits else []
        return "-".join([method, *self.options, *mixed])

    def bits_of(self, block: int, name: str) -> int:
        return self.linear_bits.get(f"{block}.{name}", self.block_bits.get(block, self.bits))

    def format(self, blocks: int = 1) -> Format:
        """How the linears of so many blocks are stored; `bits` are the blocks' mean."""
        bits = sum(self.block_bits.get(block, self.bits) for block in range(blocks)) / blocks
        bits = int(bits) if bits == int(bits) else bits
        return self.kind.format(bits, self.group_size, double=self.double)


def quantizers(names: Iterable[str]) -> list[Form]:
    """Quantizers by their names, each at its first width; DermError says what is known."""
    found = []
    for name in names:
        head, *options = name.split("-")
        if head not in METHODS:
            raise DermError(f"quantizer {name!r}: methods are {', '.join(METHODS)}")
        METHODS[head].check_options(options)
        if len(set(options)) < len(options):
            raise DermError(f"quantizer {name!r}: an option is named once")
        found.append(Form(head, METHODS[head].widths[0], **dict.fromkeys(options, True)))
    return found


def forms(names: Iterable[str], bits: Sequence[int], group_size: int) -> list[Form]:
    """Every quantizer at every width; a method of one width has that one, whatever is asked."""
    found = []
    for form in quantizers(names):
        widths = form.kind.widths if len(form.kind.widths) == 1 else bits
        found += [replace(form, bits=width, group_size=group_size) for width in widths]
    return found


def check_groups(asked: Iterable[Form], inputs: Mapping[str, int]) -> None:
    """DermError for a group size that does not divide the linears' inputs, by name."""
    for form in asked:
        size = form.group_size
        odd = [name for name, into in inputs.items() if into % size]
        if odd and form.kind.grid != "int8":  # which takes whole rows
            every = inputs.values()
            sizes = (256, 128, 64, 32, 16, 8, 1)
            fit = next(n for n in sizes if not any(into % n for into in every))
            told = f"{size} does not divide the {inputs[odd[0]]} inputs of {odd[0]}"
            raise DermError(f"group_size: {told}; use a divisor, such as {fit}")
