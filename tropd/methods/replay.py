"""Rollouts that are trained more than once: a buffer of what the student wrote in earlier steps (DistiLLM).

Rollouts are kept and used again by visit: all responses to a prompt of one step stay together, so whatever compares
them finds all of them.  The buffer is part of the run's memory, the same on all ranks and in every checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tropd.base.ranges import Count, Share, Whole
from tropd.errors import ConfigError
from tropd.methods.drafts import RolloutJob
from tropd.methods.packed import pack, unpack
from tropd.methods.policies import Done, RolloutPolicy
from tropd.objective.memory import Memory, as_bytes, read_bytes
from tropd.types import Author, Rollout

_AGAIN = "again "
"""How the id of a rollout begins that is used again."""


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """All responses to a prompt of one step, packed."""

    visit: str
    prompt_id: str
    version: int
    """The oldest weights that wrote them."""
    number: int
    packed: str

    @classmethod
    def of(cls, visit: str, rollouts: Sequence[Rollout]) -> _Kept:
        by_student = [r.policy_version[0] for r in rollouts if Author.STUDENT in r.authors]
        packed = json.dumps([pack(rollout) for rollout in rollouts])
        prompt_id, number = rollouts[0].prompt.id, len(rollouts)
        return cls(visit=visit, prompt_id=prompt_id, version=min(by_student), number=number, packed=packed)

    @property
    def line(self) -> str:
        return json.dumps([self.visit, self.prompt_id, self.version, self.number]) + "\t" + self.packed

    @classmethod
    def read(cls, line: str) -> _Kept:
        head, packed = line.split("\t")
        visit, prompt_id, version, number = json.loads(head)
        return cls(visit=visit, prompt_id=prompt_id, version=version, number=number, packed=packed)


@dataclass(frozen=True, kw_only=True)
class Replay(RolloutPolicy):
    """A share of a step's prompts is not written: earlier rollouts of the student take their places (DistiLLM).  Their
    importance ratios use the log-probabilities with which they were drawn, and their grades are kept.

    >>> Replay(share=0.25, max_age=4).oldest, Replay(share=0.0).oldest
    (4, 0)
    """

    share: Share = 0.5
    """[inferred] Share of the prompts of a step that earlier rollouts take the places of; 0 is on-policy. In [0, 1]."""
    max_age: Whole = 8
    """[inferred] How many steps old a rollout may be; 0 is on-policy. At least 0."""
    size: Count = 512
    """[inferred] Rollouts that are kept, the newest ones (DistiLLM: 1,000). At least 1."""

    def check(self, num_rollouts: int) -> None:
        if self.oldest and self.size < num_rollouts:
            raise ConfigError(
                f"replay.size = {self.size} rollouts are kept, but a prompt has rollout.num_rollouts = {num_rollouts}, "
                "which are kept together: nothing would ever be used again. Raise size."
            )

    @property
    def description(self) -> str:
        return (
            f"{self.share:.0%} of the prompts of a step are not written: rollouts of the student that are up to "
            f"{self.max_age} steps old take their places, out of the newest {self.size}."
        )

    @property
    def oldest(self) -> int:
        return self.max_age if self.share > 0 else 0

    def again(self, job: RolloutJob) -> Mapping[str, Sequence[Rollout]]:
        """Nothing before the buffer holds as many prompts as are asked for.  No prompt is twice in a step."""
        batch = job.batch or job.prompts
        wanted = int(self.share * len(batch) + job.draw("replay?", str(job.step)))
        if wanted == 0 or self.oldest == 0 or job.recall is None:
            return {}
        here = {prompt.id for prompt, _ in batch}
        found = [kept for kept in _read(job.memory, self.memory) if job.step - kept.version <= self.max_age]
        by_prompt: dict[str, _Kept] = {}
        for kept in sorted(found, key=lambda kept: job.draw(f"replay {job.step}", kept.visit)):
            if kept.prompt_id not in here:
                by_prompt.setdefault(kept.prompt_id, kept)
        if len(by_prompt) < wanted:
            return {}
        visits = [f"{visit}/{prompt.id}" for prompt, visit in batch]
        places = sorted(visits, key=lambda visit: job.draw("replayed", visit))[:wanted]
        chosen = list(by_prompt.values())[:wanted]
        return {place: _used_again(kept, job) for place, kept in zip(places, chosen, strict=True)}

    def remember(self, done: Done, memory: Memory) -> None:
        if self.oldest == 0:
            return
        visits: dict[str, list[Rollout]] = {}
        for rollout in done.rollouts:
            if not rollout.id.startswith(_AGAIN):
                visits.setdefault(rollout.id.rpartition("/")[0], []).append(rollout)
        own = [_Kept.of(*one).line + "\n" for one in visits.items() if any(Author.STUDENT in r.authors for r in one[1])]
        lines = read_bytes(done.world.gather(as_bytes("".join(own)))).split("\n")
        memory.write(f"{self.memory}/{done.step:08d}", "\n".join(sorted(lines)))
        self._forget(done.step + 1, memory)

    def _forget(self, step: int, memory: Memory) -> None:
        """What is too old for a step, and what is more than the buffer holds."""
        left = self.size
        for name in sorted(_names(memory, self.memory), reverse=True):
            kept = []
            for one in _read_one(memory, name):
                if step - one.version <= self.max_age and one.number <= left:
                    kept.append(one.line)
                    left -= one.number
                elif step - one.version <= self.max_age:
                    left = 0
            if kept:
                memory.write(name, "\n".join(kept))
            else:
                del memory[name]


def _used_again(kept: _Kept, job: RolloutJob) -> list[Rollout]:
    assert job.recall is not None
    prompt = job.recall(kept.prompt_id)
    assert prompt is not None, "checkpoints of other data are refused"
    rollouts = [unpack(held, prompt) for held in json.loads(kept.packed)]
    return [replace(rollout, id=f"{_AGAIN}{job.step}/{rollout.id}") for rollout in rollouts]


def _names(memory: Memory, owner: str) -> list[str]:
    return [name for name in memory if name.rpartition("/")[0] == owner]


def _read(memory: Memory, owner: str) -> Iterator[_Kept]:
    for name in sorted(_names(memory, owner)):
        yield from _read_one(memory, name)


def _read_one(memory: Memory, name: str) -> list[_Kept]:
    return [_Kept.read(line) for line in memory.read(name).split("\n") if line]
