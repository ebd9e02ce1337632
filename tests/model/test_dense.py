"""Whole distributions tile by tile give the loss and the gradient of plain autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.model.test_fused import compare, gradients, plain, setting
from tests.objective.variants import VARIANTS
from tropd.model.dense import can_tile, dense_loss
from tropd.model.head import Head
from tropd.model.one_pass import wanted
from tropd.objective import Context
from tropd.objective.evidence import Needs

FULL = [
    name for name, method in VARIANTS.items() if Needs.FULL in method.needs and Needs.STUDENT_HIDDEN not in method.needs
]


def dense(head, hidden, tokens, objective, tile):
    plan = objective.plan(tokens, Context(progress=0.6))
    ids_NM, view_of = wanted(tokens, objective.needs)

    def judge(rows, full_CV):
        view = view_of(full_CV.gather(1, ids_NM[rows])).with_(full_logprobs_NV=full_CV)
        return objective(tokens.rows(rows), view, plan.rows(rows)).loss

    return dense_loss(head, hidden, tokens.token_ids_N, judge, tile)


@pytest.mark.parametrize("name", [*FULL, "tropd", "many_faces"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_method_has_the_plain_loss_and_gradient(name, softcap):
    head, hidden, tokens = setting(23, 11, bias=True, padded=2)
    head = dataclasses.replace(head, softcap=softcap)
    objective = VARIANTS[name].objective
    a, b = plain(head, hidden, tokens, objective), dense(head, hidden, tokens, objective, tile=5)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    compare(gradients(a, head, hidden), gradients(b, head, hidden), 1e-12)


def test_a_head_with_an_adapter_is_left_to_autograd():
    assert not can_tile(Head(module=torch.nn.Sequential(torch.nn.Linear(4, 5)), vocab_size=5))
