"""An allocation: which blocks of one model go, and how many bits each linear gets, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from derm_compress.errors import DermError, first_line
from derm_compress.method.quantization.methods import METHODS, WHOLE, Form
from derm_compress.model.recipe import Recipe
from derm_compress.model.units import Unit, left

WIDTHS = (2, 3, 4, 8, WHOLE)
RUNNING = ("kernel_steps", "kv_cache", "activations", "workspace")  # bytes that are in no file
# Ways to spend a budget: JOINT is the best CANDIDATE; PROBE, one model that calibrates costs.
JOINT, BITS, CANDIDATE, PROBE = "joint", "bits alone", "candidate", "probe"
DROPS, UNIFORM, PAPER, LAST = "drops alone", "uniform", "paper's pipeline", "last blocks wide"
RANDOM = "random"
ROUNDING = tuple(  # methods that need no calibration, at several widths
    name
    for name, one in METHODS.items()
    if len(one.widths) > 1 and not Form(name, one.widths[0]).searched
)


@dataclass(frozen=True)
class Allocation:
    """Of the model `source`: units that go, and bits by kept linear, "12.mlp.down_proj", by the
    block's original index; WHOLE bits leave it as it is.

    method: of ROUNDING. bytes: planned, by component; predicted: KL divergence in nats a token.
    """

    source: str
    fingerprint: str
    blocks: int
    bits: Mapping[str, int]
    removed: tuple[Unit, ...] = ()
    method: str = "rtn"
    group_size: int = 64
    predicted: float | None = None
    bytes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        try:
            object.__setattr__(self, "removed", tuple(map(Unit.of, self.removed)))
            self._check()
        except (AttributeError, TypeError, ValueError) as error:
            raise DermError(f"allocation of {self.source}: {first_line(error)}") from error

    def _check(self) -> None:
        if self.method not in ROUNDING:
            raise ValueError(f"method {self.method!r} is none of {', '.join(ROUNDING)}")
        if wrong := set(self.bits.values()) - {*WIDTHS}:
            raise ValueError(f"{wrong} are no widths; there are {WIDTHS}")
        kept = {str(block) for block in self.kept}
        if beyond := [name for name in self.bits if name.partition(".")[0] not in kept]:
            raise ValueError(f"{beyond[0]} has bits, but no kept block")

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks of which something stays."""
        return left(self.blocks, self.removed)[0]

    @property
    def form(self) -> Form | None:
        """How the linears that are left are quantized, by their new places; None for not at all."""
        if {*self.bits.values()} <= {WHOLE}:
            return None
        place = {str(block): i for i, block in enumerate(self.kept)}
        found = {}
        for name, bits in self.bits.items():
            block, _, linear = name.partition(".")
            found[f"{place[block]}.{linear}"] = bits
        widest = max(bits for bits in found.values() if bits != WHOLE)
        return Form(self.method, widest, self.group_size, linear_bits=found)

    def applied(self, recipe: Recipe, fingerprint: str) -> Recipe:
        """The recipe of the unpruned model that has this fingerprint, and what is decided here."""
        if (fingerprint, recipe.blocks) != (self.fingerprint, self.blocks):
            raise DermError(
                f"allocation of {self.source}: made for a model of {self.blocks} blocks and "
                f"fingerprint {self.fingerprint}, not for this one ({recipe.blocks} blocks, "
                f"{fingerprint}); allocate anew"
            )
        kept, absent = left(self.blocks, self.removed)
        recipe = recipe.pruned(kept, absent) if self.removed else recipe
        return self.quantized(recipe)

    def quantized(self, recipe: Recipe) -> Recipe:
        """The recipe of a model that lacks these units already, and the bits."""
        return recipe.then("quantize", **self.form.step) if self.form else recipe

    def to_dict(self) -> dict:
        told = {"removed": [unit.plain for unit in self.removed], "bits": dict(self.bits)}
        return asdict(self) | told

    @staticmethod
    def from_json(text: str) -> Allocation:
        return Allocation(**json.loads(text))
