"""A teacher that is never quite sure: a model's probabilities, mixed with those of a die."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tropd import Teacher
from tropd.objective.evidence import Needs
from tropd.teachers.local import LocalTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.types import TeacherScores


class Unsure(Teacher):
    """log((1 - share) p + share / V)."""

    name = "unsure"
    capabilities = Needs.SAMPLED

    def __init__(self, path: str, share: float = 0.1) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.share = share

    def prepare(self, tokenizer: Any, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.inner = LocalTeacher(self.model.to(device), vocab_size=vocab_size)

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        request.check(self)
        floor = math.log(self.share / self.vocab_size)
        return [self._mixed(scores.logprobs_T, floor) for scores in self.inner.score(ScoreRequest(request.rollouts))]

    def _mixed(self, logprobs_T: torch.Tensor, floor: float) -> TeacherScores:
        mixed_T = torch.logaddexp(logprobs_T + math.log1p(-self.share), torch.full_like(logprobs_T, floor))
        return TeacherScores(logprobs_T=mixed_T, teacher=self.name)
