"""The report of runs that go on, served on this machine alone.

    GET /TOKEN/                    the page
    GET /TOKEN/state.json?known=V  what changed since version V: 204 where nothing did
    GET /TOKEN/transcripts.json    the transcripts, asked for when their version changed

Nothing else is answered, and nothing is written.  The token is drawn when the server starts and printed with the
address: other users of the machine, who can reach each of its ports, cannot read the run.  A request whose Host is not
this server's is refused as well: a page of somebody else, opened in the same browser, cannot read a run by giving its
own name this address.  A request has SECONDS, and of more than CONNECTIONS at a time the oldest is dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tropd.errors import ConfigError
from tropd.report.history import History
from tropd.report.page import embed_json, policy, render, state_of
from tropd.report.transcripts import Shelf, collect

ADDRESS = "127.0.0.1"
CONNECTIONS, SECONDS = 32, 30.0


class Watched:
    """The runs, read again when the page asks and something is new."""

    def __init__(self, runs: Sequence[History], num_transcripts: int) -> None:
        self.runs, self.num_transcripts = list(runs), num_transcripts
        self._lock = Lock()
        self._shelf = Shelf()
        self._state: dict[str, Any] = {}
        self._fresh = False

    def state(self) -> dict[str, Any]:
        """Parts and data as the page takes them, with the versions of both the whole and the transcripts."""
        with self._lock:
            changed = [run.refresh() for run in self.runs]
            if any(changed) or not self._fresh:
                self._shelf = collect(self.runs, self.num_transcripts)
                state = state_of(self.runs, self._shelf)
                state["shelf"] = _version(
                    [(entry["run"], entry["step"], entry["id"]) for entry in self._shelf.transcripts]
                )
                state["version"] = _version(state)
                self._state, self._fresh = state, True
            return self._state

    def page(self) -> str:
        self.state()
        with self._lock:
            return render(self.runs, self._shelf, live=True)

    def transcripts(self) -> dict[str, Any]:
        self.state()
        with self._lock:
            return self._shelf.as_data()


def _version(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=8).hexdigest()


class Server(ThreadingHTTPServer):
    """Bound to loopback; port 0 takes any that is free."""

    daemon_threads = True

    def __init__(self, watched: Watched, port: int) -> None:
        self.watched = watched
        self.root = f"/{secrets.token_urlsafe(24)}"
        self._open: dict[socket.socket, float] = {}
        """Connections, oldest first, and until when each may take for its request."""
        self._lock = Lock()
        try:
            super().__init__((ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"port {port} was asked for on {ADDRESS}, and cannot be had: {error}. Leave --port out for a free one."
            ) from None
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}{self.root}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.allow_time(request)
        with self._lock:
            for connection in list(self._open)[:-CONNECTIONS]:
                self._drop(connection)
        super().process_request(request, client_address)

    def allow_time(self, request: socket.socket) -> None:
        with self._lock:
            self._open[request] = time.monotonic() + SECONDS

    def service_actions(self) -> None:
        with self._lock:
            for connection, until in list(self._open.items()):
                if time.monotonic() > until:
                    self._drop(connection)

    def _drop(self, request: socket.socket) -> None:
        """Its thread finds the connection ended, and ends."""
        del self._open[request]
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the browser has gone
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "tropd"
    sys_version = ""
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        self.server.allow_time(self.connection)
        super().handle_one_request()

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            return self._answer(403, "text/plain", "This server answers for 127.0.0.1 only.\n")
        root, path = self.server.root, urlsplit(self.path).path
        if not secrets.compare_digest(path[: len(root) + 1].encode(), f"{root}/".encode()):
            return self._answer(403, "text/plain", "Open the whole address that `tropd watch` printed.\n")
        path = path[len(root) :]
        watched = self.server.watched
        if path == "/":
            return self._answer(200, "text/html", watched.page())
        if path == "/state.json":
            state = watched.state()
            if parse_qs(urlsplit(self.path).query).get("known") == [state["version"]]:
                return self._answer(204, "application/json", "")
            return self._answer(200, "application/json", embed_json(state))
        if path == "/transcripts.json":
            return self._answer(200, "application/json", embed_json(watched.transcripts()))
        return self._answer(404, "text/plain", "There is nothing here. The report is at /\n")

    do_HEAD = do_GET

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        packed = len(body) > 2000 and "gzip" in self.headers.get("Accept-Encoding", "")
        if packed:
            body = gzip.compress(body, 1)
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Cache-Control": "no-store",
            "Content-Security-Policy": policy(live=True) + "; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            **({"Content-Encoding": "gzip"} if packed else {}),
            **({"Content-Length": str(len(body))} if status != 204 else {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A line for every poll would bury what a person wants to see."""
