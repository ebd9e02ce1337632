"""Everything about a run that needs no weights: configurations, tokenizers, prompts, graders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tropd.config.checks import check_policy
from tropd.config.models import ModelConfig, ReaderConfig, TeacherConfig
from tropd.config.run import Run
from tropd.config.stages import DataConfig
from tropd.data import chat
from tropd.data.briefer import Briefer, check_briefings
from tropd.data.graders import Grader, resolve_grader
from tropd.data.listener import Candidate
from tropd.data.prompts import load_prompts
from tropd.data.stream import LazyPromptStream, PromptStream
from tropd.doctor.check import Check, error, ok, warning
from tropd.errors import ConfigError, TropdError
from tropd.model.head import causal_lm_of
from tropd.model.loading import load_tokenizer
from tropd.objective.evidence import Needs
from tropd.servers.dialects import dialect_of
from tropd.teachers.bridged import Bridged
from tropd.teachers.chat import ChatTeacher
from tropd.teachers.loading import shares_model
from tropd.teachers.local import LocalTeacher, same_vocabulary
from tropd.teachers.routed import shared_by
from tropd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tropd.training.assembly import Parts

STREAMED = 64  # prompts looked at where they are not all in memory


@dataclass(frozen=True, kw_only=True)
class Side:
    """Student or teacher."""

    whose: str
    tokenizer: PreTrainedTokenizerBase
    config: Any
    """The text configuration of the model."""
    generation: Any
    """Its generation configuration."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return chat.stop_ids(self.tokenizer, self.generation)

    @property
    def context(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    def token(self, index: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(index)!r} ({index})"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The input of the checks.  `prompts` is empty if they cannot be read, which another check reports."""

    run: Run
    student: Side
    teachers: Mapping[str, Side | None]
    """By name; None for the base under the student's adapter, or for the user's own teacher."""
    capabilities: Needs
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...] = ()
    grader: Grader | None = None
    eval_grader: Grader | None = None
    briefer: Briefer | None = None
    readers: Mapping[str, Side] = field(default_factory=dict)
    """Those with a model of their own, where they are read from files."""

    @property
    def teacher(self) -> Side | None:
        """The only one."""
        if self.run.teachers:
            raise ConfigError(
                f"memory and time are estimated for one teacher, but the run has {', '.join(self.teachers)}. Name the "
                "largest as [teacher], without data.teacher_column."
            )
        (side,) = self.teachers.values()
        return side

    def taught_by(self, name: str) -> Subject:
        """The subject of one teacher: its model and its prompts."""
        own = tuple(prompt for prompt in self.prompts if not self.run.teachers or prompt.teacher == name)
        return dataclasses.replace(
            self, run=self.run.taught_by(name), teachers={name: self.teachers[name]}, prompts=own
        )


def subject_of(parts: Parts) -> Subject:
    """The subject of an assembled run; the position of its prompt stream stays the same."""
    run, inside = parts.run, causal_lm_of(parts.model)
    student = Side(
        whose="student",
        tokenizer=parts.tokenizer,
        config=inside.config.get_text_config(),
        generation=inside.generation_config,
    )
    stream = parts.stream
    before = stream.state_dict()
    drawn = stream.next(len(stream) if isinstance(stream, PromptStream) else STREAMED)
    stream.load_state_dict(before)
    return Subject(
        run=run,
        student=student,
        teachers={name: _side_of(parts, name) for name in parts.teacher.teachers},
        capabilities=parts.teacher.capabilities,
        prompts=tuple({prompt.id: prompt for prompt, _ in drawn}.values()),
        held_out=parts.held_out,
        grader=parts.grader,
        eval_grader=parts.eval_grader,
        briefer=parts.briefer,
    )


def _side_of(parts: Parts, name: str) -> Side | None:
    teacher, config, given = parts.teacher.teachers[name], parts.run.all_teachers[name], parts.given.teacher
    if config.servers and config.is_model:
        return _read_side(config, "teacher")
    tokenizer = given[1] if isinstance(given, tuple) else None
    teacher = teacher.inner if isinstance(teacher, Bridged) else teacher
    if teacher.forward is None or not (config.is_model or tokenizer):
        return None
    inside = causal_lm_of(teacher.forward.model)
    return Side(
        whose="teacher",
        tokenizer=tokenizer or load_tokenizer(config, "teacher"),
        config=inside.config.get_text_config(),
        generation=inside.generation_config,
    )


def read_subject(run: Run) -> tuple[Subject | None, list[Check]]:
    """Read everything except weights.  Failures become checks, and the rest is still read."""
    checks: list[Check] = []

    def attempt(name: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except TropdError as refusal:
            checks.append(error(name, str(refusal)))
            return None

    student = attempt("student", lambda: _read_side(run.student, "student"))
    teachers: dict[str, Side | None] = {}
    for name, config in run.all_teachers.items():
        said = f"{name}: teacher" if run.teachers else "teacher"
        teachers[name] = attempt(said, partial(_read_side, config, "teacher")) if config.is_model else None
    own = {
        name: attempt(f"reader {name!r}", partial(_read_reader, x, student))
        for name, x in run.all_readers.items()
        if x.is_model and x.made_of is None and not shares_model(run, x)
    }
    grader = attempt("grader", lambda: resolve_grader(run.grader) if run.grader else None)
    judge = run.evaluation.grader or run.grader
    eval_grader = grader if judge == run.grader else attempt("grader", lambda: resolve_grader(judge or ""))
    if student is None:
        return None, checks
    briefer = attempt("briefing", lambda: _briefer(run, student, teachers, own))
    prompts = attempt("data", lambda: _read_prompts(run.data, student, checks, "data", briefer))
    data = run.evaluation.data
    held_out: tuple[Prompt, ...] | None = ()
    if data is not None:
        held_out = attempt("held-out data", lambda: _read_prompts(data, student, checks, "held-out data"))
    models = [teachers[name] for name, config in run.all_teachers.items() if config.is_model]
    if None in (*models, *own.values()):
        return None, checks
    return Subject(
        run=run,
        student=student,
        teachers=teachers,
        capabilities=_capabilities(run),
        prompts=prompts or (),
        held_out=held_out or (),
        grader=grader,
        eval_grader=eval_grader,
        briefer=briefer,
        readers=own,
    ), checks


def offered_by(config: TeacherConfig) -> Needs:
    """The evidence that such a teacher offers."""
    if config.only_writes:
        return ChatTeacher.capabilities
    if config.bridge is not None:
        return Bridged.capabilities
    if config.servers:
        return dialect_of(config.server).capabilities
    return LocalTeacher.capabilities


def _capabilities(run: Run) -> Needs:
    each = [offered_by(config) for config in run.all_teachers.values()]
    return shared_by(each) if run.teachers else each[0]


def _read_side(config: ModelConfig, whose: str) -> Side:
    from transformers import AutoConfig, GenerationConfig

    tokenizer = load_tokenizer(config, whose)
    options: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    extra: dict[str, Any] = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    try:
        found = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code, **options, **extra)
    except (OSError, ValueError, KeyError) as failure:
        raise ConfigError(
            f"the {whose}'s config.json cannot be read from {config.path}: {str(failure).splitlines()[0]}"
        ) from failure
    try:
        generation = GenerationConfig.from_pretrained(config.path, **options)
    except OSError:  # a model need not bring one; transformers makes one of config.json then, and so does this
        generation = GenerationConfig.from_model_config(found)
    return Side(whose=whose, tokenizer=tokenizer, config=found.get_text_config(), generation=generation)


def _read_reader(config: ReaderConfig, student: Side | None) -> Side:
    side = _read_side(config, "teacher")
    if student is not None and config.bridge is None:
        same_vocabulary(student.tokenizer, side.tokenizer)
    return side


def _briefer(run: Run, student: Side, sides: Mapping[str, Side | None], own: Mapping[str, Side | None]) -> Briefer:
    """What everybody reads, as in training."""
    check_policy(run, run.grader is not None)
    check_briefings(run, run.grader is not None)
    told = {
        name: Candidate(
            config=config,
            tokenizer=side.tokenizer if (side := sides[name]) else None,
            context=(side or student).context,
        )
        for name, config in run.all_teachers.items()
    }
    readers = {}
    for name, config in run.all_readers.items():
        shared = sides.get("default") if shares_model(run, config) else None
        side = own.get(name) or shared
        tokenizer = None if side is None else side.tokenizer
        readers[name] = Candidate(config=config, tokenizer=tokenizer, context=(side or student).context)
    return Briefer(run, student.tokenizer, told, readers)


def _read_prompts(
    data: DataConfig, student: Side, checks: list[Check], name: str, briefer: Briefer | None = None
) -> tuple[Prompt, ...]:
    if data.streaming:
        stream = LazyPromptStream(data, student.tokenizer, briefer=briefer)
        prompts, report = tuple(prompt for prompt, _ in stream.next(STREAMED)), stream.report
    else:
        loaded = load_prompts(data, student.tokenizer, briefer=briefer)
        prompts, report = loaded.prompts, loaded.report
        for note in briefer.check_lengths(prompts) if briefer else ():
            checks.append(warning("briefing", note, "Make the briefing shorter."))
    example = str(student.tokenizer.decode(list(prompts[0].token_ids)))
    shown = f"{data.path}: {report}\nthe first prompt as the student reads it: {example[:300]!r}"
    if report.skipped or report.warnings:
        advice = "Read the rows that were left out; data.on_bad_row = 'refuse' stops there." if report.skipped else ""
        checks.append(warning(name, shown, advice))
    else:
        checks.append(ok(name, shown))
    return prompts
