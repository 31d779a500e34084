"""Model cards of exported folders: what a model is and is for, its data, how it opens. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pandas as pd

from derm_compress.data import dialogue
from derm_compress.data.preset import preset_names, read_preset
from derm_compress.evaluate import metrics
from derm_compress.files import artifact, read_json, read_note
from derm_compress.model import small
from derm_compress.model.recipe import Recipe

NOT_PLAIN = (
    "plain Transformers cannot open this folder, as blocks lack their attention or MLP: "
    "use derm_compress.model.loading.load_base(folder)"
)
SMOLLM2 = (
    f"{small.ATTRIBUTION} SmolLM2 is the work of Loubna Ben Allal, Anton Lozhkov, Elie Bakouch and "
    "others (2025, arXiv 2502.02737); its licence lies beside this card, in LICENSE."
)
WEIGHTS = {  # licence of a base, by its name: the tag that the hub knows, and what it says
    "tiny": (
        "apache-2.0",
        "The base is the tiny model of derm_compress, under Apache-2.0 like its code.",
    ),
    "small": ("apache-2.0", SMOLLM2),
    "pico": ("apache-2.0", "The base has random weights; nobody's licence binds them."),
    "llava-1.5-7b-hf": (
        "llama2",
        "The base is LLaVA-1.5-7B; the Llama 2 Community License binds its derivatives.",
    ),
}
UNKNOWN = (
    "other",
    "The base's own licence binds this model too; look it up where the base comes from.",
)
DATA = {  # by what stage 01 calls its source
    "synthetic": "Pictures drawn by derm_compress, no photographs; "
    "free like its code (Apache-2.0).",
    "folder": "A folder of the maker's own: the maker must know its licence.",
}
NO_DATA = "The export does not know the data: see the run's stage 01."


@dataclass(frozen=True)
class Facts:
    """What a run knows of a model beside its recipe; empty where the run has not come so far."""

    run: str = ""
    variant: str = ""
    source: str = ""
    judge: str = "rubric"
    score: metrics.Score | None = None


NOTHING = Facts()


def facts(recipe_json: str, artifacts: Path, run: str) -> Facts:
    """What the store knows of a model: the run's name for it, its data, its score on all 08's
    items.
    """
    report = _stored(artifacts, run, "01_data", "report.json")
    source = read_json(report).get("source", "") if report else ""
    variants = _stored(artifacts, run, "08_evaluation", "variants.parquet")
    answers = _stored(artifacts, run, "08_evaluation", "answers.parquet")
    if not variants or not answers:
        return Facts(run, source=source)
    frame = pd.read_parquet(variants)
    names = frame.variant[frame.recipe == recipe_json].tolist()
    if not names:
        return Facts(run, source=source)
    told = pd.read_parquet(answers, filters=[("variant", "==", names[0])])
    score = metrics.score_interval(told)
    judge = str(told.judge.iloc[0]) if len(told) else "rubric"
    return Facts(run, names[0], source, judge, score if score.n else None)


def _stored(artifacts: Path, run: str, stage: str, name: str) -> Path | None:
    pointer = read_note(Path(artifacts, "runs", run, f"{stage}.json"))
    if "key" not in pointer:
        return None
    path = artifact(Path(artifacts, "store"), stage, pointer["key"]) / name
    return path if path.is_file() else None


def model_card(
    recipe: Recipe, left: int, *, layout: str = "", known: Facts = NOTHING, half: bool = False
) -> str:
    """README.md of an exported folder with `left` decoder blocks, from recipe and facts.

    layout: of packed weights, as checkpoint.save says; "" for plain ones.
    """
    from jinja2 import Environment

    text = (files("derm_compress.evaluate") / "model_card.md.jinja").read_text("utf-8")
    base = Path(recipe.base).name
    tag, licence = WEIGHTS.get(base, UNKNOWN)
    return Environment(autoescape=False).from_string(text).render(  # Markdown, of our own words
        recipe=recipe,
        base=base,
        left=left,
        half=half,
        known=known,
        floor=metrics.FLOOR,
        licence_tag=tag,
        licence=licence,
        data=data_terms(known.source),
        question=dialogue.question("name"),
        not_plain=NOT_PLAIN,
        layout=layout,
        opens=_opens(recipe, layout),
    )  # fmt: skip


def data_terms(source: str) -> str:
    """Whose the pictures are and what they may be used for."""
    if source not in preset_names():
        return DATA.get(source, NO_DATA)
    preset = read_preset(source)
    return f"{preset.title} photographs ({preset.licence}). Name the source: {preset.citation}."


def _opens(recipe: Recipe, layout: str) -> str:
    if recipe.absent():
        return "load_base"
    return "checkpoint" if layout in ("autoawq", "own") else "transformers"
