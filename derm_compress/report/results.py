"""What a run has left, as frames: every stage's stored results by name, whichever of them there are. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import pandas as pd

from derm_compress.model.variants import paper_depth
from derm_compress.report import paper

ANSWERING = (
    "02_finetune",
    "04_pruning",
    "05_sft",
    "07_quantization",
    "08_evaluation",
)  # the last one's word counts


def _of(file: str):
    return field(default=None, metadata={"file": file})


@dataclass(frozen=True)
class Results:
    """A run's frames and JSON values by name; None is what no stage has left.

    `variants`: of all stages; `answers`: their 39 x 3 test items; `evaluation`: stage 08's test and held-out items.
    """

    items: pd.DataFrame | None = _of("01_data/items.parquet")
    data_report: dict | None = _of("01_data/report.json")
    curve: pd.DataFrame | None = _of("02_finetune/curve.parquet")
    scores: pd.DataFrame | None = _of("03_layer_importance/scores.parquet")
    values: pd.DataFrame | None = _of("03_layer_importance/values.parquet")
    plans: dict | None = _of("03_layer_importance/plans.json")
    similarity: pd.DataFrame | None = _of("03_layer_importance/similarity.parquet")
    choice: dict | None = _of("04_pruning/choice.json")
    training: pd.DataFrame | None = _of("05_sft/measured/training.parquet")
    statistics: pd.DataFrame | None = _of("06_activation_analysis/statistics.parquet")
    figure4: pd.DataFrame | None = _of("06_activation_analysis/figure4.parquet")
    errors: pd.DataFrame | None = _of("07_quantization/errors.parquet")
    search: pd.DataFrame | None = _of("07_quantization/search.parquet")
    channels: pd.DataFrame | None = _of("07_quantization/channels.parquet")
    equal_bytes: pd.DataFrame | None = _of("07_quantization/equal_bytes.parquet")
    evaluation: pd.DataFrame | None = _of("08_evaluation/answers.parquet")
    architecture: dict | None = _of("08_evaluation/architecture.json")
    memory: pd.DataFrame | None = _of("08_evaluation/memory.parquet")
    judge_controls: pd.DataFrame | None = _of("08_evaluation/judge_controls.parquet")
    latency: pd.DataFrame | None = _of("08_evaluation/measured/latency.parquet")
    predictions: pd.DataFrame | None = _of("08_evaluation/predictions.parquet")
    architecture_7b: dict | None = _of("08_evaluation/architecture_7b.json")
    variants: pd.DataFrame | None = None
    answers: pd.DataFrame | None = None

    @property
    def criterion(self) -> str:
        """The criterion of the study's own variants, which bear no criterion in their names.

        Before there are any, the first plan that goes by the first values, which lie in the order of the rankings.
        """
        rows = (
            []
            if self.variants is None
            else self.variants[["variant", "blocks_removed", "criterion"]].to_numpy()
        )
        plain = [criterion for name, n, criterion in rows if n and name == variant_id(n)]
        plans, first = (
            list(self.plans or {}),
            None if self.values is None else next(iter(self.values.ranking), None),
        )
        likely = [
            name for name in plans if scored_as(name) == first
        ]  # stored plans lie in the alphabet's order
        return next(iter([*plain, *likely, *plans]), "output_similarity")

    @property
    def one_prompt(self) -> pd.DataFrame | None:
        """The measured times at batch 1, which come first; None where nothing was measured."""
        return (
            None
            if self.latency is None or self.latency.empty
            else self.latency.drop_duplicates("variant")
        )

    @property
    def blocks(self) -> int:
        return next((plan["blocks"] for plan in (self.plans or {}).values()), paper.BLOCKS)

    @property
    def protected(self) -> tuple[int, ...]:
        """Blocks that the study's own plan never removes."""
        return tuple((self.plans or {}).get(self.criterion, {}).get("protected", ()))

    @property
    def operating(self) -> int:
        return (self.choice or {}).get("operating", paper_depth(6, self.blocks))

    @property
    def deeper(self) -> int:
        return (self.choice or {}).get("deeper", paper_depth(9, self.blocks))


def load_results(folders: dict[str, Path], **given) -> Results:
    """Results from {stage: its artifact folder}; a stage still running hands over its own frames by name."""
    known = {f.name: _read(folders, f.metadata["file"]) for f in fields(Results) if f.metadata}
    known |= {name: _together(folders, name) for name in ("variants", "answers")}
    known |= of_predictions(known["predictions"]) | given
    for name, keys in (("variants", ["variant"]), ("answers", ["variant", "item", "question"])):
        if known[name] is not None:
            known[name] = known[name].drop_duplicates(keys, keep="last")
    return Results(**known)


def of_predictions(predictions: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """`answers` and `evaluation` from stage 08's one frame of all answers: what every score table is made of."""
    if predictions is None:
        return {}
    last = predictions.stage == ANSWERING[-1]
    return {"answers": predictions[predictions.split == "test"], "evaluation": predictions[last]}


def _read(folders, file):
    stage, _, name = file.partition("/")
    path = Path(folders[stage], name) if stage in folders else None
    if path is None or not path.is_file():
        return None
    return (
        pd.read_parquet(path) if path.suffix == ".parquet" else json.loads(path.read_text("utf-8"))
    )


def _together(folders, name):
    """One frame of all stages' variants or test answers; of equal rows the later stage's counts."""
    frames = [
        f for stage in ANSWERING if (f := _read(folders, f"{stage}/{name}.parquet")) is not None
    ]
    frame = pd.concat(frames, ignore_index=True) if frames else None
    return frame[frame.split == "test"] if frames and name == "answers" else frame


def variant_id(
    blocks: int, *, criterion: str = "", healed: bool = False, method: str = "", bits: int = 4
) -> str:
    """The id that the stages give a model: pruned-6+sft|awq4."""
    name = (f"pruned-{blocks}" if blocks else "original") + (f"-{criterion}" if criterion else "")
    return name + ("+sft" if healed else "") + (f"|{method}{bits}" if method else "")


def scored_as(name: str) -> str:
    """The name under which a ranking's values are kept: without what is done differently after scoring."""
    return "-".join(
        part for part in name.split("-") if part not in ("iterative", "contiguous", "unprotected")
    )


def answers_of(frame: pd.DataFrame | None, variant: str) -> pd.DataFrame:
    """One variant's answers, each once; empty where there are none."""
    if frame is None:
        return pd.DataFrame({"item": [], "question": [], "score": []})
    return frame[frame.variant == variant].drop_duplicates(["item", "question"], keep="last")


def first_to_go(plan: dict, count: int) -> list:
    """The first `count` units that a stored plan removes, or all that it has; of a plan of runs, one so long."""
    if starts := plan.get("starts"):
        count = min(count, len(starts))
        return list(range(starts[count - 1], starts[count - 1] + count)) if count else []
    return list(plan["order"][:count])


def reaches(plan: dict, count: int) -> bool:
    """Whether a stored plan has so many units to remove."""
    return count <= len(plan.get("starts") or plan["order"])
