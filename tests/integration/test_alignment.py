"""Every number belongs to the token that it stands beside, through real models, engines and batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.cases import plain
from tests.one_step import judge, parts_of, step_of, write
from tests.small_runs import TROPD, write_models
from tests.tiny import tiny_model
from tropd.methods import METHODS
from tropd.objective.context import Context
from tropd.objective.evidence import Needs
from tropd.objective.losses import PolicyGradient
from tropd.objective.support import NOTHING
from tropd.teachers.teacher import ScoreRequest
from tropd.training.assembly import Parts
from tropd.training.batches import ScoredBatch
from tropd.training.micro_batch import Seen
from tropd.training.scoring import score
from tropd.training.step import train_step
from tropd.types import Author, Rollout

ON_POLICY = {"tropd": {"guidance": False}, "gkd": {"student_share": 1.0}, "sg_opd": {"beta": 0.0}}
SILENT = sorted(name for name, method in METHODS.items() if method.zero_at_teacher)
REWARDED = [n for n in SILENT if all(isinstance(t.loss, PolicyGradient) for t in METHODS[n]().objective.terms)]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def pair_with_a_copy(tmp_path: Path, family: str = "qwen3") -> Path:
    return write_models(tmp_path, family, teacher=tiny_model(family, seed=0, tied=True))


def norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([g.double().pow(2).sum() for g in gradients.values()]).sum().sqrt())


def full_of(parts: Parts, rollouts: list[Rollout]) -> list[Tensor]:
    """[T, V] of the student for each rollout, from one call of the whole model each."""
    with torch.no_grad():
        return [plain(parts.model.eval(), [rollout]) for rollout in rollouts]


@pytest.mark.parametrize("name", sorted({*REWARDED, "tropd"}))
def test_a_student_that_is_its_teacher_gets_exactly_no_gradient_from_rewards(tmp_path: Path, name: str) -> None:
    method = {"name": name} | ON_POLICY.get(name, {})
    parts = parts_of(pair_with_a_copy(tmp_path), method, optimizer={"learning_rate": 0.1})
    before = {key: p.detach().clone() for key, p in parts.model.named_parameters()}
    step = step_of(parts)
    assert all(float(g.abs().max()) == 0.0 for g in step.gradients.values())
    assert step.sums.gradient_norms == [0.0]
    assert all(torch.equal(x, step.weights[key]) for key, x in before.items())


@pytest.mark.parametrize("name", sorted(set(SILENT) - set(REWARDED)))
def test_a_student_that_is_its_teacher_gets_no_gradient_from_divergences_beyond_rounding(
    tmp_path: Path, name: str
) -> None:
    method = {"name": name} | ON_POLICY.get(name, {})
    at_teacher = step_of(parts_of(pair_with_a_copy(tmp_path / "same"), method))
    elsewhere = step_of(parts_of(write_models(tmp_path / "other"), method))
    assert norm(elsewhere.gradients) > 1e-2
    assert norm(at_teacher.gradients) < 1e-5 * norm(elsewhere.gradients)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_trust_is_total_and_every_ratio_zero_between_copies_of_any_family(tmp_path: Path, family: str) -> None:
    parts = parts_of(pair_with_a_copy(tmp_path, family), TROPD | {"guidance": False})
    step = step_of(parts)
    assert all(float(weights.sum()) == 0.0 for weights in step.shares["outlier"].values())
    assert all(bool((weights > 0).all()) for weights in step.shares["trusted"].values())
    assert step.sums.loss == 0.0


def test_the_teachers_copy_gets_only_likelihood_on_prefixes(tmp_path: Path) -> None:
    parts = parts_of(pair_with_a_copy(tmp_path))
    step = step_of(parts)
    terms = step.sums.terms
    assert terms["guidance"].tokens > 0 and terms["guidance"].loss > 0
    assert terms["trusted"].loss == 0.0 and terms["outlier"].tokens == 0


def everything(parts: Parts, rollouts: list[Rollout]) -> tuple[ScoredBatch, dict[str, Tensor]]:
    """A scored batch, and the same evidence from one whole forward pass per rollout."""
    batch = judge(parts, rollouts)
    hidden_NH = batch.tokens.peek("teacher_hidden_NH")
    if hidden_NH is not None:  # whole distributions are made where they are read
        whole_NV = parts.teacher.forward.full_logprobs(hidden_NH, batch.tokens.token_ids_N)
        batch = dataclasses.replace(batch, tokens=batch.tokens.with_(teacher_full_logprobs_NV=whole_NV))
    with torch.no_grad():
        teacher_NV = plain(parts.teacher.forward.model, rollouts)
    student_NV = torch.cat(full_of(parts, rollouts))
    ids_N1 = torch.tensor([i for r in rollouts for i in r.response_ids])[:, None]
    by_hand = {
        "token_ids_N": ids_N1[:, 0],
        "teacher_logprobs_N": teacher_NV.gather(1, ids_N1)[:, 0],
        "student_logprobs_N": student_NV.gather(1, ids_N1)[:, 0],
        "student_entropy_N": torch.special.entr(student_NV.exp()).sum(-1),
        "reverse_kl_N": (student_NV.exp() * (student_NV - teacher_NV)).sum(-1),
        "teacher_topk_logprobs_NK": teacher_NV.topk(8).values,
    }
    return batch, by_hand


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_evidence_of_every_token_is_a_whole_forward_pass_gathered_at_that_token(tmp_path: Path, family: str) -> None:
    folder = write_models(tmp_path, family)
    rollouts = write(parts_of(folder))
    assert {author for r in rollouts for author in r.authors} == {Author.CONTEXT, Author.TEACHER, Author.STUDENT}
    assert len({len(r.prompt.token_ids) for r in rollouts}) > 1
    found = set()
    for method in (TROPD, {"name": "tip"}):
        batch, by_hand = everything(parts_of(folder, method), rollouts)
        for field, expected in by_hand.items():
            got = batch.tokens.peek(field)
            if got is None or (field == "student_logprobs_N" and not batch.measured):
                continue
            found.add(field)
            if field == "teacher_topk_logprobs_NK":  # asked for only where a term may read it
                there_N = got[:, 0] > NOTHING
                assert bool(there_N.any())
                got, expected = got[there_N], expected[there_N]
            torch.testing.assert_close(got, expected, **CLOSE)
    assert found == set(by_hand)


def told(rollouts: list[Rollout]) -> list[Rollout]:
    """The same responses, behind prompts that say more."""
    return [
        dataclasses.replace(
            r,
            prompt=dataclasses.replace(r.prompt, token_ids=(9, *r.prompt.token_ids, 33, 34)),
            token_ids=(9, *r.prompt.token_ids, 33, 34, *r.response_ids),
            authors=(Author.CONTEXT,) * 3 + r.authors,
            behavior_logprobs=(0.0,) * 3 + r.behavior_logprobs,
        )
        for r in rollouts
    ]


def test_a_teacher_that_reads_another_prompt_is_asked_there_for_all_of_its_evidence(tmp_path: Path) -> None:
    """A copy of the student that is told something first: nothing of its evidence comes from the student's prompt."""
    parts = parts_of(pair_with_a_copy(tmp_path, "qwen3"), {"name": "tip"}, tokens_per_micro_batch=24)
    rollouts = write(parts)
    objective, read = parts.run.method.objective, told(rollouts)
    batch = score(rollouts, objective, parts.teacher, parts.learner, seed=0, recall=True, as_read={"teacher": read})
    student_NV, teacher_NV = torch.cat(full_of(parts, rollouts)), torch.cat(full_of(parts, read))
    ids_N = batch.tokens.token_ids_N
    expected_N = (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
    torch.testing.assert_close(batch.tokens.reverse_kl_N, expected_N, **CLOSE)
    torch.testing.assert_close(batch.tokens.teacher_logprobs_N, teacher_NV.gather(1, ids_N[:, None])[:, 0], **CLOSE)
    whole_NV = parts.teacher.forward.full_logprobs(batch.tokens.teacher_hidden_NH, ids_N)
    torch.testing.assert_close(whole_NV, teacher_NV, **CLOSE)
    assert float(expected_N.mean()) > 0.1
    same = score(rollouts, objective, parts.teacher, parts.learner, seed=0, recall=True)
    assert not same.tokens.reverse_kl_N.any(), "a copy that reads the same prompt says the same"


def test_a_top_k_that_is_asked_for_again_is_that_of_what_the_teacher_reads(tmp_path: Path) -> None:
    parts = parts_of(pair_with_a_copy(tmp_path), {"name": "full_fkl", "top_k": 8}, tokens_per_micro_batch=48)
    rollouts = write(parts)
    objective, read = parts.run.method.objective, told(rollouts)
    batch = score(rollouts, objective, parts.teacher, parts.learner, seed=0, recall=False, as_read={"teacher": read})
    left_out = batch.tokens.with_(
        teacher_topk_logprobs_NK=torch.full_like(batch.tokens.teacher_topk_logprobs_NK, NOTHING)
    )
    given: dict[str, Tensor] = {}

    def watch(seen: Seen) -> None:
        lengths = [len(r.response_ids) for r in seen.part.rollouts]
        rows = seen.part.tokens.teacher_topk_logprobs_NK.split(lengths)
        given.update(zip((r.id for r in seen.part.rollouts), rows, strict=True))

    train_step(
        dataclasses.replace(batch, tokens=left_out),
        objective,
        parts.learner,
        Context(),
        tokens_per_micro_batch=48,
        watch=watch,
        teacher=parts.teacher,
    )
    again_NK = torch.cat([given[r.id] for r in rollouts])
    torch.testing.assert_close(again_NK, batch.tokens.teacher_topk_logprobs_NK, **CLOSE)


def test_whole_distributions_of_the_teacher_are_those_of_a_whole_forward_pass(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path))
    rollouts = write(parts)
    scores = parts.teacher.score(ScoreRequest(rollouts, Needs.FULL))
    for rollout, given in zip(rollouts, scores, strict=True):
        with torch.no_grad():
            expected_TV = plain(parts.teacher.forward.model, [rollout])
        assert given.full_logprobs_TV is not None
        torch.testing.assert_close(given.full_logprobs_TV, expected_TV, **CLOSE)


def test_the_student_that_is_trained_is_a_whole_forward_pass_gathered_at_that_token(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path), tokens_per_micro_batch=60)
    rollouts = write(parts)
    full = dict(zip((r.id for r in rollouts), full_of(parts, rollouts), strict=True))
    step = step_of(parts, rollouts)
    assert len(step.seen) > 1
    for part, view in step.seen:
        expected_NV = torch.cat([full[r.id] for r in part.rollouts])
        ids_NM = torch.cat([part.tokens.token_ids_N[:, None], part.tokens.teacher_topk_ids_NK], 1)
        got_NM = torch.cat([view.logprobs_N[:, None], view.topk_logprobs_NK], 1)
        torch.testing.assert_close(got_NM.detach(), expected_NV.gather(1, ids_NM), **CLOSE)


def test_evidence_that_is_one_token_off_would_be_noticed(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path))
    batch, by_hand = everything(parts, write(parts))
    for shift in (1, -1):
        moved_N = batch.tokens.teacher_logprobs_N.roll(shift)
        wrong_N = (moved_N - by_hand["teacher_logprobs_N"]).abs() > 1e-2
        assert float(wrong_N.float().mean()) > 0.9


def test_what_the_sampler_says_is_what_the_trainer_says(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path))
    rollouts = write(parts)
    full_NV = torch.cat(full_of(parts, rollouts))
    own_N = torch.tensor([a == Author.STUDENT for r in rollouts for a in r.authors[len(r.prompt.token_ids) :]])
    said_N = torch.tensor([x for r in rollouts for x in r.behavior_logprobs[len(r.prompt.token_ids) :]])
    ids_N1 = torch.tensor([i for r in rollouts for i in r.response_ids])[:, None]
    torch.testing.assert_close(said_N[own_N], full_NV.gather(1, ids_N1)[own_N, 0], **CLOSE)
    assert bool((said_N[~own_N] == 0).all()) and bool((~own_N).any())


def test_the_whole_batch_is_scored_in_the_order_of_its_rollouts(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path))
    rollouts = write(parts)
    forward, backward = judge(parts, rollouts).tokens, judge(parts, rollouts[::-1]).tokens
    lengths = [len(r.response_ids) for r in rollouts]
    turned = torch.cat(list(forward.teacher_logprobs_N.split(lengths))[::-1])
    torch.testing.assert_close(backward.teacher_logprobs_N, turned, **CLOSE)
    assert not torch.equal(forward.token_ids_N, backward.token_ids_N)
    keys = dict(zip((r.id for r in rollouts), forward.keys_S.tolist(), strict=True))
    assert backward.keys_S.tolist() == [keys[r.id] for r in rollouts[::-1]]
    renamed = [dataclasses.replace(rollouts[0], id="other"), *rollouts[1:]]
    assert judge(parts, renamed).tokens.keys_S[0] != forward.keys_S[0]
