"""Why AWQ's blocks err more than rounding's where its search found less error: an ablation.

`python benchmarks/block_errors.py [RUN]` takes the unpruned model of a finished run (tiny) in AWQ
and in plain rounding, both at the first width. `through`: the relative error of every block's
output, each block being given what the quantized blocks before it leave, as Table 3 has it.
`alone`: every block is given what the unquantized model gives it; relative to what the block adds.
Both on the pictures that the scales were searched on, and on others; means over blocks. Last line:
one JSON object, with AWQ's errors over rounding's as ratios.
"""

import json
import os
import sys

sys.path.pop(0)
os.environ["OMP_NUM_THREADS"] = "1"

from functools import partial

import pandas as pd
import torch

from derm_compress import data
from derm_compress.errors import DermError
from derm_compress.method import activations
from derm_compress.method.assemble import materialize
from derm_compress.method.iterate import each_model
from derm_compress.method.quantization.block_errors import each_quantized
from derm_compress.method.quantization.quantize import quantize_step
from derm_compress.model import anatomy
from derm_compress.model.variants import ORIGINAL, recipe_of
from derm_compress.study.plan import find_plan


def first(output):
    return output[0] if isinstance(output, tuple) else output


def alone(model, changed, batches) -> list[dict]:
    """Rows (block, relative_error): each changed block on the whole model's own inputs."""
    errors, sizes = {}, {}

    def beside(number, other):
        @torch.no_grad()
        def compare(_, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            apart = first(other(*args, **kwargs)) - first(output)
            added = first(output) - given
            for sums, value in ((errors, apart), (sizes, added)):
                sums[number] = sums.get(number, 0.0) + value.double().square().sum().item()

        return compare

    blocks, others = anatomy.blocks(model), anatomy.blocks(changed)
    hooks = [
        block.register_forward_hook(beside(i, other), with_kwargs=True)
        for i, (block, other) in enumerate(zip(blocks, others, strict=True))
    ]
    for batch in batches:
        activations.tap(model, [batch], {}, lambda name, x: None)
    for hook in hooks:
        hook.remove()
    return [{"block": i, "relative_error": (errors[i] / sizes[i]) ** 0.5} for i in errors]


def measure(plan) -> dict[str, float]:
    """Mean errors by where they are taken, on which pictures, and by which method."""
    dataset = data.load_dataset(plan.made("01_data") / "dataset")
    told = plan.parameters("07_quantization")
    count, seed, bits = told["quantization_items"], told["seed"], told["bits"][0]
    searched = data.sample(dataset.of("train"), count, seed)
    rest = [item for item in dataset.of("train") if item not in searched]
    pictures = {"searched": searched, "others": data.sample(rest, count, seed + 1)}
    variants = pd.read_parquet(plan.made("07_quantization") / "variants.parquet")
    names = {f"{ORIGINAL}|{way}{bits}": way for way in ("awq", "rtn")}
    variants = variants[variants.variant.isin(list(names))]
    whole, _ = materialize(recipe_of(variants, f"{ORIGINAL}|rtn{bits}").until(-1), plan.store)
    found = {}
    for kind, items in pictures.items():
        read = {"items": items, "images": dataset.images, "batch_size": 12}
        how = {"store": plan.store, "device": "cpu", "batch_size": 12}
        for turn, errors in each_quantized(variants, items, dataset.images, **how):
            found[f"through_{kind}_{names[turn.variant]}"] = errors.relative_error.mean()
        for turn in each_model(variants, plan.store, "cpu", "errors", quantize=quantize_step):
            rows = turn.calibrated(partial(alone, whole, turn.model), "alone", **read)
            rows = pd.DataFrame(rows)
            found[f"alone_{kind}_{names[turn.variant]}"] = rows.relative_error.mean()
    return found


def main(run: str = "tiny") -> None:
    try:
        found = measure(find_plan(run))
    except DermError as error:
        print(json.dumps({"skipped": str(error)}))
        return
    for place in ("through", "alone"):
        for kind in ("searched", "others"):
            awq, rtn = (found[f"{place}_{kind}_{way}"] for way in ("awq", "rtn"))
            found[f"{place}_{kind}_ratio"] = awq / rtn
    print(json.dumps({name: round(float(value), 4) for name, value in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
