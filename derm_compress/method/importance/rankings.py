"""Names of rankings: a criterion and what is done differently, joined by dashes. No torch.

`output_similarity-iterative`, `angular-contiguous`, `perplexity-text`, `taylor-unprotected`,
`output_similarity-mlp`, `random-3`; `published` is the removal order of the paper's code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from derm_compress.errors import DermError
from derm_compress.method.importance.criteria import CRITERIA, PUBLISHED, Criterion
from derm_compress.model.units import Unit

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Option:
    """What is done differently: its title in a ranking's name for people, and explained."""

    title: str
    explained: str
    parts: tuple[str, ...] = ()  # sublayers that are ranked by themselves
    after_scoring: bool = False  # the values are those without it


OPTIONS = {
    "text": Option("text only", "ranked on the questions without pictures"),
    "iterative": Option("iterative", "scored anew after each removal", after_scoring=True),
    "contiguous": Option("contiguous", "one run of neighbouring blocks goes", after_scoring=True),
    "unprotected": Option("unprotected", "no block is protected", after_scoring=True),
    "attention": Option("attentions", "attentions go, their MLPs stay", ("attention",)),
    "mlp": Option("MLPs", "MLPs go, their attentions stay", ("mlp",)),
    "sublayers": Option("sublayers", "attentions and MLPs go one by one", ("attention", "mlp")),
}
RUN = "angular-contiguous"  # a control: neighbours that turn the stream least


@dataclass(frozen=True)
class Ranking:
    """One way to rank units: a criterion and its options; `draw` tells random orders apart."""

    name: str
    criterion: Criterion
    options: tuple[str, ...] = ()  # in the order of OPTIONS
    draw: int = 0

    @staticmethod
    def of(name: str) -> Ranking:
        """From its name; DermError says what is known."""
        criterion, *words = name.split("-")
        draws = [int(word) for word in words if word.isdecimal()]
        options = [word for word in words if not word.isdecimal()]
        if why := _wrong(criterion, options, draws):
            raise DermError(f"ranking {name!r}: {why}")
        known = tuple(option for option in OPTIONS if option in options)
        return Ranking(name, CRITERIA[criterion], known, *draws)

    @property
    def parts(self) -> tuple[str, ...]:
        """Sublayers that it ranks by themselves; none where whole blocks go."""
        return sum((OPTIONS[option].parts for option in self.options), ())

    @property
    def text_only(self) -> bool:
        return "text" in self.options

    @property
    def items_alike(self) -> bool:
        """Whether one item stands for all: none is read, or the same questions without pictures."""
        asks_nothing_else = self.text_only and self.criterion.asks_alone
        return asks_nothing_else or not self.criterion.calibrated

    @property
    def base(self) -> str:
        """The name of its values, which do not know what is done after scoring."""
        draw = [str(self.draw)] if self.criterion.name == "random" else []
        scoring = [option for option in self.options if not OPTIONS[option].after_scoring]
        return "-".join([self.criterion.name, *draw, *scoring])

    def units(self, blocks: int) -> list[Unit]:
        """All units that it ranks, those of protected blocks too."""
        return [Unit(block, part) for block in range(blocks) for part in self.parts or ("",)]


def _wrong(criterion: str, options: list[str], draws: list[int]) -> str:
    """What is wrong with a name's parts, if anything."""
    if criterion not in CRITERIA or set(options) - set(OPTIONS):
        near = get_close_matches(criterion, (*CRITERIA, PUBLISHED.name), 1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != criterion else ""
        known = f"a criterion ({', '.join(CRITERIA)}) and options ({', '.join(OPTIONS)})"
        return f"write {known}, joined by -, or {PUBLISHED.name}{hint}"
    if criterion == "random" and len(draws) != 1:
        return "random needs the number of its draw, as in random-0"
    if criterion != "random" and draws:
        return "only random has draws"
    if len(set(options)) < len(options):
        return "an option stands there twice"
    parts = [option for option in options if OPTIONS[option].parts]
    if len(parts) > 1:
        return f"{' and '.join(sorted(parts))} exclude each other"
    if "contiguous" in options and ("iterative" in options or parts):
        return "runs are of blocks, ranked once; leave contiguous out"
    if not CRITERIA[criterion].calibrated and {"iterative", "text"} & set(options):
        return f"{criterion} sees no calibration item; leave iterative and text out"
    return ""


def rankings(names: Iterable[str]) -> list[Ranking]:
    """Rankings of these names, each once, `published` aside; the first one removes blocks."""
    names = list(dict.fromkeys(names))
    if not names:
        raise DermError("rankings: name at least one, such as output_similarity")
    found = [Ranking.of(name) for name in names if name != PUBLISHED.name]
    if found and found[0].name == names[0] and found[0].parts:
        raise DermError(
            f"rankings: the first, {names[0]}, is the study's own and must remove whole blocks"
        )
    return found


def check_weights(found: Iterable[Ranking]) -> None:
    """DermError for rankings that no model without values has."""
    if weigh := [ranking.name for ranking in found if ranking.criterion.weighs]:
        raise DermError(
            f"rankings {weigh} need weights, and device meta has none: "
            "take published, last or random-0"
        )


def criteria_used(names: Iterable[str]) -> pd.DataFrame:
    """Source, reads and cost of the criteria in these rankings, by name."""
    import pandas as pd

    used = {ranking.criterion.name: ranking.criterion for ranking in rankings(names)}
    columns = ["source", "reads", "cost"]
    rows = [[getattr(criterion, column) for column in columns] for criterion in used.values()]
    return pd.DataFrame(rows, index=list(used), columns=columns)
