"""A form: what a model's linears are quantized to, by name and as a recipe's step. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from derm_compress.errors import DermError
from derm_compress.method.quantization.methods import METHODS, Method, quantizers
from derm_compress.model.memory import Format

MIXED = "mixed"  # how names end where blocks have several widths


@dataclass(frozen=True)
class Form:
    """A method at a width: awq4, awq3-duo-clip, awq4-text, awq2-mixed.

    duo: scales also know the weights' magnitudes. clip: groups may be clipped. double: NF4's absmax
    in 8 bits. text: calibrated without pictures. block_bits: {block of the model at hand: bits}
    where they differ from `bits`.
    """

    method: str
    bits: int = 4
    group_size: int = 64
    duo: bool = False
    clip: bool = False
    double: bool = False
    text: bool = False
    block_bits: Mapping[int, int] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise DermError(f"quantize: unknown method {self.method!r}; use one of {known}")
        widths = {int(block): bits for block, bits in self.block_bits.items()}  # JSON's keys: texts
        object.__setattr__(self, "block_bits", widths)
        self.kind.check_options(self.options)
        for bits in {self.bits, *widths.values()}:
            self.kind.check_size(bits, self.group_size)

    @staticmethod
    def of(step: Mapping) -> Form:
        """The form of a recipe's step."""
        told = {key: value for key, value in step.items() if key not in ("step", "ref")}
        known = [f.name for f in fields(Form)]
        if unknown := sorted(set(told) - set(known)):
            said = f"a recipe's step has unknown fields {unknown}; known: {known}"
            raise DermError(f"quantize: {said}")
        return Form(**told)

    @property
    def step(self) -> dict:
        """What a recipe's step says of it, as JSON holds it: nothing of its calibration."""
        step = {"method": self.method, "bits": self.bits, "group_size": self.group_size}
        step |= {option: True for option in self.options if option != "text"}
        if self.block_bits:
            step["block_bits"] = {str(block): bits for block, bits in self.block_bits.items()}
        return step

    @property
    def kind(self) -> Method:
        return METHODS[self.method]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(name for name in ("duo", "clip", "double", "text") if getattr(self, name))

    @property
    def scaled(self) -> bool:
        return bool(self.kind.scaling)

    @property
    def searched(self) -> bool:
        """Whether it needs a search on calibration inputs."""
        return self.kind.searched(self.options)

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
        return "-".join([method, *self.options, *([MIXED] if self.block_bits else [])])

    def format(self, blocks: int = 1) -> Format:
        """How the linears of so many blocks are stored; `bits` are the blocks' mean."""
        bits = sum(self.block_bits.get(block, self.bits) for block in range(blocks)) / blocks
        bits = int(bits) if bits == int(bits) else bits
        return self.kind.format(bits, self.group_size, double=self.double)


def forms(names: Iterable[str], bits: Sequence[int], group_size: int) -> list[Form]:
    """Every quantizer at every width; a method of one width has that one, whatever is asked."""
    found = []
    for method, options in quantizers(names):
        widths = method.widths if len(method.widths) == 1 else bits
        given = dict.fromkeys(options, True)
        found += [Form(method.name, width, group_size, **given) for width in widths]
    return found


def check_groups(asked: Iterable[Form], inputs: Mapping[str, int]) -> None:
    """DermError for a group size that does not divide the linears' inputs, by name."""
    for form in asked:
        if form.kind.grid == "int8":  # whole rows
            continue
        size = form.group_size
        odd = [name for name, into in inputs.items() if into % size]
        if odd:
            fit = [
                n
                for n in (256, 128, 64, 32, 16, 8, 1)
                if not any(into % n for into in inputs.values())
            ]
            told = f"{size} does not divide the {inputs[odd[0]]} inputs of {odd[0]}"
            raise DermError(f"group_size: {told}; use a divisor, such as {fit[0]}")
