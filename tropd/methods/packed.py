"""Rollouts as JSON has them, without their prompts, which the run's data give again.  Every number keeps its last
bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tropd.types import Author, Finish, Prompt, Rollout


def pack(rollout: Rollout) -> dict[str, Any]:
    start = len(rollout.prompt.token_ids)
    return {
        "id": rollout.id,
        "prompt_id": rollout.prompt.id,
        "token_ids": rollout.response_ids,
        "authors": "".join(str(int(author)) for author in rollout.authors[start:]),
        "behavior_logprobs": rollout.behavior_logprobs[start:],
        "policy_version": rollout.policy_version,
        "finish": rollout.finish,
        "reward": rollout.reward,
        "feedback": rollout.feedback,
        "trace": rollout.trace,
    }


def unpack(held: Mapping[str, Any], prompt: Prompt) -> Rollout:
    """Without the student's own log-probabilities: by now it is another."""
    given = len(prompt.token_ids)
    return Rollout(
        id=held["id"],
        prompt=prompt,
        token_ids=prompt.token_ids + tuple(held["token_ids"]),
        authors=(Author.CONTEXT,) * given + tuple(Author(int(author)) for author in held["authors"]),
        behavior_logprobs=(0.0,) * given + tuple(held["behavior_logprobs"]),
        policy_version=tuple(held["policy_version"]),
        finish=Finish(held["finish"]),
        reward=held.get("reward"),
        feedback=held.get("feedback"),
        trace=tuple(held.get("trace", ())),
    )
