"""A launch that cannot be meant is refused in words; ranks hear each other whatever they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import run_case
from tests.distributed.launch import become, free_port
from tests.small_runs import write_run
from tropd.distributed.launch import launched
from tropd.distributed.ranks import ALONE, Ranks
from tropd.errors import ConfigError

GOOD = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": ""}, "WORLD_SIZE is 4 in the environment, which asks for 4 processes, but RANK is not set"),
        ({"RANK": "", "MASTER_PORT": ""}, "but RANK, MASTER_PORT are not set"),
        ({"RANK": "4"}, "RANK is 4, but WORLD_SIZE = 4 knows ranks 0 to 3"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four' in the environment, which is no number"),
    ],
)
def test_an_odd_launch_is_refused_with_the_command_that_works(change: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        launched({**GOOD, **change})
    assert "torchrun --nproc-per-node N -m tropd train RUN.toml" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "size"),
    [({}, 4), ({"WORLD_SIZE": "1"}, 1), ({"WORLD_SIZE": ""}, 1), ({"WORLD_SIZE": "1", "RANK": ""}, 1)],
)
def test_a_launch_says_how_many_there_are(change: dict[str, str], size: int) -> None:
    assert launched({**GOOD, **change}) == size


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"timeout_minutes": 0.0}}, "parallel.timeout_minutes = 0.0 was asked for, but it must be"),
        (
            {"parallel": {"student": "sharded"}, "student": {"lora": {"rank": 2, "alpha": 4}}},
            'parallel.student is "sharded", but the student has an adapter',
        ),
        (
            {
                "parallel": {"teacher": "sharded"},
                "student": {"lora": {"rank": 2, "alpha": 4}},
                "teacher": {"path": "base"},
            },
            'parallel.teacher is "sharded", but teacher.path is "base"',
        ),
        (
            {"parallel": {"teacher": "sharded"}, "teacher": {"servers": ["http://127.0.0.1:1"]}},
            'parallel.teacher is "sharded", but teacher.servers hold the teacher',
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        write_run(tmp_path, tmp_path / "run", **changes)


def said_by(rank: int) -> list[torch.Tensor]:
    """Tensors that ranks send, of lengths that differ."""
    return [
        torch.arange(rank * 2, dtype=torch.int64),
        torch.full((rank + 1, 2), rank / 3, dtype=torch.float64),
        torch.tensor([True, False])[: 2 - rank],
        torch.zeros(0),
        torch.tensor([float("inf"), float("nan")]),
    ]


def speak(rank: int, port: int, out: Path) -> None:
    become({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    world = Ranks(rank, 2)
    heard: dict[str, Any] = {"tensors": [world.gather(x) for x in said_by(rank)]}
    heard["json"] = world.gather_json({"rank": rank, "text": "ü" * rank})
    heard["bytes"] = [list(said) for said in world.gather_bytes(bytes(range(rank)))]
    heard["rest"] = [world.first(rank + 7), world.most(-rank), world.any(rank == 1), world.any(False)]
    sums = [torch.full((3,), rank + 1.0), torch.tensor(rank + 0.5)]
    world.add_(sums)
    torch.save({**heard, "sums": sums}, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_hear_all_ranks_in_order(tmp_path: Path) -> None:
    port = free_port()
    processes = [run_case.processes().Process(target=speak, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        heard = torch.load(tmp_path / f"{rank}.pt")
        for mine, first, second in zip(heard["tensors"], said_by(0), said_by(1), strict=True):
            assert torch.equal(mine.nan_to_num(5.0), torch.cat([first, second]).nan_to_num(5.0))
            assert mine.dtype == first.dtype
        assert heard["json"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}]
        assert heard["bytes"] == [[], [0]]
        assert heard["rest"] == [7, 0, True, False]
        assert [x.tolist() for x in heard["sums"]] == [[3.0, 3.0, 3.0], 2.0]


def test_one_process_hears_itself() -> None:
    x = torch.arange(3)
    assert ALONE.gather(x) is x and ALONE.gather_json([1]) == [[1]] and ALONE.share("abc") == ["a", "b", "c"]
    assert (ALONE.first(2), ALONE.most(3), ALONE.any(True), ALONE.leads) == (2, 3, True, True)
