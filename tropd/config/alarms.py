"""The section of a run that says when to warn and when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from tropd.base.ranges import Count, Positive, PositiveShare, Ranged
from tropd.errors import ConfigError

ENOUGH = math.log(1e9)
"""Nats of evidence that refuse a sampler.  By chance once in 1e9 looks at each of at most nine other ways to draw."""
Action = Literal["warn", "stop", "off"]
_ACTIONS = get_args(Action)


@dataclass(frozen=True, kw_only=True)
class AlarmConfig(Ranged):
    """What each alarm does, and from where on."""

    section = "alarms"

    non_finite: Action = "stop"
    """The loss or the gradient is not a finite number."""
    uniform_teacher: Action = "stop"
    """The teacher gives every token the same probability 1 / vocabulary."""
    uniform_teacher_tolerance: PositiveShare = 0.05
    """How near to -ln V and ln V counts, as a share of ln V. In (0, 1]."""
    mismatch: Action = "stop"
    """The sampler's log-probabilities are not the trainer's."""
    mismatch_nats: Positive = 0.05
    """Largest mean absolute difference.  A healthy bfloat16 engine has a standard deviation of at most 0.06. Above
    0."""
    length_blow_up: Action = "warn"
    """Answers grow suddenly and run into the limit."""
    length_blow_up_factor: Positive = 2.0
    """Times the running median of the mean length. Above 0."""
    length_blow_up_truncated: PositiveShare = 0.5
    """And this share of answers is cut off. In (0, 1]."""
    length_window: Count = 20
    """Steps in the running median; the alarm waits for a quarter of them. At least 1."""
    support_collapse: Action = "warn"
    """The student puts its probability where the teacher's top-k is not."""
    support_collapse_mass: PositiveShare = 0.2
    """Least mean student probability inside the teacher's top-k. In (0, 1]."""
    entropy_collapse: Action = "warn"
    """The student has become almost deterministic."""
    entropy_collapse_share: Positive = 0.1
    """Least share of the entropy of the first step. Above 0."""
    repetition: Action = "warn"
    """Answers repeat themselves."""
    repetition_share: PositiveShare = 0.5
    """Largest mean share of repeated 4-grams. In (0, 1]."""
    student_draws: Action = "stop"
    """What servers wrote was not drawn from the student."""
    teacher_draws: Action = "stop"
    """What a served teacher wrote was not drawn with the log-probabilities that it gives."""
    equal_answers: Action = "stop"
    """Answers to one prompt are too much alike to have been drawn apart."""
    draws_nats: Positive = ENOUGH
    """Evidence from which these three are raised: by chance once in exp(20.7) = 1e9 looks. Above 0."""
    no_signal: Action = "warn"
    """The gradient of the first step is exactly zero although the models differ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.default in _ACTIONS and value not in _ACTIONS:
                raise ConfigError(f"alarm {f.name!r} was set to {value!r}. Choose 'warn', 'stop' or 'off'.")
