"""Under any briefing, a reader's log-probabilities of a response are those of model(briefing + response)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_runs import save_model, write_rows
from tests.tiny import byte_tokenizer
from tests.told import COLUMN, FEEDBACK, PEERS, SHOWN, WORDS, by_hand, scored, told, write_world
from tropd.data import chat
from tropd.errors import ConfigError
from tropd.training.assembly import load_parts
from tropd.types import READER, Message, Rollout

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4}
ROWS = [{"prompt": f"{a}+1=", "answer": str(a + 1), "solution": f"{a} and one"} for a in range(2)]
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
TEMPLATES = {"qwen3": QWEN3, "llama": LLAMA, "gemma2": GEMMA, "gpt2": None}


def written(family: str, user: str, system: str = "") -> str:
    """What each of these templates should say, by hand."""
    if family == "qwen3":
        before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return f"{before}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    if family == "llama":
        before = f"<|start|>system<|stop|>\n\n{system}<|eot|>" if system else ""
        return f"{before}<|start|>user<|stop|>\n\n{user.strip()}<|eot|><|start|>assistant<|stop|>\n\n"
    if family == "gemma2":
        before = f"{system}\n\n" if system else ""
        return f"<turn>user\n{before}{user.strip()}</turn>\n<turn>model\n"
    return user


def models(folder: Path, family: str) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[family]
    room = {} if family == "gpt2" else {"max_position_embeddings": 1024}
    write_world(folder, family)
    for name in ("student", "copy"):
        (folder / name / "chat_template.jinja").unlink()
        save_model(folder / name, tokenizer=tokenizer, family=family, seed=0, **room)
    write_rows(folder / "told.jsonl", ROWS)
    return folder


def text_of(rollout: Rollout) -> str:
    return str(byte_tokenizer().decode(list(rollout.response_ids), skip_special_tokens=True)).strip()


def in_words(kind: str, rollout: Rollout, other: Rollout) -> str:
    """The user's turn under a briefing, by hand."""
    asked, shown = ROWS if rollout.prompt.answer == ROWS[0]["answer"] else ROWS[::-1]
    question = asked["prompt"]
    if kind == "column":
        return f"({asked['solution']}) {question}"
    if kind == "feedback":
        return f"[{rollout.feedback}] {question}"
    if kind == "peers":
        return f"{('wrong', 'right')[int(other.reward or 0)]} {text_of(other)}; {question}"
    return f"{shown['prompt']}{shown['solution']}; {question}" if kind == "demonstrations" else question


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_briefed_logprobs_are_those_of_the_model_behind_the_briefing(tmp_path: Path, family: str) -> None:
    world = models(tmp_path, family)
    column, shown = {**COLUMN, "template": "({value}) {prompt}"}, {**SHOWN, "pick": "random"}
    system = [] if family == "gpt2" else [{"kind": "system", "text": "Be brief."}]
    for briefing in (column, FEEDBACK, PEERS, shown, *system):
        kind = briefing["kind"]
        parts = load_parts(told(world, briefing, grader=WORDS), tmp_path)
        rollouts, batch = scored(parts)
        rows = []
        for rollout in rollouts:
            (other,) = (r for r in rollouts if r.group == rollout.group and r.id != rollout.id)
            if kind == "peers" and not text_of(other):
                rows.append(torch.zeros(len(rollout.response_ids)))  # nothing to tell, so it is not read
                continue
            text = written(family, in_words(kind, rollout, other), "Be brief." if kind == "system" else "")
            ids = tuple(parts.tokenizer.encode(text, add_special_tokens=False))
            assert ids != rollout.prompt.token_ids
            rows.append(by_hand(parts.teacher.forward.model, ids, rollout.response_ids, parts.vocab_size))
        torch.testing.assert_close(batch.tokens.teacher_logprobs_N, torch.cat(rows), **CLOSE)
        assert bool(batch.tokens.log_ratio_N.any())


@pytest.mark.parametrize("briefing", [COLUMN, FEEDBACK, PEERS])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2"])
def test_a_reader_whose_template_opens_the_answer_otherwise_is_refused(
    tmp_path: Path, family: str, briefing: Any
) -> None:
    world, tokenizer = models(tmp_path, family), byte_tokenizer()
    start = {"qwen3": "assistant\n", "llama": "assistant<|stop|>\n\n", "gemma2": "<turn>model\n"}[family]
    tokenizer.chat_template = str(TEMPLATES[family]).replace(start, start + "So: ")
    save_model(tmp_path / "copy", tokenizer=tokenizer, family=family, max_position_embeddings=1024)
    with pytest.raises(ConfigError, match="would not begin its answer where the student does.*So: '"):
        load_parts(told(world, briefing, grader=WORDS), tmp_path)


def test_a_template_that_cuts_what_a_reader_is_told_is_refused(tmp_path: Path) -> None:
    world, tokenizer = models(tmp_path, "qwen3"), byte_tokenizer()
    tokenizer.chat_template = QWEN3.replace("m.content", "m.content[:10]")
    save_model(tmp_path / "copy", tokenizer=tokenizer, family="qwen3", max_position_embeddings=1024)
    with pytest.raises(ConfigError, match="its chat template does not write that in full"):
        load_parts(told(world, COLUMN), tmp_path)


@pytest.mark.parametrize("briefing", [FEEDBACK, PEERS])
def test_text_without_turns_is_told_in_front_of_the_prompt_or_refused(tmp_path: Path, briefing: Any) -> None:
    world = models(tmp_path, "gpt2")
    template = briefing["template"].split("{prompt}")[0]
    with pytest.raises(ConfigError, match=r"\{prompt\} has to be the end of briefing.template"):
        load_parts(told(world, {**briefing, "template": f"{{prompt}} {template}"}, grader=WORDS), tmp_path)


def test_a_response_whose_briefing_does_not_fit_is_not_read_and_nothing_is_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world, room = write_world(tmp_path), 256

    def read(fill: int) -> tuple[Any, list[Rollout], Any, list[tuple[int, ...]]]:
        """The run, its rollouts and what was scored; and the briefed texts, by hand."""
        template = "{prompt}" + "?" * fill + " {feedback} {response}"
        parts = load_parts(told(world, {**FEEDBACK, "template": template}, grader=WORDS), tmp_path)
        rollouts, batch = scored(parts)
        texts = []
        for rollout in rollouts:
            turn = f"{rollout.prompt.messages[0].content}{'?' * fill} {rollout.feedback} "
            turn += str(parts.tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True))
            ids = chat.render((Message(role="user", content=turn),), parts.tokenizer)
            texts.append(ids + rollout.response_ids)
        return parts, rollouts, batch, texts

    lengths = sorted(map(len, read(0)[-1]))
    assert lengths[0] < lengths[-1] < room
    caplog.clear()
    parts, rollouts, batch, texts = read(room - lengths[len(lengths) // 2 - 1])  # half of them fit
    as_read = parts.briefer.as_read(READER, rollouts)
    assert parts.teacher.context == room and 0 < as_read.count(None) < len(rollouts)
    assert [None if read is None else read.token_ids for read in as_read] == [
        ids if len(ids) <= room else None for ids in texts
    ]
    assert batch.tokens.read_S.tolist() == [read is not None for read in as_read]
    assert caplog.text.count("does not read response") == 1
