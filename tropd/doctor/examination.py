"""All checks, in the order of a run; checks that an error makes impossible are left out."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tropd.briefings.briefing import AsStudent
from tropd.config.run import Run
from tropd.doctor.bridge import check_bridge, check_bridges_of_readers
from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.cost import check_disk, check_memory
from tropd.doctor.method import (
    check_dropout,
    check_guidance,
    check_objections,
    check_precision,
    check_support,
)
from tropd.doctor.prompts import check_graders, check_lengths, check_prompts, check_unknown
from tropd.doctor.readers import check_needs, check_readers, nobody_teaches, says_as_teacher
from tropd.doctor.servers import check_servers
from tropd.doctor.subject import Subject, read_subject, subject_of
from tropd.doctor.texts import (
    check_briefing,
    check_generation,
    check_named_tokens,
    check_stops,
    check_templates,
    check_tokenizers,
)
from tropd.errors import ConfigError, TropdError
from tropd.model.loading import model_fingerprint
from tropd.version import outside

if TYPE_CHECKING:
    from tropd.training.assembly import Parts

Look = Callable[[Subject], Iterator[Check]]

OF_A_TEACHER: tuple[Look, ...] = (check_tokenizers, check_bridge, check_stops, check_templates, check_briefing)
"""Checks that run for each teacher."""

QUICK: tuple[Look, ...] = (
    check_bridges_of_readers,
    check_lengths,
    check_prompts,
    check_unknown,
    check_graders,
    check_support,
    check_dropout,
    check_precision,
    check_guidance,
)
"""Checks that `tropd train` runs too, once everything is loaded: without rollouts, without loading weights again."""

READ: tuple[Look, ...] = (
    *QUICK,
    check_generation,
    check_named_tokens,
    check_needs,
    check_readers,
    check_objections,
    check_memory,
    check_disk,
)


def quick_checks(parts: Parts) -> list[str]:
    """The checks without rollouts: errors are raised, warnings returned.  Servers were examined when they were met."""
    subject = subject_of(parts)
    checks = [
        *_of_teachers(subject, OF_A_TEACHER),
        *_looks(subject, QUICK),
    ]
    refusals = [check for check in checks if check.level == "error"]
    if refusals:
        more = f" `tropd doctor` shows {len(refusals) - 1} more." if len(refusals) > 1 else ""
        raise ConfigError(f"{refusals[0]}{more}")
    return [str(check) for check in (*checks, *_same_weights(parts)) if check.level == "warning"]


def examine(run: Run, *, num_prompts: int = 8, max_new_tokens: int = 64) -> list[Check]:
    """All checks of a run before its first step.  Nothing is written.

    With `num_prompts` = 0 only configurations, tokenizers and data are loaded.
    """
    subject, checks = read_subject(run)
    checks += check_versions()
    if subject is None:
        return checks
    checks += [*_of_teachers(subject, OF_A_TEACHER), *_looks(subject, READ)]
    checks += _of_teachers(subject, [partial(check_servers, weights=num_prompts > 0)])
    if num_prompts == 0 or any(check.level == "error" for check in checks):
        return checks
    return checks + _measure(run, num_prompts, max_new_tokens)


def check_versions() -> Iterator[Check]:
    """Warn of packages in versions that tropd was not run with."""
    for package in outside():
        yield warning(
            "versions",
            f"{package.objection}.",
            "It may be slower or fail. `tropd env` lists all; pip install 'tropd[tested]' goes back to what was run.",
        )


def _looks(subject: Subject, looks: Sequence[Look]) -> Iterator[Check]:
    for look in looks:
        yield from look(subject)


def _of_teachers(subject: Subject, looks: Sequence[Look]) -> Iterator[Check]:
    """The checks of each teacher, with its own prompts."""
    looks = [look for look in looks if look is check_stops] if nobody_teaches(subject.run) else looks
    for name in subject.teachers:
        yield from _bearing(subject.run, name, _looks(subject.taught_by(name), looks))


def _bearing(run: Run, name: str, checks: Iterable[Check]) -> Iterator[Check]:
    """With several teachers, each check names its teacher."""
    for check in checks:
        yield dataclasses.replace(check, name=f"{name}: {check.name}") if run.teachers else check


def _measure(run: Run, num_prompts: int, max_new_tokens: int) -> list[Check]:
    """Load the models, let the student write, take one step.  Teacher texts go to a temporary folder."""
    from tropd.doctor import readings
    from tropd.doctor.sample import draw_sample
    from tropd.training.assembly import load_parts

    of_a_teacher = (readings.check_scores, readings.check_agreement, readings.check_ends, readings.check_sampler)
    of_a_teacher = (readings.check_sampler,) if nobody_teaches(run) else of_a_teacher
    looks = (readings.check_step, readings.check_seconds)
    with tempfile.TemporaryDirectory() as folder:
        try:
            parts = load_parts(run, Path(folder))
        except TropdError as refusal:
            return [error("models", str(refusal))]
        who = "the student is" if nobody_teaches(run) else "student and teacher are"
        loaded = ok("models", f"{who} loaded; {parts.vocab_size} tokens are shared")
        try:
            sample = draw_sample(parts, num_prompts, max_new_tokens)
        except TropdError as refusal:
            return [loaded, error("one step", str(refusal))]
        finally:
            for part in (parts.engine, *dict.fromkeys(parts.readers.values()), parts.writer):
                if part is not None:
                    part.close()
        checks = [loaded]
        for name, found in sample.diagnoses.items():
            checks += _bearing(run, name, (check for look in of_a_teacher for check in look(parts, found)))
        return [*checks, *(check for look in looks for check in look(parts, sample))]


def _same_weights(parts: Parts) -> Iterator[Check]:
    models = {name: teacher.forward.model for name, teacher in parts.teacher.teachers.items() if teacher.forward}
    run, readers = parts.run, parts.run.method.objective.readers
    if not readers or not all(says_as_teacher(run, name) for name in readers):
        return
    told = {name for name, x in run.all_teachers.items() if not isinstance(x.briefing, AsStudent)}
    others = {name: model for name, model in models.items() if model is not parts.model and name not in told}
    if not others:  # nothing to compare with, and reading all weights takes its time
        return
    alike = warning(
        "teacher",
        "student and teacher have the same weights, so log-ratios start at zero and nothing is learned from them.",
        "Set teacher.path to a stronger model.",
    )
    student = model_fingerprint(parts.model)
    for name, model in others.items():
        if model_fingerprint(model) == student:
            yield from _bearing(run, name, [alike])


__all__ = ["examine", "quick_checks"]
