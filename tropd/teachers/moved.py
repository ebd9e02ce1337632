"""A teacher on servers that follows the student: the servers get its weights before the first request after a move.

The copy that moves is in this process, like that of any teacher that follows.  `tropd.rollout.delivery` gives it to the
servers and compares a known text, as it does with the student; then the servers are met anew.  Texts, such as prefixes,
are written by the copy in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from tropd.config.models import TeacherConfig
from tropd.distributed.ranks import Ranks
from tropd.errors import ConfigError, EngineError, ServerError, TeacherError
from tropd.rollout.canary import known_text
from tropd.rollout.delivery import Delivery
from tropd.rollout.shared import SharedDelivery
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Pool
from tropd.servers.settings import check_addresses
from tropd.teachers.following import Follower
from tropd.teachers.meeting import CANARY, canary_of, card_of
from tropd.teachers.server import ServerTeacher
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.types import TeacherScores

log = logging.getLogger("tropd.servers")


class MovedTeacher(Teacher):
    """Scores on servers, with the weights of `follower`.  It is asked in the thread that trains: a teacher that moves
    while it reads would say something else on every machine."""

    def __init__(self, config: TeacherConfig, follower: Follower, top_k: int, directory: Path, world: Ranks) -> None:
        dialect = dialect_of(config.server)
        if dialect.no_weights:
            raise ConfigError(
                f'{follower.name}.server.kind is "{config.server.kind}", but {dialect.no_weights} A teacher that '
                "follows the student needs that. Serve it with vLLM, or leave its servers out."
            )
        self.name, self.config, self.follower, self.top_k = follower.teacher.name, config, follower, top_k
        self.folder = directory / f"teacher_weights.{quote(follower.name, safe='')}"
        self.capabilities, self.world = dialect.capabilities, world
        self.pools = {url: Pool([url], config.server) for url in config.servers}
        self.delivery: Delivery | None = None
        self.served: ServerTeacher | None = None
        self.given = -1
        """The follower's moves as the servers know them."""

    def prepare(self, tokenizer: Any, vocab_size: int, device: torch.device) -> None:
        for note in check_addresses(self.config.servers, self.config.server):
            log.warning("%s", note)
        model = self.follower.teacher.forward.model
        make: Callable[..., Delivery] = Delivery if self.world.size == 1 else partial(SharedDelivery, self.world)
        card = card_of(self.config.servers, self.config.server)
        self.context = min(x for x in (self.follower.teacher.context, card.max_model_len, 2**31) if x is not None) - 1
        self.noise = self.config.server.nats_for(str(next(model.parameters()).dtype).removeprefix("torch."))
        self.delivery = make(
            self.pools,
            card.id,
            known_text(vocab_size, self.context),
            model=model,
            tokenizer=tokenizer,
            folder=self.folder,
            vocab_size=vocab_size,
            sync_nats=self.noise,
            whose=("teacher", f"{self.follower.name}.server.canary_nats"),
        )
        self.canary = canary_of(tokenizer.encode(CANARY, add_special_tokens=False), vocab_size)
        self._renew()

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        request.check(self)
        self._renew()
        assert self.served is not None
        return self.served.score(request)

    def close(self) -> None:
        for part in (self.served, self.delivery, *self.pools.values()):
            if part is not None:
                part.close()

    def _renew(self) -> None:
        """Give the servers what the teacher has become, and meet them anew."""
        if self.given == self.follower.moves:
            return
        assert self.delivery is not None
        try:
            with self.follower.reading():
                self.delivery.give(self.follower.moves)
        except (EngineError, ServerError) as error:
            raise TeacherError(f"teacher {self.name} has moved, and its servers cannot follow: {error}") from error
        if self.served is not None:
            self.served.close()
        self.served = ServerTeacher(
            self.config.servers,
            replace(self.config.server, model=self.delivery.asked),
            vocab_size=self.delivery.vocab_size,
            canary=self.canary,
            top_k=self.top_k,
            name=self.name,
            dtype=str(next(self.delivery.model.parameters()).dtype).removeprefix("torch."),
        )
        self.given = self.follower.moves
