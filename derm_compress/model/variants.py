"""The frame of variants: every model of the study by name, and its recipe. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from derm_compress.errors import DermError
from derm_compress.files import read_json
from derm_compress.model.recipe import Recipe

ORIGINAL, HEALED = "original", "+sft"
RIVAL = "magnitude"  # the criterion that the study's own is compared with, healed and quantized
# These stand for a criterion where the kept blocks are in random order, have random weights, are
# mended by least squares (ReplaceMe), or are healed by distillation.
SHUFFLED, REINITIALIZED, MENDED, DISTILLED = "shuffled", "reinitialized", "replace_me", "distilled"


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


def half_up(depth: float) -> int:
    """A number of blocks, rounded as everywhere in the study."""
    return int(depth + 0.5)


def paper_depth(removed: int, blocks: int, of: int = 32) -> int:
    """The same fraction of another model's blocks, rounded half up; at least one where any goes."""
    return max(min(removed, 1), half_up(removed * blocks / of))


def find(known: pd.DataFrame, removed: int, criterion: str, *, healed: bool = False) -> str | None:
    """The unquantized variant without so many blocks by a criterion, of the first SFT seed."""
    wanted = {"blocks_removed": removed, "criterion": criterion if removed else ""}
    wanted |= {"healed": healed, "sft_seed": 0, "quantizer": ""}
    rows = known[(known[list(wanted)] == list(wanted.values())).all(axis=1)]
    return rows.variant.iloc[0] if len(rows) else None


def roles(known: pd.DataFrame, choice: dict, *, healed: bool = False) -> dict[str, str]:
    """Variants by role as far as there are such: unpruned, operating, deeper, and the rival.

    The rival has as many blocks as the operating point; its criterion is another than the study's.
    """
    own, depth = choice["criterion"], choice["operating"]
    places = {"unpruned": (0, own), "operating": (depth, own), "deeper": (choice["deeper"], own)}
    if own != RIVAL:
        places["rival"] = depth, RIVAL
    found = {role: find(known, *place, healed=healed) for role, place in places.items()}
    return {role: name for role, name in found.items() if name}


def to_heal(
    known: pd.DataFrame,
    choice: dict,
    *,
    rivals: Sequence[str] = (RIVAL,),
    depths: Sequence[int] = (),
    seeds: int = 1,
    relearning: int | None = None,
    distilled: bool = False,
) -> pd.DataFrame:
    """What SFT is given: the model of every role, and the study's own plan at further `depths`.

    `rivals`: rankings whose models of the operating depth are healed, too, as far as there are
    such. `depths` are of 32; `seeds`: trainings of the operating point and of its control;
    `relearning`: the seed of what is as deep as the operating point and can only learn anew, its
    blocks in random order and with random weights, to be healed beside it; `distilled`: once more
    the operating point, to be healed by distillation. Adds `sft_seed` (0 for the first), `adapter`,
    the name of the folder to train into, and `healed_variant`, what it makes. DermError where stage
    04 has no model of a depth.
    """
    role, blocks = roles(known, choice), recipe_of(known, ORIGINAL).blocks
    names = [role[name] for name in ("unpruned", "operating", "deeper") if name in role]
    found = (find(known, choice["operating"], rival) for rival in rivals)
    names += filter(None, found)
    for depth in (paper_depth(n, blocks) for n in depths):
        names.append(find(known, depth, choice["criterion"]))
        if names[-1] is None:
            said = f"no model without {depth} blocks was made; add its depth to depths"
            raise DermError(f"sft_depths: {said}")
    first = named(known, names).assign(sft_seed=0)
    more = named(first, [role["unpruned"], role["operating"]])
    again = [more.assign(sft_seed=seed) for seed in range(1, seeds)]
    if relearning is not None:
        again.append(pd.DataFrame(learning_anew(known, role["operating"], relearning)))
    if distilled:
        name = f"{role['operating']}-{DISTILLED}"
        point = named(first, [role["operating"]])
        again.append(point.assign(variant=name, source=name, criterion=DISTILLED))
    frame = pd.concat([first, *again], ignore_index=True)
    marks = [f"~{seed}" if seed else "" for seed in frame.sft_seed]
    names = {"adapter": frame.variant + marks, "healed_variant": frame.variant + HEALED + marks}
    return frame.assign(**names)


def learning_anew(known: pd.DataFrame, name: str, seed: int) -> list[dict]:
    """A pruned variant with its blocks in random order, and with random weights: as deep, but no
    models that were trained."""
    recipe = recipe_of(known, name)
    kept = np.random.default_rng([seed, 5]).permutation(recipe.kept()).tolist()
    made = {
        SHUFFLED: recipe.pruned(kept, recipe.absent()),
        REINITIALIZED: recipe.then("reinitialize", seed=seed),
    }
    return [variant(f"{name}-{how}", made[how], criterion=how) for how in made]


def to_quantize(known: pd.DataFrame, choice: dict) -> tuple[list[str], list[str]]:
    """Names of the models that every method is tried on, and of those that only the paper's are.

    The first: the original, the operating point, and that one healed. The others, as far as there
    are such: the deeper model and the rival, healed.
    """
    plain, healed = roles(known, choice), roles(known, choice, healed=True)
    main = [plain["unpruned"], plain["operating"], healed["operating"]]
    return main, [healed[role] for role in ("deeper", "rival") if role in healed]


def mended(known: pd.DataFrame, choice: dict, ref: str) -> list[dict]:
    """The operating point as ReplaceMe mends it, untrained; `ref`: the stage's word for the maps'
    file."""
    name = roles(known, choice)["operating"]
    recipe = recipe_of(known, name)
    recipe = recipe.then("replace_me", ref=ref, kept=list(recipe.kept()))
    return [variant(f"{name}-{MENDED}", recipe, criterion=MENDED)]


def healed(
    sources: pd.DataFrame, ref: str, adapters: Path, beside: Iterable[dict] = ()
) -> pd.DataFrame:
    """The variants of to_heal() after SFT, and rows `beside` them; `ref` is the stage's word for
    the folder `adapters`."""
    rows = []
    for row in sources.to_dict("records"):
        folder = row["adapter"]
        recipe = Recipe.from_json(row["recipe"]).with_adapter(f"{ref}/{folder}", adapters / folder)
        known = {key: row[key] for key in ("criterion", "sft_seed")}
        rows.append(variant(row["healed_variant"], recipe, healed=True, **known))
    return pd.DataFrame([*rows, *beside])


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
    """Criterion, operating and deeper depth, as stage 04 chose them."""
    return read_json(Path(folder) / "choice.json")
