"""What is used again: which rollouts, how old, in whose place, and with what they were written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tropd.distributed.ranks import ALONE
from tropd.errors import ConfigError
from tropd.methods.drafts import RolloutJob
from tropd.methods.policies import Done, RolloutPolicy, TeacherPrefix
from tropd.methods.replay import Replay
from tropd.methods.stacked import stacked
from tropd.objective.memory import Memory
from tropd.objective.schedules import Schedule
from tropd.rollout.scripted import ScriptedEngine
from tropd.rollout.stage import roll_out
from tropd.types import Author, Prompt, Rollout, Sampling

PROMPTS = {f"p/{n}": Prompt(id=f"p/{n}", token_ids=(n, n + 1)) for n in range(40)}
EACH, BATCH = 2, 4


class Story:
    """Steps on a scripted student, each of four new prompts, that a policy remembers."""

    def __init__(self, policy: RolloutPolicy) -> None:
        self.policy, self.memory, self.steps, self.asked = policy, Memory(), [], []

    def job(self) -> RolloutJob:
        step, names = len(self.steps), list(PROMPTS)
        chosen = [names[(step * BATCH + i) % len(names)] for i in range(BATCH)]
        return RolloutJob(
            prompts=[(PROMPTS[name], step * BATCH // len(names)) for name in chosen],
            num_rollouts=EACH,
            max_new_tokens=6,
            sampling=Sampling(),
            stop_ids=(99,),
            seed=3,
            progress=step / 20,
            step=step,
            memory=Memory(self.memory),
            recall=PROMPTS.get,
        )

    def step(self) -> list[Rollout]:
        step = len(self.steps)
        student = ScriptedEngine(lambda r: [200 + (sum(r.token_ids) + step + t) % 50 for t in range(9)], logprob=-2.0)
        written = roll_out(self.policy, self.job(), student, ScriptedEngine(lambda r: [100] * 9))
        self.asked.append(len(student.requests))
        rollouts = [
            r if r.id.startswith("again") else replace(r, policy_version=(step, step), reward=step / 8) for r in written
        ]
        done = Done(step=step, progress=0.5, rollouts=rollouts, probes={}, max_new_tokens=6, world=ALONE)
        self.policy.remember(done, self.memory)
        self.memory = kept_and_read(self.memory)
        self.steps.append(rollouts)
        return rollouts

    def go(self, steps: int) -> list[list[Rollout]]:
        return [self.step() for _ in range(steps)]


def kept_and_read(memory: Memory) -> Memory:
    """As a checkpoint holds it."""
    found = Memory()
    found.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    return found


def again(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return [r for r in rollouts if r.id.startswith("again")]


def buffered(memory: Memory) -> int:
    """Rollouts in the buffer."""
    return sum(json.loads(line.split("\t")[0])[3] for name in memory for line in memory.read(name).split("\n"))


def test_a_share_of_the_prompts_is_used_again_with_what_was_known_of_them() -> None:
    story = Story(Replay(share=0.5, max_age=3))
    first, *later = story.go(8)
    assert again(first) == [] and story.asked[0] == BATCH * EACH, "there is nothing yet"
    originals = {r.id: r for rollouts in story.steps for r in rollouts}
    for step, rollouts in enumerate(later, start=1):
        used = again(rollouts)
        assert len(rollouts) == BATCH * EACH and len(used) == BATCH * EACH // 2 == story.asked[step]
        assert len({r.id for r in rollouts}) == len(rollouts) == EACH * len({r.group for r in rollouts})
        for rollout in used:
            head, _, name = rollout.id.partition("/")
            original = originals[name]
            assert head == f"again {step}" and rollout == replace(original, id=rollout.id, model_logprobs=())
            assert 1 <= step - rollout.policy_version[0] <= 3 and rollout.reward == original.reward


@pytest.mark.parametrize("policy", [Replay(share=0.0), Replay(max_age=0)])
def test_without_a_share_or_an_age_everything_is_new_and_nothing_is_kept(policy: Replay) -> None:
    story = Story(policy)
    assert not any(again(rollouts) for rollouts in story.go(4)) and story.memory == {}


def test_a_share_holds_on_average_where_it_is_no_whole_number_of_prompts() -> None:
    steps = Story(Replay(share=0.3, max_age=5)).go(200)[1:]
    assert sum(len(again(r)) for r in steps) / (len(steps) * BATCH * EACH) == pytest.approx(0.3, abs=0.02)


def test_the_buffer_holds_the_newest_and_nothing_that_is_too_old() -> None:
    small = Story(Replay(share=0.25, max_age=50, size=10))
    small.go(6)
    assert buffered(small.memory) == 10 and {name[-8:] for name in small.memory} == {"00000004", "00000005"}
    young = Story(Replay(share=0.25, max_age=2))
    young.go(6)
    assert {name[-8:] for name in young.memory} == {"00000004", "00000005"}


def test_a_buffer_that_does_not_hold_enough_is_left_alone() -> None:
    story = Story(Replay(share=1.0, max_age=3, size=BATCH * EACH - 1))
    assert not any(again(rollouts) for rollouts in story.go(4))


def test_what_is_written_goes_on_from_a_teachers_prefix_beside_what_is_used_again() -> None:
    prefix = TeacherPrefix(length=Schedule(start=0.5))
    story = Story(stacked([prefix, Replay(share=0.5)]))
    rollouts = story.go(3)[-1]
    assert len(again(rollouts)) == 4
    assert all(r.authors.count(Author.TEACHER) == 3 for r in rollouts)
    with pytest.raises(ConfigError, match="Replay and Replay both say what is used again"):
        stacked([Replay(), Replay()])


class Half:
    """Two ranks, as one of them sees them: the other's part of what is gathered is given."""

    def __init__(self, rank: int, parts: list) -> None:
        self.rank, self.size, self.parts = rank, 2, parts

    def gather(self, x):
        import torch

        self.parts[self.rank] = x
        return torch.cat(self.parts)


def test_the_same_is_used_again_whatever_the_number_of_processes() -> None:
    import torch

    policy, alone = Replay(share=0.5, max_age=3), Story(Replay(share=0.5, max_age=3))
    alone.go(3)
    rollouts = alone.steps[0]
    memory = Memory()
    parts = [torch.zeros(0, dtype=torch.uint8)] * 2
    for _ in range(2):  # the second time every rank knows the other's part
        for rank in (1, 0):
            own = [r for i, r in enumerate(rollouts) if i // EACH % 2 == rank]
            world = Half(rank, parts)
            memory = Memory()
            policy.remember(Done(step=0, progress=0.5, rollouts=own, probes={}, max_new_tokens=6, world=world), memory)
    first = Story(Replay(share=0.5, max_age=3))
    first.go(1)
    assert memory.keys() == first.memory.keys()
    assert all(memory.read(name) == first.memory.read(name) for name in memory)
    job = alone.job()
    whole = alone.policy.again(job)
    for rank in (0, 1):
        part = replace(job, prompts=job.prompts[rank::2], batch=job.prompts)
        assert alone.policy.again(part) == whole
        student = ScriptedEngine(lambda r: [200], logprob=-2.0)
        ids = [r.id for r in roll_out(alone.policy, part, student, None)]
        wholly = [r.id for r in roll_out(alone.policy, job, student, None)]
        assert ids == [name for i, name in enumerate(wholly) if i // EACH % 2 == rank]
