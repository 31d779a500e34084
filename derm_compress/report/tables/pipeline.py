"""The paper's Tables 1 to 5, ours beside its own, and what stands beside them."""

from __future__ import annotations

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.evaluate.judges import controls
from derm_compress.model.variants import MENDED, paper_depth
from derm_compress.report import trainings
from derm_compress.report.paper import numbers
from derm_compress.report.results import ANSWERING, Results
from derm_compress.report.tables import joins, quantizers, statistics

CONTROL = "Original and the same SFT (control)"
BASELINES = ("base", "original", "blank", "shuffled")


def pruning(results: Results) -> pd.DataFrame:
    """Pruning alone by the study's own criterion; the paper's rows by the fraction of blocks."""
    table = joins.scored(own(results), results, results.answers)
    of_32 = [paper_depth(n, numbers.BLOCKS, results.blocks) for n in table.blocks_removed]
    table["of_32"] = pd.Series(of_32).where(table.units_removed == table.blocks_removed)
    theirs = numbers.table(1).rename(columns={"blocks_removed": "of_32"})
    return table.merge(theirs, on="of_32", how="left")


def own(results: Results, *, healed: bool = False) -> pd.DataFrame:
    """The study's own models in 16 bits by what they lack, after SFT or before it."""
    depths = sorted(set(results.models.units_removed))
    names = [results.variant(n, healed=healed) for n in depths]
    table = results.models[results.models.variant.isin(names)]
    return table.sort_values("units_removed", ignore_index=True)


def sft(results: Results) -> pd.DataFrame:
    """SFT of each pruned model and of the unpruned one (the control); gain: paired."""
    rows = []
    for row in own(results, healed=True).itertuples():
        unhealed = results.variant(row.units_removed)
        before, score = (
            trainings.score(results, results.answers, name) for name in (unhealed, row.variant)
        )
        gain = trainings.apart(results, results.answers, row.variant, unhealed)
        rows.append(
            {
                "variant": row.variant,
                "blocks_removed": row.blocks_removed,
                **joins.interval("score_before", before),
                **joins.interval("score_after", score),
                **joins.interval("gain", gain),
                "n": score.n or None,
            }
        )
    if not rows:
        return pd.DataFrame()
    table = joins.sized(pd.DataFrame(rows), results)
    table = joins.join(table, results.training, ["seconds", "train_peak_gib"])
    return joins.beside_paper(table, results, 2)


def healed_rivals(results: Results) -> pd.DataFrame:
    """What was removed from the healed models of the operating depth, and the one that ReplaceMe
    mends untrained; difference: the study's own healed model's points above each, paired."""
    models, own_model = results.models, results.main[2]
    healed = models.healed | models.criterion.eq(MENDED)
    same = healed & models.bits.eq(16) & models.sft_seed.eq(0)
    rows = []
    for row in models[same & models.units_removed.eq(results.operating)].itertuples():
        score = trainings.score(results, results.answers, row.variant)
        told = {"criterion": row.criterion, **joins.interval("score", score), "n": score.n or None}
        if row.variant != own_model:
            apart = trainings.apart(results, results.answers, own_model, row.variant)
            told |= joins.interval("difference", apart)
        rows.append(told)
    return pd.DataFrame(rows) if len(rows) > 1 else pd.DataFrame()


def quantization(results: Results) -> pd.DataFrame:
    """Every quantized model of the study's own criterion, with its output errors."""
    table = quantizers.quantized(results).sort_values(joins.FORM)
    table = joins.scored(table, results, results.answers)
    if results.errors is not None:
        errors = results.errors.groupby("variant").relative_error.mean()
        table["relative_error"] = table.variant.map(errors)
    return joins.beside_paper(table, results, 3)


def efficiency(results: Results) -> pd.DataFrame:
    """The paper's six ways to the operating point, and the unpruned model with the same SFT, on
    test and held-out items, with times."""
    table = joins.of_paper(results, 4)
    if control := results.variant(0, healed=True):
        table.loc[len(table), ["setting", "variant"]] = CONTROL, control
    table = joins.join(table, results.variants, joins.FORM)
    table = joins.scored(table, results, results.evaluation)
    times = ("decode_ms_per_token", "prefill_ms", "total_ms_per_token")
    columns = [f"{name}{end}" for name in times for end in ("", "_lo", "_hi")]
    return joins.join(table, results.one_prompt, columns)


def ablation(results: Results) -> pd.DataFrame:
    """The full pipeline with one part exchanged at a time, each paired with it."""
    table = joins.join(joins.of_paper(results, 5), results.variants, joins.FORM)
    table = joins.scored(table, results, results.evaluation)
    return joins.join(table, statistics.comparisons(results), [*joins.CHANGE, "p_holm"])


def running(results: Results) -> pd.DataFrame:
    """What each packed model took when stage 08 ran it, beside its planned weights."""
    if results.one_prompt is None:
        return pd.DataFrame()
    taken = results.one_prompt.rename(columns={"weights_gib": "measured_weights_gib"})
    return joins.join(taken, results.memory, ["vram_gib"])


def latencies(results: Results) -> pd.DataFrame:
    """Every batch of every measured variant, beside the time to read what it takes."""
    if results.one_prompt is None:
        return pd.DataFrame()
    taken = results.latency
    return taken.assign(tokens_per_second=1000 * taken.batch / taken.decode_ms_per_token)


def baselines(results: Results) -> pd.DataFrame:
    """What the score owes to fine-tuning and to seeing: before it, with blank or other pictures."""
    answers = results.together
    there = [name for name in BASELINES if name in set(answers.variant)]
    return joins.scored(pd.DataFrame({"variant": there}, dtype=object), results, answers)


def diagnoses(results: Results) -> pd.DataFrame:
    """Which disease stage 08's answers to the name question name: accuracy."""
    every, rows = results.predictions, []
    named = every[(every.stage == ANSWERING[-1]) & every.diagnosis.notna()]
    for variant, part in named.groupby("variant", sort=False):
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


def judges(results: Results) -> pd.DataFrame:
    """What the judges give to answers whose worth is known."""
    return controls.controls_table(results.judge_controls)
