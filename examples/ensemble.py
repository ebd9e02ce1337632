"""Two teachers that speak with one voice: a teacher of your own, made of others.

The mixture gives a token the weighted mean of its members' probabilities:

    log p(v) = log sum_i w_i p_i(v)

python examples/ensemble.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tropd.errors import ConfigError
from tropd.objective.evidence import Needs
from tropd.teachers.local import LocalTeacher
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.testing import check_teacher, some_rollouts
from tropd.types import TeacherScores

_FROM_WHOLE = Needs.FULL | Needs.TOPK | Needs.TEACHER_ENTROPY
"""The mixture's likeliest tokens need not be among any member's, so whole distributions are mixed first."""


class Ensemble(Teacher):
    """Offers written tokens and the student's top-k where all members do, and the rest where all give whole
    distributions.  Hidden states and the reverse KL belong to one model's head, so they are not offered."""

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]) -> None:
        if len(members) != len(weights) or not math.isclose(sum(weights), 1.0) or min(weights) <= 0.0:
            raise ConfigError(f"{len(members)} members were given the weights {weights}. Give one each, summing to 1.")
        self.members, self.weights = members, weights
        self.name = " + ".join(member.name for member in members)
        shared = Needs.SAMPLED | Needs.STUDENT_TOPK | Needs.FULL
        for member in members:
            shared &= member.capabilities
        self.capabilities = shared | _FROM_WHOLE if Needs.FULL in shared else shared
        self.context = min((m.context for m in members if m.context is not None), default=None)
        self.noise = max(member.noise for member in members)
        self.elsewhere = all(member.elsewhere for member in members)

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        request.check(self)
        asked = Needs.SAMPLED | (request.needs & Needs.STUDENT_TOPK)
        if not request.needs & _FROM_WHOLE:
            return self._mixed(replace(request, needs=asked), request)
        whole = replace(request, needs=asked | Needs.FULL)  # one at a time: a distribution has many numbers
        return [self._mixed(whole.take([n]), request)[0] for n in range(len(request.rollouts))]

    def _mixed(self, part: ScoreRequest, request: ScoreRequest) -> list[TeacherScores]:
        """What all members say of `part`, as one answer to `request`."""
        answers = zip(*(member.score(part) for member in self.members), strict=True)
        return [self._one(scores, request) for scores in answers]

    def _one(self, scores: Sequence[TeacherScores], request: ScoreRequest) -> TeacherScores:
        needs, full_TV = request.needs, self._mean([s.full_logprobs_TV for s in scores])
        written_T = self._mean([s.logprobs_T for s in scores])
        assert written_T is not None, "every teacher scores the written tokens"
        top = None
        if full_TV is not None and Needs.TOPK in needs:
            top = full_TV.topk(min(request.top_k, full_TV.shape[-1]), -1)
        return TeacherScores(
            logprobs_T=written_T,
            topk_ids_TK=None if top is None else top.indices,
            topk_logprobs_TK=None if top is None else top.values,
            entropy_T=None
            if full_TV is None or Needs.TEACHER_ENTROPY not in needs
            else torch.special.entr(full_TV.exp()).sum(-1),
            at_student_topk_TJ=self._mean([s.at_student_topk_TJ for s in scores]),
            full_logprobs_TV=full_TV if Needs.FULL in needs else None,
            teacher=self.name,
        )

    def _mean(self, logprobs: Sequence[Tensor | None]) -> Tensor | None:
        """Of probabilities, not of their logarithms."""
        given = [x + math.log(weight) for x, weight in zip(logprobs, self.weights, strict=True) if x is not None]
        return torch.stack(given).logsumexp(0) if given else None

    def prepare(self, tokenizer, vocab_size: int, device: torch.device) -> None:
        for member in self.members:
            member.prepare(tokenizer, vocab_size, device)

    def close(self) -> None:
        with ExitStack() as stack:  # closes all of them, even where closing one fails
            for member in self.members:
                stack.callback(member.close)


VOCAB = 64


def make_teacher(seed: int) -> LocalTeacher:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LocalTeacher(LlamaForCausalLM(config), name=f"teacher {seed}")


def main() -> dict[str, float]:
    """The mean log-probability of some texts: the mixture's is never below the members' own mean."""
    members = [make_teacher(1), make_teacher(2)]
    ensemble = Ensemble(members, weights=[0.7, 0.3])
    check_teacher(ensemble, vocab_size=VOCAB)
    rollouts = some_rollouts(VOCAB)
    means = {}
    for teacher in (*members, ensemble):
        scores = teacher.score(ScoreRequest(rollouts))
        means[teacher.name] = float(torch.cat([score.logprobs_T for score in scores]).mean())
        print(f"{teacher.name:24} {means[teacher.name]:.3f} nats per token")
    return means


if __name__ == "__main__":
    main()
