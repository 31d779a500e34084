"""Figures 5 to 7: pictures, questions and answers with their facts marked, and the judge's text.

A right fact is bold, a wrong one slanted or struck through, so that grey prints and screen readers
keep them apart. All that a model said is escaped, and drawn as it is. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup

from derm_compress.data import dialogue
from derm_compress.evaluate.judges import rubric
from derm_compress.report.figures import style
from derm_compress.report.figures.style import QUANTIZED, Drawing
from derm_compress.report.figures.typeset import BESIDE, HEAD, SMALL, Lines, drawn, flow, plain
from derm_compress.report.page import page
from derm_compress.report.sentences import Facts
from derm_compress.report.tables import joins
from derm_compress.report.wording import size

RED = "#b00020"
ALARM = {"color": RED, "fontweight": "bold"}
RIGHT = {"color": QUANTIZED, "fontweight": "bold"}
WRONG = {"color": RED, "fontstyle": "italic"}
DRAWN, SHOWN = 220, 320  # characters of an answer in the drawing, in the page
DEPTHS = 6  # answers of Figure 7 at most, first and last among them; its csv has all
PROMPT = 4000  # of a line of the judge's prompt


@dataclass(frozen=True)
class Quote:
    """One answer to a question, beside its reference."""

    head: str
    question: str
    answer: str
    reference: str
    ended: bool = True

    def facts(self, text: str) -> list[tuple[int, int, bool]]:
        """(start, end, right) of each fact in an answer's text, as the rubric sees it; none over
        another."""
        if len(text.lower()) != len(text):
            return []  # lower case is longer: no mark beats a wrong one
        expected = rubric.stated(self.reference, self.question)
        found = [
            (*match.span(), name in expected)
            for name, pattern in rubric.vocabulary(self.question).items()
            for match in pattern.finditer(text.lower())
        ]
        kept: list[tuple[int, int, bool]] = []
        for start, end, right in sorted(found, key=lambda fact: (fact[0], -fact[1])):
            if not kept or start >= kept[-1][1]:
                kept.append((start, end, right))
        return kept

    def pieces(self) -> list[tuple[str, bool | None]]:
        """The answer as a page shows it: (words, whether they are a right fact; None: no fact)."""
        text, at, found = plain(self.answer, SHOWN), 0, []
        for start, end, right in self.facts(text):
            found += [(text[at:start], None), (text[start:end], right)]
            at = end
        return [piece for piece in [*found, (text[at:], None)] if piece[0]]


def by_question(quotes: list[Quote]) -> dict[str, list[Quote]]:
    """{question as it is asked: its quotes}."""
    kinds = dict.fromkeys(quote.question for quote in quotes)
    return {dialogue.question(k): [q for q in quotes if q.question == k] for k in kinds}


def cards(quotes: list[Quote], **above) -> Markup:
    """A row of cards a question, the reference first; above: a finding, a picture, what is told."""
    asked = {
        question: [Quote("Reference", some[0].question, *[some[0].reference] * 2), *some]
        for question, some in by_question(quotes).items()
    }
    return Markup(page("quotes.html", asked=asked, **above))


def lines(quotes: list[Quote]) -> Lines:
    """The same answers as lines, under their questions."""
    found: Lines = []
    for question, some in by_question(quotes).items():
        found += flow(question, look=HEAD)
        for quote in some:
            text = plain(quote.answer, DRAWN)
            spans = [(a, b, RIGHT if right else WRONG) for a, b, right in quote.facts(text)]
            ending = "" if quote.ended else "; this one does not end"
            head = flow(quote.head + ending, look=SMALL if quote.ended else ALARM)
            found += [*head, *flow(text, spans), []]
    return found


def quoted(quotes: list[Quote], data: pd.DataFrame, finding: str, **above) -> Drawing:
    """Answers; above: their `picture`, and `told` beside it: (name, what is said of it)."""
    html = cards(quotes, finding=finding, **above)
    finding = f"{finding}; right facts bold and green, wrong ones red and slanted"
    beside: Lines = []
    for name, said in above["told"]:
        beside += [*flow(name, look=HEAD, to=BESIDE), *flow(said, look=SMALL, to=BESIDE)]
    figure = drawn([[], *lines(quotes)], finding, picture=above["picture"], beside=beside)
    return Drawing(figure, data, finding, html)


def typical_item(answers: pd.DataFrame) -> str:
    """The item whose scores lie closest to each variant's mean: no example is picked by taste.

    Of the items that every variant has a score for; else of those with any; else the first.
    """
    means = answers.groupby(["item", "variant"]).score.mean().unstack().sort_index(kind="stable")
    apart = (means - means.mean()).abs().dropna(axis=1, how="all")
    known = apart.dropna() if len(apart.dropna()) else apart.dropna(how="all")
    return known.mean(axis=1).fillna(0).idxmin()


def grade(score) -> str:
    return "" if pd.isna(score) else f", grade {score:.0f} of 4"


def cost(facts: Facts, variant: str) -> str:
    """4.9 MiB, 8.7 ms a token."""
    (gib,) = joins.values(facts.results.memory, variant, ["vram_gib"])
    (ms,) = joins.values(facts.results.one_prompt, variant, ["decode_ms_per_token"])
    said = [] if gib is None else [size(gib)]
    said += [] if ms is None else [f"{ms:.1f} ms a token"]
    return ", ".join(said)


@style.figure("fig5_case_studies", "answers")
def case_studies(facts: Facts, answers: pd.DataFrame) -> Drawing | None:
    """What three variants say to one typical picture, and what they cost (Figure 5)."""
    results, questions = facts.results, list(dialogue.QUESTIONS)
    cases = [results.variant(0), results.variant(results.operating, quantizer="awq"), results.full]
    if not set(cases) <= set(answers.variant):
        return None
    chosen = answers[answers.variant.isin(cases)]
    chosen = chosen[chosen["item"] == typical_item(chosen)]
    chosen = chosen.assign(label=chosen.variant.map(facts.label))
    order = {"question": questions.index, "variant": cases.index}
    chosen = chosen.sort_values(list(order), key=lambda column: column.map(order[column.name]))
    quotes = [
        Quote(row.label + grade(row.score), row.question, row.answer, row.reference)
        for row in chosen.itertuples()
    ]
    finding = f"One typical picture ({chosen.disease.iloc[0]}), and what {len(cases)} models say"
    told = [(facts.label(name), cost(facts, name)) for name in cases]
    names = ["label", "variant", "item", "question", "answer", "reference", "score", "why"]
    data = chosen[names].reset_index(drop=True)
    picture = results.picture(data["item"].iloc[0])
    return quoted(quotes, data, finding, picture=picture, told=told)


@style.figure("fig6_judge_prompt")
def judge_prompt(facts: Facts) -> Drawing | None:
    """The text that the judge goes by, line by line (Figure 6)."""
    text, finding = facts.asked.strip(), "What the judge goes by"
    if not text:
        return None
    runs = [run for line in text.splitlines() for run in flow(plain(line, PROMPT))]
    html = Markup("<pre class=text>{}</pre>").format(text)
    return Drawing(drawn(runs, finding), pd.DataFrame({"line": text.splitlines()}), finding, html)


@style.figure("fig7_iterative_pruning", "table1_pruning", "answers")
def iterative_pruning(facts: Facts, table: pd.DataFrame, answers: pd.DataFrame) -> Drawing | None:
    """One typical picture's answers while blocks go, and how many answers never end (Figure 7)."""
    depths = {facts.results.variant(n): int(n) for n in table.blocks_removed}
    chosen = answers[answers.variant.isin(depths)]
    if chosen.empty:
        return None
    runaway = (~chosen.stopped.astype(bool)).groupby(chosen.variant).mean()
    chosen = chosen[chosen.question == "features"]
    chosen = chosen[chosen["item"] == typical_item(chosen)]
    data = chosen.assign(
        blocks_removed=chosen.variant.map(depths), runaway=chosen.variant.map(runaway)
    ).sort_values("blocks_removed")
    groups = [rows for _, rows in data.groupby(data.answer.ne(data.answer.shift()).cumsum())]
    places = np.linspace(0, len(groups) - 1, min(DEPTHS, len(groups))).round().astype(int)
    quotes = []
    for same in (groups[i] for i in places):
        row = same.iloc[-1]
        head = f"{depths_of(facts, same)}{grade(row.score)}"
        if wild := 100 * same.runaway.max():
            head += f"; {wild:.0f} % of all answers do not end"
        quotes.append(Quote(head, row.question, row.answer, row.reference, row.stopped))
    finding = facts.title("fig7_iterative_pruning", rows=data.to_dict("records"))
    names = ["blocks_removed", "item", "question", "answer", "reference", "tokens", "stopped"]
    data = data[[*names, "runaway", "score"]].reset_index(drop=True)
    told = [(chosen.disease.iloc[0], "a typical test picture; below, what is said of it")]
    picture = facts.results.picture(data["item"].iloc[0])
    return quoted(quotes, data, finding, picture=picture, told=told)


def depths_of(facts: Facts, same: pd.DataFrame) -> str:
    """Depths at which the answer is the same, and what the last of these models weighs."""
    first, last = same.blocks_removed.iloc[0], same.blocks_removed.iloc[-1]
    (gib,) = joins.values(facts.results.memory, same.variant.iloc[-1], ["vram_gib"])
    said = f"{first} to {last} blocks removed" if first < last else f"{first} blocks removed"
    return said if gib is None else f"{said}, {size(gib)}"
