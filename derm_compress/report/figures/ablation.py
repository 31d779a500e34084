"""What leaving out each block does to one answer: the paper's Eqs. 2 to 4, seen. No torch."""

from __future__ import annotations

import difflib
import textwrap

import pandas as pd
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from derm_compress.data import dialogue
from derm_compress.report.figures import style, typeset
from derm_compress.report.figures.style import Drawing
from derm_compress.report.page import page
from derm_compress.report.sentences import Facts

QUESTION = "features"  # the one with the longest answers
NEW = {"fontweight": "bold"}
BETWEEN = {1: "{}", 2: "{} and {}"}  # names of so many neighbours
CELL, TEXT = 11, 18  # columns of the cosine and of the answer
LONG, WHOLE, SHOWN = 400, 300, 54  # characters that are compared, of the whole answer, of changes


@style.figure("without_each_block", "ablations")
def without_each_block(facts: Facts, ablations: pd.DataFrame) -> Drawing | None:
    """One picture, the whole model's answer, and the answer without each block.

    The picture is the one whose cosines lie closest to each block's mean.
    """
    data = example(ablations)
    if data.empty:
        return None
    finding = facts.title("without_each_block", rows=data.to_dict("records"))
    picture = facts.results.picture(data["item"].iloc[0])
    whole, asked = data.original.iloc[0], dialogue.question(QUESTION)
    rows = together(data)
    told = {"asked": asked, "whole": whole, "rows": rows, "picture": picture}
    html = Markup(page("without_each_block.html", finding=finding, **told))
    beside = [
        *typeset.flow(asked, look=typeset.HEAD, to=typeset.BESIDE),
        *typeset.flow("The full model:", look=typeset.SMALL, to=typeset.BESIDE),
        *typeset.flow(typeset.plain(whole, WHOLE), to=typeset.BESIDE),
    ]
    heads = {1: "Without", CELL: "cosine", TEXT: "it says (new words are bold)"}
    lines = [[(column, words, typeset.SMALL) for column, words in heads.items()]]
    for row in rows:
        lines += answer_lines(row)
    figure = typeset.drawn(lines, finding, picture=picture, beside=beside)
    return Drawing(figure, data, finding, html)


def example(ablations: pd.DataFrame) -> pd.DataFrame:
    """block, similarity, answer, original, item of one picture; empty where no answer was kept."""
    if "answer" not in ablations:
        return ablations.iloc[:0]
    known = ablations[ablations.answer.notna() & (ablations.part == "block")]
    known = known[known.question == QUESTION].drop_duplicates(["block", "item"])
    if known.empty:
        return known
    wide = known.pivot(index="block", columns="item", values="value")
    typical = wide.sub(wide.mean(axis=1), axis=0).abs().mean().idxmin()
    chosen = known[known["item"] == typical].sort_values("block")
    chosen = chosen.assign(similarity=1 - chosen.value)
    return chosen[["block", "similarity", "answer", "original", "item"]].reset_index(drop=True)


def together(data: pd.DataFrame) -> list[dict]:
    """Neighbouring blocks without which the model says the same, as one row."""
    rows = []
    for _, same in data.groupby(data.answer.ne(data.answer.shift()).cumsum()):
        one, last = same.iloc[0], same.block.iloc[-1]
        pieces = changed(typeset.plain(one.answer, LONG), typeset.plain(one.original, LONG))
        if one.answer == one.original:
            pieces = [("the same, word for word", False)]
        rows.append(
            {
                "blocks": BETWEEN.get(len(same), "{} to {}").format(one.block, last),
                "similarity": one.similarity,
                "colour": shade(one.similarity),
                "pieces": pieces,
            }
        )
    return rows


def shade(similarity: float) -> str:
    """White for the same answer; the root makes small changes visible."""
    return to_hex(colormaps["Blues"](min(1.0, max(0.0, 1 - similarity) ** 0.5) * 0.9))


def changed(answer: str, whole: str) -> list[tuple[str, bool]]:
    """An answer from its first change on: (words, whether they are new); of one that only ends
    earlier, the last words."""
    ours, theirs = answer.split(), whole.split()
    steps = difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes()
    pieces = [(" ".join(ours[a:b]), kind != "equal") for kind, _, _, a, b in steps if a < b]
    news = [i for i, (_, new) in enumerate(pieces) if new]
    if not news:
        return [(f"ends with: {' '.join(ours[-4:])}", False)]
    found, room = [("...", False)] if news[0] else [], SHOWN
    for words, new in pieces[news[0] :]:
        found.append((textwrap.shorten(words, max(4, room), placeholder=" ..."), new))
        room -= len(words) + 1
        if room < 0:
            break
    return found


def answer_lines(row: dict) -> typeset.Lines:
    """A row of the figure."""
    cell = {"bbox": {"facecolor": row["colour"], "edgecolor": "#888888", "linewidth": 0.4}}
    cell["bbox"]["pad"] = 1.6
    cell["color"] = "white" if row["similarity"] < 0.6 else "black"
    text, spans = "", []
    for words, new in row["pieces"]:
        spans += [(len(text), len(text) + len(words), NEW)] if new else []
        text += f"{words} "
    lines = typeset.flow(text, spans, look=typeset.SMALL, at=TEXT)
    lines[0] = [(1, row["blocks"], {}), (CELL, f"{row['similarity']:5.3f}", cell), *lines[0]]
    return lines
