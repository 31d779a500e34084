"""The frame of variants: every model of the study by name, and its recipe. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.model.recipe import Recipe

ORIGINAL, HEALED = "original", "+sft"


@dataclass(frozen=True)
class Variant:
    """A row of the frame of variants; its fields are the frame's columns.

    `source` is the unquantized variant that a quantized one was made of, and any other's own name.
    Unquantized weights count as 16 bits, whatever the CPU computes in.
    """

    variant: str
    source: str
    blocks_removed: int = 0
    attentions_removed: int = 0  # from blocks that stay
    mlps_removed: int = 0
    criterion: str = ""
    healed: bool = False
    sft_seed: int = 0
    method: str = "fp16"
    bits: float = 16
    group_size: float = 0
    group_bytes: float = 0  # of a group's scale and zero point; see memory.Format
    quantizer: str = ""
    recipe: str = ""


COLUMNS = tuple(field.name for field in fields(Variant))


def variant(name: str, recipe: Recipe, *, source: str = "", **known) -> dict:
    """One row of the frame; what is removed is read off the recipe, `known` are further columns."""
    gone = [unit.part for unit in recipe.absent()]
    row = Variant(
        variant=name,
        source=source or name,
        blocks_removed=recipe.blocks - len(recipe.kept()),
        attentions_removed=gone.count("attention"),
        mlps_removed=gone.count("mlp"),
        recipe=recipe.to_json(),
        **known,
    )
    return asdict(row)


def pruned(
    original: Recipe, plans: Sequence, depths: Sequence[int], rival: Sequence[int] = ()
) -> pd.DataFrame:
    """The original, the first plan at all `depths`, and others at those of `rival`.

    Each as far as it goes. The first plan is the study's own and names its variants plainly. Depths
    count a plan's units.
    """
    rows = [variant(ORIGINAL, original)]
    for i, plan in enumerate(plans):
        for n in rival if i else depths:
            if n <= plan.most:
                recipe = original.pruned(plan.kept(n), plan.absent(n))
                name = f"pruned-{n}-{plan.criterion}" if i else f"pruned-{n}"
                rows.append(variant(name, recipe, criterion=plan.criterion))
    return pd.DataFrame(rows)


def paper_depth(removed: int, blocks: int, of: int = 32) -> int:
    """The same fraction of another model's blocks, rounded half up; at least one where any goes."""
    return max(min(removed, 1), int(removed * blocks / of + 0.5))


def to_heal(
    known: pd.DataFrame, choice: dict, *, depths: Sequence[int] = (), seeds: int = 1
) -> pd.DataFrame:
    """What SFT is given: the model of every role, and the study's own plan at further `depths`.

    `depths` are of 32; `seeds`: trainings of the operating point and of its control. Adds
    `sft_seed` (0 for the first) and `adapter`, the name of the folder to train into. DermError
    where stage 04 has no model of a depth.
    """
    role, blocks = roles(choice), recipe_of(known, ORIGINAL).blocks
    names = [name for name in role.values() if name in set(known.variant)]
    names += [f"pruned-{paper_depth(n, blocks)}" for n in depths]
    first = named(known, names).assign(sft_seed=0)
    more = named(first, [role["unpruned"], role["operating"]])
    again = [more.assign(sft_seed=seed) for seed in range(1, seeds)]
    frame = pd.concat([first, *again], ignore_index=True)
    marks = [f"~{seed}" if seed else "" for seed in frame.sft_seed]
    return frame.assign(adapter=frame.variant + marks)


def to_quantize(known: pd.DataFrame, choice: dict) -> tuple[list[str], list[str]]:
    """Names of the models that every method is tried on, and of those that only the paper's are.

    The first: the original, the operating point, and that one healed. The others, as far as there
    are such: the deeper model and the rival, healed.
    """
    role = roles(choice)
    main = [ORIGINAL, role["operating"], role["operating"] + HEALED]
    further = [role["deeper"] + HEALED, role["rival"] + HEALED]
    return main, [name for name in further if name in set(known.variant)]


def healed_name(adapter: str) -> str:
    """The variant that an adapter makes: pruned-6+sft~1 of pruned-6~1."""
    source, mark, seed = adapter.partition("~")
    return source + HEALED + mark + seed


def healed(sources: pd.DataFrame, ref: str, adapters: Path) -> pd.DataFrame:
    """The variants of to_heal() after SFT; `ref` is the stage's word for the folder `adapters`."""
    rows = []
    for row in sources.to_dict("records"):
        folder = row["adapter"]
        recipe = Recipe.from_json(row["recipe"]).with_adapter(f"{ref}/{folder}", adapters / folder)
        known = {key: row[key] for key in ("criterion", "sft_seed")}
        rows.append(variant(healed_name(folder), recipe, healed=True, **known))
    return pd.DataFrame(rows)


def named(frame: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Rows of these variants in this order, each once; DermError where one is unknown."""
    names = list(dict.fromkeys(names))
    if unknown := set(names) - set(frame.variant):
        raise DermError(f"variants {sorted(unknown)} are not among {sorted(frame.variant)}")
    rows = frame.drop_duplicates("variant").set_index("variant", drop=False)
    return rows.loc[names].reset_index(drop=True)


def recipe_of(frame: pd.DataFrame, name: str) -> Recipe:
    """The recipe of one variant; DermError where it is unknown."""
    return Recipe.from_json(named(frame, [name]).recipe[0])


def read_variants(*folders: Path) -> pd.DataFrame:
    """The variants of several stages in one frame."""
    frames = [pd.read_parquet(Path(folder) / "variants.parquet") for folder in folders]
    return pd.concat(frames, ignore_index=True).drop_duplicates("variant", ignore_index=True)


def read_choice(folder: Path) -> dict:
    """Operating and deeper depth, as stage 04 chose them."""
    return json.loads((Path(folder) / "choice.json").read_text("utf-8"))


def roles(choice: dict, rival: str = "magnitude") -> dict[str, str]:
    """Variant names by role: unpruned, operating, deeper, and the rival at the operating depth."""
    return {
        "unpruned": ORIGINAL,
        "operating": f"pruned-{choice['operating']}",
        "deeper": f"pruned-{choice['deeper']}",
        "rival": f"pruned-{choice['operating']}-{rival}",
    }
