"""In-process generation with any causal `transformers` model: CPU, one GPU, full weights or LoRA.

`tropd.rollout.rows` is the loop, `tropd.rollout.decoding` a step of a model.  On CUDA a step has a fixed shape and is
recorded and replayed (`tropd.rollout.slots`, `tropd.rollout.graphs`) for families whose masks can be made for them.

A request draws token t of *its own new tokens* with uniform(key=seed, position=t), so its tokens do not depend on
batch-mates, order or `max_batch`: in float32 up to rounding of the logits, which moves a boundary between two tokens
by about 1e-7.  In bfloat16 that rounding is about 1e-2, and the same request can differ between batches.

Axes: B live rows, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tropd.errors import ConfigError, DataError, TropdError
from tropd.model import hf
from tropd.model.hf import Cache
from tropd.rollout.cache import RowCache
from tropd.rollout.decoding import MIN_STEPS, Misread, Stepper, obstacle
from tropd.rollout.engine import Engine
from tropd.rollout.fixed import FixedShapes
from tropd.rollout.rows import Batch
from tropd.rollout.sampling import check_request
from tropd.rollout.slots import SlotCache
from tropd.rollout.voices import Voice
from tropd.types import Completion, Request

_REREADS = "reads each text whole for every token, since no key-value cache works"


class TransformersEngine(Engine):
    """Writes tokens with the trainer's own model.  `vocab_size` leaves out padded rows of the head.

    `fixed`: steps of fixed shape, the same tokens; None: on CUDA, where they can be recorded.  `within`: the context in
    which the model is read, such as its adapter switched off.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab_size: int | None = None,
        max_batch: int = 64,
        pad_id: int = 0,
        version: int = 0,
        fixed: bool | None = None,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
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
        self.within = within
        self.context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self._cache_argument = hf.cache_argument(base)
        self._last_only = {"logits_to_keep": 1} if hf.takes(base, "logits_to_keep") else {}
        self._no_cache = {"use_cache": False} if hf.takes(base, "use_cache") else {}
        unknown = f"none of its arguments is {' or '.join(hf.CACHE_ARGUMENTS)}"
        self.rereads = "" if self._cache_argument else "; ".join(hf.missing) or unknown
        """Why each text is read whole for every token; empty if keys and values are cached."""
        self.has_written = False
        self.stepper = Stepper(model, base, self._own_step)
        self.fixed_shapes = FixedShapes(fixed)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        for i, request in enumerate(requests):
            self.check(request, i)
        num_steps = [request.max_new_tokens for request in requests]
        return written([self], num_steps, lambda rereads: Batch([Voice(self, rereads=rereads)], requests).run())

    @contextmanager
    def ready(self, num_steps: Sequence[int]) -> Iterator[None]:
        """Inside the block the engine has the copies and the cache for so many steps of each text."""
        with ExitStack() as stack:
            with self.within():
                long = max(num_steps, default=0) >= MIN_STEPS
                self.stepper.slots = self.fixed_shapes.cache_for(self, _base_model(self.model)) if long else None
                stack.callback(self._give_back)
                stack.enter_context(self.stepper.ready(num_steps))
            yield

    def _give_back(self) -> None:
        if self.fixed_shapes.give_back():
            self.stepper.graphs.forget()

    @property
    def notes(self) -> Sequence[str]:
        """Notes on slow paths on this machine."""
        if self.rereads:
            return [f"{type(self.model).__name__} {_REREADS}: the same tokens, much slower ({self.rereads})."]
        reason = obstacle(self.model, _base_model(self.model))
        if not reason or next(self.model.parameters()).device.type != "cpu":
            return []
        return [f"generation runs the model's own forward pass, since {reason}: the same tokens, slower."]

    def sync(self, version: int) -> None:
        """Only note the version: the engine uses the trainer's weights."""
        self.version = version

    def last_logits(
        self, input_ids_BT: Tensor, mask: Tensor | dict[str, Tensor] | None, positions_BT: Tensor, cache: Cache
    ) -> Tensor:
        """The logits after the last token of each row, without the padded part of the vocabulary.  [B, V]."""
        output = self.model(
            input_ids=input_ids_BT,
            attention_mask=mask,
            position_ids=positions_BT,
            **{self._cache_argument or "": cache},
            use_cache=True,
            return_dict=True,
            **self._last_only,
        )
        return output.logits[:, -1, : self.vocab_size]

    def whole_logits(self, input_ids_BT: Tensor) -> Tensor:
        """The logits [B, V] after texts of one length, from a plain forward pass."""
        output = self.model(input_ids=input_ids_BT, return_dict=True, **self._no_cache, **self._last_only)
        return output.logits[:, -1, : self.vocab_size]

    def _own_step(self, last_ids_B1: Tensor, cache: RowCache | SlotCache) -> Tensor:
        return self.last_logits(last_ids_B1, cache.mask(), cache.positions(), cache)

    def check(self, request: Request, index: int) -> None:
        """Refuse a request that this model cannot continue."""
        check_request(request, index)
        num_prompt, num_new = len(request.token_ids), request.max_new_tokens
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


def written(
    engines: Sequence[TransformersEngine],
    num_steps: Sequence[int],
    write: Callable[[bool], list[Completion]],
    *,
    copies: bool = True,
) -> list[Completion]:
    """What `write` writes with these engines; `write(True)` reads each text whole for every token, which is how it goes
    on where a first call fails with caches.  `copies`: whether the engines may use copies of their weights."""
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(generating(engine.model))
        if any(engine.rereads for engine in engines):
            return write(True)
        new = [engine for engine in engines if not engine.has_written]
        try:
            completions = _with_caches(engines, num_steps if copies else (), write)
        except Exception as error:  # whatever a cache that is read or filled in another way may raise
            if not new or isinstance(error, TropdError | torch.OutOfMemoryError):
                raise
            completions = write(True)
            for engine in new:
                engine.rereads = hf.step_aside(f"{type(engine.model).__name__} {_REREADS}", error)
        for engine in new:
            engine.has_written = True
        return completions


def _with_caches(
    engines: Sequence[TransformersEngine], num_steps: Sequence[int], write: Callable[[bool], list[Completion]]
) -> list[Completion]:
    try:
        with ExitStack() as stack:
            for engine in engines:
                stack.enter_context(engine.ready(num_steps))
            return write(False)
    except Misread:
        return _with_caches(engines, num_steps, write)


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Inside the block: evaluation mode, no gradient, no gradient checkpointing (which would drop the cache)."""
    training = [module for module in model.modules() if module.training]
    checkpointed = hf.checkpointed(model)
    try:
        model.eval()
        for module in checkpointed:
            module.__dict__[hf.CHECKPOINTING] = False
        with torch.no_grad():
            yield
    finally:
        for module in checkpointed:
            module.__dict__[hf.CHECKPOINTING] = True
        for module in training:
            module.training = True


def _base_model(model: nn.Module) -> Any:
    """The model inside a compiled or LoRA wrapper."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _check_model(base: Any) -> None:
    """Refuse models without plain attention and explicit positions, which left padding and row compaction need."""
    missing = [name for name in ("attention_mask", "position_ids") if not hf.takes(base, name)]
    foreign = sorted(hf.layer_types(base) - {"full_attention", "sliding_attention"})
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
