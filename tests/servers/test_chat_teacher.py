"""A teacher that only writes: what it is asked, what becomes of its answers, and what it may cost."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.servers.chat_endpoint import ChatEndpoint, empty, endless, filtered, refusing, says, silent, slow, spaces
from tests.servers.proxy import Proxy, cut, first, status
from tests.tiny import VOCAB, byte_tokenizer
from tropd.config.chat import ChatConfig
from tropd.config.models import ServerConfig, TeacherConfig
from tropd.errors import BudgetSpent, TeacherRefused, TeacherUnavailable
from tropd.objective.chunks import Audit
from tropd.objective.evidence import Needs
from tropd.teachers.chat import ChatTeacher
from tropd.teachers.routed import Routed
from tropd.teachers.similarity import similarity_of
from tropd.teachers.teacher import ScoreRequest
from tropd.types import Author, Message, Prompt, Rollout, TeacherScores

pytest.importorskip("rapidfuzz", reason="the extra 'omni' is not installed: pip install 'tropd[omni]'")

QUICK = ServerConfig(kind="openai", deadline_seconds=1.5, answer_seconds=5.0, max_requests=2)
AUDIT = Audit(chunks=2, tokens=4, continuations=3)
TOKENIZER = byte_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def rollout(response: str, name: str = "0/a/0") -> Rollout:
    prompt, own = ids("1+1="), ids(response)
    return Rollout(
        id=name,
        prompt=Prompt(id="a", token_ids=prompt, messages=(Message(role="user", content="1+1="),)),
        token_ids=prompt + own,
        authors=(Author.CONTEXT,) * len(prompt) + (Author.STUDENT,) * len(own),
        behavior_logprobs=(0.0,) * (len(prompt) + len(own)),
    )


ROLLOUTS = [rollout("0123456789"), rollout("abcdefghij", "0/a/1")]
CHUNKS = [[range(0, 4), range(6, 10)], [range(2, 6)]]


def teacher_at(url: str, folder: Path, chat: ChatConfig | None = None, **changes: Any) -> ChatTeacher:
    config = TeacherConfig(servers=(url,), server=replace(QUICK, **changes), chat=chat)
    teacher = ChatTeacher(config, "writer", folder)
    teacher.prepare(TOKENIZER, VOCAB, torch.device("cpu"))
    return teacher


def audit(teacher: ChatTeacher, audit: Audit = AUDIT, rollouts: Any = ROLLOUTS, chunks: Any = CHUNKS) -> Any:
    return teacher.score(ScoreRequest(rollouts, Needs.CHUNKS, audit=audit, chunks=chunks))


def said_of(scores: list[TeacherScores]) -> list[Any]:
    return [(x.chunks_T.tolist(), x.support_T.tolist()) for x in scores]  # type: ignore[union-attr]


def same(a: list[TeacherScores], b: list[TeacherScores]) -> bool:
    return said_of(a) == said_of(b)


def test_the_support_of_a_chunk_is_the_sum_of_its_similarities(tmp_path: Path) -> None:
    """A writer that says the chunk, half of it, and something else."""
    answers = ["0123", "0199", "xyxy"]

    def fault(number: int, body: dict[str, Any]) -> Any:
        return says(answers[number - 1])

    with ChatEndpoint(fault) as endpoint:
        (score,) = audit(teacher_at(endpoint.url, tmp_path, max_requests=1), AUDIT, ROLLOUTS[:1], [[range(0, 4)]])
    assert score.support_T.tolist() == [1.5] * 4 + [0.0] * 6
    assert score.chunks_T.tolist() == [1.0] * 4 + [0.0] * 6
    assert score.logprobs_T is None


def test_the_conversation_is_continued_in_ascending_order(tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        audit(teacher_at(endpoint.url, tmp_path, max_requests=1))
    said = [body["messages"] for body in endpoint.requests]
    user = {"role": "user", "content": "1+1="}
    begun = [[user], [user, {"role": "assistant", "content": "012345"}], [user, {"role": "assistant", "content": "ab"}]]
    assert said == [one for one in begun for _ in range(3)]
    assert all(body["max_tokens"] == 4 and body["temperature"] == 1.0 for body in endpoint.requests)
    assert len({body["seed"] for body in endpoint.requests}) == 9


def test_an_endpoint_that_cannot_go_on_is_asked_to(tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        audit(teacher_at(endpoint.url, tmp_path, ChatConfig(continues="ask"), max_requests=1))
    assert [m["role"] for m in endpoint.requests[3]["messages"]] == ["user", "assistant", "user"]
    assert endpoint.requests[3]["messages"][2]["content"].startswith("Continue your answer")


@pytest.mark.parametrize(
    ("kind", "more"),
    [("vllm", {"continue_final_message", "add_generation_prompt"}), ("sglang", {"continue_final_message"})],
)
def test_a_known_kind_of_server_is_told_that_the_turn_is_unfinished(kind: Any, more: set[str], tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        audit(teacher_at(endpoint.url, tmp_path, ChatConfig(), kind=kind, max_requests=1))
    usual = {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}
    assert endpoint.requests[0].keys() == usual  # nothing is written yet
    assert endpoint.requests[3].keys() == usual | more


def test_the_same_text_has_the_same_support_however_the_batch_is_cut(tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        whole = audit(teacher_at(endpoint.url, tmp_path / "a"))
        apart = teacher_at(endpoint.url, tmp_path / "b", max_requests=1)
        parts = [audit(apart, AUDIT, ROLLOUTS[n:][:1], CHUNKS[n:][:1])[0] for n in (1, 0)]
    assert same(whole, parts[::-1]) and float(whole[0].support_T.sum()) > 0


def test_nothing_is_asked_twice_whoever_asks_again(tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        before = audit(teacher_at(endpoint.url, tmp_path))
        asked = len(endpoint.requests)
        endpoint.fault = lambda number, body: refusing(number, body)
        after = audit(teacher_at(endpoint.url, tmp_path))
    assert same(before, after) and len(endpoint.requests) == asked == 9


@pytest.mark.parametrize("fault", [empty, spaces, silent, filtered, refusing])
def test_a_chunk_without_one_of_its_continuations_is_not_audited(
    fault: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def some(number: int, body: dict[str, Any]) -> Any:
        return fault(number, body) if len(body["messages"]) == 1 and body["seed"] == lost else None

    with ChatEndpoint() as endpoint:
        whole = audit(teacher_at(endpoint.url, tmp_path / "whole", max_requests=1))
        lost = endpoint.requests[1]["seed"]
        endpoint.fault = some
        with caplog.at_level(logging.WARNING, "tropd.teachers"):
            scores = audit(teacher_at(endpoint.url, tmp_path / "some"))
        said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        asked = len(endpoint.requests)
        again = audit(teacher_at(endpoint.url, tmp_path / "some"))
    assert scores[0].chunks_T.tolist() == [-1.0] * 4 + [0.0] * 2 + [2.0] * 4
    assert scores[0].support_T[:4].tolist() == [0.0] * 4
    assert torch.equal(scores[0].support_T[6:], whole[0].support_T[6:]) and same(scores[1:], whole[1:])
    assert len(said) == 1 and "continuations of 1 of 3 chunks are missing; these chunks are not audited" in said[0]
    assert same(scores, again) and len(endpoint.requests) == asked  # what is missing stays missing


def test_what_is_too_long_is_cut_to_the_chunk(tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        usual = audit(teacher_at(endpoint.url, tmp_path / "a"))
        endpoint.fault = endless
        assert same(usual, audit(teacher_at(endpoint.url, tmp_path / "b")))


def test_a_slow_or_broken_connection_is_tried_again(tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint, Proxy(endpoint.url) as proxy:
        usual = audit(teacher_at(endpoint.url, tmp_path / "a"))
        for number, fault in enumerate((cut, status(429), status(503))):
            proxy.fault = first(proxy.posts + 2, fault)
            assert same(usual, audit(teacher_at(proxy.url, tmp_path / str(number), deadline_seconds=20.0)))
        endpoint.fault = slow(0.05)
        assert same(usual, audit(teacher_at(endpoint.url, tmp_path / "slow")))


def test_an_endpoint_that_never_answers_ends_the_step_and_what_was_written_is_kept(tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint, Proxy(endpoint.url) as proxy:
        proxy.fault = lambda number, request, reply: reply if number <= 4 else cut(number, request, reply)
        with pytest.raises(TeacherUnavailable, match=r"teacher default: continuation .*deadline_seconds"):
            audit(teacher_at(proxy.url, tmp_path, max_requests=2, deadline_seconds=0.5))
        proxy.fault = first(0, cut)
        before = proxy.posts
        audit(teacher_at(proxy.url, tmp_path))
        assert proxy.posts - before == 9 - 4


def test_an_endpoint_that_gives_nothing_at_all_ends_the_step(tmp_path: Path) -> None:
    with (
        ChatEndpoint(refusing) as endpoint,
        pytest.raises(TeacherRefused, match="3 of 3 chunks are missing, so nothing"),
    ):
        audit(teacher_at(endpoint.url, tmp_path))


def test_a_wrong_key_or_a_wrong_address_is_no_missing_continuation(tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint, Proxy(endpoint.url, status(401)) as proxy:
        with pytest.raises(TeacherRefused, match="does not let us in"):
            audit(teacher_at(proxy.url, tmp_path))
        proxy.fault = status(404)
        with pytest.raises(TeacherRefused, match="answered 404"):
            audit(teacher_at(proxy.url, tmp_path))


@pytest.mark.parametrize("limit", [{"max_calls": 7}, {"max_tokens": 70}])
def test_a_budget_ends_the_step_before_it_is_exceeded_and_a_larger_one_goes_on(limit: Any, tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        whole = audit(teacher_at(endpoint.url, tmp_path / "whole"))
        endpoint.requests.clear()
        for _ in range(2):  # a resumed run has the same budget
            with pytest.raises(BudgetSpent, match=r"are spent \(teacher.chat.max_.*is kept.*raise max_"):
                audit(teacher_at(endpoint.url, tmp_path / "few", ChatConfig(**limit)))
            spent = json.loads((tmp_path / "few" / "teacher_costs.json").read_text())
            assert spent["calls"] == len(endpoint.requests) == 4
            assert all(spent[name.removeprefix("max_")] <= most for name, most in limit.items())
        assert same(whole, audit(teacher_at(endpoint.url, tmp_path / "few", ChatConfig(max_calls=9))))
    assert len(endpoint.requests) == 9


def test_repeated_requests_count_as_well(tmp_path: Path) -> None:
    def once_empty(number: int, body: dict[str, Any]) -> Any:
        return empty(number, body) if number == 1 else None

    with ChatEndpoint(once_empty) as endpoint:
        audit(teacher_at(endpoint.url, tmp_path))
    assert json.loads((tmp_path / "teacher_costs.json").read_text())["calls"] == len(endpoint.requests) == 10


def test_a_text_is_never_cut_within_a_character(tmp_path: Path) -> None:
    """A chunk that begins in the middle of a character is compared from that character on."""
    text = "12é4567890"
    with ChatEndpoint() as endpoint:
        audit(teacher_at(endpoint.url, tmp_path), AUDIT, [rollout(text)], [[range(3, 7)]])
        assert endpoint.requests[0]["messages"][1]["content"] == "12"


def test_each_of_several_endpoints_is_asked_about_its_own_prompts(tmp_path: Path) -> None:
    """Their continuations and their costs are kept apart."""
    own = [replace(r, prompt=replace(r.prompt, teacher=name)) for r, name in zip(ROLLOUTS, "ab", strict=True)]
    with ChatEndpoint() as one, ChatEndpoint() as other:
        both = {
            name: ChatTeacher(TeacherConfig(servers=(url,), server=QUICK), "writer", tmp_path, name=name)
            for name, url in (("a", one.url), ("b", other.url))
        }
        routed = Routed(both)
        routed.prepare(TOKENIZER, VOCAB, torch.device("cpu"))
        scores = audit(routed, rollouts=own)
        assert [len(endpoint.requests) for endpoint in (one, other)] == [6, 3]
    assert [score.teacher for score in scores] == ["a", "b"]
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {f"teacher_{what}" for n in "ab" for what in (f"continuations.{n}.sqlite", f"costs.{n}.json")}


@pytest.mark.parametrize("kind", ["edit", "rouge1"])
def test_a_similarity_is_1_of_the_same_text_0_of_nothing_in_common_and_between_them_else(kind: Any) -> None:
    if kind == "rouge1":
        pytest.importorskip("rouge_score", reason="the extra 'rouge' is not installed: pip install 'tropd[rouge]'")
    similarity = similarity_of(kind)
    assert similarity("to be or not", "to be or not") == 1.0
    assert similarity("aaa bbb", "ccc-ddd") == 0.0
    assert similarity("to be or not", "to be or nut") == pytest.approx(11 / 12 if kind == "edit" else 3 / 4)
