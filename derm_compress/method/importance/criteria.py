"""The criteria of importance: what each goes by, reads and costs. No torch.

To add one: a record in CRITERIA, and the function of its name in scoring.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from derm_compress.data import dialogue

ASKED, TOLD = "questions", "questions and reference answers"


@dataclass(frozen=True)
class Criterion:
    """What a ranking's blocks go by; the lowest value goes first."""

    name: str
    source: str
    explained: str
    reads: str = ""  # of each calibration item
    cost: str = "none"
    title: str = ""  # for people, where the name does not do
    by_question: bool = False  # a value for every question, not one for a picture
    weighs: bool = True  # looks at weights, or at what they do
    keeps: str = ""  # of a reading: what "units" start from, "ends" of sublayers, "gradients"

    @property
    def calibrated(self) -> bool:
        return bool(self.reads)

    @property
    def asks_alone(self) -> bool:
        """Whether the questions are all it reads: without pictures every item is then the same."""
        return self.reads == ASKED

    @property
    def questions(self) -> tuple[str, ...]:
        """What each item is asked, where values are kept by question."""
        return dialogue.QUESTIONS if self.by_question else ("",)


_ALL = (
    Criterion(
        "output_similarity",
        source="paper, Eqs. 2-5",
        explained="how much the answers change without the block",
        reads=ASKED,
        cost="half a reading a unit, and writing what differs",
        by_question=True,
        keeps="units",
    ),
    Criterion(
        "perplexity",
        source="Kim et al. 2024; SLEB, Song et al. 2024",
        explained="how unlikely the reference answers become without the block",
        reads=TOLD,
        cost="half a reading a unit",
        by_question=True,
        keeps="units",
    ),
    Criterion(
        "block_influence",
        source="ShortGPT, Men et al. 2024",
        explained="1 minus the cosine of what goes into the block and what comes out",
        reads=TOLD,
        cost="one reading in all",
    ),
    Criterion(
        "angular",
        source="Gromov et al. 2024",
        explained="the angle between the same two at the last token",
        reads=TOLD,
        keeps="ends",
        cost="one reading in all",
    ),
    Criterion(
        "taylor",
        source="Kim et al. 2024",
        explained="the sum of absolute weights times gradients",
        reads=TOLD,
        cost="two readings and one backward pass in all",
        keeps="gradients",
    ),
    Criterion("magnitude", source="Han et al. 2015", explained="the sum of absolute weights"),
    Criterion(
        "last",
        source="Gromov et al. 2024",
        explained="from the end, block by block",
        title="last blocks first",
        weighs=False,
    ),
    Criterion("random", source="baseline", explained="a random order", weighs=False),
)
CRITERIA = {criterion.name: criterion for criterion in _ALL}
PUBLISHED = Criterion(  # an order that is read, not measured
    "published",
    source="the code published with the paper",
    explained="the order that comes with the paper's code",
    title="the published order",
    weighs=False,
)
