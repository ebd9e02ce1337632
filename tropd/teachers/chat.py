"""A teacher that only writes: it continues the student's answers from some places, and is compared with them.

    chunks at peaks of the student's entropy -> N continuations each -> how much they resemble the chunk

It says no log-probability.  A chunk of which a continuation is missing is not audited, and nothing is trained on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import torch

from tropd.config.chat import ChatConfig
from tropd.config.models import TeacherConfig
from tropd.distributed.ranks import ALONE, Ranks
from tropd.errors import TeacherRefused
from tropd.objective.chunks import Audit
from tropd.objective.evidence import Needs
from tropd.rollout.engine import Engine
from tropd.servers.cards import Card
from tropd.servers.pool import Pool
from tropd.servers.settings import check_addresses
from tropd.teachers.continuing import ChatContinuations, Passage
from tropd.teachers.meeting import card_of
from tropd.teachers.served import ServedTeacher
from tropd.teachers.server import said_by
from tropd.teachers.similarity import similarity_of
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.teachers.texts import CachedTexts
from tropd.types import Completion, Finish, Message, Rollout, Sampling, TeacherScores, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("tropd.teachers")
_BROKEN = "\ufffd"
"""Stands for bytes that are no whole character."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One chunk of a rollout, and what is asked in its place."""

    rollout: int
    number: int
    """From 1 on."""
    chunk: range
    text: str
    passages: tuple[Passage, ...]


class ChatTeacher(Teacher):
    """Needs what the student's pass says before it is asked, so it cannot be asked ahead."""

    capabilities = Needs.CHUNKS

    def __init__(self, config: TeacherConfig, model: str, directory: Path, world: Ranks = ALONE, name: str = "default"):
        """`directory` keeps the continuations and what they cost."""
        self.config, self.model, self.name, self.share = config, model, name, world.size
        self.chat = config.chat or ChatConfig()
        own = "" if name == "default" else f".{quote(name, safe='')}"
        self.texts = directory / world.own_name(f"teacher_continuations{own}.sqlite")
        self.costs = directory / world.own_name(f"teacher_costs{own}.json")
        self.pool = Pool(config.servers, config.server)
        self.writer: Engine | None = None

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.asked = ChatContinuations(
            self.pool, self.model, tokenizer, self.chat, self.costs, self.name, share=self.share
        )
        self.writer = self.asked
        if self.config.text_cache:
            self.writer = CachedTexts(self.asked, self.texts, f"{self.model} {self.chat.continues}")

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        request.check(self)
        chunks_T = [torch.zeros(len(rollout.response_ids)) for rollout in request.rollouts]
        support_T = [torch.zeros_like(own_T) for own_T in chunks_T]
        if request.audit is not None and request.chunks is not None:
            similarity = similarity_of(request.audit.similarity)
            places = [
                place
                for number, (rollout, chunks) in enumerate(zip(request.rollouts, request.chunks, strict=True))
                for place in self._places(number, rollout, chunks, request.audit)
            ]
            missing = 0
            for place, written in zip(places, self._written(places), strict=True):
                rows = slice(place.chunk.start, place.chunk.stop)
                if any(text.finish is Finish.ABORT for text in written):
                    missing, chunks_T[place.rollout][rows] = missing + 1, -place.number
                    continue
                support = sum(similarity(place.text, self._decoded(text.token_ids).strip()) for text in written)
                chunks_T[place.rollout][rows], support_T[place.rollout][rows] = place.number, support
            self._report(missing, len(places))
        return [
            TeacherScores(chunks_T=own_T, support_T=k_T, teacher=self.name)
            for own_T, k_T in zip(chunks_T, support_T, strict=True)
        ]

    def close(self) -> None:
        (self.writer or self.pool).close()

    def _places(self, index: int, rollout: Rollout, chunks: Sequence[range], audit: Audit) -> Iterator[Place]:
        """In ascending order, so that a server finds the beginning of a text in its cache."""
        ids, prompt = rollout.response_ids, rollout.prompt
        messages = prompt.messages or (Message(role="user", content=self._decoded(prompt.token_ids)),)
        for number, chunk in enumerate(chunks, 1):
            so_far, until = self._decoded(ids[: chunk.start]), self._decoded(ids[: chunk.stop])
            whole = until[len(so_far) :] if until.startswith(so_far) else self._decoded(ids[chunk.start : chunk.stop])
            passage = Passage(
                token_ids=prompt.token_ids + ids[: chunk.start],
                messages=messages,
                so_far=so_far,
                max_new_tokens=len(chunk),
                seed=0,
                sampling=Sampling(temperature=self.chat.temperature),
            )
            seeds = [key_of(0, rollout.id, chunk.start, n) for n in range(audit.continuations)]
            passages = tuple(replace(passage, seed=seed) for seed in seeds)
            yield Place(rollout=index, number=number, chunk=chunk, text=whole.strip(), passages=passages)

    def _written(self, places: Sequence[Place]) -> Iterator[tuple[Completion, ...]]:
        """The continuations of each place.  They are kept slice by slice: as many as a crash can cost."""
        assert self.writer is not None, "prepared before the first request"
        passages = [passage for place in places for passage in place.passages]
        size = 2 * self.config.server.max_requests * len(self.config.servers)
        slices = [passages[start : start + size] for start in range(0, len(passages), size)]
        texts = iter([text for part in slices for text in self.writer.generate(part)])
        for place in places:
            yield tuple(next(texts) for _ in place.passages)

    def _decoded(self, ids: Sequence[int]) -> str:
        """Without a character that the last token leaves unfinished."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).rstrip(_BROKEN)

    def _report(self, missing: int, number: int) -> None:
        if not missing:
            return
        said = f"teacher {self.name}: continuations of {missing} of {number} chunks are missing"
        why = f" The last one: {self.asked.why}" if self.asked.why else ""
        if missing == number:
            raise TeacherRefused(f"{said}, so nothing can be compared.{why}")
        log.warning("%s; these chunks are not audited.%s", said, why)


def meet_chat(config: TeacherConfig, directory: Path, world: Ranks = ALONE, name: str = "default") -> ServedTeacher:
    """The teacher behind a chat endpoint.  Where its model is named, nothing is asked before the first step."""
    notes = list(check_addresses(config.servers, config.server))
    ask = partial(card_of, config.servers, config.server)
    with said_by(name):
        card = ask() if config.server.model is None else Card(id=config.server.model)
    teacher = ChatTeacher(config, card.id, directory, world, name)
    notes.append(
        "the teacher only writes: its continuations come from a chat endpoint, are compared with the student's text "
        "and say no log-probability."
    )
    return ServedTeacher(teacher=teacher, model=card.id, identity=f"{config.server.kind} {card.id}", notes=tuple(notes))
