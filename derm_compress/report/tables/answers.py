"""What else an answer is worth, and what it took: diagnoses, scores without a judge, times."""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges import controls
from derm_compress.report.results import ANSWERING, Results
from derm_compress.report.tables import joins


def diagnoses(results: Results) -> pd.DataFrame:
    """Which disease the answer to the name question names: accuracy."""
    rows = []
    for variant, part in named(results).groupby("variant", sort=False):
        right = (part.diagnosis == part.disease).astype(float)
        share = metrics.share_interval(part["item"], right)
        rows.append(
            {
                "variant": variant,
                **joins.interval("accuracy", share),
                "balanced": 100 * right.groupby(part.disease).mean().mean(),
                "none": (part.diagnosis == "none").sum(),
                "several": (part.diagnosis == "several").sum(),
                "n": share.n,
            }
        )
    return pd.DataFrame(rows)


def named(results: Results) -> pd.DataFrame:
    """Stage 08's answers to the name question."""
    every = results.predictions
    if every is None:
        return pd.DataFrame({"variant": [], "disease": [], "diagnosis": []})
    return every[(every.stage == ANSWERING[-1]) & every.diagnosis.notna()]


def latencies(results: Results) -> pd.DataFrame:
    """Every batch of every measured variant, beside the floor of its decoding."""
    taken = results.latency
    if not {"batch", "floor_ms"} <= set(taken):
        return pd.DataFrame()
    return taken.assign(tokens_per_second=1000 * taken.batch / taken.decode_ms_per_token)


def judges(results: Results) -> pd.DataFrame:
    """What the judges give to answers whose worth is known."""
    return controls.controls_table(results.judge_controls)
