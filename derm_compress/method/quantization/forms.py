"""Which models are quantized how, by name. No torch.

A quantizer is a method and what is done differently, joined by dashes: awq, awq-duo-clip, bitsandbytes-double, awq-text
(calibrated without pictures). With its width it is a form: awq4, awq3-text, awq2-mixed (blocks of two widths).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from derm_compress.errors import DermError
from derm_compress.model.memory import OVERHEAD
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import variant

if TYPE_CHECKING:  # a machine that only rehearses may lack it
    import pandas as pd

SCALED = ("awq", "awq_nf4", "autoawq")  # methods whose scales are searched
WIDTHS = {
    "bitsandbytes": (4,),
    "awq_nf4": (4,),
    "autoawq": (4,),
    "llm_int8": (8,),
}  # of those that have one alone
BLOCKS = dict.fromkeys(
    ("bitsandbytes", "awq_nf4"), (32, 64, 128, 256)
)  # group sizes of those that have not all
METHODS = ("awq", "autoawq", "rtn", "rtn_symmetric", "bitsandbytes", "awq_nf4", "hqq", "llm_int8")
COMMON = ("awq", "bitsandbytes", "rtn", "rtn_symmetric")  # of the paper's Tables 3 and 5
TEXT, MIXED = "text", "mixed"
TAKES = {  # who has an option, where not all have it
    "duo": SCALED,
    "clip": ("awq", "awq_nf4", "autoawq", "rtn", "rtn_symmetric"),
    "double": ("bitsandbytes", "awq_nf4"),
    TEXT: SCALED,
}


def quantizers(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(method, options) of quantizers' names; DermError says what is known."""
    found = []
    for name in names:
        method, *options = name.split("-")
        if method not in METHODS:
            raise DermError(f"quantizer {name!r}: methods are {', '.join(METHODS)}")
        has = [option for option, methods in TAKES.items() if method in methods]
        if set(options) - set(has) or len(set(options)) < len(options):
            raise DermError(
                f"quantizer {name!r}: options of {method}, each once: {', '.join(has) or 'none'}"
            )
        found.append((method, options))
    return found


def forms(
    names: Iterable[str], bits: int | Sequence[int], group_size: int, *, label="", **options
) -> dict[str, dict]:
    """{form: step} of every quantizer at every width; a method of one width alone has that one, whatever is asked.

    options: quantize.Form's, for all quantizers whose methods have them; `label` ends the names, and must where blocks
    or linears are treated apart. A step's `text` says that it calibrates without pictures.
    """
    if not label and (options.keys() & {"block_bits", "keep", "parts"}):
        raise DermError(
            "quantized: forms with block_bits, keep or parts need a label to be told apart by"
        )
    found = {}
    for method, ways in quantizers(names):
        given = {
            key: _plain(v)
            for key, v in options.items()
            if v and method in TAKES.get(key, (method,))
        }
        for width in WIDTHS.get(method) or ([bits] if isinstance(bits, int) else bits):
            step = {
                "method": method,
                "bits": width,
                "group_size": group_size,
                **given,
                **dict.fromkeys(ways, True),
            }
            found[form_name(step, label)] = step
    return found


def check_groups(steps: Iterable[dict], inputs: dict[str, int]) -> None:
    """DermError for a group size that a step's method has not, or that does not divide the linears' inputs, by name."""
    for step in steps:
        method, size = step["method"], step["group_size"]
        if size not in BLOCKS.get(method, (size,)):
            raise DermError(
                f"group_size: {method} has blocks of {', '.join(map(str, BLOCKS[method]))}, not of {size}"
            )
        odd = [] if method == "llm_int8" else [name for name, into in inputs.items() if into % size]
        if odd:
            told = f"the {inputs[odd[0]]} inputs of {odd[0]}"
            fit = [
                n
                for n in (256, 128, 64, 32, 16, 8)
                if not any(into % n for into in inputs.values())
            ]
            raise DermError(
                f"group_size: {size} does not divide {told}; use a divisor, such as {fit[0] if fit else 1}"
            )


def _plain(value):
    """A value as JSON gives it back."""
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


def searched(step: dict) -> bool:
    """Whether a quantize step needs the result of a search on calibration inputs."""
    return step["method"] in SCALED or bool(step.get("clip"))


def form_name(step: dict, label: str = "") -> str:
    """awq4, awq_nf4, awq3-duo-clip, awq3-mixed: method, bits, options, label."""
    method, bits = step["method"], str(step["bits"])
    return quantizer_name(
        step | {"method": method if method.endswith(bits) else method + bits}, label
    )


def quantizer_name(step: dict, label: str = "") -> str:
    """The same without the width."""
    return "-".join(
        [
            step["method"],
            *(option for option in TAKES if step.get(option)),
            *([label] if label else []),
        ]
    )


def stored_as(step: dict, blocks: int) -> dict:
    """method, bits and group_size of the format that memory.plan_weights plans; bits are the mean over the blocks.

    Where blocks stay at 16 bits, the group size is the one at which all blocks' scales would take what the others' do.
    Not counted: linears that `keep` leaves as they are, and `parts` beyond the decoder.
    """
    method = step["method"] + "_double" * bool(step.get("double"))
    own = {int(block): bits for block, bits in step.get("block_bits", {}).items()}
    widths = [own.get(block, step["bits"]) for block in range(blocks)]
    rounded, mean, size = (
        [bits for bits in widths if bits < 16],
        sum(widths) / blocks,
        step["group_size"],
    )
    if not rounded:
        return {"method": "fp16", "bits": 16, "group_size": 0}
    if (
        scales := sum(OVERHEAD[method](bits, size) for bits in rounded) / blocks
        if len(rounded) < blocks
        else 0
    ):
        size = OVERHEAD[method](mean, 1) / scales
    return {"method": method, "bits": int(mean) if mean == int(mean) else mean, "group_size": size}


def asked(
    sources: Iterable[str], names: Iterable[str], bits, group_size: int, *, label="", **options
) -> pd.DataFrame:
    """What forms() gives, for every source: source, form, quantizer, step (JSON)."""
    import pandas as pd

    found = forms(names, bits, group_size, label=label, **options)
    rows = [
        (s, form, quantizer_name(step, label), json.dumps(step))
        for s in sources
        for form, step in found.items()
    ]
    return pd.DataFrame(rows, columns=["source", "form", "quantizer", "step"])


def quantized(sources: pd.DataFrame, wanted: pd.DataFrame, ref: str) -> pd.DataFrame:
    """The variants that asked() asks for.

    What needs a search takes its scales from `ref/<form>/<variant>.safetensors`, as evaluate.search_scales leaves them.
    """
    import pandas as pd

    known, rows = sources.drop_duplicates("variant").set_index("variant"), []
    for row in wanted.itertuples():
        source, step = known.loc[row.source], json.loads(row.step)
        scales = {"ref": f"{ref}/{row.form}/{row.source}.safetensors"} if searched(step) else {}
        step.pop(TEXT, None)
        recipe = Recipe.from_json(source.recipe).then("quantize", **step, **scales)
        told = {
            "criterion": source.criterion,
            "healed": bool(source.healed),
            "quantizer": row.quantizer,
        }
        told |= stored_as(step, len(recipe.kept()))
        rows.append(variant(f"{row.source}|{row.form}", recipe, source=row.source, **told))
    return pd.DataFrame(rows)


def calibrations(wanted: pd.DataFrame, source: str) -> dict[bool, dict[str, dict]]:
    """{calibrated without pictures: {form: step}} of what a source needs a search for."""
    found: dict[bool, dict[str, dict]] = {}
    for row in wanted[wanted.source == source].itertuples():
        if searched(step := json.loads(row.step)):
            found.setdefault(step.pop(TEXT, False), {})[row.form] = step
    return found
