"""What else an answer is worth, and what it took: diagnoses, scores without a judge, times."""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges import controls
from derm_compress.report.results import ANSWERING, Results
from derm_compress.report.tables import joins

OPEN = ["none", "several"]  # diagnoses that name no one disease


def diagnoses(results: Results) -> pd.DataFrame:
    """Which disease the answer to the name question names: accuracy, the commonest confusion."""
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
                "most_confused": most_confused(part),
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


def most_confused(part: pd.DataFrame) -> str:
    wrong = part[(part.diagnosis != part.disease) & ~part.diagnosis.isin(OPEN)]
    counts = wrong.groupby(["disease", "diagnosis"]).size()
    if counts.empty:
        return ""
    disease, called = counts.idxmax()
    return f"{disease} called {called} ({counts.max()})"


def secondary_scores(results: Results) -> pd.DataFrame:
    """Scores that no judge gives, and runaway answers, of every variant on the test pictures."""
    every, rows = results.predictions, []
    for variant, part in every[every.split == "test"].groupby("variant", sort=False):
        right = (part.diagnosis == part.disease).astype(float).where(part.diagnosis.notna())
        marks = {"name_exact": right, "fact_f1": part.fact_f1, "similarity": part.similarity}
        row = {"variant": variant, "score": metrics.percent(part.score.astype(float).mean())}
        for name, values in marks.items():
            row |= joins.interval(name, metrics.share_interval(part["item"], values))
        runaway = (~part.stopped.astype(bool)).sum()
        rows.append(row | {"runaway": runaway, "n": len(part)})
    known = [] if results.variants is None else results.variants.variant
    place = {name: i for i, name in enumerate(dict.fromkeys(known))}
    return pd.DataFrame(sorted(rows, key=lambda row: place.get(row["variant"], len(place))))


def latencies(results: Results) -> pd.DataFrame:
    """Every batch of every measured variant, beside the floor of its decoding."""
    taken = results.latency
    if not {"batch", "floor_ms"} <= set(taken):
        return pd.DataFrame()
    return taken.assign(tokens_per_second=1000 * taken.batch / taken.decode_ms_per_token)


def judges(results: Results) -> pd.DataFrame:
    """What the judges give to answers whose worth is known."""
    return controls.controls_table(results.judge_controls)
