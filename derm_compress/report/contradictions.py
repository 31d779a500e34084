"""Where the paper disagrees with itself: each item a check computed from its printed tables and 7B shapes. No torch.

What is wording alone (an item without numbers) is listed as such and not computed.
"""

from __future__ import annotations

import pandas as pd

from derm_compress.report import paper, paper_model

COLUMNS = ["where", "says", "arithmetic", "verdict"]
CONTRADICTS, AGREES, WORDING = "disagrees", "agrees", "by its wording"
SPEEDUP, SAVED = 4.2, {"Discussion": 70, "4.6.1": 71}  # claims of the text that no table holds
DISMISSED = "hqq"
WORDS = (  # statements without arithmetic
    (
        "3.2, 4.3",
        "High similarity means unimportant (3.2); blocks with the lowest importance scores go (4.3).",
    ),
    ("Equation 5, Figure 3", "Equation 5 averages the similarities, Figure 3 adds them up."),
    (
        "2.3, Equations 6 to 8",
        "AWQ preserves 0.1 to 1 % of the weights; the equations scale channels, keep none.",
    ),
    ("Equation 1, code", "Equation 1 is a symmetric grid; the public code's grid is asymmetric."),
    (
        "Appendix",
        "The judge's prompt is referred to in Appendix B and stands in A; the public demo has another judge.",
    ),
)


def check(tables: dict[int, pd.DataFrame] | None = None) -> pd.DataFrame:
    """One row an item; COLUMNS. `tables`: the paper's, by number."""
    tables = tables or {number: paper.table(number) for number in range(1, 6)}
    items = (
        which_model, nine_blocks, compression, pruned_vram, four_bit_vram, same_vram, speedup, pruning_speed, sft_speed,
        saving, seven_percent, four_percent, calibration_free, unmeasured, two_floors, stable, training_memory,
        training_time,
    )  # fmt: skip
    rows = []
    for item in items:
        where, says, arithmetic, contradicts = item(tables)
        rows.append((where, says, arithmetic, CONTRADICTS if contradicts else AGREES))
    return pd.DataFrame(
        [*rows, *((where, says, "", WORDING) for where, says in WORDS)], columns=COLUMNS
    )


def findings(frame: pd.DataFrame) -> list[str]:
    """How many of the computed items disagree."""
    found, computed = (frame.verdict == CONTRADICTS).sum(), (frame.verdict != WORDING).sum()
    said = f"{found} of {computed} computed checks find numbers or statements of the paper that do not agree with each "
    return [f"{said}other; {len(frame) - computed} more items are wording alone."]


def which_model(tables):
    """Tables 2 and 3 name another size than Table 4 for the same scores."""
    two, four, first = (
        tables[2].iloc[0],
        _by(tables[4], "variant"),
        _by(tables[1], "blocks_removed").paper_score,
    )
    named = (
        paper_model.blocks_gone(_billions(two.paper_model)),
        paper_model.blocks_gone(four.paper_params_b["pruned-6"]),
    )
    same = (two.paper_score_before, two.paper_score_after) == tuple(
        four.paper_score[["pruned-6", "pruned-6+sft"]]
    )
    told = ", ".join(f"{n} blocks are {paper_model.params_b(n):.3f} B" for n in named)
    own = f"Table 1 has {first[named[0]]:g} at {named[0]} blocks" if named[0] in first.index else ""
    says = f"{two.paper_score_before:g} and {two.paper_score_after:g} belong to {_billions(two.paper_model):g} B "
    says += f"(Table 2) and to {four.paper_params_b['pruned-6']:g} B (Table 4)."
    return "Tables 1, 2, 4", says, f"{told}; {own}", same and named[0] != named[1]


def nine_blocks(tables):
    deeper = tables[2].iloc[1]
    n, quantized = (
        paper_model.blocks_gone(_billions(deeper.paper_model)),
        tables[3].query("role == 'deeper'").iloc[0],
    )
    printed = _by(tables[1], "blocks_removed").paper_score[n]
    says = f"{n} blocks removed score {printed:g} (Table 1) and {deeper.paper_score_before:g} before SFT (Table 2)."
    told = f"{deeper.paper_score_before:g} - {printed:g} = {deeper.paper_score_before - printed:.2f} points; "
    told += f"Table 3 has {quantized.paper_score:g} for the same depth after SFT and AWQ"
    return "Tables 1, 2, 3", says, told, printed != deeper.paper_score_before


def compression(tables):
    own = 100 * tables[1].blocks_removed * paper_model.BLOCK / paper_model.TOTAL
    wrong = [(n, c, x) for n, c, x in zip(tables[1].blocks_removed, tables[1].paper_compression, own, strict=True)
             if round(x) != c]  # fmt: skip
    says = (
        "; ".join(f"{n} blocks are {c:g} % compression" for n, c, _ in wrong)
        or "Compression in percent"
    )
    told = "; ".join(
        f"{n} x {paper_model.BLOCK / 1e9:.4f} B / {paper_model.TOTAL / 1e9:.4f} B = {x:.2f} %"
        for n, _, x in wrong
    )
    return "Table 1", f"{says}.", told or "every row rounds to what is printed", bool(wrong)


def pruned_vram(tables):
    """Table 1's VRAM follows GiB of fp16 weights; Table 4's of the same kind follows neither unit."""
    printed, n = (
        tables[4].query("bits == 16").paper_vram.iloc[1],
        paper_model.blocks_gone(tables[4].paper_params_b[1]),
    )
    pruned = tables[1][tables[1].blocks_removed > 0]
    most = max(
        abs(paper_model.weights_gib(m) - gb)
        for m, gb in zip(pruned.blocks_removed, pruned.paper_vram, strict=True)
    )
    gib, gb = paper_model.weights_gib(n), paper_model.weights_gb(n)
    told = f"{n} blocks removed leave {gib:.2f} GiB or {gb:.2f} GB of fp16 weights; Table 1's pruned rows lie within "
    told += f"{most:.2f} of their GiB"
    return (
        "Tables 1, 4",
        f"VRAM is {printed:g} for {n} blocks removed.",
        told,
        min(abs(gib - printed), abs(gb - printed)) > most,
    )


def four_bit_vram(tables):
    three, four = (
        tables[3].query("role == 'operating' and method == 'awq'").iloc[0],
        tables[4].iloc[-1],
    )
    sizes = [
        paper_model.blocks_gone(_billions(three.paper_model)),
        paper_model.blocks_gone(four.paper_params_b),
    ]
    says = f"{three.paper_vram:g} GB is {_billions(three.paper_model):g} B (Table 3), {four.paper_vram:g} GB "
    says += f"{four.paper_params_b:g} B (Table 4)."
    told = "; ".join(f"{n} blocks removed: {paper_model.weights_gib(n, 'awq'):.2f} GiB, {paper_model.weights_gb(n, 'awq'):.2f} GB"
                     for n in sizes)  # fmt: skip
    return "Tables 3, 4", says, told, sizes[0] != sizes[1] and three.paper_vram == four.paper_vram


def same_vram(tables):
    """One VRAM for both quantizers, whose formats differ by more than the printed digit."""
    base = tables[3].query("role == 'unpruned'").set_index("method").paper_vram
    awq, nf4 = (paper_model.weights_gb(0, method) for method in ("awq", "bitsandbytes"))
    double = paper_model.weights_gb(0, "bitsandbytes-double")
    told = f"AWQ {awq:.2f} GB, NF4 {nf4:.2f} GB, doubly quantized {double:.2f} GB at 32 blocks"
    differs = base["awq"] == base["bitsandbytes"] and min(abs(awq - nf4), abs(awq - double)) > 0.1
    return (
        "4.5, Table 3",
        f"AWQ and bitsandbytes need the same VRAM, {base['awq']:g}.",
        told,
        differs,
    )


def speedup(tables):
    ms = _by(tables[4], "setting").paper_ms_per_token
    one, other = ms["Original LLaVA"], ms["Prune + SFT + Quant"]
    says = f"{SPEEDUP:g} times faster (Discussion)."
    return (
        "Discussion, Table 4",
        says,
        f"{one} / {other} = {one / other:.2f}",
        abs(one / other - SPEEDUP) > 0.05,
    )


def pruning_speed(tables):
    """A decoder with fewer blocks of the same shape should be faster in proportion."""
    four = _by(tables[4], "setting")
    one, other = four.paper_ms_per_token[["Original LLaVA", "Pruning Only"]]
    left = paper.BLOCKS - paper_model.blocks_gone(four.paper_params_b["Pruning Only"])
    told = (
        f"{one} / {other} = {one / other:.2f}; {paper.BLOCKS} / {left} = {paper.BLOCKS / left:.2f}"
    )
    return (
        "Table 4",
        "Pruning makes inference faster.",
        told,
        one / other < (1 + paper.BLOCKS / left) / 2,
    )


def sft_speed(tables):
    ms = _by(tables[4], "setting").paper_ms_per_token
    before, after = ms["Pruning Only"], ms["Pruning and SFT"]
    says = f"{before} ms become {after} ms by SFT."
    return (
        "Table 4",
        says,
        f"SFT changes no shape: {before} - {after} = {before - after} ms of noise",
        before != after,
    )


def saving(tables):
    vram = _by(tables[4], "setting").paper_vram
    one, other = vram["Original LLaVA"], vram["Prune + SFT + Quant"]
    told, says = (
        100 * (1 - other / one),
        ", ".join(f"{x} % less VRAM ({where})" for where, x in SAVED.items()),
    )
    return (
        "4.6.1, Discussion",
        f"{says}.",
        f"1 - {other} / {one} = {told:.1f} %",
        len(set(SAVED.values())) > 1,
    )


def seven_percent(tables):
    return _drop(tables, "Bitsandbytes quantization")


def four_percent(tables):
    return _drop(tables, "Pruning Based on Magnitude Baseline")


def calibration_free(tables):
    awq, other = (
        tables[3]
        .query("role == 'unpruned'")
        .set_index("method")
        .paper_score[["awq", "bitsandbytes"]]
    )
    says = "Quantization without calibration fails (Introduction)."
    told = f"on the base model bitsandbytes has {other:g}, AWQ {awq:g}: {other - awq:+.2f} points"
    return "Introduction, Table 3", says, told, other > awq


def unmeasured(tables):
    """A method that the text dismisses, looked for in every table that compares quantizers."""
    rows = pd.concat([tables[number].assign(table=number) for number in (3, 4, 5)])
    words = rows[["method", "setting", "paper_notes"]].fillna("").agg(" ".join, axis=1).str.lower()
    count, known = words.str.contains(DISMISSED).sum(), ", ".join(sorted({*tables[3].method}))
    told = f"{count} of {len(rows)} rows of Tables 3 to 5 name it; Table 3's methods are {known}"
    says = f"{DISMISSED} fails, as other quantization without calibration (Introduction)."
    return "Introduction, Tables 3 to 5", says, told, count == 0


def two_floors(tables):
    """A healed model rounded to nearest scores exactly as an unhealed one with an unnamed quantizer."""
    rounded = _by(tables[5], "setting").paper_score["Round to neighbour Quantization"]
    plain = _by(tables[4], "setting").paper_score["Prune + Quant"]
    says = "Round to neighbour gives unintelligible output (Table 5), Prune + Quant an unusable one (Table 4)."
    told = f"{rounded:g} and {plain:g}: one score, though only one of the two models had SFT"
    return "Tables 4, 5", says, told, rounded == plain


def stable(tables):
    """Depths called stable, and what they cost."""
    one = _by(tables[1], "blocks_removed").paper_score
    six = _by(tables[4], "setting").paper_score["Pruning Only"]
    says = "Stable with up to 6 blocks removed (3.3), with up to 4 (4.3)."
    told = f"4: {one[0]:g} - {one[4]:g} = {one[0] - one[4]:.2f} points; 6: {one[0]:g} - {six:g} = {one[0] - six:.2f}"
    return "3.3, 4.3, Table 1", says, told, one[0] - one[4] > 5


def training_memory(tables):
    """Two blocks less cannot save more than their weights, gradients and activations of one setting."""
    one, other = tables[2].paper_vram
    sizes = [
        paper_model.params_b(paper_model.blocks_gone(_billions(name)))
        for name in tables[2].paper_model
    ]
    fewer = sizes[0] - sizes[1]
    told = f"{one} - {other} = {one - other:.1f} GB for {fewer:.3f} B parameters, {2 * fewer:.2f} GB at 16 bits"
    return "Table 2", f"Training takes {one} and {other} GB.", told, one - other > 2 * 2 * fewer


def training_time(tables):
    one, other = tables[2].paper_seconds
    left = [
        paper.BLOCKS - paper_model.blocks_gone(_billions(name)) for name in tables[2].paper_model
    ]
    saved, fewer = 100 * (1 - other / one), 100 * (1 - left[1] / left[0])
    told = f"{saved:.0f} % less time for {fewer:.0f} % fewer blocks ({left[0]} to {left[1]})"
    says = f"Training takes {one / 3600:.1f} h and {other / 3600:.1f} h."
    return "Table 2", says, f"{told}: the settings must have differed", saved > 1.5 * fewer


def _drop(tables, setting):
    """A drop printed in percent that is one in points, and larger in percent."""
    five = _by(tables[5], "setting")
    full, other, printed = (
        five.paper_score.iloc[0],
        five.paper_score[setting],
        five.paper_notes[setting],
    )
    points, share = full - other, 100 * (1 - other / full)
    told = f"{full:g} - {other:g} = {points:.2f} points, {share:.1f} % of {full:g}; a judge's score, not accuracy"
    return (
        "Table 5",
        f"{setting}: {printed}.",
        told,
        abs(share - float(printed.split("%")[0])) > 0.5,
    )


def _by(frame, column):
    return frame.set_index(column)


def _billions(name: str) -> float:
    """5.6 from Pruned LLaVA (5.6 B)."""
    return float(name.split("(")[1].rstrip("B )"))
