"""How a run reaches its servers, and what is refused about that before anything is sent."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from tropd.errors import ConfigError
from tropd.ranges import Count, Positive, Ranged, Seconds
from tropd.reading import shortened

NATS = {"float32": 0.002}
NATS_OF_HALF_PRECISION = 0.1
"""By how many nats per token a server may differ from itself, or from a forward pass of the same weights."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig(Ranged):
    """How servers are spoken to."""

    section = "server"

    kind: Literal["vllm", "sglang", "openai"] = "vllm"
    """Whose API it is.  "openai" is any compatible server: it can write texts, but it cannot score token ids."""
    model: str | None = None
    """The name it is served under; by default the only one that the server lists."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key.  The key itself is never written anywhere."""
    text: Literal["tokens", "chat"] = "tokens"
    """How texts are asked for: token ids in and out, or messages, whose answer is tokenised again."""
    deadline_seconds: Seconds = 600.0
    """A request that keeps failing is tried again for so long; then the run stops. In (0, 1000000]."""
    answer_seconds: Seconds = 300.0
    """An answer that takes longer is given up, and the request is tried again. In (0, 1000000]."""
    connect_seconds: Seconds = 10.0
    """A server that does not take a connection in so long is asked again later. In (0, 1000000]."""
    max_tokens_in_flight: Count = 32768
    """Tokens that one server is asked about at the same time; fewer need less memory there. At least 1."""
    max_requests: Count = 32
    """Requests that one server is asked at the same time. At least 1."""
    canary_nats: Positive | None = None
    """By how many nats per token a teacher's server may differ from itself: in the known text that every scoring
    request brings along, in texts that it wrote, in shared beginnings.  By default 0.1, for half precision, and 0.002
    where teacher.dtype is float32. Above 0."""
    allow_plain_http: bool = False
    """Send the key over http:// to another machine, readable to whoever is in between."""

    def nats_for(self, dtype: str = "auto") -> float:
        """`canary_nats`, or what is usual of servers that compute in `dtype`."""
        usual = NATS.get(dtype, NATS_OF_HALF_PRECISION)
        return usual if self.canary_nats is None else self.canary_nats


def base_url(url: str) -> str:
    """The address without a trailing /v1; refused if it is no plain http(s) address."""
    try:
        parts = urlsplit(url)
        plain = parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # a bracket that is not closed, a port that is no number
        raise _no_address(url) from None
    if parts.username or parts.password or parts.query or parts.fragment:
        host = parts.hostname or "?"
        raise ConfigError(
            f"the address of server {host} holds a name, a password or a query, and addresses are recorded. Put the "
            "key into an environment variable and name that in api_key_env."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise _no_address(url)
    return url.rstrip("/").removesuffix("/v1")


def _no_address(url: str) -> ConfigError:
    return ConfigError(f"{shortened(url)!r} is no address of a server. Give one such as http://127.0.0.1:8000.")


def is_loopback(url: str) -> bool:
    """Whether the address is this machine, so that nothing leaves it."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def api_key(settings: ServerConfig) -> str | None:
    """The key from the environment; its value appears in no message."""
    name = settings.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(f"api_key_env names {name}, but this variable is not set. Export it, or leave it out.")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"the key in {name} holds characters that no HTTP header can carry. Export it again.")
    return key


def check_addresses(urls: Sequence[str], settings: ServerConfig) -> Iterator[str]:
    """Refuse what would give a key away; say what travels in the clear."""
    plain = [url for url in urls if urlsplit(url).scheme == "http" and not is_loopback(url)]
    if plain and settings.api_key_env and not settings.allow_plain_http:
        raise ConfigError(
            f"the key in {settings.api_key_env} would go over plain http to {', '.join(plain)}, where anybody in "
            "between can read it. Use https://, a tunnel to 127.0.0.1, or server.allow_plain_http = true."
        )
    if plain:
        yield (
            f"{', '.join(plain)}: plain http to another machine. Texts and log-probabilities travel unprotected, and "
            "whoever is in between can change them; use https:// or a tunnel outside a network of your own."
        )
