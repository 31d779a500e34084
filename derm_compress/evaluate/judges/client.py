"""Questions to a judge's server, through the openai client. Imported only where it is asked.

The client library tries again after a fault and waits as the server asks; what is ours guards the
key, bounds what a server may send, and leaves out what it does not take.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx2  # what the client library speaks through
import openai

from derm_compress.errors import DermError
from derm_compress.evaluate.judges.prompts import JudgePrompt
from derm_compress.evaluate.judges.replies import Reply, content_text, storable
from derm_compress.evaluate.judges.server import KEYS, ChatServer, here, key_for, unsent
from derm_compress.progress import say

SIZE = 2**20  # bytes of a response that are read
KEPT = 2000  # characters of a faulty response that are kept
HEADERS = {"host", "accept", "connection", "content-type", "content-length"}  # beside the key
HEADERS |= {"x-stainless-raw-response"}  # which the client looks for in what it has sent
REFUSALS = {
    openai.AuthenticationError: "wrong or missing key",
    openai.PermissionDeniedError: "no access",
    openai.NotFoundError: "no such address or model",
}
CALLED = {"response_format": r"response.?format|json.?schema|structured.?output"}  # else by name
DENIED = re.compile(  # what servers say of a field that they do not take
    r"\b(?:unsupported|unknown|unrecogni[sz]ed|unexpected|invalid|unavailable|deprecated)\b"
    r"|(?:\bnot|n't|\bno longer)\s+(?:\w+\s+)?(?:support|allow|permit|accept|recogni[sz]|valid)",
    re.IGNORECASE,
)
BESIDE = 60  # characters between a field's name and such a word, at most
_REFUSING = threading.Lock()


class Bounded(httpx2.SyncByteStream):
    """The bytes of a response, at most SIZE of them, first to last within `seconds`."""

    def __init__(self, stream, seconds: float):
        self.stream, self.end = stream, time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.stream:
            size += len(part)
            if size > SIZE:
                raise httpx2.ReadError(f"the response is longer than {SIZE} bytes")
            if time.monotonic() > self.end:
                raise httpx2.ReadTimeout("the response took too long")
            yield part

    def close(self) -> None:
        self.stream.close()


def replies(
    server: ChatServer,
    todo: dict[str, list],
    prompt: JudgePrompt,
    keep: Callable[[str, Reply], None],
) -> Iterator[tuple[str, Reply]]:
    """(key, Reply) of each {key: messages} as it comes, an error where no try brought one.

    keep(key, reply) is called, by one thread at a time, with each that arrives: also with those
    that are under way when nobody asks for more. Raises DermError where the server refuses the key
    or the model.
    """
    secret, keeping = key_for(server.url), threading.Lock()

    def answered(key: str) -> Reply:
        reply = storable_reply(ask(api, server, todo[key], prompt), secret)
        with keeping:
            keep(key, reply)
        return reply

    with connect(server, secret) as api, ThreadPoolExecutor(server.concurrency) as pool:
        asked = {pool.submit(answered, key): key for key in todo}
        try:
            for future in as_completed(asked):
                yield asked[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def connect(server: ChatServer, secret: str) -> openai.OpenAI:
    """The client of a server: nothing is sent yet."""

    def sending(request):
        """Whatever else the environment has for OpenAI stays here."""
        for name in set(request.headers) - HEADERS:
            del request.headers[name]
        request.headers["Accept-Encoding"] = "identity"
        if secret:
            request.headers["Authorization"] = f"Bearer {secret}"

    def receiving(response):
        if "content-encoding" in response.headers:
            raise httpx2.DecodingError("a compressed response, which was not asked for")
        response.stream = Bounded(response.stream, server.timeout)

    speaking = openai.DefaultHttpxClient(
        follow_redirects=False,
        trust_env=not here(server.url),  # no proxy between here and here
        event_hooks={"request": [sending], "response": [receiving]},
    )
    return openai.OpenAI(
        api_key=secret or "none",
        base_url=server.url,
        timeout=server.timeout,
        max_retries=server.retries,
        http_client=speaking,
    )


def ask(api: openai.OpenAI, server: ChatServer, messages: list[dict], prompt: JudgePrompt) -> Reply:
    """The reply to one task; again without a field that the server refuses, for good.

    Raises DermError where it refuses the key or the model.
    """
    fields = server.fields(prompt)
    try:
        told = api.chat.completions.with_raw_response.create(
            model=server.model, messages=messages, **fields
        )
        return completion(told.content)._replace(without=unsent(fields))
    except tuple(REFUSALS) as error:
        raise DermError(
            f"judge at {server.url} answered {error.status_code} ({REFUSALS[type(error)]}): "
            f"check judge_url, judge_model and the key in {' or '.join(KEYS)}"
        ) from None
    except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        field = refused_field(error, fields)
        if field is None:
            return fault(error)
    except openai.APIStatusError as error:
        return fault(error)
    except openai.APIConnectionError as error:
        return Reply("", type(error).__name__)
    leave_out(field, server)
    return ask(api, server, messages, prompt)


def fault(error: openai.APIStatusError) -> Reply:
    return Reply(body_of(error), f"status {error.status_code}")


def body_of(error: openai.APIStatusError) -> str:
    return storable(error.response.content.decode("utf-8", "replace"))


def refused_field(error: openai.APIStatusError, fields: dict) -> str | None:
    """The field that a server refuses; None where that is not what it says.

    It is the error's `param` or, without one, the name that stands closest to a word of DENIED.
    """
    if isinstance(error.param, str) and error.param:
        return next((name for name in fields if places(name, error.param)), None)
    said = body_of(error)
    denials = [match.span() for match in DENIED.finditer(said)]
    apart = {}
    for name in fields:
        gaps = [gap(one, other) for one in places(name, said) for other in denials]
        apart[name] = min(gaps, default=BESIDE + 1)
    closest = min(apart, key=apart.get, default=None)
    return closest if closest and apart[closest] <= BESIDE else None


def places(name: str, text: str) -> list[tuple[int, int]]:
    """Where a text names a field."""
    called = re.compile(rf"\b(?:{CALLED.get(name, name)})\b", re.IGNORECASE)
    return [match.span() for match in called.finditer(text)]


def gap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(one[0] - other[1], other[0] - one[1], 0)


def leave_out(field: str, server: ChatServer) -> None:
    """Notes a field that the server refuses, and says so the first time."""
    with _REFUSING:
        if field in server.refused:
            return
        server.refused.add(field)
    instead = "max_completion_tokens goes in its place" if field == "max_tokens" else "left out"
    say(f"the judge at {server.url} refuses {field}: {instead} from now on")


def completion(body: bytes) -> Reply:
    """The reply in a response's body, or the body itself and an error."""
    text = storable(body.decode("utf-8", "replace"))
    try:
        told = json.loads(text)
        choice = told["choices"][0]
        said = storable(content_text(choice["message"].get("content")))
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return Reply(text, "a response that is no chat completion")
    served, finish = (str(part or "") for part in (told.get("model"), choice.get("finish_reason")))
    return Reply(said, served=storable(served)[:200], finish=storable(finish)[:40])


def storable_reply(reply: Reply, secret: str) -> Reply:
    """A reply as it may be kept: without the key, should it have come back, and cut if faulty."""
    if secret:
        reply = Reply(*(part.replace(secret, "[key]") for part in reply))
    return reply._replace(text=reply.text[:KEPT]) if reply.error else reply
