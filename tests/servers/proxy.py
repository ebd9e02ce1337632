"""A small HTTP proxy that spoils answers on the way: delays, cuts, truncates, corrupts and swaps them.

A fault is a function of (which POST this is, the request, the upstream's reply) that gives the reply to send.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx

from tests.servers.mini import QuietServer


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    keep: float = 1.0
    """The share of the body that is sent before the connection is closed."""


Fault = Callable[[int, bytes, Reply], Reply]


def untouched(number: int, request: bytes, reply: Reply) -> Reply:
    return reply


class Proxy:
    def __init__(self, upstream: str, fault: Fault = untouched) -> None:
        self.upstream, self.fault, self.posts = upstream, fault, 0
        self.lock = threading.Lock()
        self.client = httpx.Client(timeout=60, trust_env=False)
        self.http = QuietServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Proxy:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.client.close()

    def forward(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        kept = {name: headers[name] for name in ("X-Request-Id", "Authorization", "Content-Type") if name in headers}
        try:
            answer = self.client.request(method, self.upstream + path, content=body, headers=kept)
            reply = Reply(answer.status_code, answer.content)
        except httpx.HTTPError:
            reply = Reply(502, b"")
        if method != "POST":
            return reply
        with self.lock:
            self.posts += 1
            number = self.posts
        return self.fault(number, body, reply)


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(proxy.forward("GET", self.path, b"", dict(self.headers)))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._send(proxy.forward("POST", self.path, body, dict(self.headers)))

        def _send(self, reply: Reply) -> None:
            time.sleep(reply.delay)
            try:
                self.send_response(reply.status)
                self.send_header("Content-Length", str(len(reply.body)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body[: int(reply.keep * len(reply.body))])
            except (BrokenPipeError, ConnectionResetError):
                pass  # whoever asked has given up
            if reply.keep < 1.0:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def first(number_of_posts: int, fault: Fault) -> Fault:
    """The fault for the first POSTs alone."""
    return lambda number, request, reply: fault(number, request, reply) if number <= number_of_posts else reply


def delayed(seconds: float) -> Fault:
    return lambda number, request, reply: replace(reply, delay=seconds)


def cut(number: int, request: bytes, reply: Reply) -> Reply:
    """The connection ends in the middle of the body."""
    return replace(reply, keep=0.5)


def truncated(number: int, request: bytes, reply: Reply) -> Reply:
    """A whole answer, as HTTP sees it, of half the body."""
    return replace(reply, body=reply.body[: len(reply.body) // 2])


def corrupt(number: int, request: bytes, reply: Reply) -> Reply:
    """Every 1000th byte is another one."""
    body = bytearray(reply.body)
    for place in range(500, len(body), 1000):
        body[place] ^= 0x55
    return replace(reply, body=bytes(body))


def status(code: int, **headers: str) -> Fault:
    return lambda number, request, reply: Reply(code, b'{"error": {"message": "not now"}}', headers)


def garbage(number: int, request: bytes, reply: Reply) -> Reply:
    return replace(reply, body=b"<html>Bad gateway</html>")


def huge(number: int, request: bytes, reply: Reply) -> Reply:
    return replace(reply, body=b"[" + b"0," * 8_000_000 + b"0]")


class Swapped:
    """Gives every answer to whoever asked next; the first one waits for nobody and gets its own with a changed id."""

    def __init__(self) -> None:
        self.before: bytes | None = None

    def __call__(self, number: int, request: bytes, reply: Reply) -> Reply:
        given, self.before = self.before or reply.body, reply.body
        return replace(reply, body=given)
