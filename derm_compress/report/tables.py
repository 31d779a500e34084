"""The paper's five tables, ours beside its own, as pure functions of the stages' stored frames. No torch."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges import controls
from derm_compress.model.variants import paper_depth
from derm_compress.report import agreement, paper, precision, rivals, statistics_tables
from derm_compress.report.results import ANSWERING as ANSWERING
from derm_compress.report.results import Results, answers_of, variant_id
from derm_compress.report.results import load_results as load_results

SCORE = ["score", "score_lo", "score_hi", "n"]
SIZE = [
    "params_b",
    "vram_gib",
    "peak_gib",
    "blocks_removed_7b",
    "params_b_7b",
    "vram_gib_7b",
    "peak_gib_7b",
]
MEASURED = ("decode_ms_per_token", "prefill_ms", "total_ms_per_token")
TIMES = [f"{name}{end}" for name in MEASURED for end in ("", "_lo", "_hi")]
MODEL = ["variant", "blocks_removed", "healed", "method", "bits"]
PAPER_SIZE = [
    "params_b",
    "vram_gib",
    "peak_gib",
    *SIZE[3:5],
    "paper_params_b",
    *SIZE[5:6],
    "paper_vram",
    *SIZE[6:],
]
COLUMNS = {  # what the paper gives stands beside what is ours
    "table1_pruning": ["blocks_removed", "fraction_removed", "score", "paper_score", *SCORE[1:], *PAPER_SIZE],
    "table2_sft": [
        "blocks_removed", "fraction_removed",
        "score_before", "paper_score_before", "score_before_lo", "score_before_hi",
        "score_after", "paper_score_after", "score_after_lo", "score_after_hi", "gain", "gain_lo", "gain_hi", "n",
        "seconds", "paper_seconds", "train_peak_gib", "paper_vram", *SIZE[:2], *SIZE[3:6], "paper_model",
    ],
    "table3_quantization": [
        *MODEL[1:], "score", "paper_score", *SCORE[1:], "relative_error",
        *(name for name in PAPER_SIZE if name != "paper_params_b"),
    ],
    "table4_efficiency": [
        "setting", *MODEL, "score", "paper_score", *SCORE[1:],
        *TIMES[:3], "paper_ms_per_token", *TIMES[3:], *PAPER_SIZE,
    ],
    "table5_ablation": [
        "setting", *MODEL, "score", "paper_score", *SCORE[1:],
        "difference", "difference_lo", "difference_hi", "p", "p_holm", *SIZE, "paper_notes",
    ],
    "extra_quantization_tests": precision.TESTS[1:],
    "extra_errors": ["blocks_removed", "healed", "bits", "block"],  # and a column a method
    "extra_equal_bytes": [
        "budget", *precision.MODEL[1:], "method", "mean_bits", *SCORE, *precision.CHANGE, "p_holm",
        *SIZE[1:2], *SIZE[4:6],
    ],
    "extra_agreement": ["one", "other", "rho", "rho_lo", "rho_hi"],
    "extra_calibration_size": agreement.CURVE,
    "extra_criteria": ["criterion", "blocks_removed", *SCORE, *SIZE[:3], *SIZE[4:6]],
    "extra_criteria_tests": [*rivals.TESTS[:6], "p_holm", *rivals.TESTS[6:12], "p_all_holm", "n"],
    "extra_cliffs": rivals.CLIFF,
    "extra_sublayers": [
        "criterion", "blocks_removed", "attentions_removed", "mlps_removed", "score", *SCORE[1:], *SIZE[:3], *SIZE[4:6],
        "nearest", "nearest_params_b", "nearest_score", "nearest_score_lo", "nearest_score_hi", "apart", *rivals.CHANGE,
    ],
    "extra_measured": [
        "variant", "vram_gib", "measured_weights_gib", "rss_gib", "rss_peak_gib",
        "allocated_peak_gib", "reserved_peak_gib", "device_used_gib", "prompt_tokens", "new_tokens", "repeats",
    ],
    "extra_baselines": ["variant", *SCORE],
    "extra_judges": controls.TABLE,
    **statistics_tables.COLUMNS,
}  # fmt: skip
COUNTS = (
    "n", "bits", "blocks_removed", "blocks_removed_7b", "attentions_removed", "mlps_removed", "items", "depths",
    "ahead", "fall_from", "fall_to", "level_until", "budget",
    *statistics_tables.COUNTS,
)  # fmt: skip
ERROR = "error_"  # before a method's name
BASELINES = ("base", "original", "blank", "shuffled")
UNITS = {
    "score": "score, %", "score_before": "score before, %", "score_after": "score after, %",
    "params_b": "parameters, B", "vram_gib": "weights, GiB", "peak_gib": "peak, GiB",
    "seconds": "time, s", "train_peak_gib": "training plan, GiB", "vram": "VRAM, GB", "ms_per_token": "ms/token",
    "prefill_ms": "prefill, ms (quartiles)", "decode_ms_per_token": "decode, ms/token (quartiles)",
    "total_ms_per_token": "total, ms/token (quartiles)", "t4_prefill_ms": "prefill on a T4, ms",
    "t4_decode_ms_per_token": "decode on a T4, ms/token", "t4_total_ms_per_token": "total on a T4, ms/token",
    "gpu_gib": "GPU, GiB", "disk_gib": "disk, GiB", "measured_weights_gib": "measured weights, GiB",
    "rss_gib": "process, GiB", "rss_peak_gib": "process peak, GiB", "device_used_gib": "GPU in use, GiB",
    "allocated_peak_gib": "GPU allocated, peak GiB", "reserved_peak_gib": "GPU reserved, peak GiB",
    "rho": "rank correlation", "items": "pictures", "overlap": "share in common", "chance": "by chance",
    "difference": "difference, points", "gain": "gain, points",
    "difference_all": "difference, all depths, points", "p_all": "p, all depths", "p_holm": "p (Holm)",
    "p_all_holm": "p, all depths (Holm)", "ahead": "ahead at", "fall_from": "steepest from", "fall_to": "to",
    "fall": "fall, points", "fall_per_block": "points a block", "nearest": "nearest whole-block model",
    "nearest_params_b": "its parameters, B", "nearest_score": "its score, %", "apart": "apart, blocks",
    "relative_error": "output error, mean over blocks", "cost": "minus 16 bits, points", "p_cost": "p, 16 bits",
    "p_cost_holm": "p, 16 bits (Holm)", "budget": "bytes of all blocks at bits", "mean_bits": "bits, mean",
    "as_expected": "as expected, %",
    **statistics_tables.UNITS,
}  # fmt: skip


def items_hash(items: pd.DataFrame) -> str:
    """sha256 of which items (id, disease, facts) the test and held-out sets hold, in any order."""
    held = items[items.split.isin(["test", "heldout"])]
    rows = sorted(map(list, held[["id", "disease", "facts"]].to_numpy()))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def build(results: Results) -> dict[str, pd.DataFrame]:
    """{stem: table} of everything that the results suffice for."""
    made = {stem: make(stem, results) for stem in (*COLUMNS, *BESIDE)}
    return {stem: frame for stem, frame in made.items() if frame is not None}


BESIDE = ("extra_contradictions", "extra_side_by_side", "extra_verdicts")


def make(stem: str, results: Results) -> pd.DataFrame | None:
    """One table, or None where the results do not suffice for it."""
    from derm_compress.report import side_by_side

    if stem in BESIDE:
        return side_by_side.build(results).get(stem)
    makers = (table1, table2, table3, table4, table5, quantization_tests, block_errors, equal_bytes)
    makers += (agreements, calibration_sizes, criteria, criteria_tests, cliffs, sublayers)
    makers += (running, baselines, judges, *statistics_tables.MAKERS)
    maker = dict(zip(COLUMNS, makers, strict=True))[stem]
    if needed(maker, results) is None:
        return None
    frame = maker(results)
    return tidy(frame, stem) if len(frame) else None


def needed(make, results: Results):
    """What a table cannot be made without."""
    special = {
        agreements: results.values,
        calibration_sizes: results.values,
        judges: results.judge_controls,
    }
    special |= dict.fromkeys(statistics_tables.MAKERS, results)  # they know themselves
    special |= {quantization_tests: results.answers, equal_bytes: results.equal_bytes}
    special |= {block_errors: None if results.variants is None else results.errors}
    return special.get(make, results.variants)


def tidy(frame: pd.DataFrame, stem: str) -> pd.DataFrame:
    """The table's columns in order, absent ones empty; counts stay whole numbers beside empty cells."""
    methods = [name for name in frame if name.startswith(ERROR)]
    frame = frame.reindex(columns=[*COLUMNS[stem], *methods]).reset_index(drop=True)
    return frame.astype(dict.fromkeys((name for name in COUNTS if name in frame), "Int64"))


def table1(results: Results) -> pd.DataFrame:
    """Pruning alone by the paper's criterion; the paper's rows by blocks of 32, so by fraction for other models."""
    table = results.variants
    table = table[
        [v == variant_id(n) for v, n in zip(table.variant, table.blocks_removed, strict=True)]
    ]
    table = _measured(table.sort_values("blocks_removed"), results, results.answers)
    table["of_32"] = [
        paper_depth(n, paper.BLOCKS, of=results.blocks) for n in table.blocks_removed
    ]
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
    names = [
        f"{name}{end}"
        for name in ("score_before", "score_after", "gain")
        for end in ("", "_lo", "_hi")
    ]
    frame = pd.DataFrame(rows, columns=["variant", "blocks_removed", *names, "n"])
    frame = _join(_sized(frame, results), results.training, ["seconds", "train_peak_gib"])
    return _beside(frame, results, 2)


def table3(results: Results) -> pd.DataFrame:
    """Every quantized model of the paper's criterion: method x bits, before and after SFT; output errors beside."""
    table = precision.quantized(results.variants)
    table = _measured(
        table.sort_values(["blocks_removed", "healed", "method", "bits"]), results, results.answers
    )
    if results.errors is not None:
        table["relative_error"] = table.variant.map(
            results.errors.groupby("variant").relative_error.mean()
        )
    return _beside(table, results, 3, drop=["method"])


def quantization_tests(results: Results) -> pd.DataFrame:
    """Every quantized model against AWQ's and against 16 bits, paired."""
    if results.variants is None:
        return pd.DataFrame()
    return precision.method_tests(results.answers, results.variants)


def block_errors(results: Results) -> pd.DataFrame:
    """Output errors of the own models' blocks, by original indices, the methods side by side."""
    table = precision.quantized(results.variants).merge(results.errors, on="variant")
    wide = table.pivot(index=COLUMNS["extra_errors"], columns="method", values="relative_error")
    wide = wide[list(dict.fromkeys(table.method))].add_prefix(ERROR).reset_index()
    return wide.sort_values(COLUMNS["extra_errors"], ascending=[True, True, False, True])


def equal_bytes(results: Results) -> pd.DataFrame:
    """What is worth most at the same bytes: fewer blocks, fewer bits, or both."""
    if results.variants is None:
        return pd.DataFrame()
    table = precision.equal_bytes(results.answers, results.variants, results.equal_bytes)
    return _measured(table.drop(columns="n"), results, results.answers)


def table4(results: Results) -> pd.DataFrame:
    """The paper's six ways to the operating point, scored on test and held-out items, with measured times."""
    table = paper.table(4, operating=results.operating, deeper=results.deeper).drop(columns="bits")
    table = _join(table, results.variants, MODEL[1:])
    return _join(_measured(table, results, results.evaluation), results.one_prompt, TIMES)


def table5(results: Results) -> pd.DataFrame:
    """The full pipeline with one part exchanged at a time; differences to it paired, on test and held-out items."""
    table = paper.table(5, operating=results.operating, deeper=results.deeper)
    symmetric = variant_id(results.operating, healed=True, method="rtn_symmetric")
    if symmetric in set(results.variants.variant):
        table.loc[len(table), ["setting", "variant"]] = (
            "Round to neighbour, symmetric grid (Eq. 1)",
            symmetric,
        )
    table = _measured(_join(table, results.variants, MODEL[1:]), results, results.evaluation)
    full = answers_of(results.evaluation, table.variant[0])
    for row in table.index[1:]:
        change = metrics.paired_difference(answers_of(results.evaluation, table.variant[row]), full)
        table.loc[row, ["difference", "difference_lo", "difference_hi", "p"]] = change[:4]
    return _join(table, statistics_tables.comparisons(results), ["p_holm"])


def agreements(results: Results) -> pd.DataFrame:
    """Rank correlation of every two rankings of whole blocks."""
    table = agreement.agreement(results.values, results.protected)
    return table.rename(columns={"lo": "rho_lo", "hi": "rho_hi"})


def calibration_sizes(results: Results) -> pd.DataFrame:
    """How well two disjoint draws of calibration pictures agree, by their size."""
    return agreement.calibration_curve(results.values, results.protected, removed=results.operating)


def criteria(results: Results) -> pd.DataFrame:
    """Every criterion at every depth, before SFT; whole blocks only."""
    table = rivals.pruned_only(results.variants)
    table = table[table.whole & (table.blocks_removed > 0)]
    return _measured(table.sort_values(["blocks_removed", "criterion"]), results, results.answers)


def criteria_tests(results: Results) -> pd.DataFrame:
    """The study's own criterion against each rival, paired."""
    if results.answers is None:
        return pd.DataFrame()
    return rivals.criteria_tests(
        results.answers, results.variants, results.criterion, operating=results.operating
    )


def cliffs(results: Results) -> pd.DataFrame:
    """Where each criterion's score falls steepest."""
    return (
        pd.DataFrame()
        if results.answers is None
        else rivals.cliffs(results.answers, results.variants)
    )


def sublayers(results: Results) -> pd.DataFrame:
    """Models without single attentions or MLPs, beside whole blocks of nearly as many parameters."""
    sizes = (
        pd.DataFrame({"variant": [], "params_b": []}) if results.memory is None else results.memory
    )
    table = rivals.sublayers(results.answers, results.variants, sizes, results.criterion)
    beside = _measured(
        table[["nearest"]].rename(columns={"nearest": "variant"}), results, results.answers
    )
    beside = beside.set_axis(table.index)[["params_b", *SCORE[:3]]].add_prefix("nearest_")
    return _measured(table.join(beside), results, results.answers)


def running(results: Results) -> pd.DataFrame:
    """What each packed model took when stage 08 ran it, beside its planned weights."""
    if results.one_prompt is None:
        return pd.DataFrame()
    taken = results.one_prompt.rename(columns={"weights_gib": "measured_weights_gib"})
    return _join(taken, results.memory, ["vram_gib"])


def baselines(results: Results) -> pd.DataFrame:
    """What the score owes to fine-tuning and to seeing: before it, and with blank or exchanged pictures."""
    frames = [f for f in (results.evaluation, results.answers) if f is not None]
    if not frames:
        return pd.DataFrame()
    answers = pd.concat(frames)
    there = [name for name in BASELINES if name in set(answers.variant)]
    return _measured(pd.DataFrame({"variant": there}, dtype=object), results, answers)


def judges(results: Results) -> pd.DataFrame:
    """What the judges give to answers whose worth is known."""
    return controls.controls_table(results.judge_controls)


def _measured(table, results, answers):
    """Scores (with interval, over `answers`) and planned sizes beside each variant."""
    answers = None if answers is None else answers.drop_duplicates(["variant", "item", "question"])
    known = (
        None
        if answers is None
        else metrics.score_table(answers[answers.variant.isin(table.variant)], ["variant"])
    )
    return _sized(_join(table, known, SCORE), results)


def _sized(table, results):
    return _join(table, results.memory, SIZE).assign(
        fraction_removed=lambda frame: (
            frame["blocks_removed"] / results.blocks if "blocks_removed" in frame else np.nan
        )
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
    endings = {
        "params_b": 9,
        "nearest_params_b": 9,
        "params_b_7b": 6,
        "fraction_removed": 6,
        "seconds": 1,
    }
    four = {"p", "rho", "overlap", "chance", "error"} & set(column.split("_"))
    return f"%.{endings.get(column, 6 if 'gib' in column else 3 if 'ms' in column.split('_') else 4 if four else 2)}f"


def to_csv(frame: pd.DataFrame) -> str:
    """CSV with fixed digits; what is unknown stays empty."""
    shown = frame.copy()
    for name in frame.select_dtypes("number"):
        if not pd.api.types.is_integer_dtype(frame[name]):
            shown[name] = [
                None if pd.isna(x) else digits(name) % x for x in frame[name].astype(float)
            ]
    return shown.to_csv(index=False, lineterminator="\n")


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: intervals in one cell, short numbers, words for gaps, no empty columns."""
    shown = frame.drop(columns=[name for name in frame if name.endswith(("_lo", "_hi"))])
    empty = shown.columns[shown.isna().all()].difference(["score", "score_before", "score_after"])
    shown = shown.drop(columns=empty).drop(
        columns=["variant"] if "setting" in shown else [], errors="ignore"
    )
    if "blocks_removed_7b" in shown and shown.blocks_removed_7b.equals(shown.blocks_removed):
        shown = shown.drop(columns="blocks_removed_7b")
    for name in shown:
        ends = frame.reindex(columns=[f"{name}_lo", f"{name}_hi"]).to_numpy()
        cells = [
            _cell(name, value, *interval) for value, interval in zip(frame[name], ends, strict=True)
        ]
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
    if name in COUNTS:
        return str(int(value))
    if name.split("_")[0] == "p":
        return "< 0.001" if value < 0.001 else f"{value:.2g}"
    points = (name == "ours" and not pd.isna(lo)) or name.startswith(
        ("score", "gain", "diff", "fall", "nearest_s", "cost", "as_exp")
    )
    share = name.startswith(("rho", "over", "chance"))
    style = (
        digits(name)
        if name.startswith("paper")
        else "%.1f"
        if points
        else "%.2f"
        if share
        else "%.4g"
    )
    text = style % value
    return text if pd.isna(lo) else f"{text} ({style % lo} to {style % hi})"



def table(stem: str, results: Results) -> pd.DataFrame | None:
    """One table as a reader sees it; None where what it needs is not there."""
    made = build(results)
    return readable(made[stem]) if stem in made else None
