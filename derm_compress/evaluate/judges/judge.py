"""One interface for judges (the rubric, a model behind a server), and their registry. No torch.

Every judge has a `name` and `judged(answers)`, which adds schema.SCORE and, of a model,
schema.REPLY. What a model judged is kept by content, for all runs.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.evaluate import schema
from derm_compress.evaluate.judges.prompts import JudgePrompt, Reply, Verdict, judge_prompt
from derm_compress.evaluate.judges.rubric import score_by_rubric
from derm_compress.files import Journal, digest, hold, public, release
from derm_compress.progress import track

_WRITING = threading.Lock()


class RubricJudge:
    name = "rubric"

    def judged(self, answers: pd.DataFrame) -> pd.DataFrame:
        return score_by_rubric(answers)


class ModelJudge:
    """A judging model with its prompt; replies are kept in `folder`, and never asked for again.

    server: as server.ChatServer. The key of a reply is the model's identity, the messages (prompt,
    question, reference, answer) and the frame's column `round`, if it has one. A task without a
    reply (a server that gave up) is not kept: a later run asks again.
    """

    def __init__(self, server, prompt: JudgePrompt, folder: Path | None = None):
        self.server, self.prompt, self.folder = server, prompt, folder
        self.name = f"{public(server.model)} ({prompt.name})"

    def judged(self, answers: pd.DataFrame) -> pd.DataFrame:
        """The answers with verdicts beside them; DermError where the model cannot be asked."""
        who = self.server.identity() | {"max_tokens": self.prompt.max_tokens}
        tasks, keys = {}, []
        for row in answers.itertuples():
            task = self.prompt.messages(row.prompt, row.reference, row.answer)
            keys.append(digest([who, task, getattr(row, "round", 0)]))
            tasks[keys[-1]] = task
        known = self._replies(tasks, digest(who)[:8])
        replies = [known[key] for key in keys]
        verdicts = [self.prompt.read(reply) for reply in replies]
        told = pd.DataFrame(verdicts, columns=Verdict._fields, index=answers.index)
        told = told.assign(
            judge=self.name,
            reply=[reply.text for reply in replies],
            served=[reply.served for reply in replies],
        )
        columns = schema.SCORE | schema.REPLY
        return answers.assign(**told[list(columns)].astype(columns))

    def _replies(self, tasks: dict[str, list], who: str) -> dict[str, Reply]:
        with self._journal(who) as journal:
            known = {key: Reply(*journal.done[key]) for key in tasks if key in journal.done}
            todo = {key: task for key, task in tasks.items() if key not in known}
            asking = self.server.replies(todo, self.prompt) if todo else ()
            for key, reply in track(asking, f"judged by {self.name}", total=len(todo)):
                known[key] = reply
                if not reply.error:
                    journal.add(key, list(reply))
        return known

    @contextlib.contextmanager
    def _journal(self, who: str) -> Iterator[Journal]:
        """The replies that are kept, for one process at a time."""
        if self.folder is None:
            yield Journal()
            return
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", public(self.server.model)).strip("-.")[-60:]
        path = self.folder / f"{slug}-{who}.jsonl"
        lock = path.with_suffix(".lock")
        with _WRITING:
            hold(lock, waiting=f"another process judges with {self.name}; waiting for it")
            try:
                yield Journal(path)
            finally:
                release(lock)


Judge = RubricJudge | ModelJudge


def rubric_judge(**_) -> RubricJudge:
    return RubricJudge()


def served_judge(
    *, model: str = "", url: str = "", prompt: str = "paper", concurrency: int = 4, folder=None
) -> ModelJudge:
    """A model behind a server; folder: where its replies are kept."""
    if not model:
        raise DermError("judge: openai needs judge_model, the name that the server knows it by")
    try:
        from derm_compress.evaluate.judges.server import ChatServer
    except ImportError as error:
        raise DermError(f"judge: openai needs {error.name}: pip install openai==3.57.0") from error
    return ModelJudge(ChatServer(model, url, concurrency), judge_prompt(prompt), folder)


JUDGES = {"rubric": rubric_judge, "openai": served_judge}


def choose_judge(kind: str, **asked) -> Judge:
    """The judge of a run's parameters, which asks nothing yet; DermError for what cannot work.

    asked: as of served_judge, which the rubric has no use for.
    """
    if kind not in JUDGES:
        raise DermError(f"judge is {kind!r}; allowed: {', '.join(JUDGES)}")
    return JUDGES[kind](**asked)


def judge_all(answers: pd.DataFrame, folders: dict[str, Path], chosen: Judge) -> pd.DataFrame:
    """The final answers with the chosen judge's `score`.

    A model's stands beside the rubric's (`rubric`, `rubric_why`), and it judges the test answers of
    the earlier stages too ({stage: its folder}), so that all tables have one judge.
    """
    if chosen.name == RubricJudge.name:
        return answers
    every = schema.latest([*schema.read_answers(folders).values(), answers])
    return chosen.judged(every.assign(rubric=every.score, rubric_why=every.why))


def parse_rate(judged: pd.DataFrame) -> float:
    """Share of answers whose verdict could be read, 0 to 1; nan without answers."""
    return float(judged.score.notna().mean())
