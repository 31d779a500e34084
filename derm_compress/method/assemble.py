"""A model from its recipe: base, adapters, pruned blocks, quantized weights, in that order."""

from __future__ import annotations

from derm_compress.errors import DermError
from derm_compress.method.finetune.merge import merge_adapter
from derm_compress.method.quantization import quantize
from derm_compress.model import removal, usage
from derm_compress.model.anatomy import META, blocks, fingerprint
from derm_compress.model.hf import LlavaForConditionalGeneration, LlavaProcessor
from derm_compress.model.loading import load_base
from derm_compress.model.recipe import Recipe


def materialize(
    recipe: Recipe, store, device: str = "cpu", packed: bool = False, dtype=None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The variant of a recipe, adapters merged; `store.resolve(ref)` finds adapters and scales."""
    usage.reset_peak(device)  # a GPU has room for one model, and none for what is left of the last
    model, processor = load_base(recipe.base, device, dtype)
    if (found := fingerprint(model)) != recipe.fingerprint:
        raise DermError(
            f"model {recipe.base}: fingerprint {found}, "
            f"but the recipe was made for {recipe.fingerprint}"
        )
    kept, absent = tuple(range(len(blocks(model)))), ()
    for step in recipe.steps:
        if rounded := quantize.quantized_linears(model)["decoder"]:
            raise DermError(
                f"recipe: {step['step']} after a quantize step ({rounded} linears); "
                "quantize comes last"
            )
        if device == META and step["step"] in ("adapter", "quantize"):
            continue  # neither changes a shape; formats are planned (memory.plan_weights)
        match step["step"]:
            case "adapter":
                merge_adapter(model, store.resolve(step["ref"]), step, kept=kept, absent=absent)
            case "prune":
                kept = removal.apply_step(model, step, kept)
                absent = tuple(step.get("absent", ()))
            case "quantize":
                quantize.apply_step(model, step, store, packed=packed)
            case unknown:
                raise DermError(f"recipe: unknown step {unknown!r}; adapter, prune or quantize")
    return model, processor
