"""A hub that does not answer is told in one line, and what was trained is safe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.distributed.launch import free_port

ROOT = Path(__file__).parents[2]
ASK_TWICE = """
from huggingface_hub.utils import http_backoff
from tropd.cli.main import main
main(["version"])
for path in ("config.json", "tokenizer.json"):
    try:
        http_backoff("HEAD", f"{url}/owner/model/resolve/main/{path}", max_retries=2, base_wait_time=0.01)
    except Exception as error:
        print(type(error).__name__)
"""
PUSH = """
from pathlib import Path
from tropd.errors import CheckpointError
from tropd.checkpoints.export import push
try:
    push(Path("runs/mine/model"), "owner/model")
except CheckpointError as error:
    print(error)
"""


def run(code: str, url: str) -> subprocess.CompletedProcess[str]:
    """In a process that may use the network, with a hub at an address where nobody listens."""
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": "hf_of_nobody", "PYTHONPATH": str(ROOT)}
    environment["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-c", f"url = {url!r}\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_attempts_of_the_hubs_library_are_one_line_that_says_what_helps() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = run(ASK_TWICE, url)
    assert done.stdout.splitlines()[1:] == ["ConnectError", "ConnectError"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("no answer from the Hugging Face hub: ") and "HF_HUB_OFFLINE=1" in line
    assert f"HEAD {url}/owner/model/resolve/main/config.json" in line and "refused" in line


def test_a_push_that_fails_leaves_a_folder_and_the_command_that_uploads_it() -> None:
    done = run(PUSH, f"http://127.0.0.1:{free_port()}")
    assert "runs/mine/model could not be pushed to owner/model" in done.stdout
    assert "`hf upload owner/model runs/mine/model .`" in done.stdout and not done.stderr
