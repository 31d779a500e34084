"""Judge prompts as data: what a judging model is asked, and how its reply becomes a score of 1 to 4 (no torch)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import yaml

from derm_compress.errors import DermError
from derm_compress.evaluate.metrics import SCALE
from derm_compress.evaluate.rubric import LIMIT

FOLDER = (
    files("derm_compress.evaluate") / "judge_prompts"
)  # one readable file a form, and the attacks on them
FORMS = ("paper", "aspects", "ten")
UNSAFE = frozenset(
    '"\\<>[]{}|`'
)  # what could end a string, open a chat template's marker or pose as a reply
BLANK = re.compile(r"\{(question|reference|answer)\}")
THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
FENCE = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)


class Reply(NamedTuple):
    """What a judge answered, as it came (untrusted); `error` says why there is no whole answer, else it is empty."""

    text: str
    error: str = ""
    served: str = ""  # the model's name by its server


class Verdict(NamedTuple):
    """A reply read: score of 1 to 4, value on the form's own scale, the judge's reason; or nulls and the error."""

    score: float | None
    value: float | None
    why: str
    error: str = ""


def storable(text: str) -> str:
    """The text without halves of characters, which JSON can name and no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def fenced(text: str) -> str:
    """A text as a JSON string that nothing in it can close or leave: cut after LIMIT characters, one line, escaped."""
    said = '"' + "".join(map(_escaped, text[:LIMIT])) + '"'
    return said if len(text) <= LIMIT else f"{said} (cut after {LIMIT} characters)"


def _escaped(char: str) -> str:
    if not char.isprintable():
        return json.dumps(char)[1:-1]
    return f"\\u{ord(char):04x}" if char in UNSAFE else char


@dataclass(frozen=True)
class Form:
    """One way of asking a judge: its texts, the marks it gives, and their scale (lowest, highest)."""

    name: str
    system: str
    user: str
    marks: tuple[str, ...]
    scale: tuple[int, int]
    max_tokens: int

    def messages(self, question: str, reference: str, answer: str) -> list[dict[str, str]]:
        """The two chat messages of one task; the three texts are fenced."""
        texts = {
            "question": fenced(question),
            "reference": fenced(reference),
            "answer": fenced(answer),
        }
        user = BLANK.sub(
            lambda blank: texts[blank[1]], self.user
        )  # in one pass: an answer may hold "{reference}"
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]

    def schema(self) -> dict:
        """JSON schema of a reply: a reason, and every mark out of its scale."""
        low, high = self.scale
        mark = {"type": "integer", "enum": list(range(low, high + 1))}
        fields = {"reason": {"type": "string"}} | dict.fromkeys(self.marks, mark)
        return {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }

    def score(self, value: float) -> float:
        """A mean mark on the paper's scale: lowest to lowest, highest to highest, a straight line between."""
        (low, high), (bottom, top) = self.scale, SCALE
        return bottom + (value - low) * (top - bottom) / (high - low)

    def read(self, reply: Reply) -> Verdict:
        """The verdict in a reply: the whole of it has to be the JSON object that was asked for."""
        told = _object(reply.text)
        if reply.error or isinstance(told, str):
            return Verdict(None, None, "", reply.error or told)
        low, high = self.scale
        for name in self.marks:
            if type(told.get(name)) is not int or not low <= told[name] <= high:
                found = repr(told[name])[:40] if name in told else "missing"
                return Verdict(
                    None,
                    None,
                    "",
                    f"{name} is {found}; allowed: whole numbers from {low} to {high}",
                )
        value = sum(told[name] for name in self.marks) / len(self.marks)
        return Verdict(self.score(value), value, storable(str(told.get("reason", "")))[:LIMIT])

    def explanation(self) -> str:
        """The prompt as people read it: what Figure 6 shows where a model judges."""
        low, high = self.scale
        rule = (
            "the mark is the score"
            if self.scale == SCALE
            else f"mapped onto {SCALE[0]} to {SCALE[1]}"
        )
        head = f"Judge prompt `{self.name}` ({', '.join(self.marks)}: {low} to {high}; {rule})"
        return "\n\n".join([head, self.system.strip(), self.user.strip()])


def form(name: str) -> Form:
    """The form of judge_prompts/<name>.yaml; DermError for another name."""
    if name not in FORMS:
        raise DermError(f"judge_prompt is {name!r}; allowed: {', '.join(FORMS)}")
    told = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    return Form(
        **told | {"name": name, "marks": tuple(told["marks"]), "scale": tuple(told["scale"])}
    )


def attacks() -> dict[str, str]:
    """The injection attempts by name."""
    return yaml.safe_load((FOLDER / "attacks.yaml").read_text("utf-8"))


def _object(text: str) -> dict | str:
    """The JSON object that a reply is, thoughts before it and a code fence around it aside; else what is wrong."""
    text = THOUGHT.sub("", text, count=1).strip() if THOUGHT.match(text) else text.strip()
    inside = FENCE.fullmatch(text)
    try:
        told = json.loads(inside[1] if inside else text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return "the reply is not the one JSON object that was asked for"
    return told if isinstance(told, dict) else "the reply is JSON, but no object"


def _once(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field stands twice")
    return dict(pairs)
