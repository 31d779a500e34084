"""The paper's five tables, ours beside its own, as pure functions of the stages' stored frames. No torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd

from derm_compress import metrics, paper

ANSWERING = ("02_finetune", "04_pruning", "05_sft", "07_quantization", "08_evaluation")  # the last one's word counts
SCORE = ["score", "score_lo", "score_hi", "n"]
SIZE = ["params_b", "vram_gib", "peak_gib", "blocks_removed_7b", "params_b_7b", "vram_gib_7b", "peak_gib_7b"]
MEASURED = ("decode_ms_per_token", "prefill_ms", "total_ms_per_token")
TIMES = [f"{name}{end}" for name in MEASURED for end in ("", "_lo", "_hi")]
MODEL = ["variant", "blocks_removed", "healed", "method", "bits"]
PAPER_SIZE = ["params_b", "vram_gib", "peak_gib", *SIZE[3:5], "paper_params_b", *SIZE[5:6], "paper_vram", *SIZE[6:]]
COLUMNS = {  # what the paper gives stands beside what is ours
    "table1_pruning": ["blocks_removed", "fraction_removed", "score", "paper_score", *SCORE[1:], *PAPER_SIZE],
    "table2_sft": [
        "blocks_removed", "fraction_removed",
        "score_before", "paper_score_before", "score_before_lo", "score_before_hi",
        "score_after", "paper_score_after", "score_after_lo", "score_after_hi", "gain", "gain_lo", "gain_hi", "n",
        "seconds", "paper_seconds", "train_peak_gib", "paper_vram", *SIZE[:2], *SIZE[3:6], "paper_model",
    ],
    "table3_quantization": [
        *MODEL[1:], "score", "paper_score", *SCORE[1:], *(name for name in PAPER_SIZE if name != "paper_params_b"),
    ],
    "table4_efficiency": [
        "setting", *MODEL, "score", "paper_score", *SCORE[1:],
        *TIMES[:3], "paper_ms_per_token", *TIMES[3:], *PAPER_SIZE,
    ],
    "table5_ablation": [
        "setting", *MODEL, "score", "paper_score", *SCORE[1:],
        "difference", "difference_lo", "difference_hi", "p", *SIZE, "paper_notes",
    ],
    "extra_criteria": ["criterion", "blocks_removed", *SCORE],
    "extra_measured": [
        "variant", "vram_gib", "measured_weights_gib", "rss_gib", "rss_peak_gib",
        "allocated_peak_gib", "reserved_peak_gib", "device_used_gib", "prompt_tokens", "new_tokens", "repeats",
    ],
    "extra_baselines": ["variant", *SCORE],
}  # fmt: skip
BASELINES = ("base", "original", "blank", "shuffled")
UNITS = {
    "score": "score, %", "params_b": "parameters, B", "vram_gib": "weights, GiB", "peak_gib": "peak, GiB",
    "seconds": "time, s", "train_peak_gib": "training peak, GiB", "vram": "VRAM, GB", "ms_per_token": "ms/token",
    "prefill_ms": "prefill, ms (quartiles)", "decode_ms_per_token": "decode, ms/token (quartiles)",
    "total_ms_per_token": "total, ms/token (quartiles)", "measured_weights_gib": "measured weights, GiB",
    "rss_gib": "process, GiB", "rss_peak_gib": "process peak, GiB", "device_used_gib": "GPU in use, GiB",
    "allocated_peak_gib": "GPU allocated, peak GiB", "reserved_peak_gib": "GPU reserved, peak GiB",
}  # fmt: skip


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
    plans: dict | None = _of("03_layer_importance/plans.json")
    choice: dict | None = _of("04_pruning/choice.json")
    training: pd.DataFrame | None = _of("05_sft/measured/training.parquet")
    statistics: pd.DataFrame | None = _of("06_activation_analysis/statistics.parquet")
    figure4: pd.DataFrame | None = _of("06_activation_analysis/figure4.parquet")
    errors: pd.DataFrame | None = _of("07_quantization/errors.parquet")
    evaluation: pd.DataFrame | None = _of("08_evaluation/answers.parquet")
    memory: pd.DataFrame | None = _of("08_evaluation/memory.parquet")
    latency: pd.DataFrame | None = _of("08_evaluation/measured/latency.parquet")
    variants: pd.DataFrame | None = None
    answers: pd.DataFrame | None = None

    @property
    def criterion(self) -> str:
        """The criterion of the study's own variants, which bear no criterion in their names: the paper's, mostly."""
        rows = [] if self.variants is None else self.variants[["variant", "blocks_removed", "criterion"]].to_numpy()
        plain = [criterion for name, n, criterion in rows if n and name == variant_id(n)]
        return plain[0] if plain else "output_similarity"

    @property
    def blocks(self) -> int:
        return next((plan["blocks"] for plan in (self.plans or {}).values()), paper.BLOCKS)

    @property
    def operating(self) -> int:
        return (self.choice or {}).get("operating", round(6 * self.blocks / paper.BLOCKS))

    @property
    def deeper(self) -> int:
        return (self.choice or {}).get("deeper", round(9 * self.blocks / paper.BLOCKS))


def load_results(folders: dict[str, Path], **given) -> Results:
    """Results from {stage: its artifact folder}; a stage still running hands over its own frames by name."""
    known = {f.name: _read(folders, f.metadata["file"]) for f in fields(Results) if f.metadata}
    known |= {name: _together(folders, name) for name in ("variants", "answers")} | given
    for name, keys in (("variants", ["variant"]), ("answers", ["variant", "item", "question"])):
        if known[name] is not None:
            known[name] = known[name].drop_duplicates(keys, keep="last")
    return Results(**known)


def _read(folders, file):
    stage, _, name = file.partition("/")
    path = Path(folders[stage], name) if stage in folders else None
    if path is None or not path.is_file():
        return None
    return pd.read_parquet(path) if path.suffix == ".parquet" else json.loads(path.read_text("utf-8"))


def _together(folders, name):
    """One frame of all stages' variants or test answers; of equal rows the later stage's counts."""
    frames = [f for stage in ANSWERING if (f := _read(folders, f"{stage}/{name}.parquet")) is not None]
    frame = pd.concat(frames, ignore_index=True) if frames else None
    return frame[frame.split == "test"] if frames and name == "answers" else frame


def variant_id(blocks: int, *, criterion: str = "", healed: bool = False, method: str = "", bits: int = 4) -> str:
    """The id that the stages give a model: pruned-6+sft|awq4."""
    name = (f"pruned-{blocks}" if blocks else "original") + (f"-{criterion}" if criterion else "")
    return name + ("+sft" if healed else "") + (f"|{method}{bits}" if method else "")


def answers_of(frame: pd.DataFrame | None, variant: str) -> pd.DataFrame:
    """One variant's answers, each once; empty where there are none."""
    if frame is None:
        return pd.DataFrame({"item": [], "question": [], "score": []})
    return frame[frame.variant == variant].drop_duplicates(["item", "question"], keep="last")


def items_hash(items: pd.DataFrame) -> str:
    """sha256 of which items (id, disease, facts) the test and held-out sets hold, in any order."""
    held = items[items.split.isin(["test", "heldout"])]
    rows = sorted(map(list, held[["id", "disease", "facts"]].to_numpy()))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def build(results: Results) -> dict[str, pd.DataFrame]:
    """{stem: table} of everything that the results suffice for."""
    if results.variants is None:
        return {}
    makers = (table1, table2, table3, table4, table5, criteria, running, baselines)
    made = {stem: make(results) for stem, make in zip(COLUMNS, makers, strict=True)}
    return {stem: tidy(frame, stem) for stem, frame in made.items() if len(frame)}


def tidy(frame: pd.DataFrame, stem: str) -> pd.DataFrame:
    """The table's columns in order, absent ones empty; counts stay whole numbers beside empty cells."""
    frame = frame.reindex(columns=COLUMNS[stem]).reset_index(drop=True)
    counts = [name for name in ("n", "bits", "blocks_removed", "blocks_removed_7b") if name in frame]
    return frame.astype(dict.fromkeys(counts, "Int64"))


def table1(results: Results) -> pd.DataFrame:
    """Pruning alone by the paper's criterion; the paper's rows by blocks of 32, so by fraction for other models."""
    table = results.variants
    table = table[[v == variant_id(n) for v, n in zip(table.variant, table.blocks_removed, strict=True)]]
    table = _measured(table.sort_values("blocks_removed"), results, results.answers)
    table["of_32"] = (table.blocks_removed * paper.BLOCKS / results.blocks + 0.5).astype(int)
    theirs = paper.table(1).rename(columns={"blocks_removed": "of_32"})
    return table.merge(theirs, on="of_32", how="left")


def table2(results: Results) -> pd.DataFrame:
    """SFT of each pruned model and of the unpruned one (0 blocks, the control); gain: paired, with its interval."""
    table, rows = results.variants, []
    for n in sorted(set(table.blocks_removed)):
        healed = variant_id(n, healed=True)
        before, after = (answers_of(results.answers, name) for name in (variant_id(n), healed))
        if healed in set(table.variant):
            scores = metrics.score_interval(before), metrics.score_interval(after)
            gain = metrics.paired_difference(after, before)[:3]
            rows.append([healed, n, *scores[0][:3], *scores[1][:3], *gain, scores[1].n or None])
    names = [f"{name}{end}" for name in ("score_before", "score_after", "gain") for end in ("", "_lo", "_hi")]
    frame = pd.DataFrame(rows, columns=["variant", "blocks_removed", *names, "n"])
    frame = _join(_sized(frame, results), results.training, ["seconds", "train_peak_gib"])
    return _beside(frame, results, 2)


def table3(results: Results) -> pd.DataFrame:
    """Every quantized model of the paper's criterion: method x bits, before and after SFT."""
    table = results.variants[results.variants.bits < 16]
    plain = [variant_id(n, healed=h) for n, h in zip(table.blocks_removed, table.healed, strict=True)]
    table = table[table.variant.str.split("|").str[0] == plain]
    table = _measured(table.sort_values(["blocks_removed", "healed", "method", "bits"]), results, results.answers)
    return _beside(table, results, 3, drop=["method"])


def table4(results: Results) -> pd.DataFrame:
    """The paper's six ways to the operating point, scored on test and held-out items, with measured times."""
    table = paper.table(4, operating=results.operating, deeper=results.deeper).drop(columns="bits")
    table = _join(table, results.variants, MODEL[1:])
    return _join(_measured(table, results, results.evaluation), results.latency, TIMES)


def table5(results: Results) -> pd.DataFrame:
    """The full pipeline with one part exchanged at a time; differences to it paired, on test and held-out items."""
    table = paper.table(5, operating=results.operating, deeper=results.deeper)
    symmetric = variant_id(results.operating, healed=True, method="rtn_symmetric")
    if symmetric in set(results.variants.variant):
        table.loc[len(table), ["setting", "variant"]] = "Round to neighbour, symmetric grid (Eq. 1)", symmetric
    table = _measured(_join(table, results.variants, MODEL[1:]), results, results.evaluation)
    full = answers_of(results.evaluation, table.variant[0])
    for row in table.index[1:]:
        change = metrics.paired_difference(answers_of(results.evaluation, table.variant[row]), full)
        table.loc[row, ["difference", "difference_lo", "difference_hi", "p"]] = change[:4]
    return table


def criteria(results: Results) -> pd.DataFrame:
    """Every criterion at every depth, before SFT."""
    table = results.variants
    table = table[(table.blocks_removed > 0) & ~table.healed.astype(bool) & (table.bits == 16)]
    return _measured(table.sort_values(["blocks_removed", "criterion"]), results, results.answers)


def running(results: Results) -> pd.DataFrame:
    """What each packed model took when stage 08 ran it, beside its planned weights."""
    if results.latency is None:
        return pd.DataFrame()
    taken = results.latency.rename(columns={"weights_gib": "measured_weights_gib"})
    return _join(taken, results.memory, ["vram_gib"])


def baselines(results: Results) -> pd.DataFrame:
    """What the score owes to fine-tuning and to seeing: before it, and with blank or exchanged pictures."""
    frames = [f for f in (results.evaluation, results.answers) if f is not None]
    if not frames:
        return pd.DataFrame()
    answers = pd.concat(frames)
    there = [name for name in BASELINES if name in set(answers.variant)]
    return _measured(pd.DataFrame({"variant": there}, dtype=object), results, answers)


def _measured(table, results, answers):
    """Scores (with interval, over `answers`) and planned sizes beside each variant."""
    answers = None if answers is None else answers.drop_duplicates(["variant", "item", "question"])
    known = None if answers is None else metrics.score_table(answers[answers.variant.isin(table.variant)], ["variant"])
    return _sized(_join(table, known, SCORE), results)


def _sized(table, results):
    return _join(table, results.memory, SIZE).assign(
        fraction_removed=lambda frame: frame["blocks_removed"] / results.blocks if "blocks_removed" in frame else np.nan
    )


def _join(table, other, columns):
    other = pd.DataFrame(columns=["variant"]) if other is None else other.drop_duplicates("variant")
    return table.merge(other.reindex(columns=["variant", *columns]), on="variant", how="left")


def _beside(table, results, number, drop=()):
    theirs = paper.table(number, operating=results.operating, deeper=results.deeper)
    return table.merge(theirs.drop(columns=list(drop)), on="variant", how="left")


def digits(column: str) -> str:
    """How many digits a column's numbers have: fixed, so that equal results give equal bytes."""
    if column.startswith("paper"):
        return "%g"
    endings = {"params_b": 9, "params_b_7b": 6, "fraction_removed": 6, "seconds": 1, "p": 4}
    return f"%.{endings.get(column, 6 if 'gib' in column else 3 if 'ms' in column.split('_') else 2)}f"


def to_csv(frame: pd.DataFrame) -> str:
    """CSV with fixed digits; what is unknown stays empty."""
    shown = frame.copy()
    for name in frame.select_dtypes("number"):
        if not pd.api.types.is_integer_dtype(frame[name]):
            shown[name] = [None if pd.isna(x) else digits(name) % x for x in frame[name].astype(float)]
    return shown.to_csv(index=False, lineterminator="\n")


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: intervals in one cell, short numbers, words for gaps, no empty columns."""
    shown = frame.drop(columns=[name for name in frame if name.endswith(("_lo", "_hi"))])
    empty = shown.columns[shown.isna().all()].difference(["score", "score_before", "score_after"])
    shown = shown.drop(columns=empty).drop(columns=["variant"] if "setting" in shown else [], errors="ignore")
    if "blocks_removed_7b" in shown and shown.blocks_removed_7b.equals(shown.blocks_removed):
        shown = shown.drop(columns="blocks_removed_7b")
    for name in shown:
        ends = frame.reindex(columns=[f"{name}_lo", f"{name}_hi"]).to_numpy()
        cells = [_cell(name, value, *interval) for value, interval in zip(frame[name], ends, strict=True)]
        shown = shown.assign(**{name: cells})
    return shown.rename(columns=heading)


def heading(column: str) -> str:
    """A column's name for people, with its unit."""
    for mark, said in (("paper_", "paper: "), ("_7b", "7B: ")):
        if mark in column:
            return said + heading(column.replace(mark, ""))
    return UNITS.get(column, column.replace("_", " "))


def _cell(name, value, lo, hi):
    if pd.isna(value):
        return "needs weights" if name.startswith("score") else ""
    if isinstance(value, str | bool | np.bool_):
        return {"True": "yes", "False": "no"}.get(str(value), str(value))
    points = name.startswith(("score", "gain", "diff"))
    style = digits(name) if name.startswith("paper") else "%.1f" if points else "%.4g"
    text = style % value
    return text if pd.isna(lo) else f"{text} ({style % lo} to {style % hi})"
