"""What a run's numbers say, as sentences: every number and every claim is computed, none is typed. No torch.

Each `findings_*` takes Results and returns the sentences that its frames suffice for.
"""

from __future__ import annotations

import pandas as pd

from derm_compress import metrics, tables
from derm_compress.tables import Results, answers_of, variant_id


def percent(score) -> str:
    """62.5 % (58.1 to 66.9), from a metrics.Score or a table's row."""
    lo, hi = (score.score_lo, score.score_hi) if hasattr(score, "score_lo") else (score.lo, score.hi)
    return f"{score.score:.1f} % ({lo:.1f} to {hi:.1f})"


def verdict(change: metrics.Difference, first: str, second: str) -> str:
    """Which of two scored better, or that the interval of their difference holds 0."""
    if change.lo <= 0 <= change.hi:
        interval = f"{change.difference:.1f} points, {change.lo:.1f} to {change.hi:.1f}"
        return f"{first} cannot be told apart from {second} ({interval})"
    lo, hi = sorted((abs(change.lo), abs(change.hi)))
    side = "above" if change.lo > 0 else "below"
    return f"{first} scores {abs(change.difference):.1f} points ({lo:.1f} to {hi:.1f}) {side} {second}"


def compare(answers: pd.DataFrame | None, one: str, other: str) -> metrics.Difference:
    return metrics.paired_difference(answers_of(answers, one), answers_of(answers, other))


def headline(results: Results) -> str:
    """One sentence: how far can this model be compressed, and is it worth more than pruning or quantizing alone?"""
    if results.variants is None or not results.variants.blocks_removed.any():
        return "No stage has left a compressed model yet."
    n, table = results.operating, tables.table4(results).set_index("variant")
    full, packed, pruned = variant_id(n, healed=True, method="awq"), variant_id(0, method="awq"), variant_id(n)
    size = table.vram_gib_7b.map(lambda gib: "memory not planned" if pd.isna(gib) else f"{gib:.1f} GiB")
    saved = 100 * (1 - table.vram_gib_7b[full] / table.vram_gib_7b["original"])
    plan = f"at 7B its weights take {size[full]} instead of {size['original']} ({saved:.0f} % less)"
    plan = "its memory is not planned" if pd.isna(saved) else plan
    how = f"with {n} of {results.blocks} blocks removed, SFT and 4-bit AWQ"
    if table.score[[full, "original"]].isna().any():
        return f"Scores need weights; {how}, {plan}."
    both = [compare(results.evaluation, full, alone) for alone in (packed, pruned)]
    said = [
        verdict(change, "it", f"{name} alone at {size[alone]}")
        for change, name, alone in zip(both, ("quantization", "pruning"), (packed, pruned), strict=True)
        if change.n
    ]
    scores = f"the model scores {percent(table.loc[full])} against {percent(table.loc['original'])} uncompressed"
    return "; ".join([f"{how[0].upper()}{how[1:]}, {scores}", plan, " and ".join(said)]).removesuffix("; ") + "."


def findings_data(report: dict) -> list[str]:
    """What stage 01 kept, left out and found alike, from its report."""
    counts = {split: sum(by.values()) for split, by in report["counts"].items()}
    said = [f"{sum(counts.values())} pictures: {', '.join(f'{n} {split}' for split, n in counts.items())}."]
    groups, largest = report["groups"], report["largest_group"]
    said.append(f"They form {groups} groups of at most {largest}; no group lies in two splits.")
    alike = [len(report.get(kind, [])) for kind in ("exact_duplicates", "perceptual_duplicates")]
    said.append(f"Duplicates: {alike[0]} exact groups, {alike[1]} perceptual ones.")
    if report.get("excluded"):
        said.append("Excluded by label: " + ", ".join(f"{label} {n}" for label, n in report["excluded"].items()) + ".")
    unreadable = [bad["image"] for bad in report.get("unreadable", [])]
    said.append(f"Unreadable: {', '.join(unreadable)}." if unreadable else "Every file could be read.")
    return said + [f"Note: {note}." for note in report["notes"]]


def findings_finetune(results: Results) -> list[str]:
    """What fine-tuning changed, from the answers of the base and of the original."""
    change = compare(results.answers, "original", "base")
    if not change.n:
        return ["Scores need weights."]
    one, other = (metrics.score_interval(answers_of(results.answers, name)) for name in ("original", "base"))
    text = verdict(change, "the fine-tuned model", "its base")
    ended = answers_of(results.answers, "original").stopped.mean()
    return [
        f"Fine-tuned {percent(one)}, base {percent(other)}: {text}.",
        f"{100 * ended:.0f} % of the fine-tuned model's answers end by themselves.",
    ]


def findings_importance(results: Results) -> list[str]:
    """What the criteria agree on, from stage 03's scores and plans."""
    plans, said = sorted((results.plans or {}).items(), key=lambda plan: plan[0] != results.criterion), []
    for name, plan in plans:
        gone = plan["order"][: results.operating]
        said.append(f"By {words(name)} blocks {listed(gone)} go first; {listed(plan['protected'])} are protected.")
        if name != plans[0][0]:
            both = len(set(gone) & set(plans[0][1]["order"][: len(gone)]))
            said[-1] = said[-1][:-1] + f"; {both} of these {len(gone)} would go by {words(plans[0][0])} too."
    return said


def findings_pruning(results: Results) -> list[str]:
    """Table 1 in words: the loss, where it shows, the operating point, runaway answers, the rival criteria."""
    table = tables.table1(results).dropna(subset=["score"])
    if table.empty:
        return ["Scores need weights."]
    whole, last = table.iloc[0], table.iloc[-1]
    clear = table[table.score_hi < whole.score_lo].blocks_removed
    first = f"The first depth whose interval lies below the unpruned model's is {clear.min()} blocks."
    said = [
        f"The score goes from {percent(whole)} at 0 blocks to {percent(last)} at {last.blocks_removed}.",
        first if len(clear) else "No depth's interval lies below the unpruned model's.",
        f"Operating point: {results.operating} blocks, the deeper one {results.deeper}.",
    ]
    wild = results.answers.assign(runaway=~results.answers.stopped.astype(bool)).groupby("variant").runaway.mean()
    share = table.variant.map(wild)
    worst = table.loc[share.idxmax()]
    most = f"at most {100 * share.max():.0f} % of a depth's answers do not end, at {worst.blocks_removed} blocks"
    said.append(f"Runaway answers: {most}." if share.max() else "Every answer ends, at every depth.")
    ours = variant_id(results.operating)
    for name in sorted(set(results.variants.criterion) - {""}):
        change = compare(results.answers, ours, variant_id(results.operating, criterion=name))
        text = verdict(change, "the paper's criterion", words(name))
        said += [f"At {results.operating} blocks {text}."] if change.n else []
    return said


def findings_sft(results: Results) -> list[str]:
    """Table 2 in words: what SFT gives back, net of what the same SFT gives the unpruned model."""
    table, said = tables.table2(results).dropna(subset=["gain"]).set_index("blocks_removed"), []
    for n, row in table.iterrows():
        model = f"the model with {n} blocks removed" if n else "the unpruned control"
        points = f"{row.gain:+.1f} points ({row.gain_lo:.1f} to {row.gain_hi:.1f})"
        said.append(f"SFT changes {model} from {row.score_before:.1f} to {row.score_after:.1f} %: {points}.")
    if 0 in table.index and results.operating in table.index:
        row, control = table.loc[results.operating], table.loc[0]
        loss, net = control.score_before - row.score_before, row.gain - control.gain
        share = f"{100 * net / max(loss, 1e-9):.0f} % of the {loss:.1f} points that pruning took"
        share = share if loss > 0 else "pruning left no loss to heal"
        said.append(f"Net of the control's gain, {net:.1f} points come back: {share}.")
    return said or ["Scores need weights."]


def findings_activations(results: Results) -> list[str]:
    """Where the outliers sit, from stage 06's statistics."""
    if results.statistics is None:
        return []
    table = results.statistics[results.statistics.variant == results.statistics.variant.iloc[0]]
    peak = table.loc[table["max"].idxmax()]
    return [
        f"The largest output is {peak['max']:.1f}, of {peak.projection} in block {peak.block}, "
        f"{peak['max'] / peak.mean_abs:.0f} times that projection's mean.",
        f"{(table.outlier_channels > 0).sum()} of {len(table)} projections have outlier channels.",
    ]


def findings_quantization(results: Results) -> list[str]:
    """Table 3 in words: each method against AWQ on the same model and bits, and what four bits cost."""
    table, said = tables.table3(results), []
    for row in table.dropna(subset=["score"]).itertuples():
        plain = row.variant.split("|")[0]
        rival = f"{plain}|awq{row.bits}" if row.method != "awq" else plain
        change = compare(results.answers, row.variant, rival)
        if change.n and plain in (variant_id(0), variant_id(results.operating, healed=True)):
            name = f"{words(row.method)} at {row.bits} bits"
            said.append(f"{plain}: {verdict(change, name, 'AWQ' if row.method != 'awq' else '16 bits')}.")
    if results.errors is not None:
        errors = results.errors.groupby("variant").relative_error.mean().sort_values()
        said.append(f"The smallest mean block error is {errors.iloc[0]:.3f}, of {errors.index[0]}.")
    return said or ["Scores need weights."]


def findings_evaluation(results: Results) -> list[str]:
    """The headline, Table 5's differences, and whether the score comes from seeing."""
    said, full = [headline(results)], variant_id(results.operating, healed=True, method="awq")
    for row in tables.table5(results).iloc[1:].itertuples():
        change = compare(results.evaluation, full, row.variant)
        if change.n:
            said.append(f"{verdict(change, 'The full pipeline', row.setting.lower())}.")
    for blind in ("blank", "shuffled"):
        change = compare(results.evaluation, "original", blind)
        if change.n:
            said.append(f"{verdict(change, 'The original model', f'itself with {blind} images')}.")
    return said


def words(name: str) -> str:
    known = {"rtn": "round-to-nearest", "rtn_symmetric": "symmetric round-to-nearest", "awq": "AWQ"}
    return known.get(name, name.replace("_", " "))


def listed(numbers) -> str:
    return ", ".join(map(str, numbers)) or "none"
