"""Names of rankings: a criterion and what is done differently, joined by dashes. No torch.

`output_similarity-iterative`, `angular-contiguous`, `perplexity-text`, `taylor-unprotected`, `output_similarity-mlp`,
`random-3`; `published` is the removal order that comes with the paper's code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from derm_compress.errors import DermError

PUBLISHED = "published"
CALIBRATED = ("output_similarity", "perplexity", "block_influence", "angular", "taylor")
CRITERIA = (*CALIBRATED, "magnitude", "random", "last")
PARTS = {"attention": ("attention",), "mlp": ("mlp",), "sublayers": ("attention", "mlp")}
OPTIONS = {
    "iterative": "re-scored after each removal",
    "contiguous": "one run of neighbouring blocks goes",
    "text": "calibrated without pictures",
    "unprotected": "no block is spared",
    "attention": "attentions go, blocks stay",
    "mlp": "MLPs go, blocks stay",
    "sublayers": "attentions and MLPs go, each by itself",
}


@dataclass(frozen=True)
class Ranking:
    """One way to rank units: a criterion and its options; `draw` tells random orders apart."""

    name: str
    criterion: str
    options: frozenset[str] = frozenset()
    draw: int = 0

    @staticmethod
    def of(name: str) -> Ranking:
        """From its name; DermError says what is known."""
        criterion, *words = name.split("-")
        draws = [int(word) for word in words if word.isdecimal()]
        options = frozenset(word for word in words if not word.isdecimal())
        if why := _wrong(criterion, options, draws):
            raise DermError(f"ranking {name!r}: {why}")
        if len(words) != len(options) + len(draws):
            raise DermError(f"ranking {name!r}: an option stands there twice")
        return Ranking(name, criterion, options, draws[0] if draws else 0)

    @property
    def parts(self) -> tuple[str, ...]:
        """Sublayers that it ranks by themselves; none where whole blocks go."""
        return next((PARTS[word] for word in PARTS if word in self.options), ())

    @property
    def text_only(self) -> bool:
        return "text" in self.options

    def base(self) -> str:
        """The name under which values are kept: what happens after scoring does not matter to them."""
        scoring = [
            word
            for word in OPTIONS
            if word in self.options - {"iterative", "contiguous", "unprotected"}
        ]
        draw = [str(self.draw)] if self.criterion == "random" else []
        return "-".join([self.criterion, *draw, *scoring])


def _wrong(criterion: str, options: frozenset[str], draws: list[int]) -> str:
    """What is wrong with a name's parts, if anything."""
    if criterion not in CRITERIA or options - OPTIONS.keys():
        near = get_close_matches(criterion, (*CRITERIA, PUBLISHED), 1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != criterion else ""
        known = f"a criterion ({', '.join(CRITERIA)}) and options ({', '.join(OPTIONS)})"
        return f"write {known}, joined by -, or {PUBLISHED}{hint}"
    parts = options & PARTS.keys()
    if len(draws) != (criterion == "random"):
        return (
            "random needs the number of its draw, as in random-0"
            if criterion == "random"
            else "only random has draws"
        )
    if len(parts) > 1:
        return f"{' and '.join(sorted(parts))} exclude each other"
    if "contiguous" in options and ("iterative" in options or parts):
        return "runs are of blocks, ranked once; leave contiguous out"
    if criterion not in CALIBRATED and options & {"iterative", "text"}:
        return f"{criterion} sees no calibration item; leave iterative and text out"
    return ""


def rankings(names: Iterable[str]) -> list[Ranking]:
    """Rankings of these names, each once, the published plan aside; the first, the study's own, removes blocks."""
    names = list(dict.fromkeys(names))
    if not names:
        raise DermError("rankings: name at least one, such as output_similarity")
    found = [Ranking.of(name) for name in names if name != PUBLISHED]
    if found and found[0].name == names[0] and found[0].parts:
        raise DermError(
            f"rankings: the first, {names[0]}, is the study's own and must remove whole blocks"
        )
    return found
