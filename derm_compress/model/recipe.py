"""Recipes: what every stage says of a model instead of storing one. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from derm_compress.errors import DermError, first_line
from derm_compress.files import KEY, STAGE
from derm_compress.model.units import Unit

REF = re.compile(rf"{STAGE.pattern}/{KEY.pattern}(/[^/\\\0]+)*")

FIELDS = {"base": str, "fingerprint": str, "blocks": int, "steps": list}
NEEDED = {
    "adapter": ("ref", "sha256", "kept"),
    "prune": ("kept",),
    "replace_me": ("ref", "kept"),
    "reinitialize": ("seed",),
    "quantize": ("method",),
}
MOST = 10_000  # blocks that any model has


@dataclass(frozen=True)
class Recipe:
    """How a variant is made: `steps` applied to `base`, a name load_base knows, of `blocks` blocks.

    Steps are `adapter` (ref, sha256, kept), `prune` (kept), `replace_me` (ref to maps, kept),
    `reinitialize` (seed: all blocks get random weights) and `quantize` (a Form's fields; ref to
    searched scales). Where blocks are kept without their attention or MLP, `prune` and later
    `adapter` steps list these as `absent`.
    """

    base: str
    fingerprint: str
    blocks: int
    steps: tuple[dict, ...] = ()

    def then(self, step: str, **settings) -> Recipe:
        return replace(self, steps=(*self.steps, {"step": step, **settings}))

    def until(self, number: int) -> Recipe:
        """What this recipe's step of a number is applied to; of -1, its last."""
        return replace(self, steps=self.steps[:number])

    def kept(self) -> tuple[int, ...]:
        """Original indices of the blocks that are left, in the order in which they stand."""
        return tuple(self._pruning().get("kept", range(self.blocks)))

    def absent(self) -> tuple[Unit, ...]:
        """Sublayers that the kept blocks lack, by the block's original index."""
        return tuple(map(Unit.of, self._pruning().get("absent", ())))

    def _pruning(self) -> dict:
        return next((step for step in reversed(self.steps) if step["step"] == "prune"), {})

    @property
    def weights(self) -> tuple[dict, ...]:
        """The steps up to the last that changes a weight; any after it only remove."""
        changing = [i for i, step in enumerate(self.steps, 1) if step["step"] != "prune"]
        return self.steps[: max(changing, default=0)]

    @property
    def quantized(self) -> bool:
        return any(step["step"] == "quantize" for step in self.steps)

    def pruned(self, kept: Iterable[int], absent: Iterable[Unit | str] = ()) -> Recipe:
        return self.then("prune", kept=list(kept), **_absent(absent))

    def with_adapter(self, ref: str, folder: Path) -> Recipe:
        """The recipe with a trained adapter merged; it belongs to what is left now."""
        settings = {"ref": ref, "sha256": adapter_digest(folder), "kept": list(self.kept())}
        return self.then("adapter", **settings, **_absent(self.absent()))

    def to_dict(self) -> dict:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """DermError for a text that is no recipe, or whose steps name what cannot be."""
        try:
            value = json.loads(text)
            for name, kind in FIELDS.items():
                if type(value[name]) is not kind:
                    raise ValueError(f"{name} is {value[name]!r}")
            if not 0 < value["blocks"] <= MOST:
                raise ValueError(f"{value['blocks']} blocks")
            recipe = Recipe(**value | {"steps": tuple(value["steps"])})
            for step in recipe.steps:
                _check_step(step, range(recipe.blocks))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DermError(f"recipe: it cannot be read ({first_line(error)})") from error
        return recipe


def shared(recipes: Sequence[Recipe]) -> Recipe:
    """What all recipes begin with; DermError where they are of several bases."""
    if len(bases := {recipe.until(0).to_json() for recipe in recipes}) > 1:
        raise DermError(f"recipes: {len(bases)} bases in one frame of variants; one at a time")
    same = 0
    for steps in zip(*(recipe.steps for recipe in recipes), strict=False):
        if any(step != steps[0] for step in steps):
            break
        same += 1
    return recipes[0].until(same)


def _check_step(step: dict, blocks: range) -> None:
    """References, blocks and units of a step as it was read; ValueError for what is none."""
    if missing := [name for name in NEEDED.get(step["step"], ()) if name not in step]:
        raise ValueError(f"{step['step']} has no {missing[0]}")
    if "ref" in step:
        check_ref(str(step["ref"]))
    kept, units = step.get("kept", [0]), [Unit.of(unit) for unit in step.get("absent", ())]
    named = [*kept, *(unit.block for unit in units)]
    if beyond := [block for block in named if type(block) is not int or block not in blocks]:
        raise ValueError(f"{step['step']} names block {beyond[0]} of {len(blocks)}")
    if not kept or len(kept) > len(set(kept)):
        raise ValueError(f"{step['step']} keeps {kept}, of which each is a block once")


def _absent(units: Iterable[Unit | str]) -> dict[str, list[str]]:
    told = [str(unit) for unit in units]
    return {"absent": told} if told else {}


def check_ref(text: str) -> str:
    """A reference, "02_finetune/<64-digit key>/adapter"; DermError for what is none."""
    if not REF.fullmatch(text) or {".", ".."} & set(text.split("/")):
        raise DermError(f"reference {text!r}: is not STAGE/KEY/NAME of a stored result")
    return text


def adapter_digest(folder: Path) -> str:
    return hashlib.sha256((Path(folder) / "adapter_model.safetensors").read_bytes()).hexdigest()


def read_recipe(folder: Path) -> Recipe:
    """The recipe that a stage left as recipe.json."""
    return Recipe.from_json((Path(folder) / "recipe.json").read_text("utf-8"))
