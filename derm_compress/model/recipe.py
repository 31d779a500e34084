"""Recipes and the frame of variants: what every stage says of a model instead of storing one. No torch.

A recipe is a base and the ordered steps that turn it into a variant:
`adapter` (ref, sha256, kept), `prune` (kept), `quantize` (the fields of quantize.Form; ref to searched scales). Where
blocks are kept without their attention or MLP, `prune` and later `adapter` steps list these as `absent`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from derm_compress.errors import DermError
from derm_compress.model.units import Unit


@dataclass(frozen=True)
class Recipe:
    """How a variant is made: `base` is a name load_base knows, `blocks` its depth; `steps` are applied in order."""

    base: str
    fingerprint: str
    blocks: int
    steps: tuple[dict, ...] = ()

    def then(self, step: str, **settings) -> Recipe:
        return Recipe(
            self.base, self.fingerprint, self.blocks, (*self.steps, {"step": step, **settings})
        )

    def kept(self) -> tuple[int, ...]:
        """Original indices of the blocks that are left."""
        pruned = [step["kept"] for step in self.steps if step["step"] == "prune"]
        return tuple(pruned[-1]) if pruned else tuple(range(self.blocks))

    def absent(self) -> tuple[str, ...]:
        """Sublayers that the kept blocks lack, by the block's original index."""
        pruned = [step.get("absent", ()) for step in self.steps if step["step"] == "prune"]
        return tuple(pruned[-1]) if pruned else ()

    def pruned(self, kept: Iterable[int], absent: Iterable[Unit | str] = ()) -> Recipe:
        lacking = {"absent": [str(unit) for unit in absent]} if absent else {}
        return self.then("prune", kept=list(kept), **lacking)

    def with_adapter(self, ref: str, folder: Path) -> Recipe:
        """The recipe with a trained adapter merged; it belongs to what is left now."""
        lacking = {"absent": list(self.absent())} if self.absent() else {}
        return self.then(
            "adapter", ref=ref, sha256=adapter_digest(folder), kept=list(self.kept()), **lacking
        )

    def to_dict(self) -> dict:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Recipe:
        value = json.loads(text)
        for step in value["steps"]:
            if "ref" in step:
                check_ref(step["ref"])
        return Recipe(**value | {"steps": tuple(value["steps"])})


REF = re.compile(r"\d\d_[a-z_]+/[0-9a-f]{64}(/[^/\\\0]+)*")


def check_ref(text: str) -> str:
    """A reference to what a stage left, "02_finetune/<64-digit key>/adapter", or DermError: it must lead nowhere else."""
    if not REF.fullmatch(text) or {".", ".."} & set(text.split("/")):
        raise DermError(f"reference {text!r}: is not STAGE/KEY/NAME of a stored result")
    return text


def adapter_digest(folder: Path) -> str:
    return hashlib.sha256((Path(folder) / "adapter_model.safetensors").read_bytes()).hexdigest()


def read_recipe(folder: Path) -> Recipe:
    """The recipe that a stage left as recipe.json."""
    return Recipe.from_json((Path(folder) / "recipe.json").read_text("utf-8"))
