"""One request to one server: a complete answer within its size limit, or an error that names the cause.

ServerUnavailable   no answer, not now, or cut off       the same request may succeed later, or elsewhere
ServerGarbled       an answer that cannot be right       likewise, but only a few times
ServerRefused       the server refuses the request       a repeat would not help
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from tropd.config.models import ServerConfig, base_url
from tropd.errors import ServerGarbled, ServerRefused, ServerUnavailable, require
from tropd.servers.settings import api_key, is_loopback

_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_SMALL = 2**20
_EXCERPT = 300


class Client:
    """Sends requests to one address.  Safe to use from several threads."""

    def __init__(self, url: str, settings: ServerConfig) -> None:
        require("httpx", "server", "a server")
        import httpx

        self.url, self.settings = base_url(url), settings
        self._key = api_key(settings)
        headers = {"Accept-Encoding": "identity", "User-Agent": "tropd"}  # compressed bombs have no size to check
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(settings.answer_seconds, connect=settings.connect_seconds),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.max_requests),
            follow_redirects=False,  # the key is for this server alone
            trust_env=not is_loopback(self.url),
            verify=_certificates(),
        )

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, limit_bytes: int = _SMALL, request_id: str = ""
    ) -> bytes:
        """POST with a body, else GET: the bytes of a 200."""
        import httpx

        headers = {"X-Request-Id": request_id} if request_id else {}
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        give_up = time.monotonic() + self.settings.answer_seconds
        try:
            method = "GET" if content is None else "POST"
            with self._http.stream(method, path, content=content, headers=headers) as response:
                if response.status_code != 200:
                    self._refuse(path, response)
                answer = bytearray()
                for chunk in response.iter_bytes():
                    answer += chunk
                    if len(answer) > limit_bytes:
                        raise ServerGarbled(f"{self.url}{path} answered with more than {limit_bytes} bytes.")
                    if time.monotonic() > give_up:
                        raise ServerUnavailable(
                            f"{self.url}{path} took more than {self.settings.answer_seconds:g} seconds to answer."
                        )
                return bytes(answer)
        except (httpx.TransportError, httpx.StreamError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ServerUnavailable(f"{self.url} does not answer ({type(error).__name__}: {reason}).") from error

    def close(self) -> None:
        self._http.close()

    def _refuse(self, path: str, response: Any) -> None:
        status = response.status_code
        said = self._excerpt(response)
        if status in _AGAIN:
            raise ServerUnavailable(
                f"{self.url}{path} answered {status}{said}.", seconds=_seconds(response.headers.get("Retry-After"))
            )
        if status in (401, 403):
            variable = self.settings.api_key_env
            cure = f"Check the key in {variable}." if variable else "Name the variable with its key in api_key_env."
            raise ServerRefused(f"{self.url} does not let us in ({status}{said}). {cure}", status=status)
        raise ServerRefused(f"{self.url}{path} answered {status}{said}.", status=status)

    def _excerpt(self, response: Any) -> str:
        """The text of an error: short, printable, and without the key if the server quotes it."""
        raw = bytearray()
        for chunk in response.iter_bytes():
            raw += chunk
            if len(raw) > _SMALL:
                break
        text = bytes(raw[:_SMALL]).decode(errors="replace")
        try:
            found = json.loads(text)
            inner = found.get("error", found) if isinstance(found, dict) else text
            text = str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner)
        except (ValueError, RecursionError):
            pass
        if self._key:
            text = text.replace(self._key, "(key)")
        text = "".join(c if c.isprintable() else " " for c in text).strip()[:_EXCERPT].rstrip(". ")
        return f": {text}" if text else ""


@cache
def _certificates() -> ssl.SSLContext:
    """The trusted certificates: read once, because reading takes longer than most requests."""
    import httpx

    return httpx.create_ssl_context()


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; a date is ignored."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return min(seconds, 300.0) if seconds >= 0 else None
