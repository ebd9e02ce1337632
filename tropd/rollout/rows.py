"""Continuous batching in one loop: prompts are prefilled left-padded, longest first; every step feeds the last token of
each live row; a finished row leaves the batch at once, and waiting requests enter when enough rows are free.

Axes: B live rows, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.errors import EngineError
from tropd.model.hf import Cache, DynamicCache
from tropd.rollout.cache import RowCache
from tropd.rollout.decoding import Stepper
from tropd.rollout.sampling import draw, draw_uniform_rows
from tropd.rollout.slots import SlotCache
from tropd.types import Completion, Finish, Request, Sampling

PREFILL_TOKENS = 16384
"""Most prompt tokens, padding included, of one forward pass: bounds the memory of activations."""
_UNIFORMS_AT_ONCE = 64


class Reader(Protocol):
    """What the loop needs of an engine: the logits after a text, and the number of live rows."""

    model: nn.Module
    stepper: Stepper
    vocab_size: int
    max_batch: int
    pad_id: int
    version: int

    def last_logits(
        self, input_ids_BT: Tensor, mask: Tensor | dict[str, Tensor] | None, positions_BT: Tensor, cache: Cache
    ) -> Tensor: ...

    def whole_logits(self, input_ids_BT: Tensor) -> Tensor: ...


@dataclass(slots=True)
class Row:
    """A request being answered."""

    index: int
    request: Request
    token_ids: list[int] = field(default_factory=list)
    behavior_logprobs: list[float] = field(default_factory=list)
    model_logprobs: list[float] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.request.stop_ids)

    @property
    def text(self) -> tuple[int, ...]:
        return (*self.request.token_ids, *self.token_ids)

    @property
    def finish(self) -> Finish | None:
        if self.token_ids[-1] in self.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if len(self.token_ids) == self.request.max_new_tokens else None


class Batch:
    """The live, waiting and finished rows of one call."""

    def __init__(self, engine: Reader, requests: Sequence[Request], *, rereads: bool = False) -> None:
        """`rereads`: there is no cache, so every text is read whole for each of its tokens."""
        # Longest prompt first: a later row never needs more columns than there are.  Equal prompts come together.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].token_ids), requests[i].token_ids))
        self.waiting = deque(Row(i, requests[i]) for i in order)
        self.engine, self.version = engine, engine.version
        self.device = next(engine.model.parameters()).device
        self.live: list[Row] = []
        self.cache = None if rereads else engine.stepper.new_cache()
        self.done: dict[int, Completion] = {}

    def run(self) -> list[Completion]:
        while self.waiting or self.live:
            free = self.engine.max_batch - len(self.live)
            # Rows enter several at a time: a prefill of one row costs about as much as one of several.
            if free >= min(len(self.waiting), max(1, self.engine.max_batch // 8)):
                while self.waiting and len(self.live) < self.engine.max_batch:
                    self.admit(self.cache)
            if self.live:
                self.step(self.cache)
        return [self.done[i] for i in range(len(self.done))]

    def admit(self, cache: RowCache | SlotCache | None) -> None:
        """Prefill some waiting rows, draw their first token, and put the unfinished rows into the cache."""
        if cache is None:
            self.live.append(self.waiting.popleft())
            return
        rows, prompts, source = self._take()
        if self.live:
            TAKEN.add(FastPath.REFILLED_BATCH)
        width = len(prompts[0])
        padded = [(self.engine.pad_id,) * (width - len(p)) + p for p in prompts]
        lengths_B = torch.tensor([len(p) for p in prompts], device=self.device)
        positions_BT = torch.arange(width, device=self.device) - (width - lengths_B)[:, None]
        mask_BT = None if len(prompts[-1]) == width else (positions_BT >= 0).long()
        prefilled = DynamicCache()
        logits_BV = self.engine.last_logits(
            torch.tensor(padded, device=self.device), mask_BT, positions_BT.clamp(min=0), prefilled
        )
        shared = len(prompts) < len(rows)
        if shared:
            TAKEN.add(FastPath.SHARED_PROMPTS)
        alive = self._draw(rows, logits_BV[torch.tensor(source, device=self.device)] if shared else logits_BV)
        if alive:
            num_rows = min(self.engine.max_batch, len(self.live) + len(alive) + len(self.waiting))
            lengths = [len(rows[i].request.token_ids) for i in alive]
            cache.admit(prefilled, [source[i] for i in alive], lengths, num_rows)
            self.live += [rows[i] for i in alive]

    def step(self, cache: RowCache | SlotCache | None) -> None:
        """One token for every live row."""
        if cache is None:
            alive = self._draw(self.live, self._reread())
            self.live = [self.live[i] for i in alive]
            return
        cache.reserve(len(self.live))
        last_ids_B1 = torch.tensor([[row.token_ids[-1]] for row in self.live], device=self.device)
        logits_BV = self.engine.stepper.logits(last_ids_B1, cache)[:, : self.engine.vocab_size]
        cache.advance()
        alive = self._draw(self.live, logits_BV)
        if len(alive) < len(self.live):
            self.live = [self.live[i] for i in cache.keep(alive)]

    def _reread(self) -> Tensor:
        """The logits [B, V] after each live row's text.  Texts of one length go together, so that nothing is padded."""
        texts = [row.text for row in self.live]
        logits_V: dict[tuple[int, ...], Tensor] = {}
        for length in {len(text) for text in texts}:
            some = list({text for text in texts if len(text) == length})
            for start in range(0, len(some), num := max(1, PREFILL_TOKENS // length)):
                part = some[start : start + num]
                logits_BV = self.engine.whole_logits(torch.tensor(part, device=self.device))
                logits_V |= zip(part, logits_BV, strict=True)
        return torch.stack([logits_V[text] for text in texts])

    def _take(self) -> tuple[list[Row], list[tuple[int, ...]], list[int]]:
        """The next rows to prefill, their different prompts, and which prompt each row has."""
        rows: list[Row] = []
        prompts: list[tuple[int, ...]] = []
        source: list[int] = []
        while self.waiting and len(self.live) + len(rows) < self.engine.max_batch:
            prompt = self.waiting[0].request.token_ids
            if not prompts or prompt != prompts[-1]:
                if prompts and len(prompts[0]) * (len(prompts) + 1) > PREFILL_TOKENS:
                    TAKEN.add(FastPath.SEVERAL_PREFILLS)
                    break
                prompts.append(prompt)
            rows.append(self.waiting.popleft())
            source.append(len(prompts) - 1)
        return rows, prompts, source

    def _draw(self, rows: list[Row], logits_BV: Tensor) -> list[int]:
        """Append one token to every row and store the finished rows.  Returns the indices of the others."""
        uniforms = self._uniforms(rows)
        samplings: dict[Sampling, list[int]] = {}
        for i, row in enumerate(rows):
            samplings.setdefault(row.request.sampling, []).append(i)
        for sampling, members in samplings.items():
            logits = logits_BV if len(samplings) == 1 else logits_BV[torch.tensor(members, device=self.device)]
            drawn = draw(logits, [uniforms[i] for i in members], sampling).tolist()
            for i, token_id, behavior_logprob, model_logprob in zip(members, *drawn, strict=True):
                _check_finite(rows[i], model_logprob)
                rows[i].token_ids.append(int(token_id))
                rows[i].behavior_logprobs.append(behavior_logprob)
                rows[i].model_logprobs.append(model_logprob)
        return [i for i, row in enumerate(rows) if not self._file(row)]

    def _uniforms(self, rows: list[Row]) -> list[float]:
        """Each row's uniform number for its next token; drawn for many tokens of many rows at once."""
        if empty := [row for row in rows if len(row.token_ids) == len(row.uniforms)]:
            seeds, firsts = zip(*((row.request.seed, len(row.uniforms)) for row in empty), strict=True)
            for row, more in zip(empty, draw_uniform_rows(seeds, firsts, _UNIFORMS_AT_ONCE), strict=True):
                row.uniforms += more
        return [row.uniforms[len(row.token_ids)] for row in rows]

    def _file(self, row: Row) -> bool:
        finish = row.finish
        if finish is not None:
            self.done[row.index] = Completion(
                token_ids=tuple(row.token_ids),
                behavior_logprobs=tuple(row.behavior_logprobs),
                model_logprobs=tuple(row.model_logprobs),
                finish=finish,
                policy_version=(self.version, self.version),
            )
        return finish is not None


def _check_finite(row: Row, model_logprob: float) -> None:
    if not math.isfinite(model_logprob):
        raise EngineError(
            f"the model's logits after token {len(row.token_ids)} of request {row.index} are not finite "
            f"(log-probability {model_logprob}), so no token can be drawn.  The weights have diverged, or half "
            "precision overflows: look at the last gradient norms, or load the model in bfloat16 or float32."
        )
