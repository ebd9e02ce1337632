"""Who reads the responses of a run: whose model each has, what it is told, what it is asked for, what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from tropd.base.names import shown
from tropd.briefings.briefing import AsStudent
from tropd.briefings.reader import Reader, model_text, told_text
from tropd.config.mixtures import unread
from tropd.config.models import ReaderConfig, TeacherConfig
from tropd.config.run import Run
from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.cost import gib, parameters_of
from tropd.doctor.subject import Subject, offered_by
from tropd.errors import TropdError
from tropd.methods.describe import asked_text
from tropd.model.loading import choose_device, choose_dtype
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.teachers.combined import Combined
from tropd.teachers.loading import shares_model
from tropd.teachers.routed import Routed
from tropd.teachers.teacher import Teacher
from tropd.training.asked import check_evidence
from tropd.types import READER


class _Capable(Teacher):
    """Stands for a teacher that is not loaded; it has only `capabilities`."""

    def __init__(self, capabilities: Needs) -> None:
        self.capabilities = capabilities


def asked_of(run: Run) -> dict[str, Needs]:
    """What each reader is asked for, those included of whom others are made."""
    objective, readers = run.method.objective, run.all_readers
    asked = {name: objective.needs_of(name) & OF_TEACHER for name in objective.readers}
    new = list(asked)
    while new:
        reader = readers.get(new.pop())
        for part in reader.made_of.readers if reader and reader.made_of else ():
            if part not in asked:
                new.append(part)
            made = part in readers and readers[part].made_of is not None
            asked[part] = asked.get(part, Needs.NOTHING) | (Needs.NOTHING if made else Needs.HIDDEN)
    return asked


def has_teachers_model(run: Run, name: str) -> bool:
    """Whether a reader's forward passes are those of the run's teacher."""
    reader = run.all_readers.get(name)
    return reader is None or (reader.made_of is None and shares_model(run, reader))


def nobody_teaches(run: Run) -> bool:
    """Whether the method learns from texts of the data set alone."""
    return not asked_of(run) and not run.policy.needs_teacher_text and not run.policy.writes_jointly


def says_as_teacher(run: Run, name: str) -> bool:
    """Whether a reader says what the teacher says when that is told as much as the student: it is the teacher, or has
    its model and nothing else, or is made of such readers."""
    if name == READER:  # several teachers are looked at one by one
        teacher = run.all_teachers.get("default")
        return teacher is None or _is_plain(teacher)
    reader = run.all_readers[name]
    if reader.made_of is not None:
        return all(says_as_teacher(run, part) for part in reader.made_of.readers)
    return _is_plain(reader) and shares_model(run, reader)


def _is_plain(config: TeacherConfig) -> bool:
    """Whether a model reads what the student reads, and as it is."""
    return isinstance(config.briefing, AsStudent) and config.direction is None


def check_needs(subject: Subject) -> Iterator[Check]:
    """Compare the evidence that the method reads with what its readers offer."""
    run = subject.run
    several = {name: _Capable(offered_by(config)) for name, config in run.teachers.items()}
    teacher = Routed(several) if several else _Capable(subject.capabilities)
    readers: Mapping[str, Teacher] = {READER: teacher, **{n: _stands(run, n, teacher) for n in run.all_readers}}
    try:
        check_evidence(run.method.objective, readers, shown(run.method.name), subject.grader is not None)
    except TropdError as refusal:
        yield error("method", str(refusal))
        return
    if nobody_teaches(run):
        yield ok("method", f"'{shown(run.method.name)}' learns from texts of the data set, and nobody teaches")
        return
    names = ", ".join(str(need.name).lower() for need in run.method.needs & OF_TEACHER) or "nothing"
    whom = "its readers" if set(run.method.objective.readers) - {READER} else "the teacher"
    yield ok("method", f"'{shown(run.method.name)}' asks {whom} for {names}, which it can answer")


def _stands(run: Run, name: str, teacher: Teacher) -> Teacher:
    reader = run.all_readers[name]
    if reader.made_of is not None:
        return _Capable(Combined.capabilities)
    return teacher if shares_model(run, reader) else _Capable(offered_by(reader))


def check_readers(subject: Subject) -> Iterator[Check]:
    """Say who reads what, where others read than the teacher."""
    run = subject.run
    if said := readers_said(run):
        yield ok("readers", "\n".join(said))
    try:
        idle = unread(run)
    except TropdError as refusal:
        yield error("readers", str(refusal))
        return
    if idle:
        yield warning(
            "readers",
            f"{shown(run.method.name)!r} reads nothing of {', '.join(map(repr, idle))}, whose models are loaded all "
            "the same.",
            f"Take the section [readers.{idle[0]}] out, or use a method that reads it.",
        )


def readers_said(run: Run, device: torch.device | None = None) -> list[str]:
    """A sentence on each, where others read than the teacher."""
    asked = asked_of(run)
    if not {*asked} - {READER}:
        return []
    return [_said(run, name, asked_text(needs), device or choose_device(run.device)) for name, needs in asked.items()]


def _said(run: Run, name: str, asked: str, device: torch.device) -> str:
    reader = run.all_readers.get(name)
    if reader is None:
        told = f"told {told_text(run.all_teachers['default'].briefing)}; " if not run.teachers else ""
        return f"{name}: {run.teachers_said}; {told}asked for {asked}."
    if reader.made_of is not None:
        return f"{name}: {reader.made_of}, which costs no weights and no forward pass; asked for {asked}."
    configured = run.readers[name].path if name in run.readers else run.method.readers[name].model
    model = model_text(Reader(model=configured, direction=reader.direction, follow=reader.follow))
    return f"{name}: {model}, {_copy(run, reader, device)}; told {told_text(reader.briefing)}; asked for {asked}."


def _copy(run: Run, reader: ReaderConfig, device: torch.device) -> str:
    """What its weights take."""
    if reader.servers:
        return f"on {len(reader.servers)} server{'s' if len(reader.servers) > 1 else ''}"
    if reader.follows:
        return "which follows the student"
    if not reader.is_model or shares_model(run, reader):
        return "without a second copy"
    return f"{gib(parameters_of(reader) * choose_dtype(reader.dtype, device).itemsize)} of its own"
