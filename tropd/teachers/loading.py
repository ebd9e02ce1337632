"""The teachers of a run: find, load and combine them so that each prompt has its own.

find      tokenizers, compared with the student's before any weights are read
load      weights of teachers in this process
engage    a single object that scores for all of them; `writer_of` likewise for writing
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tropd.base.names import Own
from tropd.config.mixtures import unread
from tropd.config.models import ReaderConfig, TeacherConfig
from tropd.config.run import Run
from tropd.config.tables import to_dict
from tropd.data.briefer import Briefer
from tropd.data.listener import Candidate
from tropd.distributed.ranks import Ranks
from tropd.errors import ConfigError, TropdError
from tropd.model.loading import load_model, load_tokenizer
from tropd.model.tiling import Tiling
from tropd.objective.evidence import Needs
from tropd.teachers.bridged import Bridged
from tropd.teachers.chat import meet_chat
from tropd.teachers.combined import Combined
from tropd.teachers.directions import added
from tropd.teachers.following import Follower, Swapped
from tropd.teachers.local import LocalTeacher, base_as_teacher, same_vocabulary, shared_vocab_size
from tropd.teachers.moved import MovedTeacher
from tropd.teachers.routed import Routed
from tropd.teachers.served import ServedTeacher, meet_teacher, served_size
from tropd.teachers.teacher import Teacher
from tropd.types import READER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = "teacher_texts.sqlite"


@dataclass(kw_only=True)
class TeacherParts:
    """One teacher while it is loaded: everything known so far."""

    name: str
    several: bool
    """Whether there are several teachers."""
    config: TeacherConfig
    tokenizer: Any = None
    """None for the student and its base."""
    model: Any = None
    """None for the student and its base, and if servers hold it."""
    served: ServedTeacher | None = None
    own: Teacher | None = None
    """A teacher of the user's own."""
    swapped: Swapped | None = None
    """Its adapter, if it follows an adapted student."""
    given: bool = False
    """Whether it is an object that no file names."""
    reader: bool = False
    """Whether it reads every response beside the prompts' teachers, and writes nothing."""

    @property
    def origin(self) -> str:
        """The name of its weights among the run's origins."""
        if self.reader:
            return f"readers.{self.name}"
        return f"teachers.{self.name}" if self.several else "teacher"

    def says(self, notes: Iterable[str]) -> list[str]:
        """Notes; with several teachers each note names its teacher."""
        return [f"{self._said}: {note}" if self.several else note for note in notes]

    @property
    def _said(self) -> str:
        return f"{'reader' if self.reader else 'teacher'} {self.name!r}"

    @contextmanager
    def named(self) -> Iterator[None]:
        """Inside the block, with several teachers, errors name their teacher."""
        try:
            yield
        except TropdError as error:
            if self.several:
                error.args = (f"{self._said}: {error}", *error.args[1:])
            raise


@dataclass(frozen=True, kw_only=True)
class Engaged:
    """Teachers ready to score."""

    teacher: Teacher
    """The teacher that scores for all of them."""
    readers: Mapping[str, Teacher]
    """Everybody who reads, by name; "teacher" is that teacher."""
    notes: tuple[str, ...]
    followers: tuple[Follower, ...] = ()
    """Those that move with the student."""


def find(run: Run, tokenizer: PreTrainedTokenizerBase, given: Any = None) -> list[TeacherParts]:
    """Find the teachers.  `given`, a Teacher or a model with its tokenizer, is the only one if it is set."""
    unread(run)  # or else a name that is a slip is refused
    several = bool(run.teachers)
    teachers = [TeacherParts(name=name, several=several, config=x) for name, x in run.all_teachers.items()]
    teachers += [
        TeacherParts(name=name, several=True, config=x, reader=True)
        for name, x in run.all_readers.items()
        if x.made_of is None and not shares_model(run, x)
    ]
    for teacher in teachers:
        if teacher.config.is_student:
            continue
        said = run.said_readers if teacher.reader else run.said_teachers
        if said[teacher.name].path == "start" and "student" in run.given:
            raise ConfigError(
                'teacher.path is "start", whose files are the student\'s, but the student was given in Python. Give a '
                "copy of it as the teacher, or set student.path."
            )
        with teacher.named():
            of = None if teacher.reader else given
            teacher.given = of is not None
            if isinstance(of, Teacher):
                teacher.own = of
            elif of is not None:
                teacher.model, teacher.tokenizer = of
            elif teacher.config.is_own:
                teacher.own = make_teacher(teacher.config)
            elif not teacher.config.only_writes:
                teacher.tokenizer = load_tokenizer(teacher.config, "teacher")
            if teacher.tokenizer is not None and not teacher.config.bridge:
                same_vocabulary(tokenizer, teacher.tokenizer)
            if teacher.own is not None:
                _check_own(teacher.own, teacher.config)
    return teachers


def shares_model(run: Run, reader: ReaderConfig) -> bool:
    """Whether it has the model of the run's teacher, however that is said."""
    if reader.path == READER:
        return True
    if "teacher" in run.given or not (teacher := run.all_teachers.get("default")) or teacher.direction:
        return False
    own, theirs = ({**to_dict(x), "briefing": None, "direction": None} for x in (reader, teacher))
    return own == theirs


def make_teacher(config: TeacherConfig) -> Teacher:
    """Make the user's own teacher with its settings."""
    return Own(name=config.path, knobs=config.knobs).make(Teacher, "teacher")


def _check_own(teacher: Teacher, config: TeacherConfig) -> None:
    """What a class of the user's own can get wrong before it is asked anything."""
    said = f"teacher {type(teacher).__name__}"
    if config.bridge is not None:
        raise ConfigError(
            f"{said} has a bridge, which is for a model with a tokenizer of its own, but a class reads the student's "
            "tokens. Give the model and its tokenizer, or leave the bridge out."
        )
    if type(teacher).score is Teacher.score:
        raise ConfigError(f"{said} scores nothing. Define score(self, request) in it.")
    if not isinstance(teacher.capabilities, Needs):
        raise ConfigError(f"{said}: capabilities is {teacher.capabilities!r}. Make it of Needs, such as Needs.SAMPLED.")
    if not (teacher.context is None or (isinstance(teacher.context, int) and teacher.context > 0)):
        raise ConfigError(f"{said}: context is {teacher.context!r}. Give a number of tokens, or None.")


def load(teachers: Sequence[TeacherParts], device: torch.device) -> None:
    for teacher in teachers:
        if teacher.given and teacher.model is not None:
            teacher.model = teacher.model.to(device).eval()
        elif teacher.config.is_model and (teacher.config.follows or not teacher.config.servers) and not teacher.own:
            with teacher.named():
                teacher.model = load_model(teacher.config, "teacher", device)


def shared_size(teachers: Sequence[TeacherParts], student: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids the student and all teachers share."""
    sizes = [shared_vocab_size(student, tokenizer, student, tokenizer)]
    for teacher in (x for x in teachers if not x.config.bridge):
        if teacher.model is not None:
            sizes.append(shared_vocab_size(student, tokenizer, teacher.model, teacher.tokenizer))
        elif teacher.tokenizer is not None and teacher.config.servers and not teacher.config.follows:
            sizes.append(served_size(teacher.config, teacher.tokenizer))
    return min(sizes)


def own_size(teacher: TeacherParts) -> int:
    """How many token ids a teacher with a tokenizer of its own has."""
    if teacher.model is None:
        return served_size(teacher.config, teacher.tokenizer)
    return shared_vocab_size(teacher.model, teacher.tokenizer, teacher.model, teacher.tokenizer)


def engage(
    run: Run,
    teachers: Sequence[TeacherParts],
    student: Any,
    vocab_size: int,
    tiling: Tiling,
    directory: Path,
    world: Ranks,
) -> Engaged:
    """`vocab_size` and `tiling` are shared by the forward passes of student and teachers."""
    objective = run.method.objective
    ready: dict[str, Teacher] = {}
    notes, followers = list[str](), list[Follower]()
    for teacher in teachers:
        size = own_size(teacher) if teacher.config.bridge else vocab_size
        local = partial(LocalTeacher, name=teacher.name, vocab_size=size, tiling=tiling)
        top_k = objective.top_k_of(teacher.name if teacher.reader else READER)
        if teacher.config.only_writes:
            with teacher.named():
                teacher.served = meet_chat(teacher.config, directory, world, teacher.name)
            ready[teacher.origin] = teacher.served.teacher
            notes += teacher.says(teacher.served.notes)
        elif teacher.config.servers and not teacher.config.follows:
            with teacher.named():
                teacher.served = meet_teacher(
                    teacher.config, top_k, size, teacher.tokenizer, directory, world, name=teacher.name
                )
            ready[teacher.origin] = teacher.served.teacher
            notes += teacher.says(teacher.served.notes)
        elif teacher.own is not None:
            ready[teacher.origin] = teacher.own
        elif teacher.model is not None:
            ready[teacher.origin] = local(teacher.model)
        elif teacher.config.path == "base" and not teacher.config.follows:
            ready[teacher.origin] = base_as_teacher(student, name=teacher.name, vocab_size=vocab_size, tiling=tiling)
        else:
            teacher.swapped = Swapped(student) if teacher.config.follows else None
            ready[teacher.origin] = local(student, within=teacher.swapped or nullcontext)
        with teacher.named():
            ready[teacher.origin] = with_direction(ready[teacher.origin], teacher.config, teacher.name)
        if isinstance(single := ready[teacher.origin], LocalTeacher) and teacher.config.follows:
            followers.append(Follower(teacher.origin, teacher.config.follow, single, teacher.swapped))
            if teacher.config.servers:
                ready[teacher.origin] = MovedTeacher(teacher.config, followers[-1], top_k, directory, world)
        if teacher.config.bridge:
            ready[teacher.origin] = Bridged(ready[teacher.origin], teacher.tokenizer, size, teacher.config.bridge)
    teaching = {x.name: ready[x.origin] for x in teachers if not x.reader}
    teacher = Routed(teaching) if teachers[0].several else teaching["default"]
    readers = {READER: teacher, **{x.name: ready[x.origin] for x in teachers if x.reader}}
    for name, config in run.all_readers.items():
        if name not in readers and config.made_of is None:
            readers[name] = with_direction(teacher, config, name)
    made = {name: mixture for name, x in run.all_readers.items() if (mixture := x.made_of)}
    while ready_now := [name for name in made if set(made[name].readers) <= readers.keys()]:  # no circles: it ends
        for name in ready_now:
            readers[name] = Combined(name, made.pop(name), readers, tiling.tile_tokens)
    everybody = {name: readers[name] for name in (READER, *run.all_readers)}
    return Engaged(teacher=teacher, readers=everybody, notes=tuple(notes), followers=tuple(followers))


def with_direction(teacher: Teacher, config: TeacherConfig, name: str) -> Teacher:
    """The teacher as it reads with the direction of its configuration, if that has one."""
    if config.direction is None:
        return teacher
    if not isinstance(teacher, LocalTeacher):
        raise ConfigError(
            f"{name!r} has a direction, which is added to a layer of a model in this process, but its model is a "
            f"{type(teacher).__name__}. Set its path to a model."
        )
    return teacher.steered(added(config.direction, teacher.forward.model, name))


def briefer_of(
    run: Run, teachers: Sequence[TeacherParts], engaged: Engaged, tokenizer: PreTrainedTokenizerBase
) -> Briefer:
    """What teachers and readers read; `tokenizer` is the student's."""
    singles, own = engaged.teacher.teachers, {x.name: x.tokenizer for x in teachers if x.reader}
    shared = None if run.teachers else teachers[0].tokenizer  # of readers that have the teacher's model
    told = {
        x.name: Candidate(config=x.config, tokenizer=x.tokenizer, context=singles.get(x.name, engaged.teacher).context)
        for x in teachers
        if not x.reader
    }
    readers = {
        name: Candidate(config=x, tokenizer=own.get(name, shared), context=engaged.readers[name].context)
        for name, x in run.all_readers.items()
        if x.made_of is None
    }
    return Briefer(run, tokenizer, told, readers)
