"""In-process generation with any causal `transformers` model: CPU, one GPU, full weights or LoRA.

Continuous batching in one loop: prompts are prefilled left-padded, longest first; every step feeds the last token of
each live row; a finished row leaves the batch at once, and waiting requests enter when enough rows are free.

A request draws token t of *its own new tokens* with uniform(key=seed, position=t), so its tokens do not depend on
batch-mates, order or `max_batch`: in float32 up to rounding of the logits, which moves a boundary between two tokens
by about 1e-7.  In bfloat16 that rounding is about 1e-2, and the same request can differ between batches.

Axes: B live rows, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from tropd.errors import ConfigError, DataError, EngineError
from tropd.rollout.cache import RowCache, packed_head
from tropd.rollout.sampling import check_sampling, draw, draw_uniform_rows
from tropd.types import Completion, Finish, Request, Sampling

PREFILL_TOKENS = 16384
"""Most prompt tokens, padding included, of one forward pass: bounds the memory of activations."""
_UNIFORMS_AT_ONCE = 64


class TransformersEngine:
    """Writes tokens with the trainer's own model.  `vocab_size` leaves out padded rows of the head."""

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab_size: int | None = None,
        max_batch: int = 64,
        pad_id: int = 0,
        version: int = 0,
    ) -> None:
        base: Any = _base_model(model)
        _check_model(base)
        self.num_embeddings: int = base.get_input_embeddings().num_embeddings
        self.vocab_size = self.num_embeddings if vocab_size is None else vocab_size
        if not 1 <= self.vocab_size <= self.num_embeddings:
            raise ConfigError(
                f"vocab_size is {vocab_size}, but the model has {self.num_embeddings} token embeddings.  "
                "Pass the tokenizer's len(), or leave it out."
            )
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}, but a batch needs at least one row.")
        self.model, self.max_batch, self.pad_id, self.version = model, max_batch, pad_id, version
        self.context: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        takes_last = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._last_only = {"logits_to_keep": 1} if takes_last else {}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        for i, request in enumerate(requests):
            self._check(request, i)
        with generating(self.model), packed_head(_base_model(self.model), [r.max_new_tokens for r in requests]):
            return _Batch(self, requests).run()

    def sync(self, weights: Any, version: int) -> None:
        """The weights are the trainer's own: only the version is noted."""
        self.version = version

    def close(self) -> None:
        pass

    def last_logits(self, input_ids_BT: Tensor, mask_BT: Tensor | None, positions_BT: Tensor, cache: Cache) -> Tensor:
        """The logits after the last token of each row, without the padded part of the vocabulary.  [B, V]."""
        output = self.model(
            input_ids=input_ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **self._last_only,
        )
        return output.logits[:, -1, : self.vocab_size]

    def _check(self, request: Request, index: int) -> None:
        check_sampling(request.sampling)
        num_prompt, num_new = len(request.token_ids), request.max_new_tokens
        if num_prompt == 0:
            raise DataError(f"request {index} has no tokens to continue.  Give it at least a begin-of-text token.")
        if num_new < 1:
            raise DataError(f"request {index} asks for max_new_tokens = {num_new}; it must be at least 1.")
        if self.context is not None and num_prompt + num_new > self.context:
            raise DataError(
                f"request {index} asks for {num_new} new tokens after a prompt of {num_prompt}, {num_prompt + num_new} "
                f"together, but the model reads at most {self.context}.  Shorten the prompt or lower max_new_tokens."
            )
        if not 0 <= min(request.token_ids) <= max(request.token_ids) < self.num_embeddings:
            raise DataError(
                f"request {index} holds token ids from {min(request.token_ids)} to {max(request.token_ids)}, but the "
                f"model knows ids 0 to {self.num_embeddings - 1}.  Was the prompt made with this model's tokenizer?"
            )
        unreachable = [i for i in request.stop_ids if not 0 <= i < self.vocab_size]
        if unreachable:
            raise DataError(
                f"request {index} stops at token {unreachable[0]}, but only ids below {self.vocab_size} can be drawn.  "
                "Pass vocab_size=len(tokenizer): tokenizer.vocab_size leaves out the added tokens."
            )
        if not -(2**63) <= request.seed < 2**63:
            raise DataError(f"request {index} has seed {request.seed}, which is no signed 64-bit number.")


@dataclass(slots=True)
class _Row:
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
    def finish(self) -> Finish | None:
        if self.token_ids[-1] in self.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if len(self.token_ids) == self.request.max_new_tokens else None


class _Batch:
    """The live rows of one call, those that wait, and those that are done."""

    def __init__(self, engine: TransformersEngine, requests: Sequence[Request]) -> None:
        # Longest prompt first: a later row never needs more columns than there are.  Equal prompts come together.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].token_ids), requests[i].token_ids))
        self.waiting = deque(_Row(i, requests[i]) for i in order)
        self.engine, self.version = engine, engine.version
        self.device = next(engine.model.parameters()).device
        self.live: list[_Row] = []
        self.cache = RowCache()
        self.done: dict[int, Completion] = {}

    def run(self) -> list[Completion]:
        while self.waiting or self.live:
            free = self.engine.max_batch - len(self.live)
            # Rows enter several at a time: a prefill of one row costs about as much as one of several.
            if free >= min(len(self.waiting), max(1, self.engine.max_batch // 8)):
                while self.waiting and len(self.live) < self.engine.max_batch:
                    self.admit()
            if self.live:
                self.step()
        return [self.done[i] for i in range(len(self.done))]

    def admit(self) -> None:
        """Prefill some waiting rows, draw their first token, and let those that go on into the cache."""
        rows, prompts, source = self._take()
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
        alive = self._draw(rows, logits_BV[torch.tensor(source, device=self.device)] if shared else logits_BV)
        if alive:
            num_rows = min(self.engine.max_batch, len(self.live) + len(alive) + len(self.waiting))
            lengths = [len(rows[i].request.token_ids) for i in alive]
            self.cache.admit(prefilled, [source[i] for i in alive], lengths, num_rows)
            self.live += [rows[i] for i in alive]

    def step(self) -> None:
        """One token for every live row."""
        self.cache.reserve(len(self.live))
        last_ids_B1 = torch.tensor([[row.token_ids[-1]] for row in self.live], device=self.device)
        logits_BV = self.engine.last_logits(last_ids_B1, self.cache.mask(), self.cache.positions(), self.cache)
        self.cache.advance()
        alive = self._draw(self.live, logits_BV)
        if len(alive) < len(self.live):
            self.live = [self.live[i] for i in self.cache.keep(alive)]

    def _take(self) -> tuple[list[_Row], list[tuple[int, ...]], list[int]]:
        """The next rows to prefill, their different prompts, and which prompt each row has."""
        rows: list[_Row] = []
        prompts: list[tuple[int, ...]] = []
        source: list[int] = []
        while self.waiting and len(self.live) + len(rows) < self.engine.max_batch:
            prompt = self.waiting[0].request.token_ids
            if not prompts or prompt != prompts[-1]:
                if prompts and len(prompts[0]) * (len(prompts) + 1) > PREFILL_TOKENS:
                    break
                prompts.append(prompt)
            rows.append(self.waiting.popleft())
            source.append(len(prompts) - 1)
        return rows, prompts, source

    def _draw(self, rows: list[_Row], logits_BV: Tensor) -> list[int]:
        """Append one token to every row and file those that are finished.  Gives the indices of the others."""
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

    def _uniforms(self, rows: list[_Row]) -> list[float]:
        """Each row's number for its next token; drawn for many tokens of many rows at once."""
        if empty := [row for row in rows if len(row.token_ids) == len(row.uniforms)]:
            seeds, firsts = zip(*((row.request.seed, len(row.uniforms)) for row in empty), strict=True)
            for row, more in zip(empty, draw_uniform_rows(seeds, firsts, _UNIFORMS_AT_ONCE), strict=True):
                row.uniforms += more
        return [row.uniforms[len(row.token_ids)] for row in rows]

    def _file(self, row: _Row) -> bool:
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


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient and no gradient checkpointing (which would drop the cache); then all as it was."""
    training = [module for module in model.modules() if module.training]
    # vars, not getattr: a LoRA wrapper answers for the model inside it, and setting it there would leave a copy.
    checkpointed = [module for module in model.modules() if vars(module).get("gradient_checkpointing") is True]
    try:
        model.eval()
        for module in checkpointed:
            module.__dict__["gradient_checkpointing"] = False
        with torch.no_grad():
            yield
    finally:
        for module in checkpointed:
            module.__dict__["gradient_checkpointing"] = True
        for module in training:
            module.training = True


def _base_model(model: nn.Module) -> Any:
    """The model inside a compiled or LoRA wrapper."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _check_model(base: Any) -> None:
    """Left padding and row compaction need plain attention, explicit positions and a cache that can be handed in."""
    takes = inspect.signature(base.forward).parameters
    missing = [name for name in ("attention_mask", "position_ids", "past_key_values") if name not in takes]
    layer_types = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    foreign = sorted(layer_types - {"full_attention", "sliding_attention"})
    reason = (
        "it is an encoder-decoder model"
        if getattr(base.config, "is_encoder_decoder", False)
        else f"its forward takes no {missing[0]}"
        if missing
        else f"it has {foreign[0]} layers"
        if foreign
        else ""
    )
    if reason:
        raise ConfigError(
            f"in-process generation was asked of {type(base).__name__}, but {reason}.  "
            "It runs causal models with plain or sliding-window attention; use a vLLM server for others."
        )


def _check_finite(row: _Row, model_logprob: float) -> None:
    if not math.isfinite(model_logprob):
        raise EngineError(
            f"the model's logits after token {len(row.token_ids)} of request {row.index} are not finite "
            f"(log-probability {model_logprob}), so no token can be drawn.  The weights have diverged, or half "
            "precision overflows: look at the last gradient norms, or load the model in bfloat16 or float32."
        )
