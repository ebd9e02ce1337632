"""Every method goes through the whole loop on exact tables, and does there what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.objective.cases import borrowable
from tropd.laboratory.exact import Setting, distil, make_tables
from tropd.laboratory.tabular import TabularLM, sequence_kl, visits
from tropd.methods import METHODS, Method
from tropd.methods.describe import describe
from tropd.methods.policies import GivenText
from tropd.objective.evidence import Needs

TOP_K = 4
SMALL = Setting(
    num_prompts=2,
    vocab_size=8,
    max_new_tokens=6,
    num_rollouts=12,
    num_steps=3,
    sharpness=2.5,
    tokens_per_micro_batch=60,
)
SEED = 1
TABULAR = [
    name
    for name, cls in METHODS.items()
    if borrowable(cls()) and Needs.REWARD not in cls().needs and cls().rollout != GivenText()
]
"""A table has no hidden states, nothing grades it, and no data set says what it should write."""


def with_small_support(name: str) -> Method:
    cls = METHODS[name]
    return cls(top_k=TOP_K) if "top_k" in {f.name for f in dataclasses.fields(cls)} else cls()


def trained(name: str, setting: Setting) -> tuple[TabularLM, TabularLM, list[float]]:
    student, teacher = make_tables(setting, SEED, 0.1)
    return student, teacher, list(distil(with_small_support(name), student, teacher, setting, SEED))


@pytest.mark.parametrize("name", TABULAR)
def test_the_whole_loop_gives_the_same_student_however_the_batch_is_cut(name):
    whole, _, norms = trained(name, dataclasses.replace(SMALL, tokens_per_micro_batch=10**6))
    cut, _, _ = trained(name, SMALL)
    assert len(norms) == 3 and all(norm > 0 for norm in norms)
    assert torch.allclose(whole.logits, cut.logits, rtol=0, atol=1e-9)


def reverse_kl(student: TabularLM, teacher: TabularLM) -> float:
    return float(sequence_kl(student, teacher, SMALL.max_new_tokens))


def forward_kl(student: TabularLM, teacher: TabularLM) -> float:
    return float(sequence_kl(teacher, student, SMALL.max_new_tokens))


def forward_kl_where_the_student_goes(student: TabularLM, teacher: TabularLM) -> float:
    log_s, log_t = student.logits.log_softmax(-1), teacher.logits.log_softmax(-1)
    weight = visits(student, SMALL.max_new_tokens)
    return float((weight * (log_t.exp() * (log_t - log_s)).sum(-1)).sum() / weight.sum())


def reverse_kl_within_top_k(student: TabularLM, teacher: TabularLM) -> float:
    ids = teacher.logits.topk(TOP_K, -1).indices
    log_s, log_t = (m.logits.gather(-1, ids).log_softmax(-1) for m in (student, teacher))
    weight = visits(student, SMALL.max_new_tokens)
    return float((weight * (log_s.exp() * (log_s - log_t)).sum(-1)).sum() / weight.sum())


TARGETS = {
    "full_fkl": forward_kl_where_the_student_goes,
    "opd_plus": forward_kl_where_the_student_goes,
    "lsm": reverse_kl_within_top_k,
    "seqkd": forward_kl,
}
"""What a method minimises where that is not reverse KL."""


@pytest.mark.parametrize("name", TABULAR)
@torch.no_grad()
def test_the_divergence_that_a_method_targets_falls_below_three_fifths(name):
    target = TARGETS.get(name, reverse_kl)
    # Forward KL from the student's own samples cannot see a token that the student never draws.
    sharpness = 1.0 if name == "opd_plus" else SMALL.sharpness
    setting = dataclasses.replace(SMALL, num_steps=35, sharpness=sharpness)
    before = target(*make_tables(setting, SEED, 0.1))
    with torch.enable_grad():
        student, teacher, _ = trained(name, setting)
    assert target(student, teacher) < 0.6 * before


@pytest.mark.parametrize("name", TABULAR)
def test_what_is_said_about_a_student_that_equals_its_teacher_is_so(name):
    _, teacher = make_tables(SMALL, SEED, 0.1)
    student = TabularLM(teacher.logits.detach(), learning_rate=0.0)
    norms = list(distil(with_small_support(name), student, teacher, SMALL, SEED))
    if describe(name).at_teacher == "no signal, at any token.":
        assert max(norms) < 1e-12
    else:
        assert max(norms) > 1e-6
