"""Judge prompts as data: what a model is asked, and how its reply becomes a score. No torch.

Both answers and replies are untrusted: an answer stands in the prompt as a JSON string that it
cannot leave, and how a reply is read stands in replies.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files

import yaml

from derm_compress.errors import DermError
from derm_compress.evaluate.judges.replies import (
    Reply,
    Verdict,
    object_with,
    storable,
    whole_number,
)
from derm_compress.evaluate.judges.rubric import LIMIT
from derm_compress.evaluate.metrics import SCALE

FOLDER = files("derm_compress.evaluate.judges") / "judge_prompts"  # a file a prompt; the attacks
PROMPTS = ("paper", "aspects", "ten")
UNSAFE = frozenset('"\\<>[]{}|`')  # may end a string, open a chat marker or pose as a reply
BLANK = re.compile(r"\{(question|reference|answer)\}")


def fenced(text: str) -> str:
    """A text as a JSON string of one line that nothing in it can leave, cut after LIMIT."""
    said = '"' + "".join(map(_escaped, text[:LIMIT])) + '"'
    return said if len(text) <= LIMIT else f"{said} (cut after {LIMIT} characters)"


def _escaped(char: str) -> str:
    if not char.isprintable():
        return json.dumps(char)[1:-1]
    return f"\\u{ord(char):04x}" if char in UNSAFE else char


@dataclass(frozen=True)
class JudgePrompt:
    """One way of asking a judge: its texts, the marks it gives, their scale (lowest, highest)."""

    name: str
    system: str
    user: str
    marks: tuple[str, ...]
    scale: tuple[int, int]

    def messages(self, question: str, reference: str, answer: str) -> list[dict[str, str]]:
        """The two chat messages of one task; the three texts are fenced."""
        texts = {"question": question, "reference": reference, "answer": answer}
        # in one pass: an answer may hold "{reference}"
        user = BLANK.sub(lambda blank: fenced(texts[blank[1]]), self.user)
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
        """A mean mark on the paper's scale: ends to ends, a straight line between."""
        (low, high), (bottom, top) = self.scale, SCALE
        return bottom + (value - low) * (top - bottom) / (high - low)

    def read(self, reply: Reply, answer: str = "") -> Verdict:
        """The verdict in a reply about an answer, whose own words in it are none."""
        came = reply.text, reply.served, reply.without
        try:
            if reply.error:
                raise ValueError(reply.error)
            if reply.finish == "length":
                raise ValueError("cut off by its length: raise judge_max_tokens")
            told = object_with(self.marks, reply.text, (self.user, answer[:LIMIT]))
            marks = [self._mark(told, name) for name in self.marks]
        except ValueError as error:
            return Verdict(None, None, "", storable(str(error)), *came)
        value = sum(marks) / len(marks)
        why = storable(str(told.get("reason", "")))[:LIMIT]
        return Verdict(self.score(value), value, why, "", *came)

    def _mark(self, told: dict, name: str) -> int:
        """A mark out of a reply's object; ValueError for any that was not asked for."""
        low, high = self.scale
        mark = whole_number(told.get(name), low, high)
        if mark is None:
            found = repr(told[name])[:40] if name in told else "missing"
            raise ValueError(f"{name} is {found}; allowed: whole numbers from {low} to {high}")
        return mark

    def explanation(self) -> str:
        """The prompt as people read it: what Figure 6 shows where a model judges."""
        low, high = self.scale
        same = self.scale == SCALE
        rule = "the mark is the score" if same else f"mapped onto {SCALE[0]} to {SCALE[1]}"
        head = f"Judge prompt `{self.name}` ({', '.join(self.marks)}: {low} to {high}; {rule})"
        return "\n\n".join([head, self.system.strip(), self.user.strip()])


def judge_prompt(name: str) -> JudgePrompt:
    """The prompt of judge_prompts/<name>.yaml; DermError for another name."""
    if name not in PROMPTS:
        raise DermError(f"judge_prompt is {name!r}; allowed: {', '.join(PROMPTS)}")
    told = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    told |= {"name": name, "marks": tuple(told["marks"]), "scale": tuple(told["scale"])}
    return JudgePrompt(**told)


def attacks() -> dict[str, str]:
    return yaml.safe_load((FOLDER / "attacks.yaml").read_text("utf-8"))
