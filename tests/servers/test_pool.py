"""A pool spreads its load, outlives what fails for a while, and says what fails for good."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.servers.mini import MiniServer
from tests.servers.proxy import Fault, Proxy, Reply, cut, delayed, first, garbage, huge, status, truncated
from tropd.config.models import ServerConfig, base_url
from tropd.errors import ConfigError, ServerGarbled, ServerRefused, ServerUnavailable
from tropd.servers.client import Client
from tropd.servers.pool import Job, Pool
from tropd.servers.settings import api_key, check_addresses
from tropd.servers.vllm import Vllm

QUICK = ServerConfig(deadline_seconds=0.6, answer_seconds=1.0, connect_seconds=0.5)
CANARY = [72, 101, 108, 108, 111]


def jobs(number: int, top_k: int = 2) -> list[Job[list[float]]]:
    return [job([1 + n, 2, 3, 4 + n], top_k) for n in range(number)]


def job(ids: list[int], top_k: int = 2) -> Job[list[float]]:
    both = Vllm().score_job(f"text {ids[0]}", "tiny", [CANARY, ids], [1, 1], top_k)
    return both.then(lambda scored: scored[1].logprobs)


def test_load_goes_to_the_least_busy_server_and_results_keep_their_order(folder: Path) -> None:
    with MiniServer(folder) as a, MiniServer(folder) as b:
        alone = [Pool([a.url], QUICK).run([one])[0] for one in jobs(8)]
        pool = Pool([a.url, b.url], ServerConfig(max_requests=2))
        assert pool.run(jobs(8)) == alone
        assert min(pool.tally.by_server.values()) >= 2 and pool.tally.answers == 8
        pool.close()


def test_tokens_in_flight_are_bounded(folder: Path) -> None:
    inside, most, lock = 0, 0, threading.Lock()
    with MiniServer(folder) as server:
        answer = server.answer

        def watched(path: str, body: dict | None, request_id: str) -> object:
            nonlocal inside, most
            with lock:
                inside, most = inside + 1, max(most, inside + 1)
            try:
                threading.Event().wait(0.01)
                return answer(path, body, request_id)
            finally:
                with lock:
                    inside -= 1

        server.answer = watched  # type: ignore[method-assign]
        Pool([server.url], ServerConfig(max_tokens_in_flight=22)).run(jobs(6))  # each weighs 11
        assert most == 2
        Pool([server.url], ServerConfig(max_tokens_in_flight=3)).run(jobs(2))  # alone, one always fits


FAULTS = {
    "cut": cut,
    "truncated": truncated,
    "garbage": garbage,
    "huge": huge,
    "503": status(503),
    "429": status(429, **{"Retry-After": "0"}),
    "slow": delayed(1.2),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_fails_once_is_asked_again_and_the_rest_is_not(folder: Path, fault: Fault) -> None:
    with MiniServer(folder) as server, Proxy(server.url) as proxy:
        expected = Pool([server.url], QUICK).run(jobs(3))
        proxy.fault = first(1, fault)
        settings = ServerConfig(answer_seconds=1.0, max_requests=1)
        assert Pool([proxy.url], settings).run(jobs(3)) == expected
        assert proxy.posts == 4


def test_a_dead_server_is_left_out_and_comes_back(folder: Path) -> None:
    down = [True]

    def perhaps(number: int, request: bytes, reply: Reply) -> Reply:
        return Reply(503, b"") if down[0] else reply

    with MiniServer(folder) as server, Proxy(server.url, perhaps) as proxy:
        pool = Pool([proxy.url, server.url], ServerConfig(max_requests=1))
        pool.run(jobs(4))
        assert pool.tally.by_server == {proxy.url: 0, server.url: 4}
        down[0] = False
        for _ in range(40):  # its rest is over within these
            pool.run(jobs(2))
            if pool.tally.by_server[proxy.url]:
                break
            threading.Event().wait(0.05)
        assert pool.tally.by_server[proxy.url] > 0


def test_a_server_that_stays_away_ends_the_run_after_the_deadline(folder: Path) -> None:
    with MiniServer(folder) as server:
        gone = server.url
    with pytest.raises(ServerUnavailable, match=r"text 1: asked for 0.6 seconds .*does not answer.*Start the server"):
        Pool([gone], QUICK).run(jobs(1))


def test_answers_that_stay_wrong_are_given_up(folder: Path) -> None:
    with MiniServer(folder) as server, Proxy(server.url, garbage) as proxy:
        with pytest.raises(ServerGarbled, match="text 1: 3 answers could not be used"):
            Pool([proxy.url], QUICK).run(jobs(1))
        assert proxy.posts == 3


def test_a_no_is_final_and_says_why(folder: Path) -> None:
    with MiniServer(folder, max_logprobs=4) as server, Proxy(server.url) as proxy:
        with pytest.raises(ServerRefused, match=r"answered 400: Requested prompt logprobs of 5.*max allowed: 4"):
            Pool([proxy.url], QUICK).run(jobs(1, top_k=5))
        assert proxy.posts == 1


def test_a_redirect_is_not_followed(folder: Path) -> None:
    away = status(307, Location="http://127.0.0.1:9/")
    with (
        MiniServer(folder) as server,
        Proxy(server.url, away) as proxy,
        pytest.raises(ServerRefused, match="answered 307"),
    ):
        Pool([proxy.url], QUICK).run(jobs(1))


def test_the_key_comes_from_the_environment_and_is_in_no_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "s3cret-value")
    settings = ServerConfig(api_key_env="TEACHER_KEY")
    with MiniServer(folder, key="s3cret-value") as server:
        listed = json.loads(Client(server.url, settings).ask("/v1/models"))
        assert listed["data"][0]["id"] == "tiny"
        server.key = "another"
        with pytest.raises(ServerRefused, match="Check the key in TEACHER_KEY") as refused:
            Client(server.url, settings).ask("/v1/models")
        assert "wrong key Bearer (key)" in str(refused.value) and "s3cret" not in str(refused.value)
        assert "s3cret" not in repr(settings) + repr(Client(server.url, settings))
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match="TEACHER_KEY, but this variable is not set"):
        api_key(settings)


def test_addresses_that_give_something_away_are_refused() -> None:
    assert base_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000"
    for bad in ("http://me:secret@host/", "https://host/?key=secret"):
        with pytest.raises(ConfigError, match="addresses are recorded") as refused:
            base_url(bad)
        assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="no address"):
        base_url("127.0.0.1:8000")
    keyed = ServerConfig(api_key_env="KEY")
    with pytest.raises(ConfigError, match="plain http to http://host:1"):
        list(check_addresses(["http://host:1", "http://[::1]:2"], keyed))
    assert list(check_addresses(["http://localhost:1", "https://host"], keyed)) == []
    assert "plain http to another machine" in next(iter(check_addresses(["http://10.0.0.1:1"], ServerConfig())))


def test_a_small_server_that_is_broken_says_so_at_once_and_is_not_asked_until_the_deadline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TypeError("forward() got an unexpected keyword argument")

    monkeypatch.setattr(MiniServer, "logprobs", broken)
    with MiniServer(folder) as server, pytest.raises(ServerRefused, match="small server fails: TypeError: forward"):
        Pool([server.url], ServerConfig()).run(jobs(1))
    assert len(server.requests) == 1
