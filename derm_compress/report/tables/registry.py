"""All tables of a report by stem: what makes each of Results, and what it cannot do without."""

from __future__ import annotations

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.report.parts import PARTS
from derm_compress.report.results import Results
from derm_compress.report.tables import (
    allocation,
    answer,
    claims,
    criteria,
    pipeline,
    quantizers,
    rankings,
    specimen,
    statistics,
)
from derm_compress.report.tables.text import readable, whole

TABLES = {  # stem: a function of Results to a frame, empty where they do not suffice; their fields
    "answer": (answer.beside, "variants"),
    "claims": (claims.claims, "variants"),
    "decisions": (answer.decisions, "variants answers"),
    "table1_pruning": (pipeline.pruning, "variants"),
    "table2_sft": (pipeline.sft, "variants"),
    "extra_healed_rivals": (pipeline.healed_rivals, "variants answers"),
    "table3_quantization": (pipeline.quantization, "variants"),
    "table4_efficiency": (pipeline.efficiency, "variants"),
    "table5_ablation": (pipeline.ablation, "variants"),
    "extra_quantization_tests": (quantizers.method_tests, "variants answers"),
    "extra_equal_bytes": (quantizers.equal_bytes, "variants equal_bytes"),
    "extra_agreement": (rankings.agreements, "values"),
    "extra_criteria": (criteria.criteria, "variants"),
    "extra_criteria_tests": (criteria.criteria_tests, "variants answers"),
    "extra_measured": (pipeline.running, "variants latency"),
    "extra_baselines": (pipeline.baselines, "variants"),
    "extra_judges": (pipeline.judges, "judge_controls"),
    "extra_latency": (pipeline.latencies, "latency"),
    "extra_seeds": (statistics.seeds, "variants answers"),
    "extra_diagnosis": (pipeline.diagnoses, "predictions"),
    "extra_allocation": (allocation.at_equal_bytes, "allocations allocation_answers held"),
    "extra_controls": (claims.controls_beside, ""),
}


def make(stem: str, results: Results) -> pd.DataFrame | None:
    """One table; None where the results do not suffice. DermError for a stem that is none."""
    if stem not in TABLES:
        raise DermError(f"report: there is no table {stem}; there are {', '.join(TABLES)}")
    maker, needs = TABLES[stem]
    if any(getattr(results, name) is None for name in needs.split()):
        return None
    frame = maker(results)
    if frame.empty:
        return None
    columns = PARTS[stem].columns.split() or list(frame)
    return whole(frame.reindex(columns=columns).reset_index(drop=True))


def build(results: Results) -> dict[str, pd.DataFrame]:
    """{stem: table} of everything that the results suffice for."""
    made = {stem: make(stem, results) for stem in TABLES}
    return {stem: frame for stem, frame in made.items() if frame is not None}


def table(stem: str, results: Results) -> pd.DataFrame | None:
    """One table as people read it; None where the results do not suffice."""
    frame = make(stem, results)
    return None if frame is None else readable(frame, results.names)


def controls(stage: str, results: Results) -> pd.DataFrame:
    """A stage's controls as people read them."""
    return readable(specimen.controls(results, stage))
