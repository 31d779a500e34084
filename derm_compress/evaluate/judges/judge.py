"""One interface for judges: the rubric, or a model behind a server. No torch.

Every judge has a `name` and `judged(answers)`, which adds schema.SCORE and, of a model,
schema.REPLY. What a model judged is kept by content, for all runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from derm_compress.errors import DermError
from derm_compress.evaluate import schema
from derm_compress.evaluate.judges.prompts import JudgePrompt, judge_prompt
from derm_compress.evaluate.judges.replies import Reply, Verdict, quoted
from derm_compress.evaluate.judges.rubric import score_by_rubric
from derm_compress.evaluate.judges.server import ChatServer
from derm_compress.files import Journal, digest, hold, public, release
from derm_compress.progress import say, track

PATIENCE = 5  # replies in a row without a score: then something is wrong, and the run says so
UNREAD = " unread"  # behind a key: a reply that gave no score, kept apart from any that does
_WRITING = threading.Lock()


class Task(NamedTuple):
    """What is asked about one answer."""

    answer: str
    messages: list[dict[str, str]]


def scored(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.score is not None


class RubricJudge:
    name = "rubric"

    def judged(self, answers: pd.DataFrame) -> pd.DataFrame:
        return score_by_rubric(answers)


class ModelJudge:
    """A judging model with its prompt; replies are kept in `folder`, readable ones for good.

    server: as server.ChatServer. The key of a reply is the model's identity, the messages (prompt,
    question, reference, answer) and the frame's column `round`, if it has one. What had no reply,
    or none that could be read, a later run asks again.
    """

    def __init__(self, server, prompt: JudgePrompt, folder: Path | None = None):
        self.server, self.prompt, self.folder = server, prompt, folder
        self.name = f"{public(server.model)} ({prompt.name})"

    def judged(self, answers: pd.DataFrame) -> pd.DataFrame:
        """The answers with verdicts beside them; DermError where the model cannot be asked."""
        who = self.server.identity()
        tasks, keys = {}, []
        for row in answers.itertuples():
            task = Task(row.answer, self.prompt.messages(row.prompt, row.reference, row.answer))
            keys.append(digest([who, task.messages, getattr(row, "round", 0)]))
            tasks[keys[-1]] = task
        with self._journal(digest(who)[:8]) as journal:
            known = self._verdicts(tasks, journal)
        verdicts = [known[key] for key in keys]
        told = pd.DataFrame(verdicts, columns=Verdict._fields, index=answers.index)
        columns = schema.SCORE | schema.REPLY
        told = told.assign(judge=self.name)
        return answers.assign(**told[list(columns)].astype(columns))

    def _verdicts(self, tasks: dict[str, Task], journal: Journal) -> dict[str, Verdict]:
        """{key: verdict} of every task; DermError after PATIENCE in a row without a score.

        A reply that could not be read before says little where others of this judge can be.
        """
        known = {key: self._kept(key, task, journal) for key, task in tasks.items()}
        todo = {key: tasks[key].messages for key, told in known.items() if not scored(told)}
        if not todo:
            return known
        from derm_compress.evaluate.judges.client import replies

        again = {key for key in todo if known[key]}
        if again:
            say(f"{self.name}: {len(again)} replies that could not be read are asked for again")
        works, row = len(todo) < len(tasks), 0

        def keep(key: str, reply: Reply) -> None:
            known[key] = self.prompt.read(reply, tasks[key].answer)
            if not reply.error:
                journal.add(key if scored(known[key]) else key + UNREAD, list(reply))

        with contextlib.closing(replies(self.server, todo, self.prompt, keep)) as asking:
            for key, reply in track(asking, f"judged by {self.name}", total=len(todo)):
                if scored(known[key]):
                    works, row = True, 0
                elif reply.error or key not in again or not works:
                    row += 1
                if row == PATIENCE:
                    raise DermError(self._unreadable(known[key]))
        return known

    def _kept(self, key: str, task: Task, journal: Journal) -> Verdict | None:
        """What a journal has on a task: a reply with a score if there is one, or any."""
        rows = [journal.done[name] for name in (key, key + UNREAD) if name in journal.done]
        found = [self.prompt.read(reply, task.answer) for reply in map(Reply.kept, rows) if reply]
        return next(filter(scored, found), found[-1] if found else None)

    def _unreadable(self, last: Verdict) -> str:
        return (
            f"judge {self.name} at {self.server.url}: {PATIENCE} replies in a row give no score "
            f"({last.error}), the last is {quoted(last.reply)}; "
            "what was judged is kept: see to the server and run again"
        )

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


def choose_judge(
    kind: str,
    *,
    model: str = "",
    url: str = "",
    prompt: str = "paper",
    concurrency: int = 4,
    max_tokens: int = 400,
    folder: Path | None = None,
) -> Judge:
    """The judge of a run's parameters, which asks nothing yet; DermError for what cannot work.

    folder: where a model's replies are kept; the rubric has a use for its kind alone.
    """
    if kind == "rubric":
        return RubricJudge()
    if kind != "openai":
        raise DermError(f"judge is {kind!r}; allowed: rubric, openai")
    if not model.strip():
        raise DermError("judge: openai needs judge_model, the name that the server knows it by")
    if not importlib.util.find_spec("openai"):
        raise DermError("judge: openai needs its client: pip install openai==3.57.0")
    server = ChatServer(model, url, concurrency, max_tokens)
    return ModelJudge(server, judge_prompt(prompt), folder)


def judge_all(answers: pd.DataFrame, folders: dict[str, Path], chosen: Judge) -> pd.DataFrame:
    """The final answers with the chosen judge's `score`.

    A model's stands beside the rubric's (`rubric`, `rubric_why`), and it judges the test answers of
    the earlier stages too ({stage: its folder}), so that all tables have one judge.
    """
    if chosen.name == RubricJudge.name:
        return answers
    every = schema.latest([*schema.read_answers(folders).values(), answers])
    return chosen.judged(every.assign(rubric=every.score, rubric_why=every.why))


def unread(judged: pd.DataFrame) -> int:
    """How many answers a model was asked to judge and gave no score; the rubric leaves none."""
    return int(judged.error.fillna("").ne("").sum()) if "error" in judged else 0


def parse_rate(judged: pd.DataFrame) -> float:
    """Share of answers whose verdict could be read, 0 to 1; nan without answers."""
    return float(judged.score.notna().mean())
