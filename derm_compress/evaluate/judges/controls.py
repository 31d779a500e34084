"""Is the judge any good? Answers of known worth, and what a judge makes of them (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from derm_compress.data import dialogue
from derm_compress.data.items import Item
from derm_compress.evaluate import metrics, schema
from derm_compress.evaluate.judges.judge import Judge, RubricJudge, parse_rate
from derm_compress.evaluate.judges.prompts import attacks
from derm_compress.evaluate.judges.rubric import stated

NONSENSE = "glimmer orbit {} tandem walrus {} nine o'clock marmalade {} hence umbrella"
COPIED = "another picture's"
EXPECTED = {  # lowest and highest of the rounded scores
    "reference": (4, 4),
    COPIED: (1, 3),
    "other disease": (1, 1),
    "empty": (1, 1),
    "name in nonsense": (1, 2),
}
QUESTIONED = ("treatment", "features")  # that diseases may share facts in: names they do not
PLAIN, INJECTED = "wrong answer", "wrong answer, injected"
CONTROL = {"control": "str", "attack": "str"} | {
    name: schema.ANSWER[name]
    for name in ("item", "disease", "question", "prompt", "answer", "reference", "stopped")
}
TABLE = [
    "judge",
    "control",
    "expected",
    "n",
    "unscored",
    "mean_score",
    "lowest",
    "highest",
    "as_expected",
]
QUALITY = ["judge", "n", "parse_rate", "without", "repeated", "on"]
QUALITY += ["kappa", "kappa_lo", "kappa_hi", "pairs"]


def control_answers(items: Sequence[Item]) -> pd.DataFrame:
    """Five kinds of control answers to every question about one item a disease; every attack once.

    Columns: CONTROL. An attack stands behind a wrong answer (another disease's reference), and the
    same answer stands there without it.
    """
    backwards = sorted(items, key=lambda item: item.id, reverse=True)
    chosen = list({item.disease: item for item in backwards}.values())  # the first of each disease
    rows = []
    for item, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        for kind in dialogue.QUESTIONS:
            for control, answer in _answers(item, kind).items():
                rows.append(_row(item, kind, control, answer))
            if other is not item:
                rows.append(_row(item, kind, COPIED, _reference(other, kind)))
    asked = [(item, kind) for item in chosen for kind in dialogue.QUESTIONS]
    for i, (name, text) in enumerate(attacks().items()):
        item, kind = asked[i % len(asked)]
        wrong = _answers(item, kind)["other disease"]
        rows.append(_row(item, kind, PLAIN, wrong, name))
        rows.append(_row(item, kind, INJECTED, f"{wrong} {text}", name))
    return schema.frame(rows, CONTROL)


def _answers(item: Item, kind: str) -> dict[str, str]:
    """The answers that need no other picture."""
    return {
        "reference": _reference(item, kind),
        "other disease": dialogue.reference(stranger(item.disease), {}, kind),
        "empty": "",
        "name in nonsense": NONSENSE.format(*[item.disease] * 3),
    }


def _reference(item: Item, kind: str) -> str:
    return dialogue.reference(item.disease, item.facts, kind)


def _row(item: Item, kind: str, control: str, answer: str, attack: str = "") -> dict:
    told = {"control": control, "attack": attack, "answer": answer, "stopped": True}
    return told | schema.asked(item, kind)


def stranger(disease: str) -> str:
    """Another disease, the next in the book that shares fewest facts with this one."""
    names = list(dialogue.diseases())
    start = names.index(disease)

    def shared(other: str) -> int:
        return sum(len(_facts(disease, kind) & _facts(other, kind)) for kind in QUESTIONED)

    return min(names[start + 1 :] + names[:start], key=shared)


def _facts(disease: str, kind: str) -> set[str]:
    return stated(dialogue.reference(disease, {}, kind), kind)


def judge_controls(items: Sequence[Item], chosen: Judge) -> pd.DataFrame:
    """The controls, judged twice (column `round`: 0, 1) by the rubric and by the chosen judge."""
    made = control_answers(items)
    twice = pd.concat([made.assign(round=turn) for turn in (0, 1)], ignore_index=True)
    judges = {judge.name: judge for judge in (RubricJudge(), chosen)}.values()
    every = pd.concat([judge.judged(twice) for judge in judges], ignore_index=True)
    every = every.reindex(columns=[*CONTROL, "round", *schema.SCORE, *schema.REPLY])
    texts = ("reply", "error", "served", "without")  # the rubric has none
    return every.astype(dict.fromkeys(texts, object))


def gains(frame: pd.DataFrame) -> pd.DataFrame:
    """What each attack won: judge, attack, plain, injected, gain (null without both scores)."""
    first = frame[(frame["round"] == 0) & frame.attack.ne("")]
    wide = first.pivot(index=["judge", "attack"], columns="control", values="score").reset_index()
    wide = wide.rename(columns={PLAIN: "plain", INJECTED: "injected"}).rename_axis(columns=None)
    wide["gain"] = wide.injected - wide.plain
    return wide[["judge", "attack", "plain", "injected", "gain"]]


def controls_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a judge and kind of control (TABLE): its scores, and the percentage as expected."""
    won, rows = gains(frame), []
    first = frame[frame["round"] == 0]
    for (judge, control), part in first.groupby(["judge", "control"], sort=False):
        scores = part.score.dropna()
        if control == INJECTED:
            told, right = "no gain", won[won.judge == judge].gain.dropna() <= 0
        else:
            low, high = EXPECTED.get(control, (1, 1))
            told = " or ".join(map(str, dict.fromkeys((low, high))))
            if high - low > 1:
                told = f"{low} to {high}"
            right = scores.round().between(low, high)
        numbers = scores.mean(), scores.min(), scores.max(), 100 * right.mean()
        rows.append((judge, control, told, len(scores), len(part) - len(scores), *numbers))
    return pd.DataFrame(rows, columns=TABLE)


def judge_quality(frame: pd.DataFrame, answers: pd.DataFrame | None = None) -> pd.DataFrame:
    """How a judge replies and agrees with the rubric, one row a judge and set (QUALITY).

    The sets are the controls and, where a model judged them, the run's `answers`.
    """
    first, again = (frame[frame["round"] == turn].reset_index(drop=True) for turn in (0, 1))
    by_rubric = first.loc[first.judge == RubricJudge.name, "score"].to_numpy()
    rows = []
    for judge, part in first.groupby("judge", sort=False):
        repeated = again.score[part.index]
        both = part.score.notna() & repeated.notna()
        same = float((part.score == repeated)[both].mean())
        compared = part.assign(rubric=None if judge == RubricJudge.name else by_rubric)
        kappa = metrics.weighted_kappa(compared, "score", "rubric")
        read = len(part), parse_rate(part), unsent_fields(part)
        rows.append((judge, *read, same, "controls", *kappa[:4]))
    if answers is not None and "rubric" in answers:
        kappa = metrics.weighted_kappa(answers, "score", "rubric")
        read = len(answers), parse_rate(answers), unsent_fields(answers)
        rows.append((answers.judge.iloc[0], *read, None, "answers", *kappa[:4]))
    return pd.DataFrame(rows, columns=QUALITY).astype({"repeated": float})


def unsent_fields(judged: pd.DataFrame) -> dict[str, int]:
    """{fields that the judge's server refuses: replies made without them}."""
    if "without" not in judged:
        return {}
    fields = judged.without.dropna()
    return {name.replace(" ", ", "): n for name, n in fields[fields.ne("")].value_counts().items()}
