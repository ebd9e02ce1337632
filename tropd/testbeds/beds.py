"""The testbeds by name."""

from __future__ import annotations

import dataclasses

from tropd.testbeds.chain import Chain, ChainStyle
from tropd.testbeds.dialects import Dialects, DialectStyle
from tropd.testbeds.gym import Gym, GymStyle
from tropd.testbeds.pairs import Pairs
from tropd.testbeds.task import Lesson, Shape, Testbed, Training
from tropd.testbeds.told import Told

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

TOLD = Testbed(
    name="told",
    task=Told(),
    teacher_training=NANO_MILD.teacher_training,
    student_training=(
        Lesson(
            task=Told(share=0.6, wrong=0.3),
            steps=200,
            learning_rate=2e-3,
            mix=((1.0, ChainStyle()),),
            warmup=20,
        ),
    ),
    max_new_tokens=28,
)

FOREIGN = dataclasses.replace(
    NANO_MILD,
    name="foreign",
    others={"apart": NANO_MILD.task, "some": Pairs(operations=(2, 4), marks="=;"), "pairs": Pairs(operations=(2, 4))},
)

_FLUENT = ((1.0, DialectStyle()),)
_FOREIGN = (
    (0.3, DialectStyle(terse=True, foreign=0.5)),
    (0.7, DialectStyle(foreign=0.5, mixed=0.3)),
)


def _lessons(short: int, long: int) -> tuple[Training, ...]:
    """Lessons from problems of one or two steps up to twenty: a model that starts with the longest learns none."""
    return (
        Lesson(task=Dialects(steps=(1, 3)), steps=short, learning_rate=8e-3, mix=_FLUENT),
        Lesson(task=Dialects(steps=(2, 10)), steps=120, learning_rate=6e-3, mix=_FLUENT, batch=32),
        Lesson(task=Dialects(steps=(12, 22)), steps=120, learning_rate=5e-3, mix=_FLUENT, batch=12),
        Training(steps=long, learning_rate=5e-3, mix=_FLUENT, batch=12),
    )


LONG = Testbed(
    name="long",
    task=Dialects(),
    teacher_training=_lessons(450, 200),
    teacher_accuracy=0.8,
    student=Shape(width=48, hidden=96),
    student_training=(
        *_lessons(500, 350),
        Training(steps=60, learning_rate=1e-3, mix=_FOREIGN, batch=12, warmup=10),
    ),
    max_new_tokens=256,
    num_held_out=128,
    num_prompts=16,
    steps=60,
    learning_rate=1e-3,
)

_SHORTER = Dialects(steps=(6, 8), most=9, dialects="abcdef")


_SHORTER_LESSONS = (
    Lesson(task=dataclasses.replace(_SHORTER, steps=(1, 3)), steps=300, learning_rate=8e-3, mix=_FLUENT),
    Lesson(task=dataclasses.replace(_SHORTER, steps=(3, 6)), steps=80, learning_rate=6e-3, mix=_FLUENT, batch=32),
    Training(steps=100, learning_rate=5e-3, mix=_FLUENT, batch=24),
)
MIDDLE = dataclasses.replace(
    LONG,
    name="middle",
    task=_SHORTER,
    teacher_training=_SHORTER_LESSONS,
    student=None,
    student_training=(Training(steps=60, learning_rate=1e-3, mix=_FOREIGN, batch=24, warmup=10),),
    max_new_tokens=100,
    steps=30,
)

_WORKED = ((1.0, GymStyle()),)
GYM = Testbed(
    name="gym",
    task=Gym(),
    teacher_training=(
        Training(steps=400, learning_rate=4e-3, mix=_WORKED),
        Training(steps=400, learning_rate=4e-3, mix=_WORKED),
        Training(steps=400, learning_rate=3e-3, mix=_WORKED),
        Training(steps=400, learning_rate=3e-3, mix=_WORKED),
    ),
    teacher_accuracy=0.85,
    student_training=(
        Training(
            steps=80,
            learning_rate=1e-3,
            mix=((0.9, GymStyle(terse=True, noise=0.3)), (0.1, GymStyle(noise=0.3))),
        ),
    ),
    max_new_tokens=48,
)

_ALL = (NANO_MILD, NANO_HARD, MAIN_MILD, MAIN_HARD, MIDDLE, LONG, GYM, TOLD, FOREIGN)
TESTBEDS: dict[str, Testbed] = {bed.name: bed for bed in _ALL}
