"""The engines that write the teachers' texts, where a method begins with them, or each token with the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropd.bridge.translation import Bridge
from tropd.config.policies import writes_alone
from tropd.config.run import Run
from tropd.data.stream import LazyPromptStream, PromptStream
from tropd.errors import ConfigError, EngineError, TeacherError
from tropd.model.origins import Origin, name_of
from tropd.rollout.engine import Engine
from tropd.rollout.joint import JointEngine
from tropd.rollout.stage import Pair
from tropd.rollout.transformers import TransformersEngine
from tropd.teachers.bridged import BridgedWriter
from tropd.teachers.loading import TeacherParts, own_size
from tropd.teachers.local import without_adapter
from tropd.teachers.routed import RoutedPair, RoutedWriter
from tropd.teachers.served import serve_writer
from tropd.teachers.teacher import Teacher
from tropd.teachers.texts import CachedTexts
from tropd.types import Completion, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TeacherEngine(Engine):
    """The teacher as a writer, inside a context such as the adapter switched off."""

    def __init__(self, engine: Engine, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.engine, self.within, self.context = engine, within, engine.context

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        try:
            with self.within():
                return self.engine.generate(requests)
        except EngineError as error:
            raise TeacherError(f"the teacher cannot write: {error}") from error

    def close(self) -> None:
        self.engine.close()


def writer_of(
    run: Run,
    teachers: Sequence[TeacherParts],
    student: Any,
    size: int,
    prompts: tuple[PreTrainedTokenizerBase, PromptStream | LazyPromptStream],
    origins: Mapping[str, Origin],
    path: Path,
) -> tuple[Engine | None, list[str]]:
    """The engine that writes the teachers' texts, if the method needs any, and notes on it.  `path` keeps the texts."""
    if not run.policy.needs_teacher_text:
        return None, []
    writers: dict[str, Engine] = {}
    notes: list[str] = []
    for teacher in (x for x in teachers if not x.reader):
        rows = own_size(teacher) if teacher.config.bridge else size
        if teacher.served is not None:
            with teacher.named():
                writer, remarks = serve_writer(teacher.config, teacher.served, *prompts, rows, name=teacher.name)
            notes += teacher.says(remarks)
        elif teacher.own is not None:
            with teacher.named():
                writer = _own_writer(teacher.own, run)
        else:
            writer = _local_writer(teacher, run, student, rows)
        if teacher.config.text_cache and not teacher.config.moves:
            writer = CachedTexts(writer, path, name_of(origins.get(teacher.origin) or origins["student"]))
        if teacher.config.bridge:  # text by text: its tokens are other tokens
            writer = BridgedWriter(
                writer, Bridge(student=prompts[0], teacher=teacher.tokenizer, config=teacher.config.bridge)
            )
        writers[teacher.name] = writer
    return (RoutedWriter(writers) if run.teachers else writers["default"]), notes


def pair_of(run: Run, teachers: Sequence[TeacherParts], student: Engine, size: int) -> Pair | None:
    """Student and teachers as they write together, if the policy asks for that."""
    if not run.policy.writes_jointly:
        return None
    pairs: dict[str, Pair] = {}
    for teacher in (x for x in teachers if not x.reader):
        if teacher.own is not None:
            raise ConfigError(writes_alone(run.policy, f"the teacher is a {type(teacher.own).__name__}"))
        if not isinstance(student, TransformersEngine):
            raise ConfigError(writes_alone(run.policy, f"a {type(student).__name__} writes as the student"))
        model, within = _model_of(teacher, student.model)
        with teacher.named():
            engine = TransformersEngine(model, vocab_size=size, max_batch=run.rollout.max_batch, within=within)
        sampling, copies = run.rollout.teacher_sampling, teacher.swapped is None
        pairs[teacher.name] = JointEngine(student, engine, sampling, copies=copies)
    return RoutedPair(pairs) if run.teachers else pairs["default"]


def _own_writer(teacher: Teacher, run: Run) -> Engine:
    """The teacher itself, if it is an engine too; it is not used if the data set brings all texts."""
    if isinstance(teacher, Engine):
        return TeacherEngine(teacher)
    if run.data.response_column is None and run.data.last_assistant != "prefix":
        asked = run.rollout.policy
        asking = f"method {run.method.name!r}" if asked is None else f"policy {asked.name!r}"
        raise ConfigError(
            f"{asking} needs the teacher's texts, but a {type(teacher).__name__} writes none. Let it "
            "inherit from tropd.rollout.engine.Engine as well, set data.response_column, or use another one."
        )
    return TeacherEngine(Engine())


def _local_writer(teacher: TeacherParts, run: Run, student: Any, size: int) -> Engine:
    """The teacher's own model, or the student as it is or with its adapter switched off."""
    if teacher.config.direction is not None:
        raise ConfigError(
            f"teacher {teacher.name!r} has a direction, with which it reads and cannot write, but method "
            f"{run.method.name!r} needs its texts. Give the direction to a reader [readers.NAME]."
        )
    model, within = _model_of(teacher, student)
    return TeacherEngine(TransformersEngine(model, vocab_size=size, max_batch=run.rollout.max_batch), within)


def _model_of(teacher: TeacherParts, student: Any) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """The model that writes as a teacher, and the context in which it does."""
    if teacher.model is not None:
        return teacher.model, nullcontext
    if teacher.config.path != "base":
        return student, nullcontext
    return student, teacher.swapped or partial(without_adapter, student)
