"""Figures 5 to 7 as text that can be read, copied and searched: answers side by side, their facts marked. No torch.

A right fact is bold and underlined, a wrong one struck through, so that grey prints and screen readers keep them apart.
All that a model said is escaped.
"""

from __future__ import annotations

import pandas as pd
from markupsafe import Markup, escape

from derm_compress.data import dialogue
from derm_compress.report.quotes import RIGHT, marks, plain

LEGEND = Markup(
    "<p class=run>A fact that the reference has too is <b class=right>bold and underlined</b>; one that it has not is "
    "<s class=wrong>struck through</s>. The rest of the text counts for nothing.</p>"
)
LIMIT = 600  # characters of an answer that are shown


def marked(text: str, reference: str, question: str) -> Markup:
    """An answer with its facts marked; control characters become blanks, what is very long is cut."""
    text = plain(text, LIMIT)
    found = marks(text, reference, question) if len(text.lower()) == len(text) else []
    shown, at = Markup(""), 0
    for start, end, look in sorted(found, key=lambda mark: (mark[0], -mark[1])):
        if start >= at:
            form = "<b class=right>{}</b>" if look is RIGHT else "<s class=wrong>{}</s>"
            shown += escape(text[at:start]) + Markup(form).format(text[start:end])
            at = end
    return (shown + escape(text[at:])) or Markup("<i>(nothing)</i>")


def case_studies(data: pd.DataFrame) -> Markup:
    """Figure 5's answers: a row of cards a question, the reference first; `data` as quotes.fig5_case_studies has it."""
    rows = Markup("")
    for question, group in data.groupby("question", sort=False):
        first = group.iloc[0]
        cards = _card("Reference", marked(first.reference, first.reference, question))
        for row in group.itertuples():
            cards += _card(
                row.label + _grade(row.score), marked(row.answer, row.reference, question)
            )
        rows += _row(question, cards)
    return LEGEND + rows


def iterative_pruning(data: pd.DataFrame) -> Markup:
    """Figure 7's answers, the reference first, a card a depth; `data` as quotes.fig7_iterative_pruning has it."""
    first = data.iloc[0]
    cards = _card("Reference", marked(first.reference, first.reference, first.question))
    for row in data.itertuples():
        head = f"{row.blocks_removed} blocks removed{_grade(row.score)}; "
        head += f"{100 * row.runaway:.0f} % of all answers do not end"
        body = marked(row.answer, row.reference, row.question)
        cards += _card(
            head, body + ("" if row.stopped else Markup(" <strong>[does not end]</strong>"))
        )
    return LEGEND + _row(first.question, cards)


def prompt(data: pd.DataFrame) -> Markup:
    """Figure 6: what the judge goes by, line by line; `data` as quotes.fig6_judge_prompt has it."""
    return Markup("<pre class=text>{}</pre>").format("\n".join(data.line))


def _grade(score) -> str:
    return "" if pd.isna(score) else f", grade {score:.0f} of 4"


def _row(question: str, cards: Markup) -> Markup:
    """A question's cards, side by side where there is room."""
    return Markup("<h3>{}</h3><div class=answers>{}</div>").format(
        dialogue.question(question), cards
    )


def _card(head: str, body: Markup) -> Markup:
    return Markup(
        "<figure class=said><figcaption>{}</figcaption><blockquote>{}</blockquote></figure>\n"
    ).format(head, body)
