"""Stock vLLM answers as `tropd.servers.vllm` reads it, and with the numbers of a forward pass of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.real_vllm.vllm import Server
from tropd.config.models import ServerConfig
from tropd.errors import ServerRefused
from tropd.servers.answers import Scored
from tropd.servers.pool import Pool
from tropd.servers.vllm import Vllm
from tropd.types import Completion, Finish, Request

pytestmark = pytest.mark.server
TEXTS = [[72, 101, 108, 108, 111], [5, 9, 7, 3, 2, 11, 200]]


def scores(server: Server, top_k: int) -> list[Scored]:
    return Pool([server.url], ServerConfig()).run([Vllm().score_job("two", server.name, TEXTS, [1, 3], top_k)])[0]


@pytest.mark.parametrize("top_k", [0, 1, 8, 64])
def test_scores_are_those_of_a_forward_pass(teacher_server: Server, teacher_folder: Path, top_k: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    for text, first, found in zip(TEXTS, [1, 3], scores(teacher_server, top_k), strict=True):
        with torch.no_grad():
            rows_TV = model(torch.tensor([text])).logits[0].log_softmax(-1)[first - 1 : -1]
        expected_T = rows_TV.gather(1, torch.tensor(text[first:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found.logprobs), expected_T, rtol=0, atol=2e-5)
        top = rows_TV.topk(top_k)
        torch.testing.assert_close(
            torch.tensor(found.topk_logprobs_TK).reshape(top.values.shape), top.values, rtol=0, atol=2e-5
        )
        assert [len(set(row)) for row in found.topk_ids_TK] == [top_k] * len(expected_T)


def test_more_than_the_server_gives_is_refused_with_its_words(teacher_server: Server) -> None:
    with pytest.raises(ServerRefused, match="max allowed: 64"):
        scores(teacher_server, 65)


def write(server: Server, request: Request) -> Completion:
    job = Vllm().text_job("text", server.name, request, logprobs=True)
    return Pool([server.url], ServerConfig()).run([job])[0]


def test_a_text_is_its_seeds_and_ends_at_its_own_stop_tokens_alone(teacher_server: Server) -> None:
    request = Request(token_ids=(72, 101, 108), max_new_tokens=12, seed=-7)
    whole = write(teacher_server, request)
    assert (len(whole.token_ids), whole.finish) == (12, Finish.LENGTH) and len(whole.behavior_logprobs) == 12
    assert write(teacher_server, request).token_ids == whole.token_ids
    end = whole.token_ids[4]
    stopped = write(teacher_server, Request(token_ids=(72, 101, 108), max_new_tokens=12, seed=-7, stop_ids=(end,)))
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1] and stopped.finish is Finish.STOP
