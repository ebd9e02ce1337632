"""One model's part in writing a batch: its key-value cache, and the logits after each row's text.

Axes: B live rows, P prompts, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model.hf import Cache, DynamicCache
from tropd.rollout.decoding import Stepper

PREFILL_TOKENS = 16384
"""Most prompt tokens, padding included, of one forward pass: bounds the memory of activations."""


class Reader(Protocol):
    """What writing needs of an engine: the logits after a text, and the number of live rows."""

    model: nn.Module
    stepper: Stepper
    vocab_size: int
    max_batch: int
    pad_id: int
    version: int
    within: Callable[[], AbstractContextManager[Any]]
    """The context in which the model is read."""

    def last_logits(
        self, input_ids_BT: Tensor, mask: Tensor | dict[str, Tensor] | None, positions_BT: Tensor, cache: Cache
    ) -> Tensor: ...

    def whole_logits(self, input_ids_BT: Tensor) -> Tensor: ...


class Voice:
    """One model of a batch: what it says after each row's text, with its cache."""

    def __init__(self, engine: Reader, *, rereads: bool = False) -> None:
        """`rereads`: there is no cache, so every text is read whole for each of its tokens."""
        self.engine = engine
        self.device = next(engine.model.parameters()).device
        self.cache = None if rereads else engine.stepper.new_cache()
        self._prefilled: list[tuple[DynamicCache, range, list[int], list[int]]] = []
        """Rows that have not entered the cache yet: their own, which rows they are, the prompt that each of them has,
        and its length."""

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """The logits [B, V] after the prompts of rows that enter."""
        logits_BV: list[Tensor] = []
        for part in _parts(prompts):
            different, source = _different(prompts[part.start : part.stop])
            width = max(map(len, different))
            padded = [(self.engine.pad_id,) * (width - len(p)) + p for p in different]
            lengths_P = torch.tensor([len(p) for p in different], device=self.device)
            positions_PT = torch.arange(width, device=self.device) - (width - lengths_P)[:, None]
            mask_PT = None if min(map(len, different)) == width else (positions_PT >= 0).long()
            cache = DynamicCache()
            with self.engine.within():
                logits_PV = self.engine.last_logits(
                    torch.tensor(padded, device=self.device), mask_PT, positions_PT.clamp(min=0), cache
                )
            shared = len(different) < len(part)
            if shared:
                TAKEN.add(FastPath.SHARED_PROMPTS)
            logits_BV.append(logits_PV[torch.tensor(source, device=self.device)] if shared else logits_PV)
            self._prefilled.append((cache, part, source, [len(prompts[i]) for i in part]))
        return logits_BV[0] if len(logits_BV) == 1 else torch.cat(logits_BV)

    def admit(self, alive: Sequence[int], num_rows: int) -> None:
        """Put the prefilled rows that go on into the cache, with room for `num_rows` rows."""
        assert self.cache is not None
        for cache, part, source, lengths in self._prefilled:
            if places := [i - part.start for i in alive if i in part]:
                self.cache.admit(cache, [source[i] for i in places], [lengths[i] for i in places], num_rows)
        self._prefilled = []

    def step(self, last_ids: Sequence[int]) -> Tensor:
        """The logits [B, V] after each live row's last token."""
        assert self.cache is not None
        self.cache.reserve(len(last_ids))
        last_ids_B1 = torch.tensor([[last] for last in last_ids], device=self.device)
        with self.engine.within():
            logits_BV = self.engine.stepper.logits(last_ids_B1, self.cache)[:, : self.engine.vocab_size]
        self.cache.advance()
        return logits_BV

    def reread(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """The logits [B, V] after texts.  Texts of one length go together, so that nothing is padded."""
        logits_V: dict[tuple[int, ...], Tensor] = {}
        for length in {len(text) for text in texts}:
            some = list({text for text in texts if len(text) == length})
            for start in range(0, len(some), num := max(1, PREFILL_TOKENS // length)):
                part = some[start : start + num]
                with self.engine.within():
                    logits_BV = self.engine.whole_logits(torch.tensor(part, device=self.device))
                logits_V |= zip(part, logits_BV, strict=True)
        return torch.stack([logits_V[text] for text in texts])


def _parts(prompts: Sequence[tuple[int, ...]]) -> Iterator[range]:
    """Rows that are prefilled together: as many as a forward pass may have, equal neighbours counted once."""
    start = width = number = 0
    for i, prompt in enumerate(prompts):
        new = i == start or prompt != prompts[i - 1]
        if i > start and new and max(width, len(prompt)) * (number + 1) > PREFILL_TOKENS:
            yield range(start, i)
            start, width, number = i, 0, 0
        width, number = max(width, len(prompt)), number + new
    yield range(start, len(prompts))


def _different(prompts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Prompts without those that equal the one before, and which of them each row has."""
    different: list[tuple[int, ...]] = []
    source: list[int] = []
    for prompt in prompts:
        if not different or prompt != different[-1]:
            different.append(prompt)
        source.append(len(different) - 1)
    return different, source
