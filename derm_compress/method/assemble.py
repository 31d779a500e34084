"""A model from its recipe: base, adapters, pruned blocks, quantized weights, in that order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from derm_compress.errors import DermError
from derm_compress.files import read_json
from derm_compress.method.pruning import fuse
from derm_compress.model import removal, usage
from derm_compress.model.anatomy import blocks, fingerprint, has_values
from derm_compress.model.hf import LlavaForConditionalGeneration, LlavaProcessor
from derm_compress.model.loading import load_base
from derm_compress.model.recipe import NEEDED, Recipe, adapter_digest

DOWN = ".lora_A.weight"


def materialize(
    recipe: Recipe, store, device: str = "cpu", *, dtype=None, quantize: Callable | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The variant of a recipe, adapters merged; `store.resolve(ref)` finds adapters and scales.

    quantize: quantization.quantize.quantize_step, for recipes that have such a step. It is given,
    not imported, so that no result without one depends on the quantizers.
    """
    check_order(recipe)
    usage.reset_peak(device)  # a GPU has room for one model, and none for what is left of the last
    model, processor = load_base(recipe.base, device, dtype)
    found = fingerprint(model), len(blocks(model))
    if found != (recipe.fingerprint, recipe.blocks):
        raise DermError(
            f"model {recipe.base}: fingerprint {found[0]} of {found[1]} blocks, "
            f"but the recipe was made for {recipe.fingerprint} of {recipe.blocks}"
        )
    apply_steps(model, recipe, store, quantize=quantize)
    return model, processor


def apply_steps(
    model,
    recipe: Recipe,
    store,
    *,
    since: int = 0,
    weights: bool = True,
    quantize: Callable | None = None,
) -> None:
    """A recipe's steps from the number `since` on, in place, on the model that those before make.

    weights: whether they are to be changed, too; else only blocks and sublayers are removed.
    """
    for number, step in list(enumerate(recipe.steps))[since:]:
        before = recipe.until(number)
        match step["step"]:
            case unknown if unknown not in NEEDED:
                raise DermError(f"recipe: unknown step {unknown!r}; known are {', '.join(NEEDED)}")
            case "prune":
                removal.apply_step(model, step, before.kept())
            case _ if not (weights and has_values(model)):
                continue  # no other changes a shape; formats are planned (memory.plan_weights)
            case "adapter":
                left = {"kept": before.kept(), "absent": tuple(map(str, before.absent()))}
                merge_adapter(model, store.resolve(step["ref"]), step, **left)
            case "replace_me":
                fuse.apply_step(model, step, store, before.kept())
            case "reinitialize":
                reinitialize(model, step["seed"])
            case "quantize" if quantize is None:
                raise DermError("recipe: it quantizes, and nothing was given that does")
            case "quantize":
                quantize(model, step, store)


def check_order(recipe: Recipe) -> None:
    """DermError for a recipe that goes on after it has quantized."""
    names = [step["step"] for step in recipe.steps]
    if "quantize" in names[:-1]:
        after = names[names.index("quantize") + 1]
        raise DermError(f"recipe: {after} after a quantize step; quantize comes last")


def merge_adapter(
    model, folder: Path, step: dict, *, kept: tuple[int, ...], absent: tuple[str, ...] = ()
) -> None:
    """W + alpha / r * B A for every adapted linear, in place, on unquantized weights.

    Refused where the adapter's bytes or blocks are not those of the recipe's step: peft loads an
    adapter of N blocks into a model of fewer without a word, on the wrong blocks.
    """
    folder = Path(folder)
    check_adapter(folder, step, kept=kept, absent=absent)
    config = read_json(folder / "adapter_config.json")
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


@torch.no_grad()
def reinitialize(model, seed: int) -> None:
    """Draw the matrices of all decoder blocks from N(0, initializer_range), in place; norms become
    1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    deviation = model.config.text_config.initializer_range
    for name, weights in blocks(model).named_parameters():
        if weights.dim() > 1:
            weights.copy_(deviation * torch.randn(weights.shape, generator=generator))
        else:
            weights.fill_(0.0 if name.endswith("bias") else 1.0)
