"""A judge behind any OpenAI-compatible server: vLLM, a hosted service, `transformers serve` (no torch).

The key comes from the environment alone, DERM_COMPRESS_JUDGE_KEY before OPENAI_API_KEY, and goes nowhere but into the
request's header: not over plain http to another machine, not after a redirect, not into a file, a line or an error.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from derm_compress.errors import DermError
from derm_compress.evaluate.judge_forms import Form, Reply, storable

KEYS = (
    "DERM_COMPRESS_JUDGE_KEY",
    "OPENAI_API_KEY",
)  # where a server's key is looked for, and nowhere else
REFUSED = {401: "wrong or missing key", 403: "no access", 404: "no such address or model"}
AGAIN = {408, 409, 425, 429}  # with 5xx: may go well a moment later
PATIENCE = 5  # answers in a row that no try brought a reply for: then the server is down, and the run says so
LONGEST = 300.0  # seconds: no server is waited for longer, whatever it asks
SIZE = 2**20  # bytes of a response that are read
KEPT = 2000  # characters of a faulty response that are kept


def address(url: str) -> None:
    """DermError for a judge_url that is no http address or holds more than one: it is shown and stored, no key is."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a half IPv6 address, a port that is no number
        raise DermError(
            "judge_url is no address; allowed: http(s)://host[:port]/path, mostly ending in /v1"
        ) from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise DermError(
            f"judge_url holds more than an address: no user, key or query there; a key goes into {KEYS[0]}"
        )
    if not whole:
        raise DermError(
            f"judge_url is {url!r}; allowed: http(s)://host[:port]/path, mostly ending in /v1"
        )


@dataclass(frozen=True)
class OpenAI:
    """A model by its server's base URL (ending in /v1, mostly) and its name there.

    timeout: seconds for one try, first byte to last; pause: seconds before the second try, doubled for each after it.
    """

    model: str
    url: str
    concurrency: int = 4
    timeout: float = 120.0
    attempts: int = 5
    pause: float = 1.0
    seed: int = 0

    def __post_init__(self):
        address(self.url)
        try:
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise DermError(f"judge_url is no address: {error}") from error

    def identity(self) -> dict:
        """What a reply depends on beside its messages; the address is no part of it."""
        return {"kind": "openai", "model": self.model, "temperature": 0, "seed": self.seed}

    def replies(self, todo: dict[str, list], form: Form) -> Iterator[tuple[str, Reply]]:
        """(key, Reply) of every task as it comes; a task that no try brought a reply for has an error.

        Raises DermError where the server refuses the key or the model, or fails PATIENCE tasks in a row.
        """
        key, stop, lost = _key(self.url), threading.Event(), 0
        how = {
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": self.timeout,
        }
        how["trust_env"] = not _here(urlsplit(self.url).hostname)  # no proxy between here and here
        with httpx.Client(**how) as client, ThreadPoolExecutor(self.concurrency) as pool:
            asked = {
                pool.submit(self._ask, client, self._body(task, form), stop): k
                for k, task in todo.items()
            }
            try:
                for future in as_completed(asked):
                    reply = _without(future.result(), key)
                    lost = lost + 1 if reply.error else 0
                    if (
                        lost == PATIENCE
                    ):  # one bad task is a row without a score, five in a row are no judge
                        last = f"{reply.error}; {reply.text[:200]!r}" if reply.text else reply.error
                        advice = "what was judged is kept: see to the server and run again"
                        raise DermError(
                            f"judge at {self.url}: {lost} answers in a row failed ({last}); {advice}"
                        )
                    yield asked[future], reply
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _body(self, messages: list[dict], form: Form) -> dict:
        schema = {"name": "verdict", "strict": True, "schema": form.schema()}
        how = {"temperature": 0, "seed": self.seed, "max_tokens": form.max_tokens}
        return {
            "model": self.model,
            "messages": messages,
            **how,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }

    def _ask(self, client: httpx.Client, body: dict, stop: threading.Event) -> Reply:
        """Tries until there is a reply, at most `attempts` times; the error of the last try otherwise."""
        for attempt in range(self.attempts):
            reply, wait = self._try(client, body)
            if not reply.error or wait is None:
                return reply
            delay = max(wait, random.uniform(0.5, 1) * self.pause * 2**attempt)
            if attempt + 1 < self.attempts and (delay > LONGEST or stop.wait(delay)):
                return reply._replace(error=f"{reply.error}, to be asked again after {delay:.0f} s")
        return reply._replace(error=f"{reply.error} ({self.attempts} tries)")

    def _try(self, client: httpx.Client, body: dict) -> tuple[Reply, float | None]:
        """One request: (reply, seconds that the server wants to be left alone, None if another try is no use)."""
        try:
            status, headers, text = self._post(client, body)
        except httpx.RequestError as error:
            return Reply("", type(error).__name__), 0.0
        if status in REFUSED:
            raise DermError(
                f"judge at {self.url} answered {status} ({REFUSED[status]}): check judge_url, "
                f"judge_model and the key in {' or '.join(KEYS)}"
            )
        if status == 200:
            reply = _content(text)
            return reply, 0.0 if reply.error else None
        again = status in AGAIN or status >= 500
        return Reply(text[:KEPT], f"status {status}"), _retry_after(headers) if again else None

    def _post(self, client: httpx.Client, body: dict) -> tuple[int, httpx.Headers, str]:
        end, parts, size = time.monotonic() + self.timeout, [], 0
        key = client.headers.get("authorization", "").removeprefix("Bearer ")
        with client.stream(
            "POST", f"{self.url.rstrip('/')}/chat/completions", json=body
        ) as response:
            for part in response.iter_bytes():
                parts, size = [*parts, part], size + len(part)
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("the response took too long")
                if size > SIZE:
                    break
        text = b"".join(parts).decode(
            "utf-8", "replace"
        )  # whole: a key cut in two would not be found any more
        return response.status_code, response.headers, text.replace(key, "[key]") if key else text


def _content(text: str) -> Reply:
    """The reply in a response's body, or the body itself and an error."""
    try:
        told = json.loads(text)
        content = told["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError):
        return Reply(text[:KEPT], "a response that is no chat completion")
    if not isinstance(content, str):
        return Reply(text[:KEPT], "a completion without text")
    return Reply(storable(content), served=storable(str(told.get("model", "")))[:200])


def _retry_after(headers: httpx.Headers) -> float:
    """Seconds of a Retry-After header, given as a number or as a date; 0 without a readable one."""
    asked = headers.get("retry-after", "")
    with contextlib.suppress(ValueError, OverflowError):
        return max(0.0, float(asked))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    return 0.0


def _key(url: str) -> str:
    """The key for this address out of the environment, "" for none; DermError where it must not be sent."""
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    key = os.environ[name].strip() if name else ""
    if not all("!" <= char <= "~" for char in key):
        raise DermError(f"{name} holds characters that no key has; set it again")
    if key and urlsplit(url).scheme == "http" and not _here(urlsplit(url).hostname):
        raise DermError(
            f"{name} would go over plain http to another machine: use https, or unset it for this server"
        )
    return key


def _here(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _without(reply: Reply, key: str) -> Reply:
    """The reply with the key blotted out, should a server have sent it back."""
    return Reply(*(part.replace(key, "[key]") for part in reply)) if key else reply
