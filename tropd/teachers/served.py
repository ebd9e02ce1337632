"""The teacher of a run whose configuration names servers: met, checked, and ready to score and to write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tropd.config.models import TeacherConfig
from tropd.data.stream import LazyPromptStream, PromptStream
from tropd.distributed.ranks import ALONE, Ranks
from tropd.errors import ConfigError, ServerGarbled, ServerRefused, TeacherRefused, VocabularyError
from tropd.rollout.engine import Engine
from tropd.servers.client import Client
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Pool
from tropd.servers.settings import check_addresses
from tropd.teachers.cached import Cached
from tropd.teachers.meeting import CANARY, canary_of, keep, recall
from tropd.teachers.questions import text_of
from tropd.teachers.reference import reference_of
from tropd.teachers.server import ServerTeacher
from tropd.teachers.teacher import Teacher
from tropd.teachers.writer import ChatWriter, ServerWriter
from tropd.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPELLING = CANARY + " \n\tΩ 汉字 🙂 x_1=0.5;  def f(n):\n    return n**2  # ünïcode"
"""A text that different tokenizers usually cut differently."""


@dataclass(frozen=True, kw_only=True)
class ServedTeacher:
    teacher: Teacher
    model: str
    """Its name on the servers."""
    identity: str
    """Identifies the model that was met."""
    notes: tuple[str, ...]


def meet_teacher(
    config: TeacherConfig,
    top_k: int,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    world: Ranks = ALONE,
    name: str = "default",
) -> ServedTeacher:
    """Connect, and for a resumed run compare with the teacher of its start.  `top_k` is the method's, `tokenizer` the
    teacher's, `vocab_size` the shared number of tokens; `name` is the teacher's among several."""
    notes = list(check_addresses(config.servers, config.server))
    own = "" if name == "default" else f".{quote(name, safe='')}"
    path = directory / f"teacher_canary{own}.json"
    canary = canary_of(tokenizer.encode(CANARY, add_special_tokens=False), vocab_size)
    text = tokenizer.encode(SPELLING, add_special_tokens=False)
    before = recall(path, canary.ids) if (directory / "run.toml").exists() else None
    teacher = ServerTeacher(
        config.servers,
        config.server,
        vocab_size=vocab_size,
        num_rows=_num_rows(config),
        num_known=max(tokenizer.get_vocab().values()) + 1,
        canary=before or canary,
        top_k=top_k,
        name=name,
        dtype=config.dtype,
        text=text,
        reference=reference_of(config, text_of(text, vocab_size), top_k) if world.leads else None,
    )
    notes += teacher.notes
    notes += compare_tokenizers(teacher.pool.clients, teacher.card.id, tokenizer)
    if teacher.canary.logprobs and before is None and world.leads:
        keep(teacher.canary, path)
    card = teacher.card
    identity = f"{config.server.kind} {card.id}" + (f" ({card.root})" if card.root not in (None, card.id) else "")
    kept: Teacher = teacher
    if config.score_cache:
        # A name says little of weights: the known text's numbers, to a tenth of a nat, say more.
        weights = [round(x, 1) for x in teacher.canary.logprobs]
        kept = Cached(teacher, directory / world.own_name(f"teacher_scores{own}.sqlite"), f"{identity} {weights}")
    return ServedTeacher(teacher=kept, model=card.id, identity=identity, notes=tuple(notes))


def served_size(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids a served teacher has."""
    ids = max(tokenizer.get_vocab().values()) + 1
    return min(_num_rows(config) or ids, ids)


def _num_rows(config: TeacherConfig) -> int | None:
    """Rows of the served model's vocabulary, padding included."""
    from transformers import AutoConfig

    options: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    try:
        found = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, KeyError):  # a folder with a tokenizer alone will do
        return None
    return getattr(found.get_text_config(), "vocab_size", None)


def compare_tokenizers(clients: list[Client], model: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Refuse servers that cut a text differently than the configured tokenizer; notes on servers that do not tell."""
    own, notes = [*tokenizer.encode(SPELLING, add_special_tokens=False)], []
    for client in clients:
        body = {"model": model, "prompt": SPELLING, "add_special_tokens": False}
        try:
            found = json.loads(client.ask("/tokenize", body))["tokens"]
        except ServerRefused as refusal:
            if refusal.status not in (404, 405):
                raise TeacherRefused(f"the tokenizer of {client.url} was asked for, but {refusal}") from refusal
            notes.append(f"{client.url} does not say how it cuts texts, so its tokenizer could not be compared.")
            continue
        except (ValueError, KeyError, TypeError, ServerGarbled) as error:
            raise TeacherRefused(
                f"{client.url}/tokenize answered with something else than tokens: {error!r}"
            ) from error
        if found != own:
            at = next(
                (n for n, (a, b) in enumerate(zip(own, found, strict=False)) if a != b), min(len(own), len(found))
            )
            raise VocabularyError(
                f"{client.url} cuts a text otherwise than the tokenizer of teacher.path: from token {at} on "
                f"{found[at : at + 4]} instead of {own[at : at + 4]}. Set teacher.path (or teacher.tokenizer) to the "
                "model that is served."
            )
    return notes


def serve_writer(
    config: TeacherConfig,
    served: ServedTeacher,
    tokenizer: PreTrainedTokenizerBase,
    stream: PromptStream | LazyPromptStream,
    vocab_size: int,
    name: str = "default",
) -> tuple[Engine, list[str]]:
    """The engine that writes the teacher's texts, and notes on it.  `tokenizer` is the student's."""
    pool = Pool(config.servers, config.server)
    chat = config.chat
    if chat is not None and (chat.max_calls or chat.max_tokens):
        raise ConfigError(
            "teacher.chat has a limit, which counts continuations alone, but the method asks for the teacher's whole "
            "texts. Leave max_calls and max_tokens out, or use a method without such texts."
        )
    if config.chats:
        return ChatWriter(pool, served.model, vocab_size, tokenizer, conversations(stream), name), [
            "the teacher's texts come from a chat endpoint and are tokenised again: their tokens may be cut otherwise "
            "than the teacher wrote them, and its own template is used."
        ]
    if refusal := dialect_of(config.server).no_texts:
        raise ConfigError(
            f"the method asks for the teacher's texts as token ids, but {refusal} "
            'Set teacher.server.text = "chat", or serve the teacher with vLLM or SGLang.'
        )
    return ServerWriter(pool, served.model, vocab_size, name), []


def conversations(stream: PromptStream | LazyPromptStream) -> Mapping[tuple[int, ...], tuple[Message, ...]]:
    """The messages behind the token ids of every prompt."""
    if not isinstance(stream, PromptStream):
        raise ConfigError(
            'teacher.server.text = "chat" needs to know every prompt\'s messages, and data.streaming reads them later. '
            "Set data.streaming = false."
        )
    before = stream.state_dict()
    prompts: list[Any] = [prompt for prompt, _ in stream.next(len(stream))]
    stream.load_state_dict(before)
    return {prompt.token_ids: prompt.messages for prompt in prompts}
