"""Supports and their gradients, by enumeration of the vocabulary."""

from __future__ import annotations

import pytest
import torch

from tests.objective.cases import F64, K, V, close, expected_gradient, make_case, pair
from tropd.errors import ConfigError
from tropd.methods import OPD, ManyFaces, Rethinking
from tropd.objective import ForwardKL, JensenShannon, ReverseKL
from tropd.objective.support_gradient import SupportGradient

SUPPORTS = ("student_top_k", "teacher_top_k", "intersection", "union", "difference")


def members(support: str, logits: torch.Tensor, teacher: torch.Tensor) -> list[int]:
    own, theirs = set(logits.topk(K).indices.tolist()), set(teacher.topk(K).indices.tolist())
    sets = {"student_top_k": own, "teacher_top_k": theirs, "full": set(range(V))}
    return sorted({**sets, "intersection": own & theirs, "union": own | theirs, "difference": own ^ theirs}[support])


@pytest.mark.parametrize("weight", ["student", "teacher", "none"])
@pytest.mark.parametrize("support", [*SUPPORTS, "full"])
def test_the_gradient_is_the_sum_over_the_support(support, weight):
    logits, teacher = pair(seed=4)
    p, q = logits.detach().softmax(-1), teacher.exp()
    expected = torch.zeros(V, dtype=F64)
    for v in members(support, logits, teacher):
        w = {"student": p[v], "teacher": q[v], "none": 1.0}[weight]
        score = -p.clone()  # grad of log S(v) in the logits
        score[v] += 1.0
        expected -= w * (teacher[v] - p[v].log()) * score
    loss = SupportGradient(support=support, top_k=K, weight=weight)
    close(expected_gradient(loss, logits, teacher), expected, 1e-12)
    assert len(members(support, logits, teacher)) > 0 and bool(expected.any())


@pytest.mark.parametrize("support", SUPPORTS)
def test_weighted_by_the_student_it_is_many_faces_stop_gradient(support):
    case = make_case()
    faces = ManyFaces(support=support, outside="stop_gradient", top_k=K).objective
    close(case.gradient(Rethinking(support=support, top_k=K).objective), case.gradient(faces), 1e-14)


def test_without_a_top_k_it_is_opd():
    case = make_case()
    close(case.gradient(Rethinking(top_k=0).objective), case.gradient(OPD().objective), 0.0)


@pytest.mark.parametrize(
    "loss",
    [
        ReverseKL,
        ForwardKL,
        JensenShannon,
        lambda **over: ReverseKL(outside="stop_gradient", **over),
        lambda **over: SupportGradient(weight="none", **over),
    ],
)
def test_the_difference_is_the_union_less_the_intersection(loss):
    logits, teacher = pair(seed=4)
    found = {s: expected_gradient(loss(support=s, top_k=K), logits, teacher) for s in SUPPORTS}
    close(found["difference"], found["union"] - found["intersection"], 1e-14)
    close(found["union"] + found["intersection"], found["student_top_k"] + found["teacher_top_k"], 1e-14)


@pytest.mark.parametrize("outside", ["ignore", "stop_gradient", "generalised", "bucket", "renormalise"])
def test_models_with_the_same_top_k_have_no_difference_and_no_gradient_there(outside):
    logits, _ = pair(seed=4)
    teacher = (2.0 * logits.detach()).log_softmax(-1)  # the same order
    loss = ReverseKL(support="difference", top_k=K, outside=outside)
    gradient = expected_gradient(loss, logits, teacher)
    assert not gradient.any()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_many_faces_as_a_reward_has_the_expected_gradient_zero_and_warns(divergence):
    logits, teacher = pair(seed=4)
    with pytest.warns(UserWarning, match="path = 'reward'"):
        faces = ManyFaces(divergence=divergence, outside="bucket", top_k=K, path="reward")
    close(expected_gradient(faces.objective.terms[0].loss, logits, teacher), torch.zeros(V, dtype=F64), 1e-14)
    direct = ManyFaces(divergence=divergence, outside="bucket", top_k=K).objective.terms[0].loss
    assert float(expected_gradient(direct, logits, teacher).abs().max()) > 1e-3


def test_corrections_of_a_divergence_are_refused():
    with pytest.raises(ConfigError, match="corrects a divergence"):
        SupportGradient(outside="bucket")
    with pytest.raises(ConfigError, match="not defined for Jensen-Shannon"):
        ManyFaces(divergence="jensen_shannon")
