"""A teacher in this process says what its model says, and leaves the student as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.model.cases import LENGTHS, plain, rollouts_of, tokens_of, written
from tests.tiny import VOCAB, byte_tokenizer, tiny_model
from tropd.errors import ConfigError, EvidenceError, TeacherError, VocabularyError
from tropd.model.forward import Forward, similar_lengths
from tropd.model.one_pass import fused_loss
from tropd.model.tiling import Tiling
from tropd.objective.evidence import Needs
from tropd.teachers.local import LocalTeacher, base_as_teacher, same_vocabulary, shared_vocab_size
from tropd.teachers.teacher import ScoreRequest, Teacher

EVERYTHING = Needs.SAMPLED | Needs.TOPK | Needs.STUDENT_TOPK | Needs.FULL | Needs.TEACHER_ENTROPY


@pytest.mark.parametrize("tokens_per_batch", [1, 12, 8192])
def test_scores_are_the_models_own_in_the_order_of_the_rollouts(tokens_per_batch: int) -> None:
    model = tiny_model("llama").double()
    rollouts = rollouts_of()
    teacher: Teacher = LocalTeacher(model, name="big", tiling=Tiling(tokens_per_batch=tokens_per_batch, tile_tokens=4))
    generator = torch.Generator().manual_seed(0)
    at_ids = [torch.randint(VOCAB, (length, 3), generator=generator) for _, length in LENGTHS]
    scores = teacher.score(ScoreRequest(rollouts, EVERYTHING, top_k=6, student_topk_ids_TJ=at_ids))
    for rollout, score, at_TJ in zip(rollouts, scores, at_ids, strict=True):
        with torch.no_grad():
            full_TV = plain(model, [rollout])
        entropy_T = -(full_TV.exp() * full_TV).sum(-1)
        assert score.teacher == "big" and score.topk_ids_TK is not None
        assert torch.equal(score.topk_ids_TK, full_TV.topk(6).indices)
        for found, expected in (
            (score.logprobs_T, written([rollout], full_TV) if len(full_TV) else full_TV.new_zeros(0)),
            (score.topk_logprobs_TK, full_TV.topk(6).values),
            (score.entropy_T, entropy_T),
            (score.at_student_topk_TJ, full_TV.gather(1, at_TJ)),
            (score.full_logprobs_TV, full_TV),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_only_what_was_asked_for_is_answered() -> None:
    (score,) = LocalTeacher(tiny_model()).score(ScoreRequest(rollouts_of([(2, 3)]), Needs.SAMPLED, top_k=4))
    assert score.topk_ids_TK is score.entropy_T is score.at_student_topk_TJ is score.full_logprobs_TV is None
    assert LocalTeacher(tiny_model()).score(ScoreRequest([])) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_that_is_the_student_agrees_to_the_last_bit(dtype: torch.dtype) -> None:
    student = tiny_model("qwen3", tied=True).to(dtype)
    teacher = LocalTeacher(copy.deepcopy(student), tiling=Tiling(tile_tokens=8))
    rollouts = rollouts_of()
    forward, ids_N = Forward(student, tiling=Tiling(tile_tokens=8)), tokens_of(rollouts).token_ids_N
    learned = []

    def judge(rows: slice, logprobs_C1: torch.Tensor) -> torch.Tensor:
        learned.append(logprobs_C1.detach().squeeze(1))
        return logprobs_C1.sum()

    fused_loss(forward.head, forward.hidden(rollouts), ids_N[:, None], judge, 8).backward()
    teacher_N = torch.cat([score.logprobs_T for score in teacher.score(ScoreRequest(rollouts))])
    assert torch.equal(teacher_N - torch.cat(learned), torch.zeros_like(teacher_N))


def test_a_local_teacher_is_frozen() -> None:
    model = tiny_model("gpt2").train()
    rollouts = rollouts_of()
    teacher = LocalTeacher(model)
    first, second = (teacher.score(ScoreRequest(rollouts))[0].logprobs_T for _ in range(2))
    assert torch.equal(first, second)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_top_k_beyond_the_vocabulary_is_the_whole_vocabulary() -> None:
    teacher = LocalTeacher(tiny_model(vocab=VOCAB + 26), vocab_size=VOCAB)
    score = teacher.score(ScoreRequest(rollouts_of(), Needs.TOPK, top_k=VOCAB + 1000))[0]
    assert score.topk_ids_TK is not None and score.topk_logprobs_TK is not None
    assert torch.equal(score.topk_ids_TK.sort(-1).values, torch.arange(VOCAB).expand(5, -1))
    torch.testing.assert_close(score.topk_logprobs_TK.exp().sum(-1), torch.ones(5))


def test_requests_that_cannot_be_answered_are_refused() -> None:
    teacher = LocalTeacher(tiny_model())
    rollouts = rollouts_of()
    with pytest.raises(EvidenceError, match="top_k = 0"):
        teacher.score(ScoreRequest(rollouts, Needs.TOPK))
    with pytest.raises(EvidenceError, match="student_topk_ids_TJ"):
        teacher.score(ScoreRequest(rollouts, Needs.STUDENT_TOPK))
    with pytest.raises(AssertionError, match="a row per token"):
        teacher.score(ScoreRequest(rollouts, Needs.STUDENT_TOPK, student_topk_ids_TJ=[torch.zeros(1, 2).long()] * 5))


def test_a_teacher_whose_numbers_are_not_finite_is_named() -> None:
    model = tiny_model()
    teacher = LocalTeacher(model, name="broken")
    with torch.no_grad():
        model.lm_head.weight[0] = float("inf")
    with pytest.raises(TeacherError, match=r"broken.*not finite"):
        teacher.score(ScoreRequest(rollouts_of()))


def lora(base: nn.Module, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False, **options)
    return get_peft_model(base, config)


def test_the_base_under_an_adapter_is_a_teacher_and_the_student_stays_as_it_was() -> None:
    base = tiny_model("llama")
    wanted = LocalTeacher(copy.deepcopy(base))
    student = lora(copy.deepcopy(base)).train()
    student.get_base_model().model.layers[1].eval()
    next(p for p in student.parameters() if p.requires_grad).requires_grad_(False)
    rollouts = rollouts_of()
    before_N = Forward(student).measure(rollouts, Needs.SAMPLED).logprobs_N
    flags = [p.requires_grad for p in student.parameters()]
    modes = [module.training for module in student.modules()]
    teacher: Teacher = base_as_teacher(student)

    scores = teacher.score(ScoreRequest(rollouts, Needs.FULL | Needs.TOPK, top_k=3))
    for found, expected in zip(
        scores, wanted.score(ScoreRequest(rollouts, Needs.FULL | Needs.TOPK, top_k=3)), strict=True
    ):
        assert torch.equal(found.logprobs_T, expected.logprobs_T)
        assert found.full_logprobs_TV is not None and expected.full_logprobs_TV is not None
        assert torch.equal(found.full_logprobs_TV, expected.full_logprobs_TV)
    with pytest.raises(VocabularyError):
        teacher.score(
            ScoreRequest(
                rollouts, Needs.STUDENT_TOPK, student_topk_ids_TJ=[torch.full((n, 1), 9999) for _, n in LENGTHS]
            )
        )

    assert [p.requires_grad for p in student.parameters()] == flags and any(flags)
    assert [module.training for module in student.modules()] == modes
    after_N = Forward(student).measure(rollouts, Needs.SAMPLED).logprobs_N
    assert torch.equal(after_N, before_N)
    assert not torch.allclose(after_N, torch.cat([score.logprobs_T for score in scores]))


def test_an_error_in_the_middle_of_scoring_leaves_the_adapter_on() -> None:
    student = lora(tiny_model("llama")).train()
    teacher = base_as_teacher(student)
    flags = [p.requires_grad for p in student.parameters()]

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = student.get_base_model().model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        teacher.score(ScoreRequest(rollouts_of()))
    handle.remove()
    assert student.training and all(module.training for module in student.modules())
    assert [p.requires_grad for p in student.parameters()] == flags
    assert student.get_model_status().enabled is True


def test_reverse_kl_to_the_own_base_takes_the_adapter_off_for_the_teacher_alone() -> None:
    base = tiny_model("llama").double()
    student = lora(copy.deepcopy(base)).double()
    rollouts = rollouts_of()
    with torch.no_grad():
        student_NV, base_NV = plain(student, rollouts), plain(base, rollouts)
    expected_N = (student_NV.exp() * (student_NV - base_NV)).sum(-1)
    found_N = Forward(student, tiling=Tiling(tile_tokens=4)).reverse_kl(rollouts, base_as_teacher(student).forward)
    assert expected_N.min() > 1e-6
    torch.testing.assert_close(found_N, expected_N, rtol=1e-10, atol=1e-10)


def test_a_base_that_cannot_be_had_back_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no adapter"):
        base_as_teacher(tiny_model())
    with pytest.raises(ConfigError, match="lora_only"):
        base_as_teacher(lora(tiny_model(), bias="lora_only"))


def test_batches_of_similar_length_hold_each_sequence_once_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 90, (50,), generator=generator).tolist()
    batches = similar_lengths(lengths, 64)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    assert all(batch == sorted(batch) for batch in batches)
    assert all(len(batch) * max(lengths[i] for i in batch) <= 64 or len(batch) == 1 for batch in batches)
    assert max(map(len, batches)) > 1
    assert similar_lengths([3, 1, 2], 9) == [[0, 1, 2]] and similar_lengths([], 9) == []


def test_tokenizers_that_differ_in_what_the_student_can_write_are_refused() -> None:
    student, teacher = byte_tokenizer(), byte_tokenizer()
    same_vocabulary(student, teacher)
    teacher.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    same_vocabulary(student, teacher)
    with pytest.raises(VocabularyError, match=r"'<\|tool\|>' is 262 for the student, but the teacher has none"):
        same_vocabulary(teacher, student)
    student.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    with pytest.raises(VocabularyError, match=r"1 of 263 .*'<\|think\|>' is 262.*'<\|tool\|>' there"):
        same_vocabulary(student, teacher)


def test_tokenizers_that_number_the_same_tokens_differently_are_refused() -> None:
    student, teacher = byte_tokenizer(), byte_tokenizer()
    for tokenizer, tokens in ((student, ["<|a|>", "<|b|>"]), (teacher, ["<|b|>", "<|a|>"])):
        tokenizer.add_tokens(tokens)
    with pytest.raises(VocabularyError, match=r"2 of 264 .*'<\|a\|>' is 262 for the student.*it at 263"):
        same_vocabulary(student, teacher)


def test_the_shared_vocabulary_is_what_both_models_and_tokenizers_know() -> None:
    small, large = tiny_model(vocab=VOCAB + 2), tiny_model(vocab=VOCAB + 90)
    assert shared_vocab_size(small, byte_tokenizer(), large, byte_tokenizer()) == VOCAB
    extended = byte_tokenizer()
    extended.add_tokens([f"<|{i}|>" for i in range(50)])
    assert shared_vocab_size(small, extended, large, extended) == VOCAB + 2
    assert shared_vocab_size(small, byte_tokenizer(), large, extended) == VOCAB
    with pytest.raises(VocabularyError):
        shared_vocab_size(small, extended, large, byte_tokenizer())
