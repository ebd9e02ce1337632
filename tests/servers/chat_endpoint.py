"""A small chat endpoint that writes letters by the request's seed, and misbehaves where it is told to.

with ChatEndpoint() as endpoint:
    endpoint.url
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.servers.mini import QuietServer, Refusal, _handler

Answer = dict[str, Any]


def says(content: str | None, reason: str = "length") -> Answer:
    return {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": reason}]}


def letters(body: dict[str, Any]) -> str:
    """What it writes: the same for the same messages and seed."""
    draw = random.Random(f"{body['seed']} {body['messages'][-1]['content']}")
    return "".join(draw.choice("0123456789 ") for _ in range(body["max_tokens"] - 1)) + "7"


class ChatEndpoint:
    """Serves until the block ends.  `fault` may answer a request in its own way; None leaves it to the endpoint."""

    def __init__(self, fault: Callable[[int, dict[str, Any]], Answer | None] = lambda number, body: None) -> None:
        self.fault, self.key = fault, None
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.http = QuietServer(("127.0.0.1", 0), _handler(self))  # type: ignore[arg-type]
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> ChatEndpoint:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any] | None, request_id: str) -> Answer:
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "writer"}]}
        if path != "/v1/chat/completions" or body is None:
            raise Refusal(404, "Not Found")
        with self.lock:
            self.requests.append(body)
            number = len(self.requests)
        return self.fault(number, body) or says(letters(body))


def slow(seconds: float) -> Callable[[int, dict[str, Any]], None]:
    return lambda number, body: time.sleep(seconds)


def empty(number: int, body: dict[str, Any]) -> Answer:
    return says("", "stop")


def spaces(number: int, body: dict[str, Any]) -> Answer:
    return says(" \n ", "stop")


def silent(number: int, body: dict[str, Any]) -> Answer:
    return says(None, "stop")


def filtered(number: int, body: dict[str, Any]) -> Answer:
    return says("I", "content_filter")


def refusing(number: int, body: dict[str, Any]) -> Answer:
    raise Refusal(400, "this text breaks our rules")


def endless(number: int, body: dict[str, Any]) -> Answer:
    return says(letters(body) + "7" * 1000)
