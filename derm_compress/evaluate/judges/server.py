"""A model behind an OpenAI-compatible server: vLLM, `transformers serve`, a hosted one. No torch.

The key comes from the environment alone, DERM_COMPRESS_JUDGE_KEY before OPENAI_API_KEY, and goes
nowhere but into the requests' header: not over plain http to another machine, not after a redirect,
not into a file, a line or an error. Nothing here asks anything: client.py does.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from derm_compress.errors import DermError
from derm_compress.evaluate.judges.prompts import JudgePrompt

KEYS = ("DERM_COMPRESS_JUDGE_KEY", "OPENAI_API_KEY")  # where a server's key is looked for
ALLOWED = "allowed: http(s)://host[:port]/path, mostly ending in /v1"
KEYED = {"temperature": 0, "max_tokens": 400}  # of every reply kept; a whole one has no other limit
SHAPING = ("temperature", "seed", "response_format")  # fields by which a whole reply may differ


def address(url: str) -> None:
    """DermError for a judge_url that is no http address, or holds more: it is shown, no key is."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a half IPv6 address, a port that is no number
        raise DermError(f"judge_url is no address; {ALLOWED}") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise DermError(
            "judge_url holds more than an address: no user, key or query there; "
            f"a key goes into {KEYS[0]}"
        )
    if not whole or not (url.isascii() and url.isprintable()):
        raise DermError(f"judge_url is {url!r}; {ALLOWED}")


def key_for(url: str) -> str:
    """The key for this address out of the environment, or ""; DermError where it must not go."""
    keys = {name: os.environ.get(name, "").strip() for name in KEYS}
    name = next((name for name, key in keys.items() if key), None)
    if not name:
        return ""
    if not all("!" <= char <= "~" for char in keys[name]):
        raise DermError(f"{name} holds characters that no key has; set it again")
    if urlsplit(url).scheme == "http" and not here(url):
        raise DermError(
            f"{name} would go over plain http to another machine: "
            "use https, or unset it for this server"
        )
    return keys[name]


def here(url: str) -> bool:
    """Whether the address is this machine's own."""
    host = urlsplit(url).hostname
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@dataclass(frozen=True)
class ChatServer:
    """A model by its server's base URL (ending in /v1, mostly) and its name there.

    timeout: seconds for one try; refused: fields of a request that the server does not take, as
    they are found. DermError for an address or a key that cannot be used.
    """

    model: str
    url: str
    concurrency: int = 4
    max_tokens: int = KEYED["max_tokens"]
    timeout: float = 120.0
    retries: int = 4
    seed: int = 0
    refused: set[str] = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self):
        address(self.url)
        key_for(self.url)

    def identity(self) -> dict:
        """What a reply is kept by beside its messages; neither address nor limits are part of it.

        Replies of every version are found by it. What was refused and so left out when one was
        made stands in the reply itself.
        """
        return {"kind": "openai", "model": self.model, "seed": self.seed} | KEYED

    def fields(self, prompt: JudgePrompt) -> dict:
        """The fields of a request that a server may refuse, but for those that it has refused."""
        verdict = {"name": "verdict", "strict": True, "schema": prompt.schema()}
        limit = "max_completion_tokens" if "max_tokens" in self.refused else "max_tokens"
        told = {
            "temperature": 0,
            "seed": self.seed,
            "response_format": {"type": "json_schema", "json_schema": verdict},
            limit: self.max_tokens,
        }
        return {name: value for name, value in told.items() if name not in self.refused}


def unsent(fields: dict) -> str:
    """Those of SHAPING that a request goes without, as a reply to it keeps them."""
    return " ".join(name for name in SHAPING if name not in fields)
