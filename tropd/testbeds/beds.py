"""The testbeds by name."""

from __future__ import annotations

import dataclasses

from tropd.testbeds.chain import Chain, ChainStyle
from tropd.testbeds.task import Shape, Testbed, Training

_VERBOSE = ChainStyle(corrupt=0.08)
_NOISY, _TERSE = ChainStyle(noise=0.3), ChainStyle(terse=True)
_MILD, _HARD = ((0.7, _TERSE), (0.3, _NOISY)), ((0.98, _TERSE), (0.02, _NOISY))

NANO_MILD = Testbed(
    name="nano-mild",
    task=Chain(modulus=5, operations=(2, 4)),
    teacher_training=(
        Training(steps=300, learning_rate=4e-3, mix=((1.0, _VERBOSE),)),
        Training(steps=300, learning_rate=3e-3, mix=((1.0, _VERBOSE),)),
    ),
    student_training=(Training(steps=60, learning_rate=1e-3, mix=_MILD),),
    max_new_tokens=28,
)
NANO_HARD = dataclasses.replace(
    NANO_MILD, name="nano-hard", student_training=(Training(steps=120, learning_rate=1e-3, mix=_HARD),)
)
MAIN_MILD = Testbed(
    name="main-mild",
    task=Chain(modulus=10, operations=(3, 6)),
    teacher=Shape(width=96, layers=3, hidden=192),
    teacher_training=(
        Training(steps=400, learning_rate=3e-3, mix=((1.0, _VERBOSE),)),
        Training(steps=250, learning_rate=2.25e-3, mix=((1.0, _VERBOSE),)),
        Training(steps=300, learning_rate=2.25e-3, mix=((1.0, _VERBOSE),)),
    ),
    teacher_accuracy=0.8,
    student_training=(Training(steps=100, learning_rate=1e-3, mix=_MILD),),
    max_new_tokens=48,
    num_train=2048,
    steps=100,
    learning_rate=2e-4,
)
MAIN_HARD = dataclasses.replace(
    MAIN_MILD, name="main-hard", student_training=(Training(steps=150, learning_rate=1e-3, mix=_HARD),)
)

TESTBEDS: dict[str, Testbed] = {bed.name: bed for bed in (NANO_MILD, NANO_HARD, MAIN_MILD, MAIN_HARD)}
