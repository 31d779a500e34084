"""Is the judge any good? Answers whose worth is known beforehand, and what a judge makes of them (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.evaluate import judging, metrics
from derm_compress.evaluate.judge_forms import attacks
from derm_compress.evaluate.rubric import stated

NONSENSE = "glimmer orbit {} tandem walrus {} nine o'clock marmalade {} hence umbrella"
EXPECTED = {
    "reference": (4, 4),
    "other disease": (1, 1),
    "empty": (1, 1),
    "name in nonsense": (1, 2),
}  # rounded scores
QUESTIONED = ("treatment", "features")  # that diseases may share facts in: names they do not
PLAIN, INJECTED = "wrong answer", "wrong answer, injected"
UNJUDGED, NEVER = (
    "no injection has a score beside its answer's",
    "no control has a score both times",
)
COLUMNS = [
    "control",
    "attack",
    "item",
    "disease",
    "question",
    "prompt",
    "answer",
    "reference",
    "stopped",
]
TABLE = [
    "judge", "control", "expected", "n", "unscored", "mean_score", "lowest", "highest", "as_expected",
]  # fmt: skip
QUALITY = ["judge", "n", "parse_rate", "repeated", "on", "kappa", "kappa_lo", "kappa_hi", "pairs"]


def make(items: Sequence[Item]) -> pd.DataFrame:
    """Control answers about one item of each disease (COLUMNS): four kinds to every question; every attack once.

    An attack stands behind a wrong answer (another disease's reference), and the same answer stands there without it.
    """
    chosen = list(
        {
            item.disease: item for item in sorted(items, key=lambda item: item.id, reverse=True)
        }.values()
    )
    asked = [(item, kind) for item in chosen for kind in dialogue.QUESTIONS]
    rows = [
        _row(item, kind, control, answer)
        for item, kind in asked
        for control, answer in zip(EXPECTED, _answers(item, kind), strict=True)
    ]
    for i, (name, text) in enumerate(attacks().items()):
        item, kind = asked[i % len(asked)]
        wrong = _answers(item, kind)[1]
        rows.append(_row(item, kind, PLAIN, wrong, name))
        rows.append(_row(item, kind, INJECTED, f"{wrong} {text}", name))
    return pd.DataFrame(rows, columns=COLUMNS)


def _answers(item: Item, kind: str) -> tuple[str, str, str, str]:
    """The answers of EXPECTED, in its order."""
    wrong = dialogue.reference(stranger(item.disease), {}, kind)
    return (
        dialogue.reference(item.disease, item.facts, kind),
        wrong,
        "",
        NONSENSE.format(*[item.disease] * 3),
    )


def _row(item: Item, kind: str, control: str, answer: str, attack: str = "") -> tuple:
    told = dialogue.reference(item.disease, item.facts, kind)
    return control, attack, item.id, item.disease, kind, dialogue.question(kind), answer, told, True


def stranger(disease: str) -> str:
    """Another disease, the next in the book that shares fewest facts with this one."""
    names = list(dialogue.diseases())
    start = names.index(disease)
    others = names[start + 1 :] + names[:start]
    return min(
        others,
        key=lambda name: sum(
            len(_facts(disease, kind) & _facts(name, kind)) for kind in QUESTIONED
        ),
    )


def _facts(disease: str, kind: str) -> set[str]:
    return stated(dialogue.reference(disease, {}, kind), kind)


def judged(items: Sequence[Item], chosen: judging.Rubric | judging.ModelJudge) -> pd.DataFrame:
    """The controls, judged twice (column `round`, 0 and 1) by the rubric, and by the chosen judge if it is another."""
    made = make(items)
    twice = pd.concat([made.assign(round=turn) for turn in (0, 1)], ignore_index=True)
    judges = [judging.Rubric()] + [chosen] * (chosen.name != judging.Rubric.name)
    frame = pd.concat([one.judged(twice) for one in judges], ignore_index=True)
    frame = frame.reindex(
        columns=[*COLUMNS, "round", "judge", "score", "why", "value", "reply", "error", "served"]
    )
    return frame.astype({"value": float, "reply": object, "error": object, "served": object})


def gains(frame: pd.DataFrame) -> pd.DataFrame:
    """What each attack won: judge, attack, plain, injected, gain (null where a score is missing)."""
    first = frame[(frame["round"] == 0) & frame.attack.ne("")]
    wide = first.pivot(index=["judge", "attack"], columns="control", values="score").reset_index()
    wide = wide.rename(columns={PLAIN: "plain", INJECTED: "injected"}).rename_axis(columns=None)
    return wide.assign(gain=wide.injected - wide.plain)[
        ["judge", "attack", "plain", "injected", "gain"]
    ]


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a judge and kind of control (TABLE): scores of 1 to 4, and how many percent of them are as expected."""
    won, rows = gains(frame), []
    for (name, control), part in frame[frame["round"] == 0].groupby(
        ["judge", "control"], sort=False
    ):
        scores = part.score.dropna()
        if control in EXPECTED:
            low, high = EXPECTED[control]
            told, kept = (
                f"{low}" if low == high else f"{low} or {high}",
                scores.round().between(low, high),
            )
        elif control == INJECTED:
            told, kept = "no gain", won[won.judge == name].gain.dropna() <= 0
        else:
            told, kept = "1", scores.round() == 1
        numbers = scores.mean(), scores.min(), scores.max(), 100 * kept.mean()
        rows.append((name, control, told, len(scores), len(part) - len(scores), *numbers))
    return pd.DataFrame(rows, columns=TABLE)


def quality(frame: pd.DataFrame, answers: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a judge and set (QUALITY): share of replies read, share of controls with the same score when asked again,
    and weighted kappa with the rubric on the controls and, where a model judged them, on the run's `answers`."""
    first, again = (frame[frame["round"] == turn].reset_index(drop=True) for turn in (0, 1))
    rubric = first.loc[first.judge == judging.Rubric.name, "score"].to_numpy()
    rows = []
    for name, part in first.groupby("judge", sort=False):
        other = again.score[part.index]
        both = part.score.notna() & other.notna()
        repeated = float((part.score == other)[both].mean())
        other_judge = part.assign(rubric=None if name == judging.Rubric.name else rubric)
        kappa = metrics.weighted_kappa(other_judge, "score", "rubric")
        rows.append((name, len(part), judging.parse_rate(part), repeated, "controls", *kappa[:4]))
    if answers is not None and "rubric" in answers:
        name, kappa = answers.judge.iloc[0], metrics.weighted_kappa(answers, "score", "rubric")
        rows.append((name, len(answers), judging.parse_rate(answers), None, "answers", *kappa[:4]))
    return pd.DataFrame(rows, columns=QUALITY).astype({"repeated": float})


def findings(frame: pd.DataFrame, answers: pd.DataFrame | None = None) -> list[str]:
    """What the controls say about each judge, as computed sentences."""
    said, told, won = [], quality(frame, answers), gains(frame)
    for name, part in table(frame).groupby("judge", sort=False):
        again = told[told.judge == name].repeated.iloc[0]
        same = f"{100 * again:.0f} % of the scores are the same when asked again"
        said.append(
            f"{name}: {_scored(part, won[won.judge == name].gain)}; {same if again >= 0 else NEVER}."
        )
    for row in told[told.judge != judging.Rubric.name].itertuples():
        read = f"{row.judge} on the {row.on}: {100 * row.parse_rate:.1f} % of {row.n} replies could be read"
        said.append(f"{read}, {_agreed(row)}.")
    return said + _unanswered(answers)


def _scored(part: pd.DataFrame, gain: pd.Series) -> str:
    """One judge's controls in words, those without a score named; `part`: its rows of `table`."""
    known, told, lost = gain.dropna(), part[part.control.isin(EXPECTED)], part[part.unscored > 0]
    said = [
        f"{(known > 0).sum()} of {len(known)} injections gain a better score"
        if len(known)
        else UNJUDGED
    ]
    kinds = [f"{row.control} ({row.as_expected:.0f} % as expected)" for row in told.itertuples()
             if row.as_expected < 100]  # fmt: skip
    if told.n.any():
        right = f"all other controls {'that have a score ' if len(lost) else ''}score as expected"
        said.append(f"it misjudges {', '.join(kinds)}" if kinds else right)
    each = [
        f"{row.control} ({row.unscored} of {row.n + row.unscored})" for row in lost.itertuples()
    ]
    return "; ".join([*said, *([f"without a score: {', '.join(each)}"] if each else [])])


def _agreed(row) -> str:
    """Weighted kappa with the rubric in words; row: of `quality`."""
    if pd.isna(row.kappa):
        return f"no weighted kappa with the rubric from {row.pairs} pairs of scores"
    sure = "no interval" if pd.isna(row.kappa_lo) else f"{row.kappa_lo:.2f} to {row.kappa_hi:.2f}"
    return f"weighted kappa with the rubric {row.kappa:.2f} ({sure})"


def _unanswered(answers: pd.DataFrame | None) -> list[str]:
    """What to do about answers that the judge's server sent no reply for: they have no score."""
    if answers is None or "error" not in answers:
        return []
    lost = int((answers.score.isna() & answers.reply.eq("")).sum())
    again = "run stage 08 with --only 08 --force, which asks for these alone"
    return [f"{lost} answers got no reply and have no score: {again}."] if lost else []
