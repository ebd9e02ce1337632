from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer
from tropd.data.chat import (
    adds_generation_prompt,
    encode_plain,
    encode_response,
    end_of_turn_id,
    parse_messages,
    render,
    stop_ids,
    unread_kwargs,
)
from tropd.errors import ConfigError, DataError
from tropd.types import Message

HELLO = (Message(role="user", content="Hello"),)
BOS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bos_tokenizer(template: str | None = BOS_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> in front and <|eos|> behind of everything it encodes."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "<|eos|>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|eos|>", special_tokens=list(ids.items())
    )
    tokenizer.chat_template = template
    return tokenizer


def id_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def test_a_conversation_ends_with_the_header_of_the_answer() -> None:
    tokenizer = byte_tokenizer()
    ids = render(HELLO, tokenizer, system_prompt="Be kind.")
    assert tokenizer.decode(list(ids)) == "<|system|>Be kind.<|end|><|user|>Hello<|end|><|assistant|>"


def test_a_conversation_with_its_own_system_message_keeps_it() -> None:
    tokenizer = byte_tokenizer()
    own = (Message(role="system", content="Be brief."), *HELLO)
    assert render(own, tokenizer, system_prompt="Be kind.") == render(own, tokenizer)


def test_template_kwargs_reach_the_template_and_unread_ones_are_named() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is false %}<think></think>{% endif %}"
    plain, without = render(HELLO, tokenizer), render(HELLO, tokenizer, kwargs={"enable_thinking": False})
    assert tokenizer.decode(list(without)) == str(tokenizer.decode(list(plain))) + "<think></think>"
    assert unread_kwargs(tokenizer, {"enable_thinking": False, "enable_thinkin": False}) == ("enable_thinkin",)


@pytest.mark.parametrize("template", [BOS_TEMPLATE, "{{ bos_token }}" + BOS_TEMPLATE])
def test_a_rendered_conversation_has_one_bos(template: str) -> None:
    tokenizer = bos_tokenizer(template)
    bos = tokenizer.bos_token_id
    ids = render(HELLO, tokenizer)
    assert ids[0] == bos and ids.count(bos) == 1
    assert ids[-1] == id_of(tokenizer, "<|assistant|>")


@pytest.mark.parametrize("text", ["Hello", "<s>Hello"])
def test_plain_text_has_one_bos_and_no_eos_behind(text: str) -> None:
    tokenizer = bos_tokenizer(template=None)
    assert encode_plain(text, tokenizer) == (tokenizer.bos_token_id, *byte_tokenizer().encode("Hello"))


def test_plain_text_keeps_an_eos_that_it_says_itself() -> None:
    tokenizer = byte_tokenizer()
    assert encode_plain("Hello<|eos|>", tokenizer)[-1] == tokenizer.eos_token_id


def test_a_written_answer_ends_with_its_end_of_turn_once() -> None:
    tokenizer = byte_tokenizer()
    end = end_of_turn_id(tokenizer)
    assert end == id_of(tokenizer, "<|end|>")
    assert encode_response("Hi", tokenizer, end) == (*tokenizer.encode("Hi"), end)
    assert encode_response("Hi<|end|>", tokenizer, end) == encode_response("Hi", tokenizer, end)


def test_stop_ids_are_the_tokenizers_the_models_and_the_templates() -> None:
    tokenizer = byte_tokenizer()
    eos, end = id_of(tokenizer, "<|eos|>"), id_of(tokenizer, "<|end|>")
    assert stop_ids(tokenizer) == (eos, end)
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[7, eos])) == (eos, 7, end)
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=7)) == (eos, 7, end)
    tokenizer.chat_template = None
    assert stop_ids(tokenizer, GenerationConfig()) == (eos,)


@pytest.mark.parametrize(
    ("after", "token"),
    [
        ("<|end|>\n", "<|end|>"),  # ChatML
        (" <|eos|>", "<|eos|>"),  # Llama 2: a space first
        ("", "<|user|>"),  # GLM: the next header ends the turn
        ("\n\nNext: <|end|>", None),  # a text, not a token
    ],
)
def test_the_end_of_a_turn_is_the_special_token_right_after_the_answer(after: str, token: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}" + after + "{% else %}"
        "<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert end_of_turn_id(tokenizer) == (None if token is None else id_of(tokenizer, token))


def test_a_template_without_a_generation_prompt_is_noticed() -> None:
    tokenizer = byte_tokenizer()
    assert adds_generation_prompt(tokenizer, {})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert not adds_generation_prompt(tokenizer, {})


def test_a_refusal_of_the_template_is_told_with_its_reason() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"user.*roles must alternate"):
        render(HELLO, tokenizer)


def test_a_tokenizer_without_a_template_renders_no_conversation() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        render(HELLO, tokenizer)


def test_text_parts_are_joined() -> None:
    value = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert parse_messages(value) == HELLO


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("Hello", "is a str"),
        ({"from": "human", "value": "Hello"}, "no `role`; it has from, value"),
        ({"role": "user", "content": None}, "no text in `content`"),
        ({"role": "user", "content": "x", "tool_calls": [1]}, "`tool_calls`"),
        ({"role": "user", "content": [{"type": "image"}]}, "type image"),
    ],
)
def test_what_is_no_text_message_is_named(message: object, says: str) -> None:
    with pytest.raises(DataError, match=f"message 2 .*{says}"):
        parse_messages([{"role": "user", "content": "x"}, message])
