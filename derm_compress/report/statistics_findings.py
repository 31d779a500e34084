"""What the statistics say, as computed sentences: plan against paper, speed against its floor, noise, power. No torch.

Each `findings_*` takes Results and returns the sentences that its frames suffice for.
"""

from __future__ import annotations

import pandas as pd

from derm_compress.report import paper, planner, power, statistics_tables
from derm_compress.report.results import Results, variant_id
from derm_compress.report.wording import joined

SURE = 0.05
SETTINGS = {True: "the paper's settings differed", False: "depth alone may explain it"}


def findings_planner(results: Results) -> list[str]:
    """How near the plan comes, in which unit, what else the paper's figures leave open, and what a user will see."""
    rows = statistics_tables.the_planner(results)
    if rows.empty:
        return []
    far, said = planner.worst(rows), rows[rows.table != 2]
    kept = f"{int(said.within.sum())} of {len(said)} figures of Tables 1, 3 and 4 are within the bounds"
    lines = [
        f"Read as GiB of weights, {kept} ({planner.LARGE:.0f} % at 16 bits, {planner.PACKED:.2f} GiB at 4); the "
        f"farthest are {far['fp16_gib']:.1f} % and {far['packed_gib']:.2f} GiB off. Read as GB the farthest would be "
        f"{far['fp16_gb']:.1f} % and {far['packed_gb']:.2f} GiB off: at 16 bits the paper's GB are "
        f"{'GiB' if far['fp16_gib'] < far['fp16_gb'] else 'GB'}."
    ]
    return lines + [_depths(rows), _peak(said), _tuned(rows[rows.table == 2])]


def _depths(rows: pd.DataFrame) -> str:
    """Where one figure stands for two depths, or fits another one better than its own."""
    other = rows[rows.explanation.str.contains("blocks removed, in")].drop_duplicates(
        ["paper_vram", "method"]
    )
    each = [
        f"{row.paper_vram:g} of {row.paper_params_b:g} B ({row.blocks_removed} blocks removed, {row.method}, planned "
        f"{row.plan_gib:.2f} GiB or {row.plan_gb:.2f} GB) is {row.explanation}"
        for row in other.itertuples()
    ]
    return (
        f"Figures that fit another depth than their own: {'; '.join(each)}."
        if each
        else "Every figure fits its depth."
    )


def _peak(said: pd.DataFrame) -> str:
    """What the smallest headline figure becomes while a question is answered."""
    row = said[said.table == 4].iloc[-1]
    tokens = planner.ANSWERING["prompt_tokens"] + planner.ANSWERING["new_tokens"]
    return (
        f"The paper's figures are weights alone. A user who asks one question ({tokens} tokens of text and a picture) "
        f"sees {row.peak_gib:.2f} GiB of tensors where it prints {row.paper_vram:g} ({row.setting}), and on top what "
        f"driver and allocator hold; the peak of {(said[said.bits == 4].peak_gib < 4).sum()} of the "
        f"{(said.bits == 4).sum()} 4-bit rows is below 4 GiB."
    )


def _tuned(rows: pd.DataFrame) -> str:
    """Table 2's two figures beside one setting for both."""
    one, two = rows.itertuples()
    differ = one.paper_vram - two.paper_vram > 2 * (one.plan_gib - two.plan_gib)
    return (
        f"Table 2's {one.paper_vram:g} and {two.paper_vram:g} GB differ by {one.paper_vram - two.paper_vram:.1f}; "
        f"planned with one setting, the nearest of {len(planner.TRAINING)} to both, the two models differ by "
        f"{one.plan_gib - two.plan_gib:.2f} GiB: {SETTINGS[differ]}."
    )


def findings_latency(results: Results) -> list[str]:
    """Decoding beside its floor, and what a larger batch gives."""
    table = statistics_tables.latencies(results)
    if table.empty:
        return []
    known, said = table.set_index(["variant", "batch"]), []
    names = [variant_id(0), variant_id(results.operating, healed=True, method="awq")]
    names = [name for name in names if (name, 1) in known.index]
    each = [
        f"{name} takes {known.decode_ms_per_token[name, 1]:.2f} ms a token, {known.times_floor[name, 1]:.1f} times the "
        f"{known.floor_ms[name, 1]:.3f} ms in which the device reads its {known.read_mib[name, 1]:.1f} MiB"
        for name in names
    ]
    if each:
        speed = table.bandwidth_gb_s.iloc[0]
        said.append(f"At {speed:.1f} GB/s, measured by copying and summing, {'; '.join(each)}.")
    for name in names:
        more = [batch for batch in known.loc[name].index if batch > 1]
        if more:
            gain = known.tokens_per_second[name, more[-1]] / known.tokens_per_second[name, 1]
            said.append(
                f"{name}: {more[-1]} prompts at once give {gain:.1f} times as many tokens a second as one."
            )
    return said + _decoded(known)


def _decoded(known: pd.DataFrame) -> list[str]:
    """Which packed weights no kernel of the device reads, and what that costs beside the unquantized source."""
    decoded = known[known.reindex(columns=["kernel_share"]).kernel_share < 1]
    if decoded.empty:
        return []
    one = decoded.xs(1, level="batch")
    sources = {name: name.rpartition("|")[0] for name in one.index}
    ratios = [
        one.decode_ms_per_token[name] / known.decode_ms_per_token[source, 1]
        for name, source in sources.items()
        if (source, 1) in known.index
    ]
    spread = (
        " to ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in (min(ratios), max(ratios))))
        if ratios
        else ""
    )
    beside = f", {spread} times as long as unquantized" if ratios else ""
    return [
        f"No kernel of this device reads the integers of {joined(one.index)}: all their weights are decoded to 16 bits "
        f"for every token{beside}. It says nothing of the method; bitsandbytes brings a kernel for NF4."
    ]


def findings_comparisons(results: Results) -> list[str]:
    """Which differences to the full pipeline stay after Holm's correction over all of them."""
    table = statistics_tables.comparisons(results).dropna(subset=["p_holm"])
    if table.empty:
        return []
    sure, rest = table[table.p_holm < SURE], table[table.p_holm >= SURE]
    each = [f"{row.setting} ({row.difference:+.1f} points)" for row in sure.itertuples()]
    line = f"Of {len(table)} comparisons with the full pipeline {len(sure)} differ after Holm's correction at 5 %"
    said = [line + (f": {joined(each)}." if each else ".")]
    return said + ([f"Not told apart from it: {joined(rest.setting)}."] if len(rest) else [])


def findings_power(results: Results) -> list[str]:
    """What the paper's number of pictures can show, and its own two gaps beside that."""
    table = statistics_tables.powers(results).dropna(subset=["detectable"])
    if table.empty:
        return []
    said = []
    for pictures, rows in table.groupby("pictures", sort=False):
        low, middle, high = rows.detectable.min(), rows.detectable.median(), rows.detectable.max()
        said.append(
            f"{rows.images.max()} {pictures} pictures ({rows.n.max()} answers) find a paired difference of "
            f"{middle:.1f} points with a power of {power.POWER:.0%} (median over {len(rows)} comparisons; {low:.1f} to "
            f"{high:.1f})."
        )
    five, test = paper.table(5), table[table.pictures == "test"]
    gaps = sorted(five.paper_score.iloc[0] - five.paper_score.iloc[1:])[:2]
    if len(test):
        line = power.detectable(test.sd.median(), power.PAPER_IMAGES)
        told = [f"its {gap:.2f} points are {'above' if gap > line else 'below'}" for gap in gaps]
        said.append(
            f"With this run's spread the paper's {power.PAPER_IMAGES} pictures could find {line:.1f} points: "
            f"{' and '.join(told)} that."
        )
    return said


def findings_seeds(results: Results) -> list[str]:
    """How much of the spread between trainings is training, and how it compares with the pictures' noise."""
    said = []
    for row in statistics_tables.seeds(results).itertuples():
        beyond = (
            "no more than the pictures explain"
            if row.training_sd == 0
            else f"{row.training_sd:.2f} of it training"
        )
        said.append(
            f"The {row.measure}: {row.score_points:.1f} on average of {row.seeds} seeds ({row.lowest:.1f} to "
            f"{row.highest:.1f}); SD between seeds {row.seed_sd:.2f} points ({beyond}), by the pictures drawn "
            f"{row.item_sd:.2f}."
        )
    return said


def findings_diagnosis(results: Results) -> list[str]:
    """How often the disease is named rightly, and what it is taken for."""
    table = statistics_tables.diagnoses(results).set_index("variant")
    diseases = statistics_tables.confusion(results, variant_id(0)).shape[0]
    said = []
    for name in (variant_id(0), variant_id(results.operating, healed=True, method="awq"), "blank"):
        if name in table.index:
            row = table.loc[name]
            wrong = f"; most often {row.most_confused}" if row.most_confused else ""
            sure = f"{row.accuracy:.1f} % ({row.accuracy_lo:.1f} to {row.accuracy_hi:.1f})"
            said.append(
                f"{name} names the right disease in {sure} of {row.n} pictures, none in {row.none}, several in "
                f"{row.several}{wrong}."
            )
    blind = f"Naming one of the {diseases} diseases at random would be right in {100 / max(1, diseases):.1f} %."
    return [*said, blind] if said else []


def findings_secondary(results: Results) -> list[str]:
    """Whether scores that no judge gives rank the variants as the judge does, and how many answers never end."""
    table = statistics_tables.secondary_scores(results)
    if table.empty:
        return []
    said = []
    names = {"name_exact": "names", "fact_f1": "facts", "similarity": "similarity of embeddings"}
    ranks = [
        f"{label} {known.score.rank().corr(known[name].rank()):.2f} ({len(known)} variants)"
        for name, label in names.items()
        if len(known := table.dropna(subset=[name, "score"])) > 2
        and known.score.nunique() > 1 < known[name].nunique()
    ]
    if ranks:
        said.append(
            f"Rank correlation of the judge's score with scores that no judge gives: {', '.join(ranks)}."
        )
    wild = table[table.runaway > 0].sort_values("runaway", ascending=False)
    worst = ", ".join(
        f"{row.variant} {row.runaway} of {row.n}" for row in wild.head(3).itertuples()
    )
    ends = f"Answers that never end: {worst}; in {len(table) - len(wild)} of {len(table)} variants every answer ends."
    return [*said, ends if worst else "Every answer ends."]
