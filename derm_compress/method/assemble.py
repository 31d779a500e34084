"""A model from its recipe: base, adapters, pruned blocks, quantized weights, in that order."""

from __future__ import annotations

from collections.abc import Callable

from derm_compress.errors import DermError
from derm_compress.method.finetune.merge import merge_adapter
from derm_compress.model import fresh, removal, usage
from derm_compress.model.anatomy import blocks, fingerprint, has_values
from derm_compress.model.hf import LlavaForConditionalGeneration, LlavaProcessor
from derm_compress.model.loading import load_base
from derm_compress.model.recipe import NEEDED, Recipe


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
            case "reinitialize":
                fresh.reinitialize(model, step["seed"])
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
