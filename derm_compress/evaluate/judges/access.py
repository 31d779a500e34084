"""Where a judge's server is and which key goes there (no torch, no network).

The key comes from the environment alone, DERM_COMPRESS_JUDGE_KEY before OPENAI_API_KEY, and goes
nowhere but into the requests' header: not over plain http to another machine, not after a redirect,
not into a file, a line or an error.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from urllib.parse import urlsplit

from derm_compress.errors import DermError

KEYS = ("DERM_COMPRESS_JUDGE_KEY", "OPENAI_API_KEY")  # where a server's key is looked for
ALLOWED = "allowed: http(s)://host[:port]/path, mostly ending in /v1"


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
