"""Continuous batching in one loop: prompts are prefilled left-padded, longest first; every step feeds the last token of
each live row; a finished row leaves the batch at once, and waiting requests enter when enough rows are free.

A batch has a voice for each model that has a say in its tokens: the student alone, or student and teacher
(`tropd.rollout.joint`).  Each has its own key-value cache and may read another prompt.

Axes: B live rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.errors import EngineError
from tropd.rollout.sampling import draw, draw_uniform_rows
from tropd.rollout.voices import PREFILL_TOKENS, Voice
from tropd.types import Author, Completion, Finish, Request, Sampling

_UNIFORMS_AT_ONCE = 64


@dataclass(slots=True)
class Row:
    """A request being answered."""

    index: int
    request: Request
    prompts: tuple[tuple[int, ...], ...]
    """What each voice reads before the new tokens."""
    token_ids: list[int] = field(default_factory=list)
    behavior_logprobs: list[float] = field(default_factory=list)
    model_logprobs: list[float] = field(default_factory=list)
    authors: list[Author] = field(default_factory=list)
    """Empty where the student writes alone."""
    trace: list[float] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)
    was_cut: bool = False
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.request.stop_ids)

    def add(self, token_id: int, behavior_logprob: float, model_logprob: float) -> None:
        self.token_ids.append(token_id)
        self.behavior_logprobs.append(behavior_logprob)
        self.model_logprobs.append(model_logprob)

    def cut(self, length: int) -> None:
        """End the text after its first `length` tokens; the trace stays whole."""
        self.was_cut = True
        for values in (self.token_ids, self.behavior_logprobs, self.model_logprobs, self.authors):
            del values[length:]

    @property
    def finish(self) -> Finish | None:
        """A text that was cut did not come to its end: like one that met the limit."""
        if self.was_cut:
            return Finish.LENGTH
        if self.token_ids[-1] in self.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if len(self.token_ids) == self.request.max_new_tokens else None

    def completion(self, version: int) -> Completion:
        finish = self.finish
        assert finish is not None
        return Completion(
            token_ids=tuple(self.token_ids),
            behavior_logprobs=tuple(self.behavior_logprobs),
            model_logprobs=tuple(self.model_logprobs),
            finish=finish,
            policy_version=(version, version),
            authors=tuple(self.authors),
            trace=tuple(self.trace),
        )


Write = Callable[[list[Row], Sequence[Tensor]], None]
"""Adds a token to each row, from the logits [B, V] of each voice."""


class Batch:
    """The live, waiting and finished rows of one call."""

    def __init__(
        self,
        voices: Sequence[Voice],
        requests: Sequence[Request],
        *,
        told: Sequence[tuple[int, ...]] | None = None,
        write: Write | None = None,
    ) -> None:
        """The first voice is the student.  `told`: what a second one reads instead of the requests' own prompts."""
        # Longest prompt first: a later row never needs more columns than there are.  Equal prompts come together.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].token_ids), requests[i].token_ids))
        others = [()] * len(requests) if told is None else [(ids,) for ids in told]
        self.waiting = deque(Row(i, requests[i], (requests[i].token_ids, *others[i])) for i in order)
        self.voices, self.write = voices, write or write_alone
        self.max_batch, self.version = voices[0].engine.max_batch, voices[0].engine.version
        self.rereads = any(voice.cache is None for voice in voices)
        self.live: list[Row] = []
        self.done: dict[int, Completion] = {}

    def run(self) -> list[Completion]:
        while self.waiting or self.live:
            free = self.max_batch - len(self.live)
            # Rows enter several at a time: a prefill of one row costs about as much as one of several.
            if free >= min(len(self.waiting), max(1, self.max_batch // 8)):
                while self.waiting and len(self.live) < self.max_batch:
                    self.admit()
            if self.live:
                self.step()
        return [self.done[i] for i in range(len(self.done))]

    def admit(self) -> None:
        """Prefill some waiting rows, write their first token, and put the unfinished rows into the caches."""
        if self.rereads:
            self.live.append(self.waiting.popleft())
            return
        rows = self._take()
        if self.live:
            TAKEN.add(FastPath.REFILLED_BATCH)
        prompts = zip(*(row.prompts for row in rows), strict=True)
        self.write(rows, [voice.prefill(read) for voice, read in zip(self.voices, prompts, strict=True)])
        alive = self._unfinished(rows)
        num_rows = min(self.max_batch, len(self.live) + len(alive) + len(self.waiting))
        for voice in self.voices:
            voice.admit(alive, num_rows)
        self.live += [rows[i] for i in alive]

    def step(self) -> None:
        """One token for every live row."""
        if self.rereads:
            texts = zip(*([(*prompt, *row.token_ids) for prompt in row.prompts] for row in self.live), strict=True)
            self.write(self.live, [voice.reread(read) for voice, read in zip(self.voices, texts, strict=True)])
        else:
            last_ids = [row.token_ids[-1] for row in self.live]
            self.write(self.live, [voice.step(last_ids) for voice in self.voices])
        alive = self._unfinished(self.live)
        if len(alive) < len(self.live):
            orders = [voice.cache.keep(alive) for voice in self.voices if voice.cache is not None]
            self.live = [self.live[i] for i in (orders[0] if orders else alive)]

    def _take(self) -> list[Row]:
        """The next rows to prefill."""
        rows: list[Row] = []
        num_prompts = 0
        while self.waiting and len(self.live) + len(rows) < self.max_batch:
            prompt = self.waiting[0].request.token_ids
            if not rows or prompt != rows[-1].request.token_ids:
                if rows and len(rows[0].request.token_ids) * (num_prompts + 1) > PREFILL_TOKENS:
                    TAKEN.add(FastPath.SEVERAL_PREFILLS)
                    break
                num_prompts += 1
            rows.append(self.waiting.popleft())
        return rows

    def _unfinished(self, rows: Sequence[Row]) -> list[int]:
        """Store the finished rows.  Returns the indices of the others."""
        self.done |= {row.index: row.completion(self.version) for row in rows if row.finish is not None}
        return [i for i, row in enumerate(rows) if row.finish is None]


def write_alone(rows: list[Row], logits: Sequence[Tensor]) -> None:
    """The student draws each token."""
    for row, token_id, behavior_logprob, model_logprob in zip(rows, *drawn(rows, logits[0]), strict=True):
        if not math.isfinite(model_logprob):
            raise not_finite(row, model_logprob)
        row.add(int(token_id), behavior_logprob, model_logprob)


def drawn(rows: list[Row], logits_BV: Tensor) -> tuple[list[float], list[float], list[float]]:
    """A token for each row with its own sampling and its own random number: ids, behavior and model logprobs."""
    uniforms = _uniforms(rows)
    samplings: dict[Sampling, list[int]] = {}
    for i, row in enumerate(rows):
        samplings.setdefault(row.request.sampling, []).append(i)
    if len(samplings) == 1:
        ids, behavior, model = draw(logits_BV, uniforms, rows[0].request.sampling).tolist()
        return ids, behavior, model
    found = [(0.0, 0.0, 0.0)] * len(rows)
    for sampling, members in samplings.items():
        part_BV = logits_BV[torch.tensor(members, device=logits_BV.device)]
        drawn_3B = draw(part_BV, [uniforms[i] for i in members], sampling).tolist()
        for i, *values in zip(members, *drawn_3B, strict=True):
            found[i] = tuple(values)
    ids, behavior, model = (list(values) for values in zip(*found, strict=True))
    return ids, behavior, model


def _uniforms(rows: list[Row]) -> list[float]:
    """Each row's uniform number for its next token; drawn for many tokens of many rows at once."""
    if empty := [row for row in rows if len(row.token_ids) == len(row.uniforms)]:
        seeds, firsts = zip(*((row.request.seed, len(row.uniforms)) for row in empty), strict=True)
        for row, more in zip(empty, draw_uniform_rows(seeds, firsts, _UNIFORMS_AT_ONCE), strict=True):
            row.uniforms += more
    return [row.uniforms[len(row.token_ids)] for row in rows]


def not_finite(row: Row, model_logprob: float) -> EngineError:
    return EngineError(
        f"the model's logits after token {len(row.token_ids)} of request {row.index} are not finite "
        f"(log-probability {model_logprob}), so no token can be drawn.  The weights have diverged, or half "
        "precision overflows: look at the last gradient norms, or load the model in bfloat16 or float32."
    )
