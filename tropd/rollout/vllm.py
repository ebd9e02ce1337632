"""Rollouts from stock vLLM servers, which get the student's weights after every step.

sync      tropd.rollout.delivery gives every server the weights
generate  requests --> servers (least busy first) --> texts --> the weights are compared again
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tropd.config.models import ServerConfig
from tropd.config.stages import RolloutConfig
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
from tropd.rollout.delivery import NOT_FOUND, Delivery, weights_folder
from tropd.rollout.engine import Engine
from tropd.rollout.jobs import text_job
from tropd.rollout.sampling import check_request
from tropd.servers.cards import Card, read_cards
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Pool
from tropd.servers.settings import check_addresses
from tropd.types import Completion, Request, Sampling

log = logging.getLogger("tropd.rollout")


class VllmEngine(Engine):
    """Writes tokens with servers that hold a copy of `model`; `delivery` and the options are those of Delivery."""

    def __init__(
        self,
        urls: Sequence[str],
        settings: ServerConfig,
        *,
        model: Any,
        vocab_size: int,
        notes: tuple[str, ...] = (),
        delivery: Callable[..., Delivery] = Delivery,
        **options: Any,
    ) -> None:
        self.dialect = dialect_of(settings)
        if refusal := self.dialect.no_weights:
            raise ConfigError(
                f'rollout.server.kind is "{settings.kind}", but {refusal} '
                "Serve the student with vLLM, or leave rollout.servers out."
            )
        self.settings, self.vocab_size = settings, vocab_size
        self.pool = Pool(urls, settings)
        self.each = {client.url: Pool([client.url], settings) for client in self.pool.clients}
        with _said_by_engine():
            served = [self._served(url) for url in self.each]
        if len({one.id for one in served}) > 1:
            raise EngineError(
                f"rollout.servers serve different models: {', '.join(sorted({s.id for s in served}))}. Name the same "
                "model on all of them (--served-model-name)."
            )
        limits = [one.max_model_len for one in served if one.max_model_len is not None]
        limits += [
            c for c in [getattr(model.config.get_text_config(), "max_position_embeddings", None)] if c is not None
        ]
        self.context = min(limits, default=None)
        text = canary.known_text(vocab_size, self.context or 4096)
        with _said_by_engine():
            self.weights = delivery(self.each, served[0].id, text, model=model, vocab_size=vocab_size, **options)
        self.notes = (*notes, *self.weights.notes)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order; written with the weights of one version, or not returned."""
        for index, request in enumerate(requests):
            self._check(request, index)
        if not requests:
            return []
        with _said_by_engine():
            if not self.weights.given:
                self.weights.give(self.weights.version)
            try:
                return self._write(requests)
            except (EngineOutOfSync, ServerRefused) as error:
                if isinstance(error, ServerRefused) and error.status != NOT_FOUND:
                    raise
                said = "%s It is given the weights of step %d again."
                log.warning(said, str(error).rstrip(), self.weights.version)
            self.weights.repeat()
            return self._write(requests)

    def sync(self, version: int) -> None:
        """Give every server the student's current weights, and make sure that it computes with them."""
        with _said_by_engine():
            self.weights.give(version)

    def rest(self) -> None:
        """Put the servers to sleep, if the run wants that."""
        with _said_by_engine():
            self.weights.rest()

    def close(self) -> None:
        self.weights.close()
        for pool in (self.pool, *self.each.values()):
            pool.close()

    def _write(self, requests: Sequence[Request]) -> list[Completion]:
        held = self.weights
        texts = self.pool.run(
            [text_job(self.dialect, r, f"rollout request {n}", held.student) for n, r in enumerate(requests)]
        )
        held.check(anew=bool(self.pool.returned))
        self.pool.returned.clear()
        return texts

    def _check(self, request: Request, index: int) -> None:
        check_request(request, index)
        num_prompt, num_new = len(request.token_ids), request.max_new_tokens
        if self.context is not None and num_prompt + num_new > self.context:
            raise DataError(
                f"request {index} asks for {num_new} new tokens after a prompt of {num_prompt}, but the servers hold "
                f"{self.context}. Start them with a larger {self.dialect.context_flag}, or lower max_new_tokens."
            )

    def _served(self, url: str) -> Card:
        (client,) = self.each[url].clients
        found = read_cards(client.ask("/v1/models"))
        chosen = [one for one in found if self.settings.model in (None, one.id) and not one.id.startswith("tropd-")]
        if len(chosen) != 1:
            there = ", ".join(one.id for one in found)
            raise EngineError(f"{url} serves {there}. Name the student among them in rollout.server.model.")
        return chosen[0]


def open_engine(
    config: RolloutConfig,
    sampling: Sampling,
    model: Any,
    tokenizer: Any,
    vocab_size: int,
    directory: Path,
    delivery: Callable[..., Delivery] = Delivery,
) -> VllmEngine:
    """The engine of the run in `directory`, an error if training would need log-probabilities that servers do not
    give."""
    if sampling != Sampling():
        raise ConfigError(
            f"rollouts on servers were asked for with {sampling}, but servers give log-probabilities only at "
            "temperature 1 without truncation. Set rollout.sampling so, or leave rollout.servers out."
        )
    notes = check_addresses(config.servers, config.server)
    return VllmEngine(
        config.servers,
        config.server,
        model=model,
        tokenizer=tokenizer,
        folder=weights_folder(config.weights_folder, directory),
        kept=config.weights_folder is None,
        sleeps=config.servers_sleep,
        wary=config.staleness > 0,
        vocab_size=vocab_size,
        sync_nats=config.sync_nats,
        notes=tuple(notes),
        delivery=delivery,
    )


@contextmanager
def _said_by_engine() -> Iterator[None]:
    """Turn errors of servers into errors of the engine."""
    try:
        yield
    except ServerUnavailable as error:
        raise EngineTimeout(f"rollouts: {error}") from error
    except ServerError as error:
        raise EngineError(f"rollouts: {error}") from error
