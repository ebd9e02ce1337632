"""Addresses and keys of a run's servers, checked before anything is sent."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from tropd.config.models import ServerConfig
from tropd.errors import ConfigError


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
    """Refuse addresses that would leak a key; notes on what travels unencrypted."""
    plain = [url for url in urls if urlsplit(url).scheme == "http" and not is_loopback(url)]
    if plain and settings.api_key_env and not settings.allow_plain_http:
        raise ConfigError(
            f"the key in {settings.api_key_env} would go over plain http to {', '.join(plain)}, where anybody in "
            "between can read it. Use https://, a tunnel to 127.0.0.1, or server.allow_plain_http = true."
        )
    if plain:
        yield (
            f"{', '.join(plain)}: plain http to another machine. Texts and log-probabilities travel unprotected, and "
            "anyone in between can change them. Use https:// or a tunnel outside your own network."
        )
