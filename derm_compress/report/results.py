"""What a run has left, as frames: every stage's stored results by name, whichever there are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import pandas as pd
from PIL import Image
from safetensors import safe_open

from derm_compress.evaluate import schema
from derm_compress.files import read_frame, read_json
from derm_compress.method.importance.rankings import OPTIONS
from derm_compress.method.quantization.methods import MIXED
from derm_compress.model.variants import paper_depth
from derm_compress.report import wording
from derm_compress.report.paper.numbers import BLOCKS

ANSWERING = (*schema.ANSWERING, "08_evaluation")
ANSWER = schema.KEY  # what tells an answer apart


def _of(file: str):
    return field(default=None, metadata={"file": file})


@dataclass(frozen=True)
class Results:
    """A run's frames and JSON values by name; None is what no stage has left.

    `variants`: of all stages; `answers`: their answers on test items; `evaluation`: stage 08's, on
    test and held-out items.
    """

    items: pd.DataFrame | None = _of("01_data/items.parquet")
    data_report: dict | None = _of("01_data/report.json")
    images: Path | None = _of("01_data/dataset/images.safetensors")
    ablations: pd.DataFrame | None = _of("03_layer_importance/measured.parquet")
    scores: pd.DataFrame | None = _of("03_layer_importance/scores.parquet")
    values: pd.DataFrame | None = _of("03_layer_importance/values.parquet")
    draws: pd.DataFrame | None = _of("03_layer_importance/draws.parquet")
    plans: dict | None = _of("03_layer_importance/plans.json")
    choice: dict | None = _of("04_pruning/choice.json")
    removals: pd.DataFrame | None = _of("04_pruning/controls.parquet")
    removal_answers: pd.DataFrame | None = _of("04_pruning/control_answers.parquet")
    removal_losses: pd.DataFrame | None = _of("04_pruning/control_losses.parquet")
    training: pd.DataFrame | None = _of("05_sft/measured/training.parquet")
    statistics: pd.DataFrame | None = _of("06_activation_analysis/statistics.parquet")
    inputs: pd.DataFrame | None = _of("06_activation_analysis/inputs.parquet")
    figure4: pd.DataFrame | None = _of("06_activation_analysis/figure4.parquet")
    errors: pd.DataFrame | None = _of("07_quantization/errors.parquet")
    losses: pd.DataFrame | None = _of("07_quantization/control_losses.parquet")
    rounded: pd.DataFrame | None = _of("07_quantization/rounded_anew.parquet")
    search: pd.DataFrame | None = _of("07_quantization/search.parquet")
    equal_bytes: pd.DataFrame | None = _of("07_quantization/equal_bytes.parquet")
    memory: pd.DataFrame | None = _of("08_evaluation/memory.parquet")
    judge_controls: pd.DataFrame | None = _of("08_evaluation/judge_controls.parquet")
    latency: pd.DataFrame | None = _of("08_evaluation/measured/latency.parquet")
    predictions: pd.DataFrame | None = _of("08_evaluation/predictions.parquet")
    evaluation: pd.DataFrame | None = _of("08_evaluation/answers.parquet")
    allocations: pd.DataFrame | None = _of("09_allocation/allocations.parquet")
    held: pd.DataFrame | None = _of("09_allocation/held.parquet")
    allocation_answers: pd.DataFrame | None = _of("09_allocation/answers.parquet")
    variants: pd.DataFrame | None = None
    answers: pd.DataFrame | None = None

    def picture(self, item: str) -> Image.Image | None:
        """An item's picture; it alone is read."""
        if self.images is None or self.items is None or item not in set(self.items["id"]):
            return None
        row = int(self.items.row[self.items["id"] == item].iloc[0])
        with safe_open(self.images, "np") as stored:
            return Image.fromarray(stored.get_slice("images")[row : row + 1][0])

    @property
    def criterion(self) -> str:
        """The study's own: stage 04 notes it, and stage 03 ranks by it first."""
        if "criterion" in (self.choice or {}):
            return self.choice["criterion"]
        if self.values is not None and len(self.values):
            return self.values.ranking.iloc[0]
        return next(iter(self.plans or {}), "output_similarity")

    @property
    def plan(self) -> dict | None:
        """The study's own."""
        return (self.plans or {}).get(self.criterion)

    @property
    def protected(self) -> tuple[int, ...]:
        """Blocks that the study's own plan never removes."""
        return tuple((self.plan or {}).get("protected", ()))

    @property
    def blocks(self) -> int:
        return next((plan["blocks"] for plan in (self.plans or {}).values()), BLOCKS)

    @property
    def operating(self) -> int:
        return (self.choice or {}).get("operating", paper_depth(6, self.blocks))

    @property
    def deeper(self) -> int:
        return (self.choice or {}).get("deeper", paper_depth(9, self.blocks))

    def depth(self, role: str) -> int:
        """How many units go from the paper's `unpruned`, `operating` or `deeper` model."""
        return {"unpruned": 0, "operating": self.operating, "deeper": self.deeper}[role]

    @property
    def one_prompt(self) -> pd.DataFrame | None:
        """The measured times at batch 1, which come first; None where nothing was measured."""
        if self.latency is None or self.latency.empty:
            return None
        return self.latency.drop_duplicates("variant")

    @cached_property
    def together(self) -> pd.DataFrame:
        """Test and held-out answers, each once."""
        frames = [frame for frame in (self.answers, self.evaluation) if frame is not None]
        frames = frames or [pd.DataFrame(columns=[*ANSWER, "score"])]
        return pd.concat(frames).drop_duplicates(ANSWER, keep="last")

    @cached_property
    def without_score(self) -> str:
        """What a judge did not do, in words: answers without a score; empty where all have one."""
        lost = self.together[self.together.score.isna()]
        if lost.empty:
            return ""
        said = f"{lost.judge.iloc[0]} gave {len(lost)} of {len(self.together)} answers no score"
        errors = lost.error[lost.error.ne("")] if "error" in lost else lost.iloc[:0]
        return f"{said} (mostly: {errors.mode().iloc[0]})" if len(errors) else said

    @cached_property
    def models(self) -> pd.DataFrame | None:
        """`variants` with `units_removed`, which plans count (blocks, or attentions and MLPs), and
        whether their bits are `mixed`."""
        if self.variants is None:
            return None
        known = self.variants
        in_a_block = 1 + known.criterion.map(removes_parts).astype(int)
        parts = known.attentions_removed + known.mlps_removed
        mixed = known.quantizer.str.endswith(f"-{MIXED}")
        return known.assign(units_removed=in_a_block * known.blocks_removed + parts, mixed=mixed)

    @cached_property
    def names(self) -> dict[str, str]:
        """What each variant is called where people read it."""
        known = () if self.variants is None else self.variants.itertuples()
        return {row.variant: wording.label(row, self.criterion) for row in known} | wording.SHOWN

    def variant(
        self, removed: int, *, criterion: str = "", healed=False, quantizer="", bits=0
    ) -> str | None:
        """The name of the model with so many units removed, by the study's own criterion unless
        another is given; quantized to 4 bits unless told otherwise. None where there is none."""
        return pick(
            self.models,
            units_removed=removed,
            criterion=(criterion or self.criterion) if removed else "",
            healed=healed,
            sft_seed=0,
            quantizer=quantizer,
            bits=bits or (4 if quantizer else 16),
        )

    @property
    def full(self) -> str | None:
        """The full pipeline's model: pruned to the operating point, healed, in 4-bit AWQ."""
        return self.variant(self.operating, healed=True, quantizer="awq")

    @property
    def main(self) -> list[str | None]:
        """The three that the question is about: unpruned, pruned, pruned and healed."""
        n = self.operating
        return [self.variant(0), self.variant(n), self.variant(n, healed=True)]


def removes_parts(criterion: str) -> bool:
    """Whether a ranking's units are attentions and MLPs, not whole blocks."""
    return any(OPTIONS[word].parts for word in criterion.split("-") if word in OPTIONS)


def pick(variants: pd.DataFrame | None, **columns) -> str | None:
    """The name of the one variant with these values in these columns; None where there is none."""
    if variants is None:
        return None
    for column, value in columns.items():
        variants = variants[variants[column] == value]
    return variants.variant.iloc[0] if len(variants) else None


def load_results(folders: dict[str, Path], **given) -> Results:
    """Results from {stage: its artifact folder}; a stage under way gives its own frames by name."""
    known = {f.name: read(folders, f.metadata["file"]) for f in fields(Results) if f.metadata}
    known["variants"] = read_all(folders, "variants")
    known["answers"] = on_test(read_all(folders, "answers"))
    every = given.get("predictions", known["predictions"])  # stage 08's one frame of all answers
    if every is not None:
        of_08 = every[every.stage == ANSWERING[-1]]
        known |= {"answers": on_test(every), "evaluation": of_08}
    known |= given
    for name, keys in (("variants", ["variant"]), ("answers", ANSWER)):
        if known[name] is not None:
            known[name] = known[name].drop_duplicates(keys, keep="last")
    return Results(**known)


def read(folders: dict[str, Path], file: str):
    """`stage/name.parquet` or `.json`, a path of pictures; None where the stage has not left it."""
    stage, _, name = file.partition("/")
    path = Path(folders[stage], name) if stage in folders else None
    if path is None or not path.is_file():
        return None
    if path.suffix == ".safetensors":
        return path
    return read_frame(path) if path.suffix == ".parquet" else read_json(path)


def read_all(folders: dict[str, Path], name: str) -> pd.DataFrame | None:
    """One frame of all stages' variants or answers, later stages last."""
    frames = [read(folders, f"{stage}/{name}.parquet") for stage in ANSWERING]
    frames = [frame for frame in frames if frame is not None]
    return pd.concat(frames, ignore_index=True) if frames else None


def on_test(answers: pd.DataFrame | None) -> pd.DataFrame | None:
    return None if answers is None else answers[answers.split == "test"]


def answers_of(frame: pd.DataFrame | None, variant: str | None) -> pd.DataFrame:
    """One variant's answers, each once; empty where there are none."""
    if frame is None:
        return pd.DataFrame({"item": [], "question": [], "score": []})
    return frame[frame.variant == variant].drop_duplicates(["item", "question"], keep="last")


def first_to_go(plan: dict, count: int) -> list:
    """The first `count` units that a stored plan removes, or all it has; of a plan of runs, one so
    long."""
    if starts := plan.get("starts"):
        count = min(count, len(starts))
        return list(range(starts[count - 1], starts[count - 1] + count)) if count else []
    return list(plan["order"][:count])


def table_of(folder: Path, stem: str) -> pd.DataFrame:
    """A table of a report, given by its folder; empty where it has none."""
    file = folder / "tables" / f"{stem}.csv"
    return pd.read_csv(file) if file.is_file() else pd.DataFrame()


def items_hash(items: pd.DataFrame) -> str:
    """sha256 of which items (id, disease, facts) are tested or held out, in any order."""
    held = items[items.split.isin(["test", "heldout"])]
    rows = sorted(map(list, held[["id", "disease", "facts"]].to_numpy()))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
