"""A model behind an OpenAI-compatible server: vLLM, `transformers serve`, a hosted one. No torch.

The client library tries again after a fault and waits as the server asks; what is ours guards the
key and bounds what a server may send. Imported only where such a judge is used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import httpx2  # what the client library speaks through
import openai

from derm_compress.errors import DermError
from derm_compress.evaluate.judges.access import KEYS, address, here, key_for
from derm_compress.evaluate.judges.prompts import JudgePrompt, Reply, storable

PATIENCE = 5  # answers in a row without a reply: then the server is down, and the run says so
SIZE = 2**20  # bytes of a response that are read
KEPT = 2000  # characters of a faulty response that are kept
HEADERS = {"host", "accept", "connection", "content-type", "content-length"}  # beside the key
HEADERS |= {"x-stainless-raw-response"}  # which the client looks for in what it has sent
REFUSALS = {
    openai.AuthenticationError: "wrong or missing key",
    openai.PermissionDeniedError: "no access",
    openai.NotFoundError: "no such address or model",
}


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


@dataclass(frozen=True)
class ChatServer:
    """A model by its server's base URL (ending in /v1, mostly) and its name there.

    timeout: seconds for one try.
    """

    model: str
    url: str
    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 4
    seed: int = 0

    def __post_init__(self):
        address(self.url)

    def identity(self) -> dict:
        """What a reply depends on beside its messages; the address is no part of it."""
        return {"kind": "openai", "model": self.model, "temperature": 0, "seed": self.seed}

    def replies(self, todo: dict[str, list], prompt: JudgePrompt) -> Iterator[tuple[str, Reply]]:
        """(key, Reply) of each {key: messages} as it comes, an error where no try brought one.

        Raises DermError where the server refuses the key or the model, or fails PATIENCE tasks in a
        row.
        """
        secret, lost = key_for(self.url), 0
        with self._client(secret) as client, ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._ask, client, todo[key], prompt): key for key in todo}
            try:
                for future in as_completed(asked):
                    reply = _kept(future.result(), secret)
                    lost = lost + 1 if reply.error else 0
                    if lost == PATIENCE:  # one bad task is a row without a score
                        raise DermError(self._down(reply))
                    yield asked[future], reply
            finally:
                pool.shutdown(cancel_futures=True)

    def _client(self, secret: str) -> openai.OpenAI:
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
            response.stream = Bounded(response.stream, self.timeout)

        speaking = openai.DefaultHttpxClient(
            follow_redirects=False,
            trust_env=not here(self.url),  # no proxy between here and here
            event_hooks={"request": [sending], "response": [receiving]},
        )
        return openai.OpenAI(
            api_key=secret or "none",
            base_url=self.url,
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=speaking,
        )

    def _ask(self, client: openai.OpenAI, messages: list[dict], prompt: JudgePrompt) -> Reply:
        verdict = {"name": "verdict", "strict": True, "schema": prompt.schema()}
        try:
            told = client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=messages,
                temperature=0,
                seed=self.seed,
                max_tokens=prompt.max_tokens,
                response_format={"type": "json_schema", "json_schema": verdict},
            )
            return _content(told.content)
        except tuple(REFUSALS) as error:
            raise DermError(
                f"judge at {self.url} answered {error.status_code} ({REFUSALS[type(error)]}): "
                f"check judge_url, judge_model and the key in {' or '.join(KEYS)}"
            ) from None
        except openai.APIStatusError as error:
            text = error.response.content.decode("utf-8", "replace")
            return Reply(text, f"status {error.status_code}")
        except openai.APIConnectionError as error:
            return Reply("", type(error).__name__)

    def _down(self, reply: Reply) -> str:
        last = f"{reply.error}; {reply.text[:200]!r}" if reply.text else reply.error
        return (
            f"judge at {self.url}: {PATIENCE} answers in a row failed ({last}); "
            "what was judged is kept: see to the server and run again"
        )


def _content(body: bytes) -> Reply:
    """The reply in a response's body, or the body itself and an error."""
    text = body.decode("utf-8", "replace")
    try:
        told = json.loads(text)
        content = told["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError):
        return Reply(text, "a response that is no chat completion")
    if not isinstance(content, str):
        return Reply(text, "a completion without text")
    return Reply(storable(content), served=storable(str(told.get("model", "")))[:200])


def _kept(reply: Reply, secret: str) -> Reply:
    """A reply as it may be kept: without the key, should it have come back, and cut if faulty."""
    if secret:
        reply = Reply(*(part.replace(secret, "[key]") for part in reply))
    return reply._replace(text=reply.text[:KEPT]) if reply.error else reply
