"""What every teacher, engine and grader promises, as checks to run on your own.

    check_teacher(MyTeacher(...), vocab_size=32000)
    check_engine(MyEngine(...), vocab_size=32000)
    check_grader(my_grader, answers=["4", "9"], right=["It is 4", "9"], wrong=["5", ""])

Each raises AssertionError with the promise that is broken.  They ask for a few short texts and take seconds
(docs/own_parts.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tropd.data.graders import Grade, Grader
from tropd.errors import EvidenceError
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.objective.support import NOTHING
from tropd.rollout.engine import Engine
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.types import Author, Completion, Finish, Prompt, Request, Rollout, Sampling, TeacherScores, key_of

_LENGTHS = ((3, 6), (1, 9), (5, 0), (2, 1), (4, 12))


def some_rollouts(vocab_size: int, lengths: Sequence[tuple[int, int]] = _LENGTHS, seed: int = 0) -> list[Rollout]:
    """Texts of arbitrary tokens, as (prompt tokens, response tokens)."""
    return [_rollout(f"r{n}", vocab_size, *pair, seed=seed + n) for n, pair in enumerate(lengths)]


def check_teacher(teacher: Teacher, *, vocab_size: int, top_k: int = 5, tolerance: float = 1e-4) -> None:
    """Scores are the teacher's own, in order, about the tokens that were written, whatever else is asked with them."""
    rollouts, offers = some_rollouts(vocab_size), teacher.capabilities
    _promise(Needs.SAMPLED in offers, "a teacher scores the written tokens (Needs.SAMPLED)")
    here = all(single.forward is not None for single in teacher.teachers.values())
    _promise(here or not offers & (Needs.REVERSE_KL | Needs.HIDDEN), "REVERSE_KL and HIDDEN come with a `forward`")
    _promise(teacher.score(ScoreRequest([])) == [], "no rollouts have no scores")
    needs = Needs.SAMPLED | (Needs.TOPK & offers)
    scores = teacher.score(ScoreRequest(rollouts, needs, top_k=top_k))
    _promise(len(scores) == len(rollouts), "each rollout has one score")
    for rollout, score in zip(rollouts, scores, strict=True):
        _check_rows(rollout, score, vocab_size, top_k if Needs.TOPK in offers else 0, tolerance)
    plain = teacher.score(ScoreRequest(rollouts))
    unasked = [s.topk_ids_TK is None and s.entropy_T is None and s.full_logprobs_TV is None for s in plain]
    _promise(all(unasked), "only what was asked for is answered")
    _same(plain, scores, tolerance, "scores do not depend on what else is asked for")
    backwards = teacher.score(ScoreRequest(rollouts[::-1], needs, top_k=top_k))[::-1]
    _same(backwards, scores, tolerance, "scores do not depend on the order, or on other rollouts")
    shorter = [replace(r, **_cut(r, len(r.prompt.token_ids) + len(r.response_ids) // 2)) for r in rollouts]
    halves = teacher.score(ScoreRequest(shorter, needs, top_k=top_k))
    whole = [replace(s, logprobs_T=s.logprobs_T[: len(r.response_ids)]) for r, s in zip(shorter, scores, strict=True)]
    _same(halves, whole, tolerance, "a token's score depends on what stands before it alone")
    _check_extras(teacher, rollouts, vocab_size, tolerance)
    _check_refusals(teacher, rollouts)


def check_grader(
    grader: Grader, *, answers: Sequence[str], right: Sequence[str], wrong: Sequence[str], **columns: Sequence[Any]
) -> None:
    """A completion's score is its own.  `right[n]` is a good completion where `answers[n]` is the row's answer, and
    `wrong[n]` a worse one; `columns` are the row's others."""
    num = len(answers)

    def grade(completions: Sequence[str], order: Sequence[int]) -> list[float]:
        given = {name: [column[n] for n in order] for name, column in {"answer": answers, **columns}.items()}
        found = grader([f"prompt {n}" for n in order], [completions[n] for n in order], **given)
        scores = [score.reward if isinstance(score, Grade) else score for score in found]
        _promise(len(scores) == len(order), "each completion has one score")
        _promise(all(math.isfinite(score) for score in scores), "scores are finite numbers")
        return [float(score) for score in scores]

    good, bad = grade(right, range(num)), grade(wrong, range(num))
    _promise(all(a > b for a, b in zip(good, bad, strict=True)), "a right completion has a higher score than a wrong")
    _promise(grade(right, range(num)) == good, "the same completion has the same score again")
    _promise(grade(right, range(num)[::-1])[::-1] == good, "a score does not depend on the order")
    _promise([grade(right, [n])[0] for n in range(num)] == good, "a score does not depend on other completions")


def check_engine(
    engine: Engine,
    *,
    vocab_size: int,
    tolerance: float = 1e-3,
    sync: Callable[[Engine, int], None] = lambda engine, version: engine.sync(version),
) -> None:
    """Texts are their requests' alone.  `sync` gives the engine weights with a version; by default those it has."""
    requests = [
        Request(token_ids=r.token_ids[: 1 + n], max_new_tokens=4 + 3 * n, seed=key_of(7, n))
        for n, r in enumerate(some_rollouts(vocab_size))
    ]
    _promise(engine.generate([]) == [], "no requests have no texts")
    texts = engine.generate(requests)
    _promise(len(texts) == len(requests), "each request has one text")
    for request, text in zip(requests, texts, strict=True):
        _check_text(request, text, vocab_size, tolerance)
    again = engine.generate(requests[::-1])[::-1]
    _promise(_ids(again) == _ids(texts), "a text depends on its seed, not on the order or its neighbours")
    others = engine.generate([replace(r, seed=key_of(8, n)) for n, r in enumerate(requests)])
    _promise(_ids(others) != _ids(texts), "another seed draws another text")
    greedy = [replace(r, sampling=Sampling(temperature=0.0)) for r in requests]
    likeliest = [engine.generate([replace(r, seed=seed) for r in greedy]) for seed in (1, 2)]
    _promise(_ids(likeliest[0]) == _ids(likeliest[1]), "temperature 0 draws nothing")
    longest = max(range(len(requests)), key=lambda n: len(texts[n].token_ids))
    end = texts[longest].token_ids[len(texts[longest].token_ids) // 2]
    (stopped,) = engine.generate([replace(requests[longest], stop_ids=(end,))])
    expected = texts[longest].token_ids[: texts[longest].token_ids.index(end) + 1]
    _promise(stopped.token_ids == expected and stopped.finish is Finish.STOP, "a stop token is the last token")
    sync(engine, 3)
    versions = {text.policy_version for text in engine.generate(requests)}
    _promise(versions == {(3, 3)}, f"a text names the weights that wrote it (version 3, not {versions})")


def _rollout(name: str, vocab_size: int, num_prompt: int, num_response: int, seed: int) -> Rollout:
    ids = tuple(key_of(seed, place) % vocab_size for place in range(num_prompt + num_response))
    return Rollout(
        id=name,
        prompt=Prompt(id=name, token_ids=ids[:num_prompt]),
        token_ids=ids,
        authors=(Author.CONTEXT,) * num_prompt + (Author.STUDENT,) * num_response,
        behavior_logprobs=(0.0,) * len(ids),
    )


def _cut(rollout: Rollout, length: int) -> dict[str, tuple]:
    names = ("token_ids", "authors", "behavior_logprobs")
    return {name: getattr(rollout, name)[:length] for name in names}


def _check_rows(rollout: Rollout, score: TeacherScores, vocab_size: int, top_k: int, tolerance: float) -> None:
    logprobs_T, ids_T = score.logprobs_T, torch.tensor(rollout.response_ids, dtype=torch.int64)
    _promise(logprobs_T.shape == ids_T.shape, "there is one log-probability per response token")
    _promise(not logprobs_T.requires_grad, "scores carry no gradient")
    _promise(bool((logprobs_T <= tolerance).all()), "log-probabilities are at most 0, and no NaN")
    if not top_k:
        return
    ids_TK, top_TK = score.topk_ids_TK, score.topk_logprobs_TK
    if ids_TK is None or top_TK is None:
        raise AssertionError("the top-k that a teacher offers is given when asked for")
    width = min(top_k, vocab_size)
    _promise(ids_TK.shape == top_TK.shape == (len(ids_T), width), f"the top-{top_k} has {width} columns")
    given_T = (top_TK > NOTHING).all(-1)  # rows that nobody wanted may be left out
    ids_TK, top_TK, logprobs_T, ids_T = (
        ids_TK[given_T].cpu(),
        top_TK[given_T],
        logprobs_T[given_T],
        ids_T[given_T.cpu()],
    )
    _promise(bool(((ids_TK >= 0) & (ids_TK < vocab_size)).all()), "the top-k are tokens of the vocabulary")
    _promise(all(len(set(row)) == width for row in ids_TK.tolist()), "the top-k are different tokens")
    _promise(bool((top_TK.diff(dim=-1) <= 0).all()), "the likeliest come first")
    _promise(bool((top_TK.exp().sum(-1) <= 1 + tolerance).all()), "probabilities sum to at most 1")
    same_TK = (ids_TK == ids_T[:, None]).to(top_TK.device)
    gap_TK = (top_TK - logprobs_T[:, None]).abs().masked_fill(~same_TK, 0.0)
    _promise(bool((gap_TK <= tolerance).all()), "a written token among the top-k has the same log-probability there")
    beside_T = ~same_TK.any(-1)
    fits_T = logprobs_T <= top_TK[:, -1] + tolerance
    _promise(bool(fits_T[beside_T].all()), "no token outside the top-k is likelier than those inside")


def _check_extras(teacher: Teacher, rollouts: list[Rollout], vocab_size: int, tolerance: float) -> None:
    """Entropies, whole distributions and the scores of given ids are about the same distributions."""
    wanted = teacher.capabilities & (Needs.TEACHER_ENTROPY | Needs.FULL | Needs.STUDENT_TOPK)
    ids_TJ = [torch.tensor(r.response_ids, dtype=torch.int64)[:, None] + torch.arange(2) for r in rollouts]
    ids_TJ = [ids % vocab_size for ids in ids_TJ]
    request = ScoreRequest(rollouts, Needs.SAMPLED | wanted, student_topk_ids_TJ=ids_TJ)
    for rollout, ids, score in zip(rollouts, ids_TJ, teacher.score(request), strict=True):
        num, full_TV = len(rollout.response_ids), score.full_logprobs_TV
        if Needs.STUDENT_TOPK in wanted:
            at_TJ = score.at_student_topk_TJ
            _promise(at_TJ is not None and at_TJ.shape == (num, 2), "each id that was given has a log-probability")
            assert at_TJ is not None
            _promise(_close(at_TJ[:, 0], score.logprobs_T, tolerance), "a written token scores the same as a given id")
        if Needs.FULL in wanted:
            _promise(full_TV is not None and full_TV.shape == (num, vocab_size), "a distribution is over all tokens")
            assert full_TV is not None
            _promise(_close(full_TV.exp().sum(-1), full_TV.new_ones(num), tolerance), "probabilities sum to 1")
            at_T = full_TV.gather(1, ids[:, :1].to(full_TV.device))[:, 0]
            _promise(_close(at_T, score.logprobs_T, tolerance), "the distribution gives the written token its score")
        if Needs.TEACHER_ENTROPY in wanted:
            entropy_T = score.entropy_T
            _promise(entropy_T is not None and entropy_T.shape == (num,), "each token has an entropy")
            assert entropy_T is not None
            expected_T = entropy_T if full_TV is None else torch.special.entr(full_TV.exp()).sum(-1)
            _promise(_close(entropy_T, expected_T, tolerance), "an entropy is that of the distribution")


def _check_refusals(teacher: Teacher, rollouts: list[Rollout]) -> None:
    if Needs.TOPK in teacher.capabilities:
        _refuses(teacher, ScoreRequest(rollouts, Needs.TOPK), "a top-k of no size is refused (EvidenceError)")
    for need in OF_TEACHER & ~teacher.capabilities:
        _refuses(teacher, ScoreRequest(rollouts, need, top_k=2), f"{need} is refused: it is not offered")


def _check_text(request: Request, text: Completion, vocab_size: int, tolerance: float) -> None:
    num = len(text.token_ids)
    _promise(0 < num <= request.max_new_tokens, "a text has between 1 and max_new_tokens tokens")
    _promise(all(0 <= token < vocab_size for token in text.token_ids), "texts are tokens of the vocabulary")
    _promise(text.finish is Finish.LENGTH and num == request.max_new_tokens, "without stop tokens it runs to the limit")
    _promise(len(text.behavior_logprobs) == num, "each token has the log-probability that it was drawn with")
    _promise(all(x <= tolerance and math.isfinite(x) for x in text.behavior_logprobs), "they are finite, at most 0")
    if text.model_logprobs:
        gaps = [abs(a - b) for a, b in zip(text.model_logprobs, text.behavior_logprobs, strict=True)]
        _promise(max(gaps) <= tolerance, "at temperature 1 the model itself is sampled")


def _ids(texts: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [text.token_ids for text in texts]


def _same(found: Sequence[TeacherScores], expected: Sequence[TeacherScores], tolerance: float, promise: str) -> None:
    for a, b in zip(found, expected, strict=True):
        _promise(a.logprobs_T.shape == b.logprobs_T.shape and _close(a.logprobs_T, b.logprobs_T, tolerance), promise)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(torch.isclose(a, b, rtol=0.0, atol=tolerance).all())


def _refuses(teacher: Teacher, request: ScoreRequest, promise: str) -> None:
    try:
        teacher.score(request)
    except EvidenceError:
        return
    raise AssertionError(f"broken promise: {promise}.")


def _promise(kept: bool, promise: str) -> None:
    if not kept:
        raise AssertionError(f"broken promise: {promise}.")
