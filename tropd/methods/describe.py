"""The description of a method, as plain data read from its own source."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from tropd.briefings.reader import model_text, told_text
from tropd.errors import ConfigError
from tropd.methods import Method, find_method
from tropd.methods.ideas import Idea
from tropd.methods.knobs import Knob, knobs_of
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
    Needs.CHUNKS: (
        "how much what the teacher writes in place of some chunks resembles them",
        "any chat endpoint with OpenAI's API",
    ),
    Needs.HIDDEN: ("the teacher's hidden states", "no server: the teacher must be one model in this process"),
    Needs.STUDENT_AT_TOPK: (
        "the student's log-probabilities at the teacher's likeliest tokens, before the gradient pass",
        "nothing: one more pass of the student gives them",
    ),
    Needs.STUDENT_HIDDEN: ("the student's hidden states", "nothing: the student's own pass gives them"),
    Needs.STUDENT_ENTROPY: ("the student's entropy at each token", "nothing: the student's own pass gives it"),
    Needs.LOOKAHEAD: (
        "how sure the teacher would be after each of the student's likeliest tokens",
        "no server: the teacher must be in this process, which reads the text once more with these tokens as branches",
    ),
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
class Description:
    """Everything that `tropd explain` says of a method, as plain data."""

    kind: Literal["method"] = "method"

    name: str
    title: str
    summary: str
    idea: Idea | None
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
        idea=cls.idea,
        paper=paper_link(cls.paper),
        definition=inspect.cleandoc(cls.__doc__ or ""),
        terms=tuple(map(_row, method.objective.terms)),
        rollout=_rollout_text(method),
        evidence=tuple(Evidence(name=str(n.name), what=EVIDENCE[n][0], server=EVIDENCE[n][1]) for n in method.needs),
        teacher=_teacher_text(method),
        readers=tuple(_readers(method)),
        knobs=tuple(knobs_of(cls)),
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
    if method.rollout.writes_jointly:
        return "A model in this process: it has a say in each token that is written." + texts
    if not needs:
        return "The teacher is never asked for a probability." + texts
    if Needs.CHUNKS in needs:
        return "A teacher that only writes, on any chat endpoint; it says no probability." + texts
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
