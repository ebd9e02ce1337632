"""Types of tokens whose divergence stays high are found in saved rollouts, and watched by their ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.monitoring.test_probes import S, T, make_tokens
from tests.small_runs import write_models, write_run
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.errors import ConfigError
from tropd.monitoring.display import Silent
from tropd.monitoring.probe import Sight
from tropd.monitoring.records import read_records
from tropd.monitoring.rock import Rock, Type, Types, types_of
from tropd.monitoring.rollouts import write_rollouts
from tropd.objective.evidence import StudentView
from tropd.objective.plan import Counts, Plan
from tropd.run.start import train
from tropd.types import Author, Finish, Prompt, Rollout


def rollout(name: str, *response: int) -> Rollout:
    """The teacher writes the first token."""
    students = (Author.STUDENT,) * (len(response) - 1)
    return Rollout(
        id=name,
        prompt=Prompt(id=name, token_ids=(9,)),
        token_ids=(9, *response),
        authors=(Author.CONTEXT, Author.TEACHER, *students),
        behavior_logprobs=(0.0,) * (1 + len(response)),
        finish=Finish.STOP,
    )


def save(folder: Path, step: int) -> None:
    """Type 3 four times with a KL of 1, type 5 once with 6, type 7 below 0; the teacher forbids one 8."""
    rollouts = [rollout("a", 5, 3, 3, 5, 7), rollout("b", 3, 3, 3, 8, 8)]
    kl = torch.tensor([50.0, 1, 1, 6, -2, 50.0, 1, 1, torch.inf, 0.5])
    student = torch.full((10,), -1.0)
    write_rollouts(
        folder / "rollouts", step, rollouts, decode=str, student_logprobs_N=student, teacher_logprobs_N=student - kl
    )


def test_types_are_ordered_by_mean_kl_times_frequency(tmp_path: Path) -> None:
    save(tmp_path, 0)
    found = types_of([tmp_path / "rollouts" / "step_000000.parquet"])
    assert [(t.token_id, t.count, t.mean) for t in found.types] == [(5, 1, 6.0), (3, 4, 1.0), (8, 1, 0.5), (7, 1, -2.0)]
    assert found.num_tokens == 7 and found.infinite == 1


def test_the_most_frequent_types_and_those_without_divergence_are_no_rock() -> None:
    types = [Type(token_id=v, count=100 - v, total=50.0 - 10.0 * v) for v in range(9)]
    found = Types(types=types, num_tokens=800, infinite=0)
    assert found.common() == {0, 1, 2, 3, 4} and found.rock(3) == [] and found.rock(9) == []
    more = Types(types=[*types, Type(token_id=20, count=1, total=3.0)], num_tokens=801, infinite=0)
    assert more.rock(9) == [20]


def test_the_probe_compares_listed_types_with_the_others() -> None:
    student = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    teacher = torch.tensor([-3.0, -1.5, -torch.inf, -9.0, -1.0])
    tokens = make_tokens([S, S, S, T, S], [0] * 5, teacher_logprobs_N=teacher)
    plan = Plan(weights={}, rewards={}, counts=Counts(actions=4, student=4, teacher=1, sequences=1), progress=0.0)
    sight = Sight(step=0, rollouts=[], tokens=tokens, view=StudentView(logprobs_N=student), plan=plan)
    assert Rock(ids=[0, 2, 3]).look(sight) == {"kl": (2.0, 1), "others": (0.5, 2), "frequency": (2, 4)}
    for wrong in ([], [-1], ["a"], 3, [True]):
        with pytest.raises(ConfigError, match="Give a list of token ids"):
            Rock(ids=wrong)  # type: ignore[arg-type]


def test_what_a_run_saved_says_what_to_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = write_models(tmp_path / "models")
    probes = [{"name": "rock", "ids": list(range(90))}]
    path = write_run(models, tmp_path / "run", "quick", probes=probes, method={"name": "opd"})
    directory = train(Run.load(path), display=Silent())
    capsys.readouterr()
    assert main(["inspect", str(directory), "--rock", "3", "--step", "0"]) == 0
    said = capsys.readouterr().out
    found = types_of(sorted((directory / "rollouts").glob("*.parquet")))
    assert f"{found.num_tokens:,} tokens of the student in 2 saved steps from step 0 on" in said
    assert f"ids = [{', '.join(map(str, found.rock(3)))}]" in said and "[[method.plus]]" in said
    steps = read_records(directory / "records.jsonl").steps
    assert all(0 <= step.probes["rock/frequency"] <= 1 and "rock/others" in step.probes for step in steps)
    assert main(["inspect", str(directory), "--rock", "0"]) == 2
    assert main(["inspect", str(directory), "--rock", "3", "--step", "9"]) == 2
    assert main(["inspect", str(directory)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    for problem in ("--rock is 0", "rollouts of steps 0 to 1, and none from step 9 on", "a step to show is missing"):
        assert problem in said


def test_saved_rollouts_of_a_run_without_a_teacher_say_nothing_of_rocks(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 0, [rollout("a", 5, 3)], decode=str)
    with pytest.raises(ConfigError, match="has no student_logprobs, so nothing is known of the divergence"):
        types_of([tmp_path / "step_000000.parquet"])
