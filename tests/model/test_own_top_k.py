"""The student's likeliest tokens off the tiles of the pass that trains: the right ones, and nothing else moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.test_fused import gradients, setting
from tests.model.test_peaks import problem
from tropd.model.dense import dense_loss
from tropd.model.head import Head
from tropd.model.one_pass import fused_loss, read_rows
from tropd.model.own_top_k import OwnTopK


def squares(rows: slice, logprobs_CM: Tensor) -> Tensor:
    return (logprobs_CM.square() * (1 + torch.arange(logprobs_CM.shape[1]))).sum()


def some_rows(number: int) -> Tensor:
    return torch.arange(number) % 3 == 1


def check(head: Head, hidden: Tensor, ids_NM: Tensor, expected_NK: Tensor, tile_vocab: int | None) -> None:
    own = OwnTopK(some_rows(len(hidden)), expected_NK.shape[1])
    with_it, without = (fused_loss(head, hidden, ids_NM, squares, 5, tile_vocab, x) for x in (own, None))
    assert torch.equal(with_it, without)
    for a, b in zip(gradients(with_it, head, hidden), gradients(without, head, hidden), strict=True):
        assert torch.equal(a, b), "a probe moves no bit of a gradient"
    assert torch.equal(own.ids_NK[own.rows_N], expected_NK[own.rows_N])
    assert bool((own.ids_NK[~own.rows_N] == -1).all())


@pytest.mark.parametrize("tile_vocab", [None, 7, 40])
@pytest.mark.parametrize("top_k", [1, 4, 33])
def test_some_rows_have_the_top_k_of_their_whole_logits(tile_vocab: int | None, top_k: int) -> None:
    head, hidden, _ = setting(23, 33, bias=True, padded=2)
    logits_NV = head.logits(hidden).detach()
    ids_NM = logits_NV.argmax(-1, keepdim=True)
    check(head, hidden, ids_NM, logits_NV.sort(dim=-1, descending=True, stable=True).indices[:, :top_k], tile_vocab)


@pytest.mark.parametrize("kind", ["sure", "five share"])
@pytest.mark.parametrize("tile_vocab", [None, 900])
def test_in_half_precision_they_are_those_that_a_pass_for_them_alone_would_read(kind: str, tile_vocab: int) -> None:
    head, hidden = problem(kind, torch.bfloat16)
    hidden.requires_grad_()
    ids_NM = torch.zeros(len(hidden), 1, dtype=torch.int64)
    expected = read_rows(head, hidden, ids_NM, 5, top_k=16, tile_vocab=tile_vocab)["topk_ids"]
    check(head, hidden, ids_NM, expected, tile_vocab)


def test_a_head_whose_whole_distributions_are_there_shows_them_too() -> None:
    head, hidden, _ = setting(23, 33, bias=False)
    own, logits_NV = OwnTopK(some_rows(23), 6), head.logits(hidden).detach()

    def judge(rows: slice, full_CV: Tensor) -> Tensor:
        own.look(rows, full_CV)
        return squares(rows, full_CV)

    dense_loss(head, hidden, logits_NV.argmax(-1), judge, 5).backward()
    expected_NK = logits_NV.sort(dim=-1, descending=True, stable=True).indices[:, :6]
    assert torch.equal(own.ids_NK[own.rows_N], expected_NK[own.rows_N])


def test_a_batch_of_which_no_row_is_looked_at_is_no_special_case() -> None:
    head, hidden, _ = setting(6, 11, bias=False)
    for tile_vocab in (None, 4):
        own = OwnTopK(torch.zeros(6, dtype=torch.bool), 3)
        fused_loss(head, hidden, torch.zeros(6, 1, dtype=torch.int64), squares, 4, tile_vocab, own)
        assert bool((own.ids_NK == -1).all())
