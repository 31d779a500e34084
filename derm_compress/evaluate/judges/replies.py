"""How a judge's reply is read: what is not clearly the object asked for has no mark. No torch.

Replies are untrusted, as are the answers that they may repeat. A thought ends with `</think>`,
whether it has a beginning or not; around the object may stand a fence or words, but no other brace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import NamedTuple

THINKING = re.compile("<think>", re.IGNORECASE)
THOUGHT = re.compile("</think>", re.IGNORECASE)  # where one ends
WHOLE = re.compile(r"\s*([0-9]{1,3})(?:\.0+)?\s*")  # a whole number as text
TEXTS = (None, "text", "output_text")  # kinds of a content's parts that are what was said


class Reply(NamedTuple):
    """What a judge answered, as it came (untrusted); `error` says why none came."""

    text: str
    error: str = ""
    served: str = ""  # the model's name by its server
    finish: str = ""  # why it ended, by its server
    without: str = ""  # fields that the request lacked, which the server refuses

    @classmethod
    def kept(cls, row) -> Reply | None:
        """A reply out of a journal, older ones without the last; None for what is no reply."""
        texts = isinstance(row, list) and all(isinstance(part, str) for part in row)
        return cls(*row) if texts and 0 < len(row) <= len(cls._fields) else None


class Verdict(NamedTuple):
    """A reply read: score of 1 to 4, value on the prompt's scale, reason; or why there is none."""

    score: float | None
    value: float | None
    why: str
    error: str
    reply: str
    served: str
    without: str


def storable(text: str) -> str:
    """The text without halves of characters, which JSON can name and no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def quoted(text: str, length: int = 120) -> str:
    """A reply's beginning for a line of a log: without control characters, in quotes."""
    plain = "".join(char if char.isprintable() else " " for char in text[: 10 * length])
    short = " ".join(plain.split())
    return f'"{short}"' if len(short) <= length else f'"{short[:length]}…"'


def content_text(content) -> str:
    """What a message's content says: a text, or the texts among its parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    named = [part if isinstance(part, dict) else {"text": part} for part in parts]
    texts = [part.get("text") for part in named if part.get("type") in TEXTS]
    return "".join(text for text in texts if isinstance(text, str))


def fields_once(pairs: list) -> dict:
    """An object's fields; one that stands twice has a list of its values, which is no mark."""
    found: dict[str, list] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


DECODER = json.JSONDecoder(object_pairs_hook=fields_once, parse_int=float, strict=False)


def json_objects(text: str) -> list[tuple[int, int, dict]]:
    """The outermost JSON objects in a text, each with its begin and end."""
    found, begin = [], text.find("{")
    while begin >= 0:
        try:
            value, end = DECODER.raw_decode(text, begin)
            found.append((begin, end, value))
        except ValueError:
            end = begin + 1
        except RecursionError:  # the rest is left: its braces say that it was not read
            break
        begin = text.find("{", end)
    return found


def said_objects(text: str) -> list[dict]:
    """The JSON objects behind a reply's thoughts; ValueError where anything else has braces."""
    found = json_objects(text)
    ends = [0, *(end for _, end, _ in found)]
    begins = [*(begin for begin, _, _ in found), len(text)]
    between = [text[end:begin] for end, begin in zip(ends, begins, strict=True)]
    thoughts = [place for place, words in enumerate(between) if THOUGHT.search(words)]
    last = thoughts[-1] if thoughts else 0  # objects from here on stand behind every thought
    words = [THOUGHT.split(between[last])[-1], *between[last + 1 :]]
    if any(THINKING.search(part) for part in words):
        raise ValueError("a thought that does not end")
    if any({"{", "}"} & set(part) for part in words):
        raise ValueError("braces that hold no JSON object")
    return [value for _, _, value in found[last:]]


def object_with(marks: Iterable[str], text: str, asked: Iterable[str]) -> dict:
    """The one object of a reply that gives marks; ValueError where that is not clear.

    asked: texts whose own objects, repeated in the reply, are no verdict.
    """
    repeated = [value for said in asked for _, _, value in json_objects(said)]
    found = [told for told in said_objects(text) if set(marks) & set(told)]
    own = [told for told in found if told not in repeated]
    if not own:
        what = "no JSON object but one that was in the question" if found else "no JSON object"
        raise ValueError(f"{what} with {', '.join(marks)}")
    first, *others = [[told.get(name) for name in marks] for told in own]
    if any(other != first for other in others):
        raise ValueError("several JSON objects that disagree")
    return own[0]


def whole_number(value, low: int, high: int) -> int | None:
    """A whole number within limits out of 3, 3.0 or "3"; None for anything else."""
    if isinstance(value, str):
        match = WHOLE.fullmatch(value)
        value = float(match[1]) if match else None
    whole = isinstance(value, float) and value.is_integer() and low <= value <= high
    return int(value) if whole else None
