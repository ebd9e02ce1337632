"""A run is started by any launcher: the lines that are printed are understood there, and Ray runs what they say."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from tests import run_case
from tests.distributed.launch import distance, free_port
from tests.small_runs import write_run
from tropd.cli.main import main
from tropd.monitoring.records import read_records

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (pip install 'tropd[ray]')")
ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 600.0
"""A Ray cluster of its own, three processes and a server begin within it on two busy cores."""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """What `tropd launch --print` shows, by the first word of each title."""
    assert main(["launch", *arguments, "--print"]) == 0
    parts = re.split(r"^# ", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: [line for line in part.splitlines()[1:] if line] for part in parts}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("processes", "nodes"), [(2, 1), (8, 2)])
def test_torchrun_understands_the_printed_lines(
    processes: int, nodes: int, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(models, tmp_path / "run", "ranks")
    said = printed(capsys, str(path), "--processes", str(processes), "--nodes", str(nodes))
    titles = list(said)
    assert [title.split(",")[0] for title in titles] == ["torchrun", "SLURM", "SLURM"]
    (shell,), (now,), queue = said.values()
    inner = [shlex.split(line)[-1] for line in (now, queue[-1])]
    for line in (shell, *inner):
        words = shlex.split(line.replace("$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)", "first"))
        assert words[0] == "torchrun"
        understood = get_args_parser().parse_args(words[1:])
        assert understood.nproc_per_node == str(processes // nodes)
        assert understood.nnodes in (str(nodes), f"{nodes}:{nodes}")
        assert (understood.module, understood.training_script) == (True, "tropd")
        assert understood.training_script_args == ["train", str(path)]
    assert queue[0] == "#!/bin/bash" and f"#SBATCH --nodes={nodes}" in queue
    assert f"#SBATCH --gpus-per-node={processes // nodes}" in queue and f"--gpus-per-node={processes // nodes}" in now
    subprocess.run(["bash", "-n"], input="\n".join([now, *queue]), text=True, check=True)


def test_a_run_that_has_begun_is_resumed(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    path = write_run(models, folder, "ranks")
    folder.mkdir()
    path.rename(folder / "run.toml")
    assert printed(capsys, str(folder))["torchrun"] == [f"torchrun --nproc-per-node 1 -m tropd resume {folder}"]
    assert "is a run that has begun" in refused(capsys, str(folder), "--steps", "9", "--print")


def test_what_is_printed_is_quoted_whatever_the_names_are(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "a $(touch gone) 'b' \"c\"; #"
    path = write_run(
        models, odd / "run", "ranks", teacher={"servers": ["http://10.0.0.5:8001"], "server": {"model": "$(x)"}}
    )
    (server,), (torchrun,), *_ = printed(capsys, str(path)).values()
    words = shlex.split(server)
    assert words[words.index("--served-model-name") + 1] == "$(x)"
    assert shlex.split(torchrun)[-1] == str(path)
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {torchrun}"], capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines()[-1] == str(path)


@pytest.mark.parametrize("name", ["--trust-remote-code", "a\x1b[2J"])
def test_a_name_that_no_command_should_hold_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    server = {"servers": ["http://10.0.0.5:8001"], "server": {"model": name}}
    path = write_run(models, tmp_path / "run", "ranks", teacher=server)
    assert main(["launch", str(path), "--print"]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and ("flags" in said.err or "control character" in said.err)


def test_servers_get_commands(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = {
        "servers": ["http://10.0.0.5:8001", "http://10.0.0.6:8001"],
        "server": {"api_key_env": "KEY", "model": "t"},
    }
    path = write_run(
        models,
        tmp_path / "run",
        "ranks",
        teacher={**there, "dtype": "float32"},
        rollout={"servers": ["http://10.0.0.7:8002"]},
    )
    (*teachers, student), *_ = printed(capsys, str(path)).values()
    assert teachers == 2 * [
        f'VLLM_API_KEY="$KEY" vllm serve {models}/teacher --host 0.0.0.0 --port 8001 --served-model-name t '
        "--dtype float32 --max-logprobs 8"
    ]
    assert student == f'VLLM_SERVER_DEV_MODE="1" vllm serve {models}/student --host 0.0.0.0 --port 8002'


def test_each_of_several_teachers_gets_its_own(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = ({"path": str(models / "teacher"), "servers": [f"http://127.0.0.1:800{n}"]} for n in range(2))
    teachers = {"sums": one, "sky": {**other, "server": {"kind": "sglang"}}, "here": {"path": str(models / "teacher")}}
    changes = {"teacher": {"path": "base"}, "teachers": teachers, "data": {"teacher_column": "answer"}}
    commands, *_ = printed(capsys, str(write_run(models, tmp_path / "run", "ranks", **changes))).values()
    assert [command.split()[0] for command in commands] == ["vllm", "python"]
    assert "--port 8000 --max-logprobs 8" in commands[0] and "--max-logprobs" not in commands[1]


def test_two_names_on_one_address_are_one_server_or_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"path": str(models / "teacher"), "servers": ["http://127.0.0.1:8000"]}
    others = {"a": {}, "b": {"path": str(models / "student")}, "c": {"server": {"model": "c"}}}
    for name, other in others.items():
        teachers = {"sums": one, "sky": {**one, "servers": ["http://127.0.0.1:8000/"], **other}}
        changes = {"teacher": {"path": "base"}, "teachers": teachers, "data": {"teacher_column": "answer"}}
        path = str(write_run(models, tmp_path / name, "ranks", **changes))
        if not other:
            commands, *_ = printed(capsys, path).values()
            assert len(commands) == 1 and commands[0].startswith(f"vllm serve {models}/teacher ")
        else:
            said = refused(capsys, path, "--print")
            assert "two teachers are served at http://127.0.0.1:8000" in said and "address of its own" in said
            assert said.count("vllm serve") == 2


def test_a_server_of_this_machine_alone_is_not_opened_to_others(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(models, tmp_path / "run", "ranks", teacher={"servers": ["http://127.0.0.1:8001"]})
    (teacher,), *_ = printed(capsys, str(path)).values()
    assert "--host 127.0.0.1 --port 8001" in teacher


def test_a_launch_that_cannot_be_is_refused(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_run(models, tmp_path / "run", "ranks"))
    assert "needs --cluster ray, or --print" in refused(capsys, path)
    assert "3 processes on 2 machines" in refused(capsys, path, "--processes", "3", "--nodes", "2", "--print")
    assert "there is no file" in refused(capsys, str(tmp_path / "nothing.toml"), "--print")


def launch(*arguments: str, path: Path | None = None) -> subprocess.Popen[str]:
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    command = [sys.executable, "-m", "tropd", "launch", *arguments, "--cluster", "ray"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end_of(process: subprocess.Popen[str]) -> str:
    """What it said until its end; a process that does not end is ended, and fails the test."""
    try:
        return process.communicate(timeout=LIMIT_SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        raise


def left_of(name: str) -> list[str]:
    """What still runs a while after the launch has ended: a process that was killed takes a moment to be gone."""
    deadline = time.monotonic() + 30
    while (found := running(name)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def running(name: str) -> list[str]:
    """Processes whose command line names something of the test's own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
        if name in command:
            found.append(command)
    return found


@needs_ray
@pytest.mark.slow
def test_ray_trains_the_student_of_one_process(models: Path, tmp_path: Path) -> None:
    """The teacher's server is started with it, on the address that the run file gives, and ends with it."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "vllm"  # serves what `vllm serve MODEL --host H --port P ...` would
    stand_in.write_text(
        textwrap.dedent(f"""\
            #!{sys.executable}
            import sys, threading
            from pathlib import Path
            from tests.servers.mini import MiniServer
            with MiniServer(Path(sys.argv[2]), port=int(sys.argv[sys.argv.index("--port") + 1])):
                threading.Event().wait()
            """)
    )
    stand_in.chmod(0o755)
    server = {"servers": [f"http://127.0.0.1:{free_port()}"]}
    path = write_run(models, tmp_path / "two", "ranks", teacher=server, steps=2, evaluation={"every": 9})
    process = launch(str(path), "--processes", "2", path=tmp_path / "bin")
    said = end_of(process)
    assert process.returncode == 0, said
    assert f"the student is in {tmp_path}/two/model" in re.sub(r"\s+", " ", said)
    assert not left_of(str(tmp_path)), "nothing is left"
    alone = run_case.train(
        write_run(models, tmp_path / "one", "ranks", steps=2, evaluation={"every": 9}), tmp_path / "one"
    )
    assert alone.code == 0, alone.said
    steps = read_records(tmp_path / "two" / "records.jsonl").steps
    assert len(steps) == 2
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-3, "a server rounds otherwise than the trainer"


@needs_ray
@pytest.mark.slow
def test_an_interrupt_stops_all_ranks_after_the_step(models: Path, tmp_path: Path) -> None:
    path = write_run(models, tmp_path / "run", "ranks", steps=500)
    process = launch(str(path), "--processes", "2")
    deadline = time.monotonic() + LIMIT_SECONDS
    while run_case.num_recorded(tmp_path / "run") < 2:
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            pytest.fail(end_of(process))
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = end_of(process)
    assert process.returncode == 143, said
    assert not left_of(str(tmp_path))
    steps = run_case.num_recorded(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / f"step_{steps:06d}").exists()


@needs_ray
@pytest.mark.slow
def test_what_cannot_be_placed_is_refused(models: Path, tmp_path: Path) -> None:
    path = write_run(models, tmp_path / "run", "ranks", teacher={"servers": ["http://203.0.113.9:8001"]})
    process = launch(str(path), "--processes", "2")
    said = " ".join(end_of(process).split())
    assert process.returncode == 2, said
    assert "http://203.0.113.9:8001 does not answer, and cannot be started there: the Ray cluster has" in said
