"""Figures made of text: answers side by side, right facts coloured, and what the judge goes by. No torch."""

from __future__ import annotations

import re
import textwrap

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from derm_compress.data import dialogue
from derm_compress.evaluate.judges import rubric
from derm_compress.report.figures import QUANTIZED, Drawing, styled

COLUMNS, ADVANCE = (
    76,
    10 / 140,
)  # characters of a line; inches of one at 8.5 points: whole pixels, so nothing drifts
HEAD, QUIET, ALARM = (
    {"fontweight": "bold"},
    {"color": "#555555"},
    {"color": "#b00020", "fontweight": "bold"},
)
RIGHT, WRONG = (
    {"color": QUANTIZED, "fontweight": "bold"},
    {"color": "#b00020", "fontstyle": "italic"},
)
LOOKS = "right facts bold and green, wrong ones red and slanted"


def marks(text: str, reference: str, question: str) -> list[tuple[int, int, dict]]:
    """(start, end, style) of each fact in an answer: right where the reference has it too (the rubric's own eyes)."""
    expected = rubric.stated(reference, question)
    return [
        (*found.span(), RIGHT if name in expected else WRONG)
        for name, pattern in rubric.vocabulary(question).items()
        for found in pattern.finditer(text.lower())
    ]


def plain(text: str, limit: int) -> str:
    """One line of at most so many characters; control characters become blanks."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def flow(text: str, find=lambda text: [], *, limit: int = 330, style: dict | None = None) -> list:
    """Lines of (words, style) runs that fit COLUMNS; `find(text)` gives the marks."""
    text = plain(text, limit)
    found, lines, used = find(text), [[]], 0
    for word in re.finditer(rf"\S{{1,{COLUMNS - 4}}}", text):
        look = next((s for a, b, s in found if a < word.end() and word.start() < b), style or {})
        if used and used + 1 + len(word.group()) > COLUMNS - 4:
            lines, used = [*lines, []], 0
        used += len(word.group()) + bool(used)
        if lines[-1] and lines[-1][-1][1] == look:
            lines[-1][-1] = (f"{lines[-1][-1][0]} {word.group()}", look)
        else:
            lines[-1].append((word.group(), look))
    return lines


def page(lines: list, finding: str, data: pd.DataFrame | None = None) -> Drawing:
    """A figure of monospaced lines, each a list of (text, style) runs, under its finding."""
    lines = [*([(text, HEAD)] for text in textwrap.wrap(finding, COLUMNS - 4)), [], *lines]
    figure = Figure(figsize=(COLUMNS * ADVANCE, 0.17 * (len(lines) + 1)), layout="none")
    FigureCanvasAgg(figure)
    for row, runs in enumerate(lines, 1):
        column = 2
        for text, style in runs:
            font = {"family": "DejaVu Sans Mono", "fontsize": 8.5, "parse_math": False}
            figure.text(column / COLUMNS, 1 - row / (len(lines) + 1), text, **font, **style)
            column += len(text) + 1
    return Drawing(figure, data, finding)


def typical_item(answers: pd.DataFrame) -> str:
    """The item whose scores lie closest to each variant's mean: no example is picked by taste.

    Of the items that every variant has a score for; else of those with any; without any score the first.
    """
    means = answers.groupby(["item", "variant"]).score.mean().unstack().sort_index(kind="stable")
    apart = (means - means.mean()).abs().dropna(axis=1, how="all")
    known = apart.dropna() if len(apart.dropna()) else apart.dropna(how="all")
    return known.mean(axis=1).fillna(0).idxmin()


@styled
def fig5_case_studies(answers: pd.DataFrame, cases: dict[str, str]) -> Drawing:
    """What the variants say to one typical picture; `cases` {label: variant}."""
    chosen = answers[answers.variant.isin(cases.values())]
    chosen, lines = chosen[chosen["item"] == typical_item(chosen)], []
    chosen = pd.concat(
        [chosen[chosen.variant == variant].assign(label=label) for label, variant in cases.items()]
    )
    for question in dialogue.QUESTIONS:
        lines.append([(dialogue.question(question), HEAD)])
        for label, variant in cases.items():
            for row in chosen[
                (chosen.variant == variant) & (chosen.question == question)
            ].itertuples():
                grade = "" if pd.isna(row.score) else f", grade {row.score:.0f} of 4"
                lines.append([(label + grade, QUIET)])
                lines += flow(
                    row.answer, lambda text, row=row: marks(text, row.reference, row.question)
                )
        lines.append([])
    finding = f"One typical picture ({chosen.disease.iloc[0]}): {LOOKS}"
    names = ["label", "variant", "item", "question", "answer", "reference", "score", "why"]
    return page(lines, finding, chosen[names])


@styled
def fig6_judge_prompt(prompt: str) -> Drawing:
    """The text that the judge goes by, line by line."""
    lines = [runs for line in prompt.strip().splitlines() for runs in flow(line, limit=4000)]
    return page(
        lines, "What the judge goes by", pd.DataFrame({"line": prompt.strip().splitlines()})
    )


@styled
def fig7_iterative_pruning(
    answers: pd.DataFrame, depths: dict[int, str], question: str = "features"
) -> Drawing:
    """One typical picture's answers while blocks go, and how many answers never end; `depths` {removed: variant}."""
    chosen = answers[answers.variant.isin(depths.values())]
    share = (~chosen.stopped.astype(bool)).groupby(chosen.variant).mean()
    item, lines, rows = typical_item(chosen[chosen.question == question]), [], []
    for removed, variant in sorted(depths.items()):
        for row in chosen[(chosen.variant == variant) & (chosen["item"] == item)].itertuples():
            if row.question == question:
                head = f"{removed} blocks removed; {100 * share[variant]:.0f} % of all answers do not end"
                lines += [
                    [
                        (
                            head + ("" if row.stopped else " >> nor this one:"),
                            QUIET if row.stopped else ALARM,
                        )
                    ]
                ]
                look = {"limit": 220, "style": {} if row.stopped else {"color": "#777777"}}
                lines += [
                    *flow(
                        row.answer,
                        lambda text, row=row: marks(text, row.reference, question),
                        **look,
                    ),
                    [],
                ]
                told = row.answer, row.reference, row.tokens, row.stopped
                rows.append((removed, item, question, *told, share[variant], row.score))
    names = [
        "blocks_removed",
        "item",
        "question",
        "answer",
        "reference",
        "tokens",
        "stopped",
        "runaway",
        "score",
    ]
    data = pd.DataFrame(rows, columns=names)
    wild = data[data.runaway > 0]
    finding = "Every answer ends, whatever is removed"
    if len(wild):
        most = wild.loc[wild.runaway.idxmax()]
        finding = f"Answers first fail to end with {wild.blocks_removed.min()} blocks removed"
        finding += f"; with {most.blocks_removed} removed, {100 * most.runaway:.0f} % run away"
    return page(lines, f"{finding}; {LOOKS}", data)
