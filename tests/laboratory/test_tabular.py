"""The exact model is exact, and every method learns on it through the whole loop."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tropd.laboratory.tabular import END, TabularLM, sequence_kl, visits
from tropd.methods import OPD
from tropd.methods.drafts import RolloutJob
from tropd.rollout.stage import roll_out
from tropd.types import Sampling

F64 = torch.float64


def test_sequence_kl_is_the_sum_over_all_sequences():
    """Enumerated: 3 tokens, at most 4 of them, two prompts."""
    p, q = TabularLM.random(2, 3, seed=0), TabularLM.random(2, 3, seed=1)
    total = 0.0
    for prompt in range(2):
        for length in range(1, 5):
            for ids in itertools.product(range(3), repeat=length):
                stops = ids[-1] == END
                if END in ids[:-1] or (not stops and length < 4):
                    continue
                before = (3, *ids[:-1])
                log_p, log_q = (
                    sum(
                        float(m.logits[prompt].detach().log_softmax(-1)[b, i]) for b, i in zip(before, ids, strict=True)
                    )
                    for m in (p, q)
                )
                total += torch.tensor(log_p).exp().item() * (log_p - log_q) / 2
    assert float(sequence_kl(p, q, 4).detach()) == pytest.approx(total, abs=1e-6)


def test_visits_count_every_token_once():
    p = TabularLM.random(2, 5, seed=0)
    assert visits(p, 1)[:, -1].tolist() == [1.0, 1.0]
    assert float(visits(p, 50).sum(-1).min().detach()) >= 1.0


def test_rollouts_follow_the_table_and_do_not_depend_on_the_batch():
    model = TabularLM.random(2, 6, seed=3)
    job = RolloutJob(
        prompts=[(p, 0) for p in model.prompts()],
        num_rollouts=300,
        max_new_tokens=8,
        sampling=Sampling(),
        stop_ids=(END,),
        seed=1,
        progress=0.0,
    )
    rollouts = roll_out(OPD().rollout, job, model, None)
    first = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts[:300]]), minlength=6) / 300
    expected = model.logits[0, -1].detach().softmax(-1)
    assert bool(((first - expected).abs() < 4 * (expected * (1 - expected) / 300).sqrt() + 1e-9).all())
    again = roll_out(OPD().rollout, dataclasses.replace(job, prompts=job.prompts[1:]), model, None)
    assert [r.token_ids for r in again] == [r.token_ids for r in rollouts[300:]]
