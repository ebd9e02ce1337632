"""Several servers of the same model: requests go to the least busy one; a dead one is left out and tried again.

    job --> lease a server --> ask --> read (validate) --> value
               ^                 |        |
               |     ServerUnavailable   ServerGarbled: again, up to GARBLED times
               +--- back off ----+

A server that fails rests 0.25, 0.5, 1, ... up to 30 seconds (or as long as it says) and is then tried with a single
request.  Answers are kept: only failed requests are repeated.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast

from tropd.config.models import ServerConfig
from tropd.errors import ServerError, ServerGarbled, ServerRefused, ServerUnavailable
from tropd.servers.client import Client

T = TypeVar("T")
U = TypeVar("U")
log = logging.getLogger("tropd.servers")
GARBLED = 3
"""Unusable answers to one request before it fails for good."""
_FIRST_REST, _LONGEST_REST = 0.25, 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Generic[T]):
    """One request, and the function that reads its answer."""

    name: str
    path: str
    read: Callable[[bytes, str], T]
    """(answer, request id) -> value; raises ServerGarbled if it cannot be right."""
    body: Mapping[str, Any] | None = None
    """Without one it is a GET."""
    named: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None
    """The body with the request's id in it, for servers that do not read headers."""
    num_tokens: int = 1
    """Its load: tokens to read and tokens that may be written."""
    limit_bytes: int = 2**20
    otherwise: Callable[[ServerError], T | None] | None = None
    """Its value where it failed for good while others may not: refused, or never usable.  None: the failure stands."""

    def then(self, change: Callable[[T], U]) -> Job[U]:
        """The same request, with its value passed through `change`; a ServerGarbled of `change` repeats the request."""
        read = self.read
        return replace(cast("Job[Any]", self), read=lambda answer, request_id: change(read(answer, request_id)))


@dataclass(eq=False, slots=True)
class _Server:
    client: Client
    tokens: int = 0
    requests: int = 0
    failures: int = 0
    """Consecutive failures."""
    garbled: int = 0
    """Consecutive unusable answers."""
    rests_until: float = 0.0
    why: str = ""


@dataclass
class Tally:
    """Counts of what has happened so far."""

    answers: int = 0
    tokens: int = 0
    failures: int = 0
    garbled: int = 0
    by_server: dict[str, int] = field(default_factory=dict)


class Pool:
    """Carries out jobs on several servers.  Safe to use from several threads."""

    def __init__(self, urls: Sequence[str], settings: ServerConfig) -> None:
        assert urls, "a pool has servers"
        self.settings = settings
        self.clients = [Client(url, settings) for url in urls]
        self.tally = Tally(by_server={client.url: 0 for client in self.clients})
        self.returned: set[str] = set()
        """Servers that answered again after a failure: they may have been restarted."""
        self._servers = [_Server(client) for client in self.clients]
        self._changed = threading.Condition()

    def run(self, jobs: Sequence[Job[T]]) -> list[T]:
        """The value of each job, in order; the first failure for good ends the others."""
        results: dict[int, T] = {}
        failures: list[BaseException] = []
        waiting = iter(enumerate(jobs))
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                with self._changed:
                    index, job = next(waiting, (-1, None))
                if job is None:
                    return
                try:
                    results[index] = self._value(job, stop)
                except BaseException as failure:  # handed to the caller below
                    failures.append(failure)
                    stop.set()
                    return

        most = len(self._servers) * self.settings.max_requests
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(len(jobs), most))]
        try:
            for thread in threads:
                thread.start()
            while not failures and (alive := [thread for thread in threads if thread.is_alive()]):
                alive[0].join(0.2)  # in slices, so that signals and failures of others are heard
        finally:
            stop.set()
            with self._changed:
                self._changed.notify_all()
        if failures:
            raise failures[0]
        return [results[index] for index in range(len(jobs))]

    def close(self) -> None:
        for client in self.clients:
            client.close()

    def _value(self, job: Job[T], stop: threading.Event) -> T:
        try:
            return self._carry_out(job, stop)
        except (ServerGarbled, ServerRefused) as failure:
            value = None if job.otherwise is None else job.otherwise(failure)
            if value is None:
                raise
            return value

    def _carry_out(self, job: Job[T], stop: threading.Event) -> T:
        until: float | None = None
        avoided: list[_Server] = []
        garbled = 0
        while True:
            server = self._lease(job, until, avoided, stop)
            request_id = f"tropd-{uuid.uuid4().hex[:20]}"
            failure: Exception | None = None
            try:
                body = job.body if job.named is None or job.body is None else job.named(job.body, request_id)
                answer = server.client.ask(job.path, body, limit_bytes=job.limit_bytes, request_id=request_id)
                return job.read(answer, request_id)
            except ServerUnavailable as error:
                failure = error
                until = until or time.monotonic() + self.settings.deadline_seconds
            except ServerGarbled as error:
                failure = error
                garbled += 1
                avoided.append(server)
                log.log(logging.WARNING if job.otherwise is None else logging.DEBUG, "%s: %s", job.name, error)
                if garbled >= GARBLED:
                    raise ServerGarbled(
                        f"{job.name}: {garbled} answers could not be used, the last from {server.client.url}: {error}"
                    ) from error
            finally:
                self._release(server, job, failure)

    def _lease(self, job: Job, until: float | None, avoided: list[_Server], stop: threading.Event) -> _Server:
        """The least busy server with room for the job; waits while there is none.  If others are up, a server
        does not get a request again that it garbled."""
        with self._changed:
            while True:
                if stop.is_set():
                    raise ServerUnavailable(f"{job.name}: given up, because another request failed.")
                now = time.monotonic()
                others = [server for server in self._servers if server not in avoided]
                asked = others if any(not server.failures for server in others) else self._servers
                free = [server for server in asked if self._has_room(server, job, now)]
                if free:
                    server = min(free, key=lambda s: (s.garbled, s.tokens, s.requests))
                    server.tokens += job.num_tokens
                    server.requests += 1
                    return server
                if all(server.failures for server in self._servers):
                    until = until or now + self.settings.deadline_seconds
                    if now >= until:
                        raise ServerUnavailable(self._given_up(job))
                elif until is not None and now >= until:
                    raise ServerUnavailable(self._given_up(job))
                self._changed.wait(self._patience(now, until))

    def _has_room(self, server: _Server, job: Job, now: float) -> bool:
        if server.failures:  # one request finds out whether it is back
            return server.requests == 0 and now >= server.rests_until
        if server.requests == 0:
            return True
        fits = server.tokens + job.num_tokens <= self.settings.max_tokens_in_flight
        return fits and server.requests < self.settings.max_requests

    def _patience(self, now: float, until: float | None) -> float:
        moments = [server.rests_until for server in self._servers if server.failures and server.rests_until > now]
        moments += [until] if until is not None else []
        return max(0.01, min([moment - now for moment in moments] + [5.0]))

    def _release(self, server: _Server, job: Job, failure: Exception | None) -> None:
        with self._changed:
            server.tokens -= job.num_tokens
            server.requests -= 1
            if isinstance(failure, ServerUnavailable):
                self._rest(server, failure)
            else:
                if server.failures:
                    log.warning("%s answers again.", server.client.url)
                    self.returned.add(server.client.url)
                server.failures, server.why = 0, ""
                server.garbled = 0 if failure is None else server.garbled + 1
                self.tally.garbled += failure is not None
            if failure is None:
                self.tally.answers += 1
                self.tally.tokens += job.num_tokens
                self.tally.by_server[server.client.url] += 1
            self._changed.notify_all()

    def _rest(self, server: _Server, failure: ServerUnavailable) -> None:
        self.tally.failures += 1
        now = time.monotonic()
        if server.failures and now < server.rests_until:
            return  # one outage, noticed by another of the requests that it cut off
        server.failures += 1
        server.why = str(failure)
        rest = min(_LONGEST_REST, _FIRST_REST * 2 ** (server.failures - 1)) * random.uniform(0.75, 1.25)
        server.rests_until = now + (rest if failure.seconds is None else failure.seconds)
        if server.failures == 1:
            left = sum(not other.failures for other in self._servers)
            log.warning("%s %d of %d servers are left; asking it again.", failure, left, len(self._servers))

    def _given_up(self, job: Job) -> str:
        said = " ".join(dict.fromkeys(server.why for server in self._servers if server.why))
        return (
            f"{job.name}: asked for {self.settings.deadline_seconds:g} seconds (server.deadline_seconds) without an "
            f"answer. {said} Start the server, or wait longer."
        )
