"""When a teacher that follows the student moves, and what a run file may say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tropd.base.ranges import OutOfRange
from tropd.briefings.follow import Answers, Copy, Ema, Follow, Frozen, Gated, read_follow
from tropd.config.models import TeacherConfig
from tropd.config.run import Run
from tropd.errors import ConfigError
from tropd.objective.memory import Memory

GATE = Gated(min_steps=2, rise=0.1, smoothing=0.5, tail=0.5, clipped=0.25)


def answers(reward: float, length: int = 10, cut: int = 0) -> Answers:
    """Four answers, the last of which is as long as said."""
    return Answers(rewards=[reward] * 4, lengths=[1, 2, 3, length], cut=[True] * cut + [False] * (4 - cut))


def moved(rule: Follow, seen: Sequence[Answers | None]) -> list[bool]:
    memory = Memory()
    return [rule.moves(step, x, memory, "follow.teacher") for step, x in enumerate(seen)]


def test_a_clock_moves_after_every_so_many_steps() -> None:
    none = [None] * 6
    assert moved(Copy(every=3), none) == moved(Ema(every=3), none) == [False, False, True, False, False, True]
    assert moved(Frozen(), none) == [False] * 6 and moved(Copy(), none) == [True] * 6
    assert [Copy(every=3).age(step, Memory(), "") for step in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_gate_opens_when_all_its_conditions_hold_and_never_before() -> None:
    better = answers(1.0)
    assert moved(GATE, [answers(0.0), better]) == [False, True]
    assert moved(GATE, [better, better, better]) == [False] * 3, "the reward has not risen"
    assert moved(Gated(min_steps=3, rise=0.1), [answers(0.0)] + [better] * 2) == [False, False, True], "too early"
    assert moved(GATE, [answers(0.0), answers(1.0, length=16)]) == [False, False], "the tail is too long"
    assert moved(GATE, [answers(0.0), answers(1.0, length=15)]) == [False, True]
    assert moved(GATE, [answers(0.0), answers(1.0, cut=2)]) == [False, False], "too many are cut"
    assert moved(GATE, [answers(0.0), answers(1.0, cut=1)]) == [False, True]


def test_after_a_copy_the_gate_measures_from_there() -> None:
    memory = Memory()
    seen = [answers(0.0), answers(1.0), answers(1.0), answers(1.0), answers(1.0, length=20), answers(1.0, length=14)]
    opened = [GATE.moves(step, x, memory, "follow.teacher") for step, x in enumerate(seen)]
    assert opened == [False, True, False, True, False, False]
    assert float(memory["follow.teacher/reward_at_copy"]) == 0.875 and GATE.age(6, memory, "follow.teacher") == 2


def test_a_gate_that_is_saved_and_read_again_opens_when_it_would_have() -> None:
    rewards = [0.1, 0.3, 0.2, 0.7, 0.1, 0.9, 1.0, 0.3, 1.0, 1.0]
    whole = moved(GATE, [answers(x) for x in rewards])
    for stop in range(1, len(rewards)):
        memory = Memory()
        before = [GATE.moves(step, answers(x), memory, "a") for step, x in enumerate(rewards[:stop])]
        again = Memory()
        again.load_state_dict(memory.state_dict())
        after = [GATE.moves(stop + n, answers(x), again, "a") for n, x in enumerate(rewards[stop:])]
        assert before + after == whole
    assert any(whole) and not all(whole)


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        ({"rule": "emma"}, ConfigError, r"no rule 'emma' to follow by \(did you mean 'ema'\?\); there are frozen, ema"),
        ({"rule": "ema", "decy": 0.9}, ConfigError, r"no knob 'decy' \(did you mean 'decay'\?\)"),
        ({"rule": "ema", "decay": 1.5}, OutOfRange, r"teacher.follow.decay = 1.5 .* must be in \[0, 1\]"),
        ({"rule": "copy", "every": 0}, OutOfRange, "teacher.follow.every = 0 .* must be at least 1"),
        ({"decay": 0.9}, ConfigError, "is a table with its rule, such as"),
        (3, ConfigError, "teacher.follow is 3, but it is a table with its rule"),
    ],
)
def test_what_is_no_rule_is_refused(value: Any, error: type[Exception], said: str) -> None:
    for read in (read_follow, lambda follow: TeacherConfig(follow=follow), lambda follow: run({"follow": follow})):
        with pytest.raises(ConfigError, match=said):
            read(value)
    with pytest.raises(error):
        read_follow(value)


def run(teacher: dict[str, Any], **changes: Any) -> Run:
    values = {"student": {"path": "there"}, "data": {"path": "rows"}, "teacher": {"path": "start", **teacher}}
    return Run.from_dict({**values, **changes})


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"path": "student"}, '"student", which is the student at every step already. Leave teacher.follow out'),
        ({"path": "base"}, 'without its adapter, which stays as it is. Set teacher.path = "start"'),
        ({"path": "Qwen/Qwen3-8B"}, 'a teacher of its own, which stays as it is. Set teacher.path = "start"'),
        ({"servers": ("http://127.0.0.1:1",), "score_cache": True}, "and then it says something else. Leave teacher."),
        ({"dtype": "float16"}, "teacher.dtype is float16, but a teacher that follows the student has the student's"),
    ],
)
def test_a_teacher_that_cannot_follow_is_refused_with_what_to_do(teacher: dict[str, Any], said: str) -> None:
    follow = {"follow": {"rule": "ema"}}
    with pytest.raises(ConfigError, match=said):
        run({**follow, **teacher})
    column = {"path": "rows", "teacher_column": "kind"}
    with pytest.raises(ConfigError, match=f"teacher 'a': .*{said}"):
        run({"path": "base"}, teachers={"a": {"path": "start", **follow, **teacher}}, data=column)


def test_a_gate_without_a_grader_is_refused_and_the_other_rules_need_none() -> None:
    with pytest.raises(ConfigError, match=r"waits until the reward rises, but there is no grader. Set `grader`"):
        run({"follow": "gated"})
    assert run({"follow": "gated"}, grader="exact").teacher.follow == Gated()
    assert run({"follow": {"rule": "ema", "decay": 0.5}}).teacher.follow == Ema(decay=0.5)


def test_a_run_file_keeps_the_rule() -> None:
    import tomllib

    asked = run({"follow": {"rule": "copy", "every": 7}})
    again = Run.from_dict(tomllib.loads(asked.dump()))
    assert again == asked and again.teacher.follow == Copy(every=7)
    assert again.fingerprint() != run({}).fingerprint()
