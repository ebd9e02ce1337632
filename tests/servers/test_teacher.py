"""A teacher on servers says what its model says, or nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.servers.mini import MiniServer, load
from tests.servers.proxy import Proxy, Reply, Swapped, corrupt, cut, first, garbage, huge, status, truncated, untouched
from tests.small_runs import save_model
from tests.tiny import VOCAB, byte_tokenizer, tiny_model
from tropd.config.models import ServerConfig
from tropd.errors import DataError, EvidenceError, TeacherRefused, TeacherUnavailable, VocabularyError
from tropd.objective.evidence import Needs
from tropd.rollout.transformers import TransformersEngine
from tropd.servers.pool import Pool
from tropd.teachers.local import LocalTeacher
from tropd.teachers.meeting import canary_of
from tropd.teachers.served import compare_tokenizers
from tropd.teachers.server import ServerTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.teachers.writer import ChatWriter, ServerWriter
from tropd.testing import some_rollouts
from tropd.types import Finish, Message, Request, TeacherScores

QUICK = ServerConfig(deadline_seconds=0.8, answer_seconds=2.0)
CANARY = canary_of(range(40, 60), VOCAB)
BOTH = Needs.SAMPLED | Needs.TOPK


def teacher_at(*urls: str, **options: Any) -> ServerTeacher:
    return ServerTeacher(urls, QUICK, **{"vocab_size": VOCAB, "canary": CANARY, "top_k": 4, **options})


def local(path: Path, vocab_size: int = VOCAB) -> LocalTeacher:
    return LocalTeacher(load(path)[0], vocab_size=vocab_size)


def same(found: list[TeacherScores], expected: list[TeacherScores]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.logprobs_T, b.logprobs_T, rtol=0, atol=1e-5)
        if b.topk_logprobs_TK is not None:
            torch.testing.assert_close(a.topk_logprobs_TK, b.topk_logprobs_TK, rtol=0, atol=1e-5)
            assert torch.equal(torch.as_tensor(a.topk_ids_TK), torch.as_tensor(b.topk_ids_TK))


def test_scores_are_those_of_the_same_model_in_this_process(folder: Path) -> None:
    rollouts = some_rollouts(VOCAB)
    with MiniServer(folder, max_logprobs=VOCAB) as a, MiniServer(folder, max_logprobs=VOCAB) as b:
        for top_k in (1, 4, VOCAB + 50):
            found = teacher_at(a.url, b.url).score(ScoreRequest(rollouts, BOTH, top_k=top_k))
            same(found, local(folder).score(ScoreRequest(rollouts, BOTH, top_k=top_k)))
        assert all(any(len(r["prompt"]) == 2 for r in server.requests) for server in (a, b))


def test_one_request_scores_a_rollout_and_proves_who_answers(folder: Path) -> None:
    with MiniServer(folder) as server:
        teacher = teacher_at(server.url)
        server.requests.clear()
        rollouts = some_rollouts(VOCAB)
        teacher.score(ScoreRequest(rollouts, BOTH, top_k=4))
        written = [r for r in rollouts if r.response_ids]
        asked = server.requests[: len(written)]
        assert {tuple(r["prompt"][1]) for r in asked} == {r.token_ids for r in written}
        assert all(tuple(r["prompt"][0]) == CANARY.ids for r in asked)
        known, again = server.requests[len(written) : -1], server.requests[-1]["prompt"]
        assert all(tuple(r["prompt"][0]) == CANARY.ids and len(r["prompt"]) == 2 for r in known), "as rollouts are"
        assert any(r.token_ids[: len(again[0])] == tuple(again[0]) for r in written) and len(server.requests) < 12


def test_likely_tokens_that_the_student_lacks_are_left_out_and_replaced(tmp_path: Path) -> None:
    path = save_model(tmp_path / "wide", tiny_model(vocab=VOCAB + 40, sharp=4.0))
    rollouts = some_rollouts(VOCAB)
    with MiniServer(path, max_logprobs=400) as server:
        found = teacher_at(server.url, num_rows=VOCAB + 40).score(ScoreRequest(rollouts, BOTH, top_k=8))
        for score, whole in zip(
            found, local(path, VOCAB + 40).score(ScoreRequest(rollouts, BOTH, top_k=VOCAB + 40)), strict=True
        ):
            assert score.topk_ids_TK is not None and whole.topk_ids_TK is not None
            for row, row_of_all in zip(score.topk_ids_TK.tolist(), whole.topk_ids_TK.tolist(), strict=True):
                assert row == [index for index in row_of_all if index < VOCAB][:8]


def changed(change: Callable[[dict[str, Any]], None]) -> Callable[[int, bytes, Reply], Reply]:
    """A reply whose second text is changed in one row."""

    def fault(number: int, request: bytes, reply: Reply) -> Reply:
        found = json.loads(reply.body)
        if len(found.get("choices", ())) == 2:
            change(found["choices"][1])
        return Reply(reply.status, json.dumps(found).encode())

    return fault


def _set(choice: dict[str, Any], token: int | None, **values: Any) -> None:
    row = choice["prompt_logprobs"][-1]
    row[str(token if token is not None else choice["prompt_token_ids"][-1])].update(values)


def _likeliest(choice: dict[str, Any]) -> int:
    return int(next(token for token, entry in choice["prompt_logprobs"][-1].items() if entry["rank"] == 1))


UNUSABLE = {
    "no row": lambda c: c["prompt_logprobs"].__setitem__(-1, None),
    "no rows": lambda c: c.update(prompt_logprobs=None),
    "a row less": lambda c: c["prompt_logprobs"].pop(),
    "no written token": lambda c: c["prompt_logprobs"][-1].pop(str(c["prompt_token_ids"][-1])),
    "null": lambda c: _set(c, None, logprob=None),
    "text": lambda c: _set(c, None, logprob="-1.0"),
    "not a number": lambda c: _set(c, None, logprob=float("nan")),
    "a filler": lambda c: _set(c, None, logprob=-9999.0, rank=VOCAB),
    "infinite": lambda c: _set(c, None, logprob=float("-inf")),
    "positive": lambda c: _set(c, _likeliest(c), logprob=0.5),
    "mass above one": lambda c: _set(c, _likeliest(c), logprob=-1e-9),
    "not falling": lambda c: _set(c, _likeliest(c), logprob=-20.0),
    "a likely token less": lambda c: c["prompt_logprobs"][-1].pop(str(_likeliest(c))),
    "ranks twice": lambda c: _set(c, _likeliest(c), rank=2),
    "other tokens": lambda c: c.update(prompt_token_ids=[1, *c["prompt_token_ids"][1:]][::-1]),
    "a token less": lambda c: c["prompt_token_ids"].pop(),
}


@pytest.mark.parametrize("change", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_answer_that_lacks_something_is_refused_and_never_filled_in(
    folder: Path,
    change: Callable[[dict[str, Any]], None],
) -> None:
    rollouts = some_rollouts(VOCAB)[:1]
    with MiniServer(folder) as server, Proxy(server.url) as proxy:
        teacher = teacher_at(proxy.url)
        proxy.fault = changed(change)
        with pytest.raises(TeacherRefused, match="teacher default: rollout r0: 3 answers could not be used"):
            teacher.score(ScoreRequest(rollouts, BOTH, top_k=4))
        proxy.fault = first(proxy.posts + 1, changed(change))
        same(
            teacher.score(ScoreRequest(rollouts, BOTH, top_k=4)),
            local(folder).score(ScoreRequest(rollouts, BOTH, top_k=4)),
        )


@pytest.mark.parametrize("fault", [Swapped(), corrupt, cut, truncated, garbage, huge, status(429), status(503)])
def test_spoiled_answers_are_asked_again_or_end_the_step(folder: Path, fault: Any) -> None:
    rollouts = some_rollouts(VOCAB)
    with MiniServer(folder) as server, Proxy(server.url) as proxy:
        teacher = teacher_at(proxy.url)
        proxy.fault = first(proxy.posts + 2, fault)
        same(
            teacher.score(ScoreRequest(rollouts, BOTH, top_k=4)),
            local(folder).score(ScoreRequest(rollouts, BOTH, top_k=4)),
        )
        proxy.fault = fault
        with pytest.raises((TeacherRefused, TeacherUnavailable)):
            teacher.score(ScoreRequest(rollouts, BOTH, top_k=4))


def test_another_model_behind_the_same_name_is_noticed(folder: Path, other_folder: Path) -> None:
    rollouts = some_rollouts(VOCAB)
    with MiniServer(folder) as server, MiniServer(other_folder) as other, Proxy(server.url) as proxy:
        teacher = teacher_at(proxy.url)
        proxy.upstream = other.url
        with pytest.raises(TeacherRefused, match=r"another model answers than at the start: .* nats apart"):
            teacher.score(ScoreRequest(rollouts, BOTH, top_k=4))
        with pytest.raises(TeacherRefused, match="another model answers"):
            teacher_at(server.url, other.url)
        mixed = teacher_at(server.url, server.url)
        mixed.pool = Pool([server.url, proxy.url], QUICK)  # one of two has changed: the other one does it all
        same(
            mixed.score(ScoreRequest(rollouts, BOTH, top_k=4)),
            local(folder).score(ScoreRequest(rollouts, BOTH, top_k=4)),
        )
        other.name = "else"
        with pytest.raises(TeacherRefused, match="different models: else, tiny"):
            teacher_at(server.url, other.url)


def test_what_a_server_cannot_do_is_refused_in_words(folder: Path) -> None:
    rollouts = some_rollouts(VOCAB)
    with MiniServer(folder, max_logprobs=4, max_model_len=18) as server:
        with pytest.raises(TeacherRefused, match=r"top-5 .* max allowed: 4.*--max-logprobs 5, or lower method.top_k"):
            teacher_at(server.url, top_k=5)
        teacher = teacher_at(server.url)
        for needs in (Needs.FULL, Needs.STUDENT_TOPK, Needs.TEACHER_ENTROPY, Needs.HIDDEN):
            with pytest.raises(EvidenceError, match="asked of teacher default, which gives"):
                teacher.score(ScoreRequest(rollouts, needs, top_k=2))
        assert teacher.context == 17
        with pytest.raises(DataError, match=r"18 tokens, but the server .* at most 17: it holds 18"):
            teacher.score(ScoreRequest(some_rollouts(VOCAB, [(8, 10)])))
    chat_only = ServerConfig(kind="openai", deadline_seconds=1.0)
    with MiniServer(folder) as server:
        teacher = ServerTeacher([server.url], chat_only, vocab_size=VOCAB, canary=CANARY)
        with pytest.raises(EvidenceError, match="which gives Needs.NOTHING"):
            teacher.score(ScoreRequest(rollouts))


def test_tokenizers_are_compared_with_the_servers(folder: Path) -> None:
    with MiniServer(folder) as server:
        clients = Pool([server.url], QUICK).clients
        assert compare_tokenizers(clients, "tiny", byte_tokenizer()) == []
        other = byte_tokenizer()
        other.add_tokens(["fox jumps"])
        with pytest.raises(VocabularyError, match="from token 16 on"):
            compare_tokenizers(clients, "tiny", other)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_writes_texts_from_token_ids_whatever_happens_on_the_way(folder: Path, kind: Any) -> None:
    requests = [Request(token_ids=(5, 6, 7 + n), max_new_tokens=9, seed=n, stop_ids=(n,)) for n in range(4)]
    expected = [(t.token_ids, t.finish) for t in TransformersEngine(load(folder)[0]).generate(requests)]
    settings = dataclasses.replace(QUICK, kind=kind)
    with MiniServer(folder) as server, Proxy(server.url) as proxy:
        writer = ServerWriter(Pool([proxy.url], settings), "tiny", VOCAB)
        for fault in (untouched, Swapped(), cut, truncated, garbage, huge, status(503)):
            proxy.fault = first(proxy.posts + 1, fault)
            assert [(t.token_ids, t.finish) for t in writer.generate(requests)] == expected
        proxy.fault = Swapped()
        with pytest.raises(TeacherRefused, match="the answer to another request"):
            writer.generate(requests)


def test_answers_to_others_are_noticed_on_sglang_as_well(folder: Path) -> None:
    with MiniServer(folder) as server, Proxy(server.url) as proxy:
        settings = dataclasses.replace(QUICK, kind="sglang")
        teacher = ServerTeacher([proxy.url], settings, vocab_size=VOCAB, canary=CANARY, top_k=4)
        rollouts = some_rollouts(VOCAB)
        same(
            teacher.score(ScoreRequest(rollouts, BOTH, top_k=4)),
            local(folder).score(ScoreRequest(rollouts, BOTH, top_k=4)),
        )
        proxy.fault = Swapped()
        with pytest.raises(TeacherRefused, match="the answer to another request"):
            teacher.score(ScoreRequest(rollouts, BOTH, top_k=4))


def test_a_chat_endpoint_writes_texts_that_are_tokenised_again(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    end = int(tokenizer.eos_token_id)
    messages = {(5, 6): (Message(role="user", content="say"),), (7,): ()}
    requests = [Request(token_ids=ids, max_new_tokens=40, seed=1, stop_ids=(end,)) for ids in messages]
    with MiniServer(folder) as server:
        texts = ChatWriter(Pool([server.url], QUICK), "tiny", VOCAB, tokenizer, messages).generate(requests)
        asked = [r["messages"] for r in server.requests]
    assert [{"role": "user", "content": "say"}] in asked
    assert [{"role": "user", "content": str(tokenizer.decode([7]))}] in asked
    for text in texts:
        assert 0 < len(text.token_ids) <= 40 and (text.token_ids[-1] == end) == (text.finish is Finish.STOP)
