"""One interface for judges: the rubric, a model behind a server, a model in a process of its own (no torch).

Every judge has a `name` and `judged(answers)`, which adds judge, score (1 to 4, or null), why and, of a model, value
(on the prompt's own scale), reply (raw), error and served. What a model judged is kept by content, for all runs.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.evaluate import judge_forms, rubric
from derm_compress.evaluate.judge_forms import Form, Reply
from derm_compress.files import Journal, digest, hold, public, read_frame, release
from derm_compress.progress import track

JUDGES = ("rubric", "openai", "transformers")
ANSWERING = (
    "02_finetune",
    "04_pruning",
    "05_sft",
    "07_quantization",
)  # stages whose test answers the tables show
_WRITING = threading.Lock()


class Backend(Protocol):
    """What a judging model needs: who it is (`identity`, JSON), and replies to {key: messages} in any order."""

    model: str

    def identity(self) -> dict: ...

    def replies(self, todo: dict[str, list], form: Form) -> Iterator[tuple[str, Reply]]: ...


class Rubric:
    """judge.rubric behind the interface."""

    name = "rubric"

    def judged(self, answers: pd.DataFrame) -> pd.DataFrame:
        return rubric.rubric(answers)


class ModelJudge:
    """A judging model with its form; replies are kept in `folder`, if there is one, and never asked for again.

    The key of a reply is the model's identity, the messages (prompt, question, reference, answer) and the frame's
    column `round`, if it has one. A task without a reply (a server that gave up) is not kept: a later run asks again.
    """

    def __init__(self, backend: Backend, form: Form, folder: Path | None = None):
        self.backend, self.form, self.folder = backend, form, folder
        self.name = f"{public(backend.model)} ({form.name})"

    def judged(self, answers: pd.DataFrame) -> pd.DataFrame:
        """The answers with the verdicts beside them; raises DermError where the model cannot be asked at all."""
        who = self.backend.identity() | {"max_tokens": self.form.max_tokens}
        turns = [0] * len(answers) if "round" not in answers else answers["round"].tolist()
        texts = zip(answers.prompt, answers.reference, answers.answer, strict=True)
        tasks = [self.form.messages(*three) for three in texts]
        wanted = [digest([who, task, turn]) for task, turn in zip(tasks, turns, strict=True)]
        known = self._replies(dict(zip(wanted, tasks, strict=True)), digest(who)[:8])
        verdicts = [self.form.read(known[key]) for key in wanted]
        columns = pd.DataFrame(
            verdicts, columns=["score", "value", "why", "error"], index=answers.index
        )
        columns = columns.astype({"score": float, "value": float})
        replies = pd.DataFrame(
            [known[key] for key in wanted], columns=Reply._fields, index=answers.index
        )
        return answers.assign(judge=self.name, **columns, reply=replies.text, served=replies.served)

    def foresee(self) -> None:
        """Says whether a local model fits, before any other is loaded; DermError where it does not."""
        self.backend.foresee(self.form)

    def _replies(self, tasks: dict[str, list], who: str) -> dict[str, Reply]:
        with self._journal(who) as journal:
            known = {key: Reply(*journal.done[key]) for key in tasks if key in journal.done}
            todo = {key: task for key, task in tasks.items() if key not in known}
            asking = self.backend.replies(todo, self.form) if todo else ()
            for key, reply in track(asking, f"judged by {self.name}", total=len(todo)):
                known[key] = reply
                if not reply.error:
                    journal.add(key, list(reply))
        return known

    @contextlib.contextmanager
    def _journal(self, who: str) -> Iterator[Journal]:
        if self.folder is None:
            yield Journal()
            return
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", public(self.backend.model)).strip("-.")[-60:]
        path = self.folder / f"{slug}-{who}.jsonl"
        with _WRITING:
            hold(
                lock := path.with_suffix(".lock"),
                waiting=f"another process judges with {self.name}; waiting for it",
            )
            try:
                yield Journal(path)
            finally:
                release(lock)


def choose(
    kind: str,
    *,
    model: str = "",
    url: str = "",
    form: str = "paper",
    concurrency: int = 4,
    device: str = "cpu",
    folder: Path | None = None,
    root: Path = Path(),
) -> Rubric | ModelJudge:
    """The judge of a run's parameters, which loads and asks nothing yet; DermError for what cannot work.

    folder: where replies are kept; root: what a relative model folder starts from.
    """
    if kind not in JUDGES:
        raise DermError(f"judge is {kind!r}; allowed: {', '.join(JUDGES)}")
    if kind == "rubric":
        return Rubric()
    if not model:
        raise DermError(
            f"judge: {kind} needs judge_model: the name the server knows, a model folder or a hub id"
        )
    if kind == "openai":
        from derm_compress.evaluate.judge_openai import OpenAI

        return ModelJudge(
            OpenAI(model, url, concurrency=concurrency), judge_forms.form(form), folder
        )
    from derm_compress.evaluate.judge_local import Local

    inside = root / model
    return ModelJudge(
        Local(str(inside) if inside.is_dir() else model, device), judge_forms.form(form), folder
    )


def all_answers(
    answers: pd.DataFrame, folders: dict[str, Path], chosen: Rubric | ModelJudge
) -> pd.DataFrame:
    """The final answers: `score` is the chosen judge's, for a model with the rubric's as `rubric` and `rubric_why`.

    A model judges the test answers of the earlier stages too ({stage: its folder}), so that all tables have one judge.
    """
    if isinstance(chosen, Rubric):
        return answers
    earlier = [
        read_frame(folders[name] / "answers.parquet") for name in ANSWERING if name in folders
    ]
    earlier = [frame[frame.split == "test"] for frame in earlier]
    every = pd.concat([*earlier, answers], ignore_index=True)
    every = every.drop_duplicates(["variant", "item", "question"], keep="last", ignore_index=True)
    return chosen.judged(every.assign(rubric=every.score, rubric_why=every.why))


def parse_rate(judged: pd.DataFrame) -> float:
    """Share of answers whose verdict could be read, 0 to 1; nan without answers."""
    return float(judged.score.notna().mean())
