"""Figures 5 to 7 are text, drawn and as HTML: answers with their facts marked, and the judge's.

A right fact is bold, a wrong one slanted or struck through, so that grey prints and screen readers
keep them apart. All that a model said is escaped, and drawn as it is. No torch.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from derm_compress.data import dialogue
from derm_compress.evaluate.judges import rubric
from derm_compress.report.figures import style
from derm_compress.report.figures.style import QUANTIZED, QUIET, Drawing
from derm_compress.report.page import page
from derm_compress.report.sentences import Facts

COLUMNS = 76  # characters of a drawn line
ADVANCE = 10 / 140  # inches of one at 8.5 points: whole pixels, so nothing drifts
RED = "#b00020"
HEAD, PLAIN, SMALL = {"fontweight": "bold"}, {}, {"color": QUIET}
ALARM = {"color": RED, "fontweight": "bold"}
RIGHT = {"color": QUANTIZED, "fontweight": "bold"}
WRONG = {"color": RED, "fontstyle": "italic"}
DRAWN, SHOWN = 330, 600  # characters of an answer in the drawing, in the page
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


def plain(text: str, limit: int) -> str:
    """One line of at most so many characters; control characters become blanks."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[:limit] + " ..."


def by_question(quotes: list[Quote]) -> dict[str, list[Quote]]:
    """{question as it is asked: its quotes}."""
    kinds = dict.fromkeys(quote.question for quote in quotes)
    return {dialogue.question(k): [q for q in quotes if q.question == k] for k in kinds}


def cards(quotes: list[Quote]) -> Markup:
    """A row of cards a question, the reference first."""
    asked = {
        question: [Quote("Reference", some[0].question, *[some[0].reference] * 2), *some]
        for question, some in by_question(quotes).items()
    }
    return Markup(page("quotes.html", asked=asked))


def lines(quotes: list[Quote]) -> list[list]:
    """The same answers as lines of (words, look) runs, under their questions."""
    found: list[list] = []
    for question, some in by_question(quotes).items():
        found.append([(question, HEAD)])
        for quote in some:
            text = plain(quote.answer, DRAWN)
            spans = [(a, b, RIGHT if right else WRONG) for a, b, right in quote.facts(text)]
            head, look = quote.head, SMALL
            if not quote.ended:
                head, look = f"{head}, this one neither", ALARM
            found += [*flow(head, [(0, len(head), look)]), *flow(text, spans), []]
    return found


def flow(text: str, spans: list[tuple[int, int, dict]]) -> list[list]:
    """Lines of (words, look) runs that fit COLUMNS; spans: (start, end, look)."""
    found, used = [[]], 0
    for word in re.finditer(rf"\S{{1,{COLUMNS - 4}}}", text):
        looks = [look for a, b, look in spans if a < word.end() and word.start() < b]
        look = looks[0] if looks else PLAIN
        if used and used + 1 + len(word.group()) > COLUMNS - 4:
            found.append([])
            used = 0
        used += len(word.group()) + bool(used)
        if found[-1] and found[-1][-1][1] == look:
            found[-1][-1] = (f"{found[-1][-1][0]} {word.group()}", look)
        else:
            found[-1].append((word.group(), look))
    return found


def drawn(runs: list[list], finding: str) -> Figure:
    """A figure of monospaced lines under their finding."""
    title = [[(text, HEAD)] for text in textwrap.wrap(finding, COLUMNS - 4)]
    runs = [*title, [], *runs]
    figure = Figure(figsize=(COLUMNS * ADVANCE, 0.17 * (len(runs) + 1)), layout="none")
    FigureCanvasAgg(figure)
    font = {"family": "DejaVu Sans Mono", "fontsize": 8.5, "parse_math": False}
    for row, line in enumerate(runs, 1):
        column = 2
        for text, look in line:
            figure.text(column / COLUMNS, 1 - row / (len(runs) + 1), text, **font, **look)
            column += len(text) + 1
    return figure


def quoted(quotes: list[Quote], data: pd.DataFrame, finding: str) -> Drawing:
    finding = f"{finding}; right facts bold and green, wrong ones red and slanted"
    return Drawing(drawn(lines(quotes), finding), data, finding, cards(quotes))


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


@style.figure("fig5_case_studies", "answers")
def case_studies(facts: Facts, answers: pd.DataFrame) -> Drawing | None:
    """What three variants say to one typical picture (Figure 5)."""
    results, questions = facts.results, list(dialogue.QUESTIONS)
    cases = {
        results.variant(0): "Original",
        results.variant(results.operating, quantizer="awq"): "Pruned + quantized",
        results.full: "Pruned + SFT + quantized",
    }
    if not set(cases) <= set(answers.variant):
        return None
    chosen = answers[answers.variant.isin(cases)]
    chosen = chosen[chosen["item"] == typical_item(chosen)]
    chosen = chosen.assign(label=chosen.variant.map(cases))
    chosen = chosen.sort_values("question", key=lambda kinds: kinds.map(questions.index))
    chosen = chosen.sort_values("variant", key=lambda n: n.map(list(cases).index), kind="stable")
    quotes = [
        Quote(row.label + grade(row.score), row.question, row.answer, row.reference)
        for row in chosen.itertuples()
    ]
    quotes.sort(key=lambda quote: questions.index(quote.question))
    names = ["label", "variant", "item", "question", "answer", "reference", "score", "why"]
    finding = f"One typical picture ({chosen.disease.iloc[0]})"
    return quoted(quotes, chosen[names].reset_index(drop=True), finding)


@style.figure("fig6_judge_prompt")
def judge_prompt(facts: Facts) -> Drawing | None:
    """The text that the judge goes by, line by line (Figure 6)."""
    text, finding = facts.asked.strip(), "What the judge goes by"
    if not text:
        return None
    runs = [run for line in text.splitlines() for run in flow(plain(line, PROMPT), [])]
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
    quotes = []
    for row in data.itertuples():
        head = f"{row.blocks_removed} blocks removed{grade(row.score)}; "
        head += f"{100 * row.runaway:.0f} % of all answers do not end"
        quotes.append(Quote(head, row.question, row.answer, row.reference, bool(row.stopped)))
    wild = data[data.runaway > 0].to_dict("records")
    finding = facts.title("fig7_iterative_pruning", wild=wild)
    names = ["blocks_removed", "item", "question", "answer", "reference", "tokens", "stopped"]
    return quoted(quotes, data[[*names, "runaway", "score"]].reset_index(drop=True), finding)
