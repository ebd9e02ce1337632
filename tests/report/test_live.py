from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from tests.report.examples import step_record
from tests.report.folders import write_folder
from tropd.monitoring.records import RecordWriter
from tropd.report import live
from tropd.report.history import History
from tropd.report.live import ADDRESS, Server, Watched


@contextmanager
def watching(*folders: Path) -> Iterator[Server]:
    runs = [History(directory=folder, name=folder.name) for folder in folders]
    with Server(Watched(runs, 100), 0) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(ADDRESS, server.server_port, timeout=20)
    connection.request(method, path if path.startswith(("//", "/..")) else server.root + path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def test_it_follows_a_run_from_before_its_first_record(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with watching(folder) as server:
        status, _, page = ask(server, "/")
        assert status == 200 and "No step is recorded." in page
        state = json.loads(ask(server, "/state.json")[2])
        assert ask(server, f"/state.json?known={state['version']}")[0] == 204
        write_folder(folder, steps=2, planned=9, saved=[1])
        status, _, body = ask(server, f"/state.json?known={state['version']}")
        fresh = json.loads(body)
        assert status == 200 and "2 of 9 steps are recorded" in fresh["parts"]["verdict"]
        assert fresh["shelf"] != state["shelf"]
        assert len(json.loads(ask(server, "/transcripts.json")[2])["transcripts"]) == 1
        with RecordWriter.resume(folder / "records.jsonl", step=2) as writer:
            writer.write(step_record(2))
        later = json.loads(ask(server, f"/state.json?known={fresh['version']}")[2])
        assert "3 of 9 steps" in later["parts"]["verdict"] and later["shelf"] == fresh["shelf"]


def test_another_host_name_is_refused(tmp_path: Path) -> None:
    with watching(write_folder(tmp_path / "run")) as server:
        port = server.server_port
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
            for path in ("/", "/state.json", "/transcripts.json"):
                status, _, body = ask(server, path, Host=host)
                assert status == 403 and "step" not in body
        assert ask(server, "/", Host=f"localhost:{port}")[0] == 200


def test_only_its_own_answers_are_given_and_nothing_may_be_kept_or_framed(tmp_path: Path) -> None:
    with watching(write_folder(tmp_path / "run")) as server:
        for path in ("/records.jsonl", "/../run/run.toml", "//etc/passwd", "/run.toml"):
            assert ask(server, path)[0] in (403, 404)
        assert ask(server, "/state.json", "POST")[0] == 501
        status, headers, body = ask(server, "/", "HEAD")
        assert status == 200 and body == "" and int(headers["content-length"]) > 10_000
        assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "connect-src 'self'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert server.server_address[0] == ADDRESS


def test_the_command_says_where_it_serves_and_ends_on_an_interrupt(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tropd", "watch", str(tmp_path / "later")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs with `&`
    )
    assert process.stdout is not None
    said = [process.stdout.readline(), process.stdout.readline()]
    assert "does not exist yet" in said[0]
    found = re.search(r"http://127\.0\.0\.1:(\d+)(/[\w-]{32}/)", said[1])
    assert found is not None
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
    connection.request("GET", found[2])
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "the run goes on" in out and "Traceback" not in err


def test_whoever_does_not_know_the_token_reads_nothing(tmp_path: Path) -> None:
    with watching(write_folder(tmp_path / "run")) as server, watching(write_folder(tmp_path / "other")) as other:
        assert server.root != other.root and len(server.root) > 30
        for path in ("/", "/state.json", f"{other.root}/", server.root, server.root[:-1] + "/", f"{server.root}x/"):
            connection = http.client.HTTPConnection(ADDRESS, server.server_port, timeout=20)
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 403 and b"step" not in answer.read()
            connection.close()


def test_connections_that_say_nothing_do_not_keep_others_out(tmp_path: Path) -> None:
    with watching(write_folder(tmp_path / "run")) as server:
        silent = [socket.create_connection((ADDRESS, server.server_port)) for _ in range(3 * live.CONNECTIONS)]
        assert ask(server, "/")[0] == 200
        assert len(server._open) <= live.CONNECTIONS + 1
        silent[0].settimeout(20)
        assert silent[0].recv(1) == b"", "the oldest was dropped"
        for one in silent:
            one.close()


def test_a_request_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SECONDS", 0.2)
    with watching(write_folder(tmp_path / "run")) as server:
        slow = socket.create_connection((ADDRESS, server.server_port), timeout=20)
        slow.sendall(f"GET {server.root}/ HTTP/1.1\r\n".encode())
        assert slow.recv(1) == b""
        slow.close()
