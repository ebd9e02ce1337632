"""The description of a method, as plain data read from its own source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tropd.briefings.reader import model_text, told_text
from tropd.errors import ConfigError
from tropd.methods import Method, find_method
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.objective.losses import NegativeLogLikelihood
from tropd.objective.schedules import Schedule
from tropd.objective.terms import Over, Term
from tropd.types import READER

OVER: dict[Over, str] = {
    "actions": "all trained tokens",
    "student": "the student's tokens",
    "teacher": "the teacher's tokens",
    "members": "its own weights",
    "sequences": "tokens per sequence, then sequences",
}

EVIDENCE: dict[Needs, tuple[str, str]] = {
    Needs.SAMPLED: (
        "the teacher's log-probability of each written token",
        "any server that scores a given text, such as vLLM with prompt_logprobs",
    ),
    Needs.TOPK: (
        "the teacher's top_k likeliest tokens with their log-probabilities",
        "a server that scores a given text with top-k, such as vLLM with prompt_logprobs and --max-logprobs >= top_k",
    ),
    Needs.STUDENT_TOPK: (
        "the teacher's log-probabilities at the student's top_k tokens",
        "no server that tropd knows scores given ids at each position: the teacher must be in this process",
    ),
    Needs.FULL: ("both whole next-token distributions", "no server: the teacher must be in this process"),
    Needs.TEACHER_ENTROPY: (
        "the entropy of the teacher's whole distribution",
        "no server: from top-k alone it is only bounded",
    ),
    Needs.REVERSE_KL: (
        "KL(student || teacher) over the whole vocabulary at each token",
        "no server: the teacher must be in this process",
    ),
    Needs.HIDDEN: ("the teacher's hidden states", "no server: the teacher must be one model in this process"),
    Needs.STUDENT_AT_TOPK: (
        "the student's log-probabilities at the teacher's likeliest tokens, before the gradient pass",
        "nothing: one more pass of the student gives them",
    ),
    Needs.STUDENT_HIDDEN: ("the student's hidden states", "nothing: the student's own pass gives them"),
    Needs.STUDENT_ENTROPY: ("the student's entropy at each token", "nothing: the student's own pass gives it"),
    Needs.REWARD: ("a grader's number for each sequence", "nothing: the `grader` of the run gives it"),
}
"""What each kind of evidence is, and which server can give it.  A teacher in this process gives all of it."""


@dataclass(frozen=True, kw_only=True)
class TermRow:
    name: str
    where: str
    loss: str
    weight: str
    divided_by: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    name: str
    what: str
    server: str


@dataclass(frozen=True, kw_only=True)
class ReaderRow:
    name: str
    model: str
    told: str
    asked: str


@dataclass(frozen=True, kw_only=True)
class Knob:
    name: str
    default: str
    choices: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything that `tropd explain` says, as plain data."""

    name: str
    title: str
    summary: str
    paper: str
    """An address."""
    definition: str
    terms: tuple[TermRow, ...]
    rollout: str
    evidence: tuple[Evidence, ...]
    teacher: str
    readers: tuple[ReaderRow, ...]
    """Empty where only "teacher" reads, and the method says nothing of it."""
    knobs: tuple[Knob, ...]
    readings: tuple[str, ...]
    at_teacher: str
    texts: bool
    """Whether it needs texts of the teacher."""


def describe(name: str) -> Description:
    """A method with its default knobs."""
    cls = find_method(name)
    try:
        method = cls()
    except TypeError as problem:
        raise ConfigError(f"method '{name}' cannot be made with default knobs: {problem}.") from None
    return Description(
        name=name,
        title=cls.__name__,
        summary=cls.summary,
        paper=paper_link(cls.paper),
        definition=inspect.cleandoc(cls.__doc__ or ""),
        terms=tuple(map(_row, method.objective.terms)),
        rollout=_rollout_text(method),
        evidence=tuple(Evidence(name=str(n.name), what=EVIDENCE[n][0], server=EVIDENCE[n][1]) for n in method.needs),
        teacher=_teacher_text(method),
        readers=tuple(_readers(method)),
        knobs=tuple(_knobs(cls)),
        readings=cls.readings,
        at_teacher=_at_teacher_text(method),
        texts=method.rollout.needs_teacher_text,
    )


def paper_link(paper: str) -> str:
    """The address of an arXiv id; an address stays what it is."""
    return paper if "://" in paper or not paper else f"https://arxiv.org/abs/{paper}"


def _row(term: Term) -> TermRow:
    return TermRow(
        name=term.name,
        where=str(term.where),
        loss=str(term.loss),
        weight=str(term.weight) if isinstance(term.weight, Schedule) else f"{term.weight:g}",
        divided_by=OVER[term.over],
    )


def _rollout_text(method: Method) -> str:
    words = method.rollout.description
    sampling = method.sampling
    if sampling is None:
        return words
    drawn = {f.name: getattr(sampling, f.name) for f in fields(sampling) if getattr(sampling, f.name) != f.default}
    return f"{words} Drawn with {', '.join(f'{k} {v:g}' for k, v in drawn.items())}." if drawn else words


def _teacher_text(method: Method) -> str:
    needs = method.needs & OF_TEACHER
    texts = " It also writes text, unless the dataset brings responses." if method.rollout.needs_teacher_text else ""
    if not needs:
        return "The teacher is never asked for a probability." + texts
    here = [str(n.name) for n in needs if EVIDENCE[n][1].startswith("no server")]
    if here:
        return f"A teacher in this process: no server gives {' or '.join(here)}." + texts
    return "A teacher in this process, or a server that can do what is named above." + texts


def _readers(method: Method) -> Iterator[ReaderRow]:
    """Everybody who reads, with what a run file may change."""
    objective, prescribed = method.objective, method.readers
    names = list(dict.fromkeys([*objective.readers, *prescribed]))
    if not {*names} - {READER} and not prescribed:
        return
    parts = {part for reader in prescribed.values() if reader.made_of for part in reader.made_of.readers}
    for name in names:
        section, reader = "[teacher]" if name == READER else f"[readers.{name}]", prescribed.get(name)
        asked = asked_text(objective.needs_of(name) | (Needs.HIDDEN if name in parts else Needs.NOTHING))
        if reader is None:
            yield ReaderRow(name=name, model=f"as {section} says", told=f"as {section} says", asked=asked)
            continue
        told = "" if reader.made_of else told_text(reader.briefing)
        yield ReaderRow(name=name, model=model_text(reader), told=told, asked=asked)


def asked_text(needs: Needs) -> str:
    """What a reader is asked for, in a few words."""
    return ", ".join(_short(str(need.name)) for need in needs & OF_TEACHER) or "nothing"


def _short(evidence: str) -> str:
    return evidence.lower().replace("_", " ").replace("topk", "top-k")


def _at_teacher_text(method: Method) -> str:
    if not method.zero_at_teacher:
        return "a signal that does not vanish."
    texts = [repr(t.name) for t in method.objective.terms if isinstance(t.loss, NegativeLogLikelihood)]
    if not texts:
        return "no signal, at any token."
    return f"no signal where it wrote; {', '.join(texts)} stays, and is zero only on average over the teacher's texts."


def needs_text(description: Description) -> str:
    """The evidence in a few words, for tables."""
    short = [_short(e.name) for e in description.evidence]
    if description.texts:
        short.append("texts")
    return ", ".join(short)


def _knobs(cls: type[Method]) -> Iterator[Knob]:
    hints, meanings = get_type_hints(cls), {}
    for home in reversed(cls.__mro__):
        meanings |= field_docstrings(home) if is_dataclass(home) else {}
    for field in fields(cls):
        if field.name not in ("name", "plus"):
            yield Knob(
                name=field.name,
                default=_default(field),
                choices=_choices(hints[field.name]),
                meaning=meanings.get(field.name, ""),
            )


def field_docstrings(cls: type) -> dict[str, str]:
    """The docstring below each field, which Python does not keep; none where there is no source."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, SyntaxError):
        return {}
    body, docstrings = getattr(node, "body", []), {}
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            docstrings[field.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return docstrings


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if is_dataclass(value) and not isinstance(value, Schedule):
        return f"{type(value).__name__}()"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, UnionType):
        return " | ".join(map(_choices, args))
    if origin is tuple:
        return f"list of {_choices(args[0])}"
    known = {NoneType: "none", bool: "true | false", int: "integer", float: "number", str: "text"}
    return known.get(hint) or hint.__name__
