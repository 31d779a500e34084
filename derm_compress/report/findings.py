"""What a run's numbers say, as sentences: every number and every claim is computed, none is typed. No torch.

Each `findings_*` takes Results and returns the sentences that its frames suffice for.
"""

from __future__ import annotations

import json
from pathlib import PurePath

import pandas as pd

from derm_compress.evaluate import metrics
from derm_compress.report import paper, tables, verdicts
from derm_compress.report.quantization_findings import findings_activations as findings_activations
from derm_compress.report.quantization_findings import (
    findings_quantization as findings_quantization,
)
from derm_compress.report.ranking_findings import findings_criteria
from derm_compress.report.ranking_findings import findings_importance as findings_importance
from derm_compress.report.results import Results, answers_of, variant_id
from derm_compress.report.wording import compare, percent, verdict

GLOSSARY = (
    "SFT: supervised fine-tuning after pruning, by QLoRA (low-rank adapters trained over a 4-bit base). AWQ: "
    "activation-aware rounding; rtn: plain rounding to nearest; bitsandbytes: its NF4 format. base: before "
    "fine-tuning; blank and shuffled: the original model shown no picture, or one of another disease. "
    "Rankings of blocks are explained beside Figure 3."
)


def headline(results: Results) -> str:
    """One sentence: how far can this model be compressed, and is it worth more than pruning or quantizing alone?"""
    if results.variants is None or not results.variants.blocks_removed.any():
        return "No stage has left a compressed model yet."
    n, table = results.operating, tables.table4(results).set_index("variant")
    full, packed, pruned = (
        variant_id(n, healed=True, method="awq"),
        variant_id(0, method="awq"),
        variant_id(n),
    )
    if full not in set(results.variants.variant):
        return "No model ends as the paper's does, in 4-bit AWQ: add awq to methods and 4 to bits."
    size = table.vram_gib_7b.map(
        lambda gib: "memory not planned" if pd.isna(gib) else f"{gib:.1f} GiB"
    )
    saved = 100 * (1 - table.vram_gib_7b[full] / table.vram_gib_7b["original"])
    plan = f"LLaVA at 7B, cut the same way, would take {size[full]} of weights instead of {size['original']} "
    plan += f"({saved:.0f} % less, planned)"
    plan = "its memory is not planned" if pd.isna(saved) else plan
    how = f"with {n} of {results.blocks} blocks removed, SFT and 4-bit AWQ"
    if table.score[[full, "original"]].isna().any():
        return f"Scores need weights; {how}, {plan}."
    both = [compare(results.evaluation, full, alone) for alone in (packed, pruned)]
    us = f"the compressed {subject(results, sized=False).removeprefix('the ')}"
    said = [
        verdict(change, who, f"{name} alone at {size[alone]}")
        for change, who, name, alone in zip(
            both, (us, "it"), ("quantization", "pruning"), (packed, pruned), strict=True
        )
        if change.n
    ]
    scores = f"{subject(results)} scores {percent(table.loc[full])} against {percent(table.loc['original'])} uncompressed"
    return (
        "; ".join([f"{how[0].upper()}{how[1:]}, {scores}", plan, " and ".join(said)]).removesuffix(
            "; "
        )
        + "."
    )


def subject(results: Results, *, sized: bool = True) -> str:
    """The model that was compressed, with its size: the tiny model (2.7 M parameters)."""
    name = PurePath(json.loads(results.variants.recipe.iloc[0])["base"]).name
    size = None if results.memory is None or not sized else results.memory.params_b.max()
    return f"the {name} model" + (
        f" ({size * 1000:.3g} M parameters)" if size is not None and size < 1 else ""
    )


def about(results: Results) -> list[str]:
    """What a reader must know before any number: model, pictures, depths, answers counted, words."""
    if results.variants is None:
        return []
    said = [f"Compressed is {subject(results)}, {results.blocks} decoder blocks"]
    if results.data_report:
        drawn = results.data_report["source"] == "synthetic"
        said[0] += ", asked about " + (
            "drawn pictures, not photographs" if drawn else "photographs"
        )
    scored = any(
        f.score.notna().any() for f in (results.answers, results.evaluation) if f is not None
    )
    own = scored and verdicts.at_papers_size(results)
    said[0] += (
        "." if own else ". Every 7B figure is a plan from exact shapes; no 7B model was run for it."
    )
    if not scored:
        why = (results.choice or {}).get("why", "no stage has chosen depths yet")
        return [
            *said,
            f"Depths are {results.operating} and {results.deeper} blocks: {why}.",
            GLOSSARY,
        ]
    theirs = ", ".join(
        f"{name} {n} of {paper.BLOCKS}" for name, n in (("operating", 6), ("deeper", 9))
    )
    said.append(
        "Depths are chosen on development pictures, as the paper's is, where about a third of the score above the "
        f"floor is gone: {results.operating} blocks and {results.deeper} here ({theirs} in the paper). Scores before "
        "SFT so resemble the paper's by design, and in Tables 2 to 5 its values stand beside other depths."
    )
    known = [f for f in (results.answers, results.evaluation) if f is not None]
    counts = [f["item"].nunique() for f in known]
    if len(counts) == 2 and all(counts):
        said.append(
            f"n counts answers, three a picture: Tables 1 to 3 rest on {counts[0]} test pictures, Tables 4 and 5 on "
            f"{counts[1]}, the held-out ones among them."
        )
    return said + [GLOSSARY]


def photographs(report: dict, model: str = "tiny") -> list[str]:
    """What a run on photographs can and cannot show; nothing for drawn pictures."""
    if report["source"] == "synthetic":
        return []
    counts = {split: sum(by.values()) for split, by in report["counts"].items()}
    said = f"{sum(counts.values())} photographs, {counts.get('test', 0)} of them test images, without noted picture "
    said += "facts: answers are judged by name, treatment and general features only"
    tiny = "; a tiny model trained on drawn pictures shows on so few photographs that the pipeline takes them, "
    tiny += "not how well a compressed model reads skin"
    return [said + (tiny if model in ("tiny", "pico") else "") + "."]


def findings_data(report: dict, model: str = "tiny") -> list[str]:
    """What stage 01 kept, left out and found alike, from its report; `model`: what will answer."""
    counts = {split: sum(by.values()) for split, by in report["counts"].items()}
    said = photographs(report, model)
    said += [
        f"{sum(counts.values())} pictures: {', '.join(f'{n} {split}' for split, n in counts.items())}."
    ]
    groups, largest = report["groups"], report["largest_group"]
    said.append(f"They form {groups} groups of at most {largest}; no group lies in two splits.")
    alike = [len(report.get(kind, [])) for kind in ("exact_duplicates", "perceptual_duplicates")]
    said.append(f"Duplicates: {alike[0]} exact groups, {alike[1]} perceptual ones.")
    if report.get("excluded"):
        said.append(
            "Excluded by label: "
            + ", ".join(f"{label} {n}" for label, n in report["excluded"].items())
            + "."
        )
    unreadable = [bad["image"] for bad in report.get("unreadable", [])]
    said.append(
        f"Unreadable: {', '.join(unreadable)}." if unreadable else "Every file could be read."
    )
    return said + [f"Note: {note}." for note in report["notes"]]


def findings_finetune(results: Results) -> list[str]:
    """What fine-tuning changed, from the answers of the base and of the original."""
    change = compare(results.answers, "original", "base")
    if not change.n:
        return ["Scores need weights."]
    one, other = (
        metrics.score_interval(answers_of(results.answers, name)) for name in ("original", "base")
    )
    text = verdict(change, "the fine-tuned model", "its base")
    ended = answers_of(results.answers, "original").stopped.mean()
    return [
        f"Fine-tuned {percent(one)}, base {percent(other)}: {text}.",
        f"{100 * ended:.0f} % of the fine-tuned model's answers end by themselves.",
    ]


def findings_pruning(results: Results) -> list[str]:
    """Table 1 in words and, at the operating point, the rival criteria."""
    return findings_depths(results) + findings_criteria(results)


def findings_depths(results: Results) -> list[str]:
    """The loss, the first depth at which it shows in pairs, the operating point, runaway answers."""
    table = tables.table1(results).dropna(subset=["score"])
    if table.empty:
        return ["Scores need weights."]
    whole, last = table.iloc[0], table.iloc[-1]
    pairs = zip(table.blocks_removed, table.variant, strict=True)
    clear = (n for n, name in pairs if n and compare(results.answers, name, variant_id(0)).hi < 0)
    first = next(clear, None)
    lies = "interval of paired differences to the unpruned model lies below 0"
    said = [
        f"The score goes from {percent(whole)} at 0 blocks to {percent(last)} at {last.blocks_removed}.",
        f"The first depth whose {lies}: {first} blocks removed."
        if first
        else f"No depth's {lies}.",
        f"Operating point: {results.operating} blocks, the deeper one {results.deeper}.",
    ]
    wild = (
        results.answers.assign(runaway=~results.answers.stopped.astype(bool))
        .groupby("variant")
        .runaway.mean()
    )
    share = table.variant.map(wild)
    worst = table.loc[share.idxmax()]
    most = f"at most {100 * share.max():.0f} % of a depth's answers do not end, at {worst.blocks_removed} blocks"
    return said + [
        f"Runaway answers: {most}." if share.max() else "Every answer ends, at every depth."
    ]


def findings_sft(results: Results) -> list[str]:
    """Table 2 in words: what SFT gives back, net of what the same SFT gives the unpruned model."""
    table, said = tables.table2(results).dropna(subset=["gain"]).set_index("blocks_removed"), []
    for n, row in table.iterrows():
        model = f"the model with {n} blocks removed" if n else "the unpruned control"
        points = f"{row.gain:+.1f} points ({row.gain_lo:.1f} to {row.gain_hi:.1f})"
        said.append(
            f"SFT changes {model} from {row.score_before:.1f} to {row.score_after:.1f} %: {points}."
        )
    n = results.operating
    if 0 in table.index and n in table.index:
        four = variant_id(0), variant_id(n), variant_id(n, healed=True), variant_id(0, healed=True)
        back = metrics.recovery(*(answers_of(results.answers, name) for name in four))
        sure = (
            "no interval, so small is the loss"
            if pd.isna(back.lo)
            else f"{back.lo:.0f} to {back.hi:.0f}"
        )
        share = f"{back.share:.0f} % ({sure}) of the {back.loss:.1f} points that pruning took"
        share = share if back.loss > 0 else "pruning left no loss to heal"
        said.append(f"Net of the control's gain, {back.net:.1f} points come back: {share}.")
    return said or ["Scores need weights."]


def limits_sft(results: Results) -> list[str]:
    """What further training seeds say of the spread that no interval over pictures holds."""
    table = results.variants.reindex(columns=["variant", "healed", "sft_seed"])
    table, said = table[table.healed.astype(bool)], []
    for name, group in table.groupby(table.variant.str.split("~").str[0], sort=False):
        scores = [
            metrics.score_interval(answers_of(results.answers, seed)).score
            for seed in group.variant
        ]
        if len(scores) > 1 and not any(map(pd.isna, scores)):
            each = ", ".join(f"{score:.1f}" for score in scores)
            said.append(
                f"{name}: {len(scores)} training seeds score {each} %; intervals here are the first seed's."
            )
    return said or ["One training seed: the spread between seeds is not in these intervals."]


def findings_evaluation(results: Results) -> list[str]:
    """The headline, Table 5's differences, and whether the score comes from seeing."""
    said, full = [headline(results)], variant_id(results.operating, healed=True, method="awq")
    for row in tables.table5(results).iloc[1:].itertuples():
        change = compare(results.evaluation, full, row.variant)
        if change.n:
            said.append(f"{verdict(change, 'The full pipeline', row.setting.lower())}.")
    said += findings_speed(results)
    for blind in ("blank", "shuffled"):
        change = compare(results.evaluation, "original", blind)
        if change.n:
            said.append(f"{verdict(change, 'The original model', f'itself with {blind} images')}.")
    return said


def findings_speed(results: Results) -> list[str]:
    """Whether the smaller model is also the faster one, and what equal shapes say of the noise."""
    if results.latency is None or results.latency.empty:
        return []
    timed, n = results.one_prompt.set_index("variant"), results.operating
    full, plain = variant_id(n, healed=True, method="awq"), variant_id(0)
    equal = [variant_id(n), variant_id(n, healed=True)]
    if not {full, plain, *equal} <= set(timed.index):
        return []
    noise = abs(timed.decode_ms_per_token[equal[0]] / timed.decode_ms_per_token[equal[1]] - 1)
    return [
        f"To write a token takes {timed.decode_ms_per_token[full]:.1f} ms with the full pipeline and "
        f"{timed.decode_ms_per_token[plain]:.1f} ms uncompressed: {_faster(timed, full, plain)}"
        f"{_kernel(timed.get('kernel_share', {}).get(full))}; the two unquantized models of equal shape differ by "
        f"{noise:.0%}, which is noise."
    ]


def _faster(timed: pd.DataFrame, one: str, other: str) -> str:
    """How many times faster one model decodes than another, if the quartiles of their repeats lie apart."""
    ends = timed.reindex(columns=["decode_ms_per_token_lo", "decode_ms_per_token_hi"]).loc[
        [one, other]
    ]
    if ends.iloc[:, 0].max(skipna=False) <= ends.iloc[:, 1].min(skipna=False):
        return (
            "on this machine they do not differ by more than repeats do (their quartiles overlap)"
        )
    ratio = timed.decode_ms_per_token[other] / timed.decode_ms_per_token[one]
    return (
        f"{max(ratio, 1 / ratio):.2f} times {'faster' if ratio > 1 else 'slower'} on this machine"
    )


def _kernel(share: float | None) -> str:
    """What reads the packed weights, where that was noted; share: of their linears in torch's int4 kernel."""
    if share is None or pd.isna(share):
        return ""
    if share == 0:
        return ", where packed weights are unpacked at every step"
    if share == 1:
        return ", where torch's int4 kernel reads packed weights"
    return f", where torch's int4 kernel reads {share:.0%} of the packed linears and the others are unpacked each step"
