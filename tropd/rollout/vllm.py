"""Rollouts from stock vLLM servers that are given the student's weights after every step.

    sync      export --> every server: reload, reset the prefix cache --> canary == the trainer's own numbers
    generate  requests --> servers (least busy first) --> texts --> canary again: nobody restarted in between

A LoRA student sends its adapter alone, under a new name each time.  Log-probabilities are those of temperature 1
without truncation, where every --logprobs-mode of vLLM means the same; texts drawn otherwise come without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tropd.config import Run
from tropd.errors import (
    ConfigError,
    DataError,
    EngineError,
    EngineOutOfSync,
    EngineTimeout,
    ServerError,
    ServerRefused,
    ServerUnavailable,
)
from tropd.rollout import canary
from tropd.rollout.sampling import check_request
from tropd.servers import updates, vllm
from tropd.servers.pool import Job, Pool
from tropd.servers.settings import ServerConfig, check_addresses
from tropd.student.export import export_adapter, export_untied
from tropd.types import Completion, Request, Sampling

log = logging.getLogger("tropd.rollout")
_NATS = {torch.float32: 2e-3, torch.float64: 2e-3}
_NATS_OF_HALF_PRECISION = 0.1
_NOT_FOUND = 404


class VllmEngine:
    """Writes tokens with servers that hold a copy of `model`; `folder` is where both sides see its weights."""

    def __init__(
        self,
        urls: Sequence[str],
        settings: ServerConfig,
        *,
        model: Any,
        tokenizer: Any,
        folder: Path,
        vocab_size: int,
        sync_nats: float | None = None,
        version: int = 0,
        export: Callable[[Any, Any, Path], Path] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        if settings.kind != "vllm":
            raise ConfigError(
                f'rollout.server.kind is "{settings.kind}", but weights can be given to vLLM servers only. '
                "Serve the student with vLLM, or leave rollout.servers out."
            )
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.settings, self.vocab_size, self.version, self.notes = settings, vocab_size, version, notes
        dtype = next(model.parameters()).dtype
        self.sync_nats = sync_nats if sync_nats is not None else _NATS.get(dtype, _NATS_OF_HALF_PRECISION)
        self.adapter = bool(getattr(model, "peft_config", None))
        self.export = export or (export_adapter if self.adapter else export_untied)
        self.pool = Pool(urls, settings)
        self.each = {client.url: Pool([client.url], settings) for client in self.pool.clients}
        with _said_by_engine():
            served = [self._served(url) for url in self.each]
        if len({one.id for one in served}) > 1:
            raise EngineError(
                f"rollout.servers serve different models: {', '.join(sorted({s.id for s in served}))}. Name the same "
                "model on all of them (--served-model-name)."
            )
        self.name = served[0].id
        limits = [one.max_model_len for one in served if one.max_model_len is not None]
        limits += [
            c for c in [getattr(model.config.get_text_config(), "max_position_embeddings", None)] if c is not None
        ]
        self.context = min(limits, default=None)
        self.text = canary.known_text(vocab_size, self.context or 4096)
        self._expected: canary.Expected | None = None  # until the servers have been given weights
        self._found: dict[str, canary.Found] = {}
        self._loaded: set[str] = set()  # names of adapters

    @property
    def asked(self) -> str:
        """The model that requests name: the adapter of a version, where there is one."""
        return f"tropd-{self.version}" if self.adapter else self.name

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order; written with the weights of `version`, or not returned."""
        for index, request in enumerate(requests):
            _check(request, index, self.context)
        if not requests:
            return []
        if self._expected is None:
            self.sync(None, self.version)
        with _said_by_engine():
            try:
                return self._write(requests)
            except (EngineOutOfSync, ServerRefused) as error:
                if isinstance(error, ServerRefused) and error.status != _NOT_FOUND:
                    raise
                log.warning("%s It is given the weights of step %d again.", str(error).rstrip(), self.version)
            self._push()
            return self._write(requests)

    def sync(self, weights: Any, version: int) -> None:
        """Give every server these weights (None: the trainer's own) and make sure that it computes with them."""
        model = self.model if weights is None else weights
        before, old = (self._expected, dict(self._found)), self.asked
        self._expected, self.version = None, version
        expected = canary.expect(model, self.text, self.vocab_size)
        self.export(model, self.tokenizer, self.folder)
        with _said_by_engine():
            self._push(expected)
            for url, found in self._found.items():
                if before[0] is not None and url in before[1]:
                    canary.compare_moves(url, (before[0], before[1][url]), (expected, found))
            self._expected = expected
            if self.adapter and old in self._loaded and old != self.asked:
                self._unload(old)

    def close(self) -> None:
        for pool in (self.pool, *self.each.values()):
            pool.close()

    def _push(self, expected: canary.Expected | None = None) -> None:
        for url, pool in self.each.items():
            try:
                if self.adapter:
                    self._load_adapter(pool)
                else:
                    pool.run([updates.reload_weights(self.folder)])
                    pool.run([updates.reset_prefix_cache()])
            except ServerRefused as error:
                raise EngineError(f"{error} {_cure(self.adapter, self.folder, url, error)}") from error
        self._verify(expected)

    def _load_adapter(self, pool: Pool) -> None:
        try:
            pool.run([updates.load_adapter(self.asked, self.folder)])
        except ServerRefused as error:
            if "already been loaded" not in str(error):
                raise
            # Of an earlier attempt, or of another run: nobody knows what is in it.
            pool.run([updates.unload_adapter(self.asked)])
            pool.run([updates.load_adapter(self.asked, self.folder)])
        self._loaded.add(self.asked)

    def _unload(self, name: str) -> None:
        self._loaded.discard(name)
        for url, pool in self.each.items():
            try:
                pool.run([updates.unload_adapter(name)])
            except ServerRefused as error:  # a server that restarted does not have it
                log.info("%s: %s", url, error)

    def _verify(self, expected: canary.Expected | None = None) -> None:
        expected = expected or self._expected
        assert expected is not None, "weights are compared after they were given"
        for url, pool in self.each.items():
            found = self._sing(pool)
            try:
                canary.compare(url, expected, found, self.sync_nats)
            except EngineOutOfSync as error:
                raise EngineOutOfSync(f"{error}{_advice(self.adapter, self.folder)}") from error
            self._found[url] = found

    def _sing(self, pool: Pool) -> canary.Found:
        text, model = self.text, self.asked

        def read(answer: bytes, request_id: str) -> list[float]:
            (scored,) = vllm.read_scores(
                answer, model=model, sequences=[text], firsts=[1], top_k=0, request_id=request_id
            )
            return scored.logprobs

        job = Job(
            name="a known text",
            path=vllm.SCORE,
            body=vllm.score_body(model, [text], 0),
            read=read,
            num_tokens=len(text) + 1,
            limit_bytes=vllm.score_limit(len(text), 0),
        )
        (logprobs,) = pool.run([job])
        (written,) = pool.run([self._job(Request(token_ids=text, max_new_tokens=1, seed=1), "a known text")])
        return canary.Found(logprobs=logprobs, written=written)

    def _write(self, requests: Sequence[Request]) -> list[Completion]:
        texts = self.pool.run([self._job(request, f"rollout request {n}") for n, request in enumerate(requests)])
        self._verify()
        return texts

    def _job(self, request: Request, name: str) -> Job[Completion]:
        neutral = request.sampling == Sampling()
        model, version = self.asked, self.version

        def read(answer: bytes, request_id: str) -> Completion:
            text = vllm.read_text(answer, model=model, request=request, request_id=request_id)
            if max(text.token_ids) >= self.vocab_size:
                raise EngineError(
                    f"the server wrote token {max(text.token_ids)}, but student and teacher share {self.vocab_size}: "
                    "the padding of the student's head has probability. Use a student whose head is trained."
                )
            known = text.behavior_logprobs if neutral else ()
            if neutral and not known:
                raise ServerRefused(f"{name}: log-probabilities were asked for, and none came.")
            return replace(text, behavior_logprobs=known, model_logprobs=known, policy_version=(version, version))

        return Job(
            name=name,
            path=vllm.TEXT,
            body=vllm.text_body(model, request, logprobs=neutral),
            read=read,
            num_tokens=len(request.token_ids) + request.max_new_tokens,
            limit_bytes=vllm.text_limit(request),
        )

    def _served(self, url: str) -> updates.Served:
        (client,) = self.each[url].clients
        found = updates.read_models(client.ask("/v1/models"))
        chosen = [one for one in found if self.settings.model in (None, one.id) and not one.id.startswith("tropd-")]
        if len(chosen) != 1:
            there = ", ".join(one.id for one in found)
            raise EngineError(f"{url} serves {there}. Name the student among them in rollout.server.model.")
        return chosen[0]


def open_engine(
    run: Run, model: Any, tokenizer: Any, vocab_size: int, folder: Path, kind: Callable[..., VllmEngine] = VllmEngine
) -> VllmEngine:
    """The engine of a run, refused where training would need log-probabilities that servers do not tell."""
    if run.sampling != Sampling():
        raise ConfigError(
            f"rollouts are asked from servers and drawn with {run.sampling}, but servers tell log-probabilities that "
            "hold at temperature 1 without truncation. Set rollout.sampling so, or leave rollout.servers out."
        )
    notes = check_addresses(run.rollout.servers, run.rollout.server)
    return kind(
        run.rollout.servers,
        run.rollout.server,
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        vocab_size=vocab_size,
        sync_nats=run.rollout.sync_nats,
        notes=tuple(notes),
    )


@contextmanager
def _said_by_engine() -> Iterator[None]:
    """What servers say, said by the engine behind them."""
    try:
        yield
    except ServerUnavailable as error:
        raise EngineTimeout(f"rollouts: {error}") from error
    except ServerError as error:
        raise EngineError(f"rollouts: {error}") from error


def _cure(adapter: bool, folder: Path, url: str, error: ServerRefused) -> str:
    mode = f"--enable-lora and {updates.LORA_MODE}" if adapter else updates.DEV_MODE
    if error.status == _NOT_FOUND:
        return f"Start vLLM with {mode} in its environment, so that it takes weights."
    return f"{url} has to see {folder} and serve a model of the same shape (its log says more)."


def _advice(adapter: bool, folder: Path) -> str:
    if adapter:
        return f"Does the server hold the student's own base model, in the same precision? The adapter: {folder}."
    return (
        f"Is its --dtype the student's? The weights that it was given are in {folder}: start it with --model "
        "on that folder, or raise rollout.sync_nats if its precision is lower."
    )


def _check(request: Request, index: int, context: int | None) -> None:
    check_request(request, index)
    num_prompt, num_new = len(request.token_ids), request.max_new_tokens
    if context is not None and num_prompt + num_new > context:
        raise DataError(
            f"request {index} asks for {num_new} new tokens after a prompt of {num_prompt}, but the servers hold "
            f"{context}. Start them with a larger --max-model-len, or lower max_new_tokens."
        )
