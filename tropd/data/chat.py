"""Conversations -> token ids, and the tokens that end a turn.

A prompt is rendered to text by the tokenizer's chat template and encoded without further special tokens, so the
template alone decides what stands at the beginning and there is never a second BOS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tropd.base.reading import refusing
from tropd.data.template import check_template, limited
from tropd.errors import ConfigError, DataError
from tropd.types import Message

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# Fields that carry part of the conversation: rendering a message without them would change what it says.
_CARRIERS = ("tool_calls", "function_call", "tool_call_id", "images", "audio")


def parse_messages(value: Sequence[Any]) -> tuple[Message, ...]:
    """Mappings with `role` and `content` (text, or text parts) -> messages; anything else is a DataError."""
    return tuple(_parse_message(item, number) for number, item in enumerate(value, start=1))


def _parse_message(item: Any, number: int) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"message {number} is a {type(item).__name__}, not an object with `role` and `content`")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"message {number} has no `role`; it has {', '.join(map(str, item)) or 'nothing'}")
    carried = [key for key in _CARRIERS if item.get(key)]
    if carried:
        raise DataError(f"message {number} has `{carried[0]}`, and a prompt carries text only")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = _join_parts(content, number)
    if not isinstance(content, str):
        raise DataError(f"message {number} has no text in `content`, but a {type(content).__name__}")
    return Message(role=role, content=content)


def _join_parts(parts: Sequence[Any], number: int) -> str:
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"message {number} has a part of type {kind}, and a prompt carries text only")
        texts.append(text)
    return "".join(texts)


def with_system(messages: Sequence[Message], system_prompt: str | None) -> tuple[Message, ...]:
    """`system_prompt` in front, unless the conversation opens with its own."""
    if system_prompt is None or (messages and messages[0].role == "system"):
        return tuple(messages)
    return (Message(role="system", content=system_prompt), *messages)


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """The conversation as the student reads it, up to and including the header of the turn it is to write."""
    text = _render_text(with_system(messages, system_prompt), tokenizer, kwargs or {}, True)
    return _one_bos(tokenizer.encode(text, add_special_tokens=False), tokenizer)


def opening(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, kwargs: Mapping[str, Any] | None = None
) -> str:
    """What the template writes to open the assistant's turn after a conversation."""
    whole, before = (_render_text(messages, tokenizer, kwargs or {}, opened) for opened in (True, False))
    at = next((n for n, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), min(len(whole), len(before)))
    return whole[at:]


def cut_short(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, kwargs: Mapping[str, Any] | None = None
) -> Message | None:
    """The first message that the template does not write in full.  It may rewrite what the assistant has said."""
    text = _render_text(messages, tokenizer, kwargs or {}, True)
    return next((m for m in messages if m.role != "assistant" and m.content.strip() not in text), None)


def encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Text to be continued: with the tokens that the tokenizer puts in front, and none behind."""
    ids = tokenizer.encode(text)
    bare = tokenizer.encode(text, add_special_tokens=False)
    if ids and ids[-1] == tokenizer.eos_token_id and bare[-1:] != ids[-1:]:
        ids = ids[:-1]
    return _one_bos(ids, tokenizer) if bare else ()


def response_end_id(tokenizer: PreTrainedTokenizerBase, uses_template: bool) -> int | None:
    """The token that ends a written answer: the template's end of turn, else EOS."""
    end = end_of_turn_id(tokenizer) if uses_template else None
    eos: Any = tokenizer.eos_token_id
    return eos if end is None else end


def encode_response(text: str, tokenizer: PreTrainedTokenizerBase, end_id: int | None) -> tuple[int, ...]:
    """A written answer as the student would have written it: the text, then the token that ends the turn."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if ids and ids[0] == tokenizer.bos_token_id != end_id:
        ids = ids[1:]
    return tuple(ids) if end_id is None or ids[-1:] == [end_id] else (*ids, end_id)


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's EOS, the generation config's, and the template's end of turn.

    Empty when there is none: then only the length ends a rollout.
    """
    of_model = generation_config.eos_token_id if generation_config is not None else None
    ends = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list | tuple) else [of_model])]
    ends.append(end_of_turn_id(tokenizer))
    return tuple(dict.fromkeys(int(token) for token in ends if token is not None))


def token_id(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the one token that is this text; "eos_token" and its like are those of the tokenizer."""
    text = str(tokenizer.special_tokens_map.get(text, text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    own = tokenizer.get_vocab().get(text)
    if len(ids) != 1 and own is not None and tokenizer.decode([own]) == text:  # a piece that begins no word
        ids = [own]
    if len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or text == tokenizer.unk_token):
        return int(ids[0])
    pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
    raise ConfigError(
        f"a token was named by its text {text!r}, but to the student's tokenizer it is "
        + (f"{len(ids)} tokens: {pieces}" if len(ids) != 1 else "unknown")
        + ". Name a text that is one token, or give its id."
    )


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right after an assistant's text, such as <|im_end|>."""
    if not tokenizer.chat_template:
        return None
    marker = "Tropdmarker"
    turns = tuple(
        Message(role=role, content=content)
        for role, content in (("user", "Hello"), ("assistant", marker), ("user", "Goodbye"))
    )
    try:
        text = _render_text(turns, tokenizer, {}, False)
    except DataError:  # some templates write one exchange only
        text = _render_text(turns[:2], tokenizer, {}, False)
    _, marked, tail = text.rpartition(marker)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in tokenizer.encode(tail, add_special_tokens=False) if marked else ():
        if token == tokenizer.bos_token_id != tokenizer.eos_token_id:
            return None
        if token in special:
            return token
        if str(tokenizer.decode([token])).strip():
            return None
    return None


def adds_generation_prompt(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> bool:
    """Whether the template writes the header of the assistant's turn."""
    turn = (Message(role="user", content="Hello"),)
    return _render_text(turn, tokenizer, kwargs, True) != _render_text(turn, tokenizer, kwargs, False)


def unread_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The keyword arguments that the template never mentions: giving them changes nothing."""
    template = str(tokenizer.get_chat_template())
    return tuple(key for key in kwargs if not re.search(rf"\b{re.escape(key)}\b", template))


def _render_text(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], generation: bool
) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            "a conversation cannot be rendered: the tokenizer has no chat template. "
            "Use an instruction-tuned student, set `tokenizer.chat_template`, or give prompts as text."
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    roles = ", ".join(message.role for message in messages)
    check_template(tokenizer.chat_template)
    with refusing(lambda why: f"the chat template refuses a conversation of {roles}: {why}", DataError), limited():
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation, **kwargs))


def _one_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    # Some tokenizers add BOS even when told not to, and some texts bring their own.
    bos, ids = tokenizer.bos_token_id, tuple(ids)
    while bos is not None and ids[:2] == (bos, bos):
        ids = ids[1:]
    return ids
