"""What leaving out each block does to one answer: the paper's Eqs. 2 to 4, seen. No torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from itertools import compress, groupby
from operator import itemgetter

import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex

from derm_compress.data import dialogue
from derm_compress.report.figures import style, typeset
from derm_compress.report.figures.style import Drawing
from derm_compress.report.sentences import Facts

QUESTION = "features"  # the one with the longest answers
NEW = {"fontweight": "bold"}
BETWEEN = {1: "{}", 2: "{} and {}"}  # names of so many neighbours
CELL, TEXT = 11, 18  # columns of the cosine and of the answer
LONG, WHOLE = 400, 300  # characters that are compared, of the whole answer
LINE = typeset.COLUMNS - 1 - TEXT  # characters of a row's answer


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
    beside = [
        *typeset.flow(asked, look=typeset.HEAD, to=typeset.BESIDE),
        *typeset.flow("The full model:", look=typeset.SMALL, to=typeset.BESIDE),
        *typeset.flow(typeset.plain(whole, WHOLE), to=typeset.BESIDE),
    ]
    heads = {1: "Without", CELL: "cosine", TEXT: "it says (new words are bold)"}
    lines = [[(column, words, typeset.SMALL) for column, words in heads.items()]]
    for row in together(data):
        lines += answer_lines(row)
    figure = typeset.drawn(lines, finding, picture=picture, beside=beside)
    return Drawing(figure, data, finding)


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
    """The part of an answer with the most new words, as much as a line holds: (words, whether the
    whole model's answer lacks them); of an answer without new words, what it leaves out."""
    words, new = answer.split(), lacking(whole, answer)
    if not any(new):
        lost = " ".join(compress(whole.split(), lacking(answer, whole)))
        said = f"leaves out: {lost}" if lost else "the same words in another order"
        return [(textwrap.shorten(said, LINE, placeholder=" ..."), False)]
    first, end = most_new(words, new)
    shown = zip(words[first:end], new[first:end], strict=True)
    groups = groupby(shown, key=itemgetter(1))
    pieces = [(" ".join(word for word, _ in group), is_new) for is_new, group in groups]
    cut = [("...", False)]
    before = cut if first else []
    after = cut if end < len(words) else []
    return before + pieces + after


def lacking(text: str, other: str) -> list[bool]:
    """Of each word of another text, whether this one lacks it, or has it less often."""
    left, found = Counter(map(bare, text.split())), []
    for word in map(bare, other.split()):
        found.append(left[word] < 1)
        left[word] -= 1
    return found


def bare(word: str) -> str:
    return word.strip(".,;:").lower()


def most_new(words: list[str], new: list[bool]) -> tuple[int, int]:
    """First and end of the stretch with the most new words, by their letters, that a line holds."""
    letters = [len(bare(word)) * is_new for word, is_new in zip(words, new, strict=True)]
    best, most = (0, 1), -1
    for first in range(len(words)):
        end = first + 1
        while end < len(words) and room(words, first, end + 1) <= LINE:
            end += 1
        if sum(letters[first:end]) > most:
            best, most = (first, end), sum(letters[first:end])
    return best


def room(words: list[str], first: int, end: int) -> int:
    """Characters of a stretch, with dots where it is cut."""
    cuts = [first > 0, end < len(words)]
    return 4 * sum(cuts) + len(" ".join(words[first:end]))


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
