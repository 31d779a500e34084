"""Which signs hold in several runs: what all reports have tested, side by side. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from derm_compress.report import wording
from derm_compress.report.results import table_of

RIVALS, QUANTIZERS = "extra_criteria_tests", "extra_quantization_tests"
ASKED = (  # question with names of columns in it, table, column of the difference that answers it
    ("Is the criterion ahead of {rival} before SFT?", RIVALS, "difference"),
    ("Is the criterion ahead of {rival} over all depths?", RIVALS, "difference_all"),
    ("Is the criterion ahead of {rival} after SFT?", "extra_healed_rivals", "difference"),
    ("Does SFT raise the score of {model}?", "table2_sft", "gain"),
    ("Does {model} gain by {quantizer} at {bits} bits?", QUANTIZERS, "cost"),
    ("Does {model} gain by {quantizer} instead of AWQ at {bits} bits?", QUANTIZERS, "difference"),
    ("Does the full pipeline gain by {exchanged}?", "table5_ablation", "difference"),
)


def signs(folders: Sequence[Path]) -> pd.DataFrame:
    """A row for each question that all reports (their folders) answer, in the order of ASKED, and
    the controls first.

    Columns: question, what each says, same sign: yes, no, or which are clear where an interval
    holds 0. Depths are those of each report, so that models count by their place in the study.
    """
    tested = {}
    for folder in folders:
        said = pd.concat([controls(folder), differences(folder)])
        tested[folder.name] = said.drop_duplicates("question").set_index("question")
    first, *others = tested.values()
    asked = [question for question in first.index if all(question in t.index for t in others)]
    told = {name: table.said[asked].tolist() for name, table in tested.items()}
    each = [{name: table.sign[question] for name, table in tested.items()} for question in asked]
    return pd.DataFrame({"question": asked} | told | {"same sign": [alike(one) for one in each]})


def controls(folder: Path) -> pd.DataFrame:
    """A report's controls that were tested: question, said, sign (1 where it holds, else -1)."""
    table = table_of(folder, "extra_controls").reindex(columns=["question", "holds"]).dropna()
    holds = table.holds.astype(str).eq("True")
    said = holds.map({True: "holds", False: "fails"})
    sign = holds.map({True: 1, False: -1})
    return pd.DataFrame({"question": table.question, "said": said, "sign": sign})


def differences(folder: Path) -> pd.DataFrame:
    """What a report tests: question, said (points with their interval), sign (0: it holds 0)."""
    rows = []
    for question, stem, column in ASKED:
        for row in in_words(folder, stem):
            value, lo, hi = (row.get(f"{column}{end}") for end in ("", "_lo", "_hi"))
            if not pd.isna(lo):
                said = f"{value:+.1f} ({lo:.1f} to {hi:.1f})"
                rows.append((question.format(**row), said, int(lo > 0) - int(hi < 0)))
    return pd.DataFrame(rows, columns=["question", "said", "sign"])


def in_words(folder: Path, stem: str) -> list[dict]:
    """A table's rows with `rival`, `quantizer`, `exchanged` and `model` for people.

    Of models by depth only the unpruned one and that of the operating point; no row where the
    report lacks the table.
    """
    table = table_of(folder, stem)
    if "criterion" in table:
        table["rival"] = table.criterion.map(rival)
    if "method" in table:
        table["quantizer"] = table.method.map(wording.quantizer, na_action="ignore")
    if "setting" in table:
        table["exchanged"] = table.setting.map(wording.exchanged)
    if "blocks_removed" in table and "variant" not in table:
        operating = table_of(folder, "table5_ablation").blocks_removed.iloc[:1]
        names = {0: "the unpruned model"} | dict.fromkeys(operating, "the pruned model")
        table["model"] = table.blocks_removed.map(names)
        table = table.dropna(subset="model")
    if {"healed", "model"} <= set(table):
        table["model"] += table.healed.map({True: " after SFT", False: ""})
    return table.to_dict("records")


def rival(criterion: str) -> str:
    """A ranking's name; random orders have one, however many were drawn."""
    return wording.words("random-0" if criterion.startswith("random") else criterion)


def alike(signs: dict[str, int]) -> str:
    """Whether the signs of all reports are the same; where some are 0, which are clear."""
    clear = [name for name, sign in signs.items() if sign]
    if len({signs[name] for name in clear}) > 1:
        return "no"
    if len(clear) == len(signs):
        return "yes"
    return f"clear in {wording.listed(clear)} only" if clear else "clear in none"


def counted(table: pd.DataFrame) -> str:
    """A table of signs in a sentence."""
    counts = table["same sign"].value_counts()
    same, opposite = (counts.get(word, 0) for word in ("yes", "no"))
    return (
        f"Of {len(table)} questions that every run answers, {same} have the same clear answer in "
        f"all runs and {opposite} have opposite ones; to the rest not every run gives a clear "
        "answer. Points with 95 % intervals; each run has its own operating point."
    )
