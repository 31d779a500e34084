"""Which signs hold in two runs: what both reports have tested, side by side. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.files import write_text
from derm_compress.report import wording
from derm_compress.report.page import to_markdown

CONTROLS, PIPELINE = "extra_controls", "table5_ablation"
ENDS = ("", "_lo", "_hi")


@dataclass(frozen=True)
class Asked:
    """A table's difference, and the question that its sign answers, with names of columns in it."""

    stem: str
    column: str
    question: str


ASKED = (
    Asked("extra_criteria_tests", "difference", "Is the criterion ahead of {rival} before SFT?"),
    Asked(
        "extra_criteria_tests",
        "difference_all",
        "Is the criterion ahead of {rival} over all depths?",
    ),
    Asked("extra_healed_rivals", "difference", "Is the criterion ahead of {rival} after SFT?"),
    Asked("table2_sft", "gain", "Does SFT raise the score of {model}?"),
    Asked("extra_quantization_tests", "cost", "Does {model} gain by {quantizer} at {bits} bits?"),
    Asked(
        "extra_quantization_tests",
        "difference",
        "Does {model} gain by {quantizer} instead of AWQ at {bits} bits?",
    ),
    Asked("table5_ablation", "difference", "Is {setting} above the full pipeline?"),
)


def signs(one: Path, other: Path) -> pd.DataFrame:
    """A row for each question that both reports (their folders) answer, in the order of ASKED, and
    the controls first.

    Columns: question, what each says, same_sign: yes, no, or where an interval holds 0 which one is
    clear. Depths are those of each report, so that models count by their place in the study.
    """
    names = one.name, other.name
    tested = [pd.concat([controls(folder), differences(folder)]) for folder in (one, other)]
    both = tested[0].merge(tested[1], on="question", suffixes=("", "_other"))
    told = {
        "question": both.question,
        names[0]: both.said,
        names[1]: both.said_other,
        "same sign": [alike(*pair, names) for pair in zip(both.sign, both.sign_other, strict=True)],
    }
    return pd.DataFrame(told)


def controls(folder: Path) -> pd.DataFrame:
    """A report's controls that were tested: question, said, sign (1 where it holds, else -1)."""
    table = read(folder, CONTROLS).dropna(subset="holds")
    holds = table.holds.astype(str).eq("True")
    said = holds.map({True: "holds", False: "fails"})
    sign = holds.map({True: 1, False: -1})
    return pd.DataFrame({"question": table.question, "said": said, "sign": sign})


def differences(folder: Path) -> pd.DataFrame:
    """What a report tests: question, said (points with their interval), sign (0: it holds 0)."""
    rows = []
    for asked in ASKED:
        columns = [asked.column + end for end in ENDS]
        for row in in_words(folder, asked.stem):
            value, lo, hi = (row.get(column) for column in columns)
            if not pd.isna(lo):
                said = f"{value:+.1f} ({lo:.1f} to {hi:.1f})"
                rows.append((asked.question.format(**row), said, int(lo > 0) - int(hi < 0)))
    return pd.DataFrame(rows, columns=["question", "said", "sign"])


def in_words(folder: Path, stem: str) -> list[dict]:
    """A table's rows with `rival`, `quantizer` and `model` for people.

    Of models by depth only the unpruned one and that of the operating point; no row where the
    report lacks the table.
    """
    table = read(folder, stem)
    if "criterion" in table:
        table["rival"] = table.criterion.map(rival)
    if "method" in table:
        table["quantizer"] = table.method.map(wording.quantizer)
    if "blocks_removed" in table and "variant" not in table:
        operating = read(folder, PIPELINE).blocks_removed.iloc[:1]
        names = {0: "the unpruned model"} | dict.fromkeys(operating, "the pruned model")
        table["model"] = table.blocks_removed.map(names)
        table = table.dropna(subset="model")
    if {"healed", "model"} <= set(table):
        table["model"] += table.healed.map({True: " after SFT", False: ""})
    return table.to_dict("records")


def rival(criterion: str) -> str:
    """A ranking's name; random orders have one, however many were drawn."""
    return wording.words("random-0" if criterion.startswith("random") else criterion)


def alike(one: int, other: int, names: tuple[str, str]) -> str:
    """Whether two signs are the same; where one is 0, which is clear."""
    if one and other:
        return "yes" if one == other else "no"
    clear = [name for sign, name in zip((one, other), names, strict=True) if sign]
    return f"clear in {clear[0]} alone" if clear else "clear in neither"


def read(folder: Path, stem: str) -> pd.DataFrame:
    """A report's table; empty where it has none."""
    file = folder / "tables" / f"{stem}.csv"
    return pd.read_csv(file) if file.is_file() else pd.DataFrame()


def write(root: Path, one: str, other: str) -> Path:
    """Writes docs/ONE-and-OTHER.md of two finished reports; DermError where one is missing."""
    folders = [root / "reports" / name for name in (one, other)]
    for folder in folders:
        if not (folder / "tables" / f"{CONTROLS}.csv").is_file():
            again = f"python -m derm_compress run params/{folder.name}.yaml"
            raise DermError(f"compare: reports/{folder.name} has no tables; {again} makes them")
    path = root / "docs" / f"{one}-and-{other}.md"
    write_text(path, text(signs(*folders), one, other))
    return path


def text(table: pd.DataFrame, one: str, other: str) -> str:
    """The table as a page, with the counts in a sentence."""
    counts = table["same sign"].value_counts()
    same, opposite = (counts.get(word, 0) for word in ("yes", "no"))
    open_ = len(table) - same - opposite
    return f"""# Which signs hold in {one} and in {other}

Of {len(table)} questions that both runs ask, {same} have the same clear answer in both and
{opposite} have opposite ones; of the other {open_} the interval of one run or of both holds 0.
Points with 95 % intervals; each run has its own operating point.

{to_markdown(table)}
Made by `python -m derm_compress compare {one} {other}` from the tables of both reports.
"""
