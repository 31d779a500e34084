"""An adapter merged into the unquantized base, never into 4 bits."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from derm_compress.errors import DermError
from derm_compress.model.recipe import adapter_digest

DOWN = ".lora_A.weight"


def merge_adapter(
    model, folder: Path, step: dict, *, kept: tuple[int, ...], absent: tuple[str, ...] = ()
) -> None:
    """W + alpha / r * B A for every adapted linear, in place, on unquantized weights.

    Refused where the adapter's bytes or blocks are not those of the recipe's step: peft loads an
    adapter of N blocks into a model of fewer without a word, on the wrong blocks.
    """
    folder = Path(folder)
    check_adapter(folder, step, kept=kept, absent=absent)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    file = folder / "adapter_model.safetensors"
    with safe_open(file, "pt", device=str(model.device)) as weights:  # a GPU may be almost full
        for name in [name for name in weights.keys() if name.endswith(DOWN)]:  # noqa: SIM118
            down, up = map(weights.get_tensor, (name, name.replace("lora_A", "lora_B")))
            linear = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(DOWN))
            update = (up @ down).mul_(config["lora_alpha"] / config["r"])
            linear.weight.data += update.to(linear.weight)  # its type, its GPU


def check_adapter(folder: Path, step: dict, *, kept: tuple[int, ...], absent: tuple[str, ...]):
    advice = "merge it before pruning or train one for these blocks"
    if step["kept"] != list(kept):
        raise DermError(
            f"adapter {folder.name}: trained on blocks {step['kept']}, "
            f"the model has {list(kept)}; {advice}"
        )
    if list(step.get("absent", ())) != list(absent):
        raise DermError(f"adapter {folder.name}: trained on other attentions and MLPs; {advice}")
    if adapter_digest(folder) != step["sha256"]:
        raise DermError(
            f"adapter {folder.name}: its bytes are not those that the recipe names; fine-tune again"
        )
