"""QLoRA: adapters on an NF4 base, trained on answers only, merged into the unquantized base and never into 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from derm_compress.errors import DermError
from derm_compress.model.recipe import adapter_digest

if TYPE_CHECKING:  # data needs scipy and pandas, which a machine that only rehearses may lack
    pass


def merge_adapter(
    model, folder: Path, step: dict, *, kept: tuple[int, ...], absent: tuple[str, ...] = ()
) -> None:
    """W + alpha / r * B A for every adapted linear, in place, on unquantized weights.

    Refused where the adapter's bytes or blocks are not those of the recipe's step: peft loads an adapter of N blocks
    into a model of fewer without a word, on the wrong blocks.
    """
    trained, found = [*step["kept"], *step.get("absent", ())], [*kept, *absent]
    if trained != found:
        raise DermError(
            f"adapter {Path(folder).name}: trained on blocks {list(step['kept'])}, the model has {list(kept)}"
            f"{' and other sublayers' * (list(step['kept']) == list(kept))}; "
            "merge it before pruning or train one for these blocks"
        )
    if adapter_digest(folder) != step["sha256"]:
        raise DermError(
            f"adapter {Path(folder).name}: its bytes are not those that the recipe names; fine-tune again"
        )
    config = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
    weights = load_file(Path(folder) / "adapter_model.safetensors", device=str(model.device))
    for name, down in weights.items():
        if name.endswith(".lora_A.weight"):
            up = weights[name.replace("lora_A", "lora_B")]
            linear = model.get_submodule(
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            )
            update = config["lora_alpha"] / config["r"] * (up @ down)
            linear.weight.data += update.to(linear.weight.dtype)
