"""What stage 07 quantizes how, and the variants that come of it. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import pandas as pd

from derm_compress.method.quantization.forms import Form, forms
from derm_compress.method.quantization.methods import IN_PAPER
from derm_compress.model.recipe import Recipe
from derm_compress.model.variants import variant

COLUMNS = ["source", "form", "quantizer", "text", "step"]


def wanted_forms(
    main: Iterable[str],
    further: Iterable[str],
    names: Iterable[str],
    bits: Sequence[int],
    group_size: int,
    shared: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """What stage 07 quantizes: source, form, quantizer, text, step (JSON), each pair once.

    Every quantizer at every width for the main models; for further ones those of the paper's tables
    at the first width; and what equal_bytes() wants, `shared`.
    """
    common = [name for name in names if name in IN_PAPER]
    frames = [asked(main, names, bits, group_size), asked(further, common, bits[:1], group_size)]
    if shared is not None:
        frames.append(shared[COLUMNS])
    return pd.concat(frames).drop_duplicates(["source", "form"], ignore_index=True)


def asked(
    sources: Iterable[str], names: Iterable[str], bits: Sequence[int], group_size: int
) -> pd.DataFrame:
    """Every quantizer at every width, for every source."""
    every = forms(names, bits, group_size)
    return frame((source, form) for source in sources for form in every)


def frame(pairs: Iterable[tuple[str, Form]]) -> pd.DataFrame:
    """Sources and what each is quantized to, as wanted_forms() has them."""
    rows = [
        (source, form.name, form.quantizer, form.text, json.dumps(form.step))
        for source, form in pairs
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def calibrations(wanted: pd.DataFrame, source: str) -> dict[bool, dict[str, Form]]:
    """{calibrated without pictures: {name: form}} of what a source needs a search for."""
    found: dict[bool, dict[str, Form]] = {}
    for row in wanted[wanted.source == source].itertuples():
        form = Form.of(json.loads(row.step))
        if form.searched:
            found.setdefault(bool(row.text), {})[row.form] = form
    return found


def quantized_variants(sources: pd.DataFrame, wanted: pd.DataFrame, ref: str) -> pd.DataFrame:
    """The variants of what is wanted, each with its `source`.

    What needs a search takes its scales from `ref/<form>/<source>.safetensors`, as
    search_scales() leaves them.
    """
    known = sources.drop_duplicates("variant").set_index("variant")
    rows = []
    for row in wanted.itertuples():
        source, form = known.loc[row.source], Form.of(json.loads(row.step))
        step = dict(form.step)
        if form.searched:
            step["ref"] = f"{ref}/{row.form}/{row.source}.safetensors"
        recipe = Recipe.from_json(source.recipe).then("quantize", **step)
        told = {
            "source": row.source,
            "criterion": source.criterion,
            "healed": bool(source.healed),
            "method": form.method,
            "quantizer": row.quantizer,
        }
        told |= asdict(form.format(len(recipe.kept())))
        rows.append(variant(f"{row.source}|{row.form}", recipe, **told))
    return pd.DataFrame(rows)
