"""The teachers of a run: found, loaded, and put together so that each prompt has its own.

find      tokenizers, compared with the student's before any weights are read
load      weights of those that compute in this process
engage    one that scores for all of them; `writer_of` one that writes for all of them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tropd.config.models import TeacherConfig
from tropd.config.run import Run
from tropd.data.stream import LazyPromptStream, PromptStream
from tropd.distributed.ranks import Ranks
from tropd.errors import DataError, EngineError, TeacherError, TropdError
from tropd.model.loading import load_model, load_tokenizer
from tropd.model.origins import Origin, name_of, origin_of
from tropd.model.tiling import Tiling
from tropd.rollout.engine import Engine
from tropd.rollout.transformers import TransformersEngine
from tropd.teachers.local import LocalTeacher, base_as_teacher, same_vocabulary, shared_vocab_size, without_adapter
from tropd.teachers.routed import Routed, RoutedWriter
from tropd.teachers.served import ServedTeacher, meet_teacher, serve_writer, served_size
from tropd.teachers.teacher import Teacher
from tropd.teachers.texts import CachedTexts
from tropd.types import Completion, Prompt, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = "teacher_texts.sqlite"


@dataclass(kw_only=True)
class TeacherParts:
    """One teacher on its way: what is known of it so far."""

    name: str
    several: bool
    """Whether there are others."""
    run: Run
    """As it would be with this teacher alone."""
    tokenizer: Any = None
    """None for the base under the student's adapter."""
    model: Any = None
    """None for the base, and where servers hold it."""
    served: ServedTeacher | None = None

    @property
    def config(self) -> TeacherConfig:
        return self.run.teacher

    @property
    def origin(self) -> str:
        """What its weights are called among the run's origins."""
        return f"teachers.{self.name}" if self.several else "teacher"

    def says(self, notes: Iterable[str]) -> list[str]:
        """Where there are several, a note bears the name of the one it is about."""
        return [f"teacher {self.name!r}: {note}" if self.several else note for note in notes]


@dataclass(frozen=True, kw_only=True)
class Engaged:
    """Teachers ready to score."""

    teacher: Teacher
    """Scores for all of them."""
    notes: tuple[str, ...]


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


def find(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[TeacherParts]:
    found = [TeacherParts(name=name, several=bool(run.teachers), run=run.taught_by(name)) for name in run.all_teachers]
    for one in found:
        if one.config.path != "base":
            with _named(run, one.name):
                one.tokenizer = load_tokenizer(one.config, "teacher")
                same_vocabulary(tokenizer, one.tokenizer)
    return found


def load(run: Run, found: Sequence[TeacherParts], device: torch.device) -> None:
    for one in found:
        if one.config.path != "base" and not one.config.servers:
            with _named(run, one.name):
                one.model = load_model(one.config, "teacher", device)


def shared_size(found: Sequence[TeacherParts], student: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids the student and all teachers know."""
    sizes = [shared_vocab_size(student, tokenizer, student, tokenizer)]
    for one in found:
        if one.model is not None:
            sizes.append(shared_vocab_size(student, tokenizer, one.model, one.tokenizer))
        elif one.config.servers:
            sizes.append(served_size(one.config, one.tokenizer))
    return min(sizes)


def engage(
    run: Run,
    found: Sequence[TeacherParts],
    student: Any,
    vocab_size: int,
    tiling: Tiling,
    directory: Path,
    world: Ranks,
) -> Engaged:
    """`vocab_size` and `tiling` are what forward passes of student and teachers share."""
    teachers: dict[str, Teacher] = {}
    notes: list[str] = []
    for one in found:
        if one.config.servers:
            with _named(run, one.name):
                one.served = meet_teacher(one.run, vocab_size, one.tokenizer, directory, world, name=one.name)
            teachers[one.name] = one.served.teacher
            notes += one.says(one.served.notes)
        elif one.model is not None:
            teachers[one.name] = LocalTeacher(one.model, name=one.name, vocab_size=vocab_size, tiling=tiling)
        else:
            teachers[one.name] = base_as_teacher(student, name=one.name, vocab_size=vocab_size, tiling=tiling)
    return Engaged(teacher=Routed(teachers) if run.teachers else teachers["default"], notes=tuple(notes))


def origin_of_teacher(one: TeacherParts) -> Origin:
    """The whole content of its files, or what its servers call themselves."""
    return origin_of(one.config, one.model) if one.served is None else {"server": one.served.identity}


def writer_of(
    run: Run,
    found: Sequence[TeacherParts],
    student: Any,
    size: int,
    prompts: tuple[PreTrainedTokenizerBase, PromptStream | LazyPromptStream],
    origins: Mapping[str, Origin],
    path: Path,
) -> tuple[Engine | None, list[str]]:
    """Whoever writes the teachers' texts, if the method asks for any, and what to know about it.  Texts are kept at
    `path`."""
    if not run.method.rollout.needs_teacher_text:
        return None, []
    writers: dict[str, Engine] = {}
    notes: list[str] = []
    for one in found:
        if one.served is not None:
            with _named(run, one.name):
                writer, remarks = serve_writer(one.config, one.served, *prompts, size, name=one.name)
            notes += one.says(remarks)
        else:
            writer = _local_writer(one, run, student, size)
        if one.config.text_cache:
            writer = CachedTexts(writer, path, name_of(origins.get(one.origin) or origins["student"]))
        writers[one.name] = writer
    return (RoutedWriter(writers) if run.teachers else writers["default"]), notes


def _local_writer(one: TeacherParts, run: Run, student: Any, size: int) -> Engine:
    model = student if one.model is None else one.model
    engine = TransformersEngine(model, vocab_size=size, max_batch=run.rollout.max_batch)
    return TeacherEngine(engine) if one.model is not None else TeacherEngine(engine, lambda: without_adapter(student))


def share_prompts(run: Run, prompts: Sequence[Prompt]) -> dict[str, int]:
    """How many are for each teacher; prompts for one that is not there are refused."""
    number = Counter(prompt.teacher for prompt in prompts)
    if unknown := [name for name in number if name not in run.all_teachers]:
        shown = ", ".join(f"{name!r} ({number[name]})" for name in unknown[:8])
        raise DataError(
            f"{sum(number[name] for name in unknown)} of {len(prompts)} prompts are for teachers that the run does "
            f"not have: {shown}. It has {', '.join(map(repr, run.all_teachers))}. Correct the column "
            f"{run.data.teacher_column!r} of {run.data.path}, or add a section [teachers.NAME] for each."
        )
    return {name: number[name] for name in run.all_teachers}


@contextmanager
def _named(run: Run, name: str) -> Iterator[None]:
    """Where there are several, what goes wrong is said with the name of the one it went wrong with."""
    try:
        yield
    except TropdError as error:
        if run.teachers:
            error.args = (f"teacher {name!r}: {error}", *error.args[1:])
        raise
