"""The values that flow between stages: prompts -> roll out -> score -> plan -> step -> record.

Axis legend (capital letters, one per axis, used as suffixes of tensors everywhere):

    N  tokens of a batch, flat, no padding        S  sequences          T  tokens of one sequence
    K  the teacher's top-k                        J  the student's top-k  V  vocabulary

Alignment, everywhere: entry t of any per-token array describes token t itself, never "the next token".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, cast

from tropd.base.ranges import NotNegative, PositiveShare, Ranged, Share, Whole

if TYPE_CHECKING:
    from torch import Tensor


READER = "teacher"
"""The reader whose evidence everything reads unless it says otherwise."""


class Author(IntEnum):
    """Who wrote a token.  Only STUDENT and TEACHER tokens are ever trained on."""

    CONTEXT = 0
    STUDENT = 1
    TEACHER = 2
    ENVIRONMENT = 3


class Finish(StrEnum):
    """Why a rollout ended."""

    STOP = "stop"
    LENGTH = "length"
    """The response came to rollout.max_new_tokens."""
    HORIZON = "horizon"
    """The rollout policy wanted no more of it; how it would have gone on is not known."""
    ABORT = "abort"


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One thing to answer, already rendered for the student."""

    id: str
    token_ids: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    answer: str | None = None
    """What the grader compares with."""
    teacher: str = "default"
    """Which of several teachers it is for."""
    told: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """What readers read instead of `token_ids`, by their names, where that is known before anything is written; empty
    where a reader cannot be told.  "teacher" is the one that `teacher` names."""
    response_ids: tuple[int, ...] = ()
    """A written answer from the dataset: an off-policy text for prefixes, GKD and SeqKD."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, handed to graders."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling(Ranged):
    """How an engine draws tokens.  The neutral values sample from the model itself."""

    section = "sampling"

    temperature: NotNegative = 1.0
    """0 takes the likeliest token. At least 0."""
    top_p: PositiveShare = 1.0
    """The likeliest tokens that together have this probability; 1 keeps every token. In (0, 1]."""
    top_k: Whole = 0
    """0 keeps every token. At least 0."""
    min_p: Share = 0.0
    """Tokens with at least this share of the likeliest one's probability; 0 keeps every token. In [0, 1]."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens of the model can never be drawn."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0 or self.temperature == 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One continuation to write."""

    token_ids: tuple[int, ...]
    """Everything before the first new token: the prompt and, perhaps, a teacher-written prefix."""
    max_new_tokens: int
    seed: int
    """The rollout's own random stream: the same tokens whatever else is in the batch."""
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    teacher: str = "default"
    """Which of several teachers is to write it; engines of one model do not look."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What an engine wrote for one request; the stop token, if one was drawn, is the last token."""

    token_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]
    """Under the distribution that was really sampled from (after temperature and truncation)."""
    model_logprobs: tuple[float, ...]
    """Under the model itself (temperature 1, whole vocabulary)."""
    finish: Finish
    policy_version: tuple[int, int] = (0, 0)
    """Oldest and newest weights that wrote it."""
    authors: tuple[Author, ...] = ()
    """Who wrote which token, where it was not the engine's model alone."""
    trace: tuple[float, ...] = ()
    """What a `Decoding` measured at each token, also at those that it cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sequence: prompt and response, token by token.

    Example: a prompt of two tokens, one teacher-written token, two of the student's:
        token_ids (5, 9, 7, 3, 2)   authors (CONTEXT, CONTEXT, TEACHER, STUDENT, STUDENT)
    """

    id: str
    """Unique in a run and the same after a resume: keys the trust draws and the sampling stream."""
    prompt: Prompt
    token_ids: tuple[int, ...]
    authors: tuple[Author, ...]
    behavior_logprobs: tuple[float, ...]
    """0.0 where nothing was sampled from the student."""
    model_logprobs: tuple[float, ...] = ()
    """The student's own log-probabilities where it wrote; () when the engine does not say."""
    policy_version: tuple[int, int] = (0, 0)
    finish: Finish = Finish.STOP
    reward: float | None = None
    feedback: str | None = None
    """The grader's words on the response."""
    trace: tuple[float, ...] = ()
    """What a `Decoding` measured at each token that was written with it, also at those that it cut off; else empty."""

    @property
    def group(self) -> str:
        """Rollouts of the same prompt form a group."""
        return self.prompt.id

    @property
    def response_ids(self) -> tuple[int, ...]:
        return self.token_ids[len(self.prompt.token_ids) :]

    def behind(self, token_ids: tuple[int, ...]) -> Rollout:
        """The same response behind another prompt."""
        start, silent = len(self.prompt.token_ids), (0.0,) * len(token_ids)
        return replace(
            self,
            prompt=replace(self.prompt, token_ids=token_ids, told={}),
            token_ids=token_ids + self.response_ids,
            authors=(Author.CONTEXT,) * len(token_ids) + self.authors[start:],
            behavior_logprobs=silent + self.behavior_logprobs[start:],
            model_logprobs=silent + self.model_logprobs[start:] if self.model_logprobs else (),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherScores:
    """A teacher's opinion of one rollout.  Rows T run over the response (teacher's and student's tokens) only."""

    logprobs_T: Tensor = cast("Tensor", None)
    """None where it was not asked for (Needs.SAMPLED)."""
    topk_ids_TK: Tensor | None = None
    topk_logprobs_TK: Tensor | None = None
    entropy_T: Tensor | None = None
    at_student_topk_TJ: Tensor | None = None
    full_logprobs_TV: Tensor | None = None
    hidden_TH: Tensor | None = None
    lookahead_TJ: Tensor | None = None
    """The log-probability of its likeliest next token after each candidate of the request, NOTHING where none is."""
    chunks_T: Tensor | None = None
    support_T: Tensor | None = None
    read_T: Tensor | None = None
    """Which tokens it says something of; None: all.  Numbers of the others mean nothing."""
    teacher: str = "default"
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """What else it says of each token, by name: for pieces of your own, which name it in `own_columns`."""

    def silent(self, length: int) -> TeacherScores:
        """Zeros of the same kinds, for a response that was not read."""

        def zeros(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.new_zeros((length, *x.shape[1:]))

        given = {f.name: zeros(getattr(self, f.name)) for f in fields(self) if f.name not in ("teacher", "columns")}
        return replace(self, **given, columns={name: zeros(x) for name, x in self.columns.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class TermStats:
    """One term's part of a step; every number adds over micro-batches and ranks."""

    loss: float
    """The term's part of the loss."""
    tokens: float
    """How many tokens it touched."""
    weight: float
    """Sum of the selector's weights on them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One line of records.jsonl.  A report is made from these alone."""

    step: int
    progress: float
    policy_version: int
    loss: float
    terms: dict[str, TermStats]
    probes: dict[str, float]
    gradient_norm: float
    learning_rate: float
    tokens: dict[str, int]
    seconds: dict[str, float]
    evaluation: dict[str, float] | None = None
    alarms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What was found when the run went on from a checkpoint at this step."""


def key_of(seed: int, *parts: object) -> int:
    """A signed 64-bit number that names (seed, parts): the key of a random stream."""
    text = "/".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
