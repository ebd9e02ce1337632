"""A language model as a table: the whole loop in milliseconds, with exact sequence-level KL.

A response token depends on the prompt and the token before it; the model is a table of logits [P, V + 1, V] whose row V
stands before the first token; token 0 ends the response.  One class is engine, teacher and student, so the same
stages run as with real models.  Divergences between two tables are sums over states, weighted by how often the student
visits them, without sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tropd.model.one_pass import wanted
from tropd.objective.context import World
from tropd.objective.draws import uniform
from tropd.objective.evidence import OF_MODEL, Needs, StudentView, Tokens
from tropd.objective.handed import teacher_evidence
from tropd.objective.support import expected_gap
from tropd.rollout.engine import Engine
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.training.micro_batch import MicroBatch, Seen
from tropd.types import Completion, Finish, Prompt, Request, Rollout, TeacherScores

END = 0


class TabularLM(Engine, Teacher):
    """A table of next-token logits, float64."""

    capabilities = OF_MODEL & ~Needs.HIDDEN & ~Needs.LOOKAHEAD
    device = torch.device("cpu")
    expands = frozenset[str]()
    margin: float | None = 1e-6

    def __init__(self, logits_PWV: Tensor, *, learning_rate: float = 0.1, max_gradient_norm: float = 1.0) -> None:
        self.logits = logits_PWV.double().clone().requires_grad_()
        # The row that stands before the first token, so also the number of tokens.
        self.start = logits_PWV.shape[-1]
        self.vocab_size: int | None = self.start
        self.max_gradient_norm = max_gradient_norm
        self.optimizer = torch.optim.Adam([self.logits], lr=learning_rate)
        self.version = 0

    @classmethod
    def random(cls, num_prompts: int, vocab_size: int, seed: int, sharp: float = 2.0, **options) -> TabularLM:
        g = torch.Generator().manual_seed(seed)
        return cls(
            sharp * torch.randn(num_prompts, vocab_size + 1, vocab_size, generator=g, dtype=torch.float64), **options
        )

    def prompts(self) -> list[Prompt]:
        """One prompt per row of the table; its only token is its number."""
        return [Prompt(id=f"p{i}", token_ids=(i,)) for i in range(self.logits.shape[0])]

    def full_logprobs(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[N, V]: the distribution that each response token was, or would have been, drawn from."""
        prompt_N = [r.prompt.token_ids[-1] for r in rollouts for _ in r.response_ids]
        before_N = [b for r in rollouts for b in (self.start, *r.response_ids[:-1]) if r.response_ids]
        index = torch.tensor(prompt_N, dtype=torch.int64), torch.tensor(before_N, dtype=torch.int64)
        return self.logits[index].log_softmax(-1)

    # As an engine

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        prompt_S = torch.tensor([r.token_ids[0] for r in requests], dtype=torch.int64)
        state_S = torch.tensor([(self.start, *r.token_ids[1:])[-1] for r in requests], dtype=torch.int64)
        longest = max((r.max_new_tokens for r in requests), default=0)
        table = self.logits.log_softmax(-1)
        cumulative = table.exp().cumsum(-1)
        keys_S = torch.tensor([r.seed for r in requests], dtype=torch.int64)
        draws_ST = uniform(keys_S[:, None], torch.arange(longest), stream=1).double()
        ids_ST = torch.zeros(len(requests), longest, dtype=torch.int64)
        logprobs_ST = torch.zeros(len(requests), longest, dtype=torch.float64)
        for t in range(longest):
            row_SV = cumulative[prompt_S, state_S]
            drawn_S = torch.searchsorted(row_SV, draws_ST[:, t, None] * row_SV[:, -1:], right=True).squeeze(-1)
            drawn_S = drawn_S.clamp(max=self.start - 1)
            logprobs_ST[:, t] = table[prompt_S, state_S, drawn_S]
            ids_ST[:, t] = state_S = drawn_S
        rows = zip(requests, ids_ST.tolist(), logprobs_ST.tolist(), strict=True)
        return [self._completion(ids[: r.max_new_tokens], logprobs) for r, ids, logprobs in rows]

    def _completion(self, ids: list[int], logprobs: list[float]) -> Completion:
        """The response up to the first END."""
        length = ids.index(END) + 1 if END in ids else len(ids)
        both = tuple(logprobs[:length])
        return Completion(
            token_ids=tuple(ids[:length]),
            behavior_logprobs=both,
            model_logprobs=both,
            finish=Finish.STOP if END in ids else Finish.LENGTH,
            policy_version=(self.version, self.version),
        )

    def sync(self, version: int) -> None:
        self.version = version

    # As a teacher

    @torch.no_grad()
    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        request.check(self)
        rollouts, at_ids_TJ = request.rollouts, request.student_topk_ids_TJ
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        full = self.full_logprobs(rollouts)
        ids = torch.tensor([i for rollout in rollouts for i in rollout.response_ids], dtype=torch.int64)
        evidence = teacher_evidence(full, ids, request.needs, request.top_k)
        parts = {name: x.split(lengths) for name, x in evidence.items() if isinstance(x, Tensor)}
        whole = full.split(lengths)
        return [
            TeacherScores(
                logprobs_T=parts["teacher_logprobs_N"][n],
                topk_ids_TK=parts["teacher_topk_ids_NK"][n],
                topk_logprobs_TK=parts["teacher_topk_logprobs_NK"][n],
                entropy_T=parts["teacher_entropy_N"][n],
                at_student_topk_TJ=whole[n].gather(-1, at_ids_TJ[n]) if at_ids_TJ else None,
                full_logprobs_TV=whole[n] if Needs.FULL in request.needs else None,
            )
            for n in range(len(rollouts))
        ]

    # As a student

    def learn(self, batch: MicroBatch) -> Seen:
        part = batch.part
        loss, piece = batch.loss_of_all(self.view(part.rollouts, part.tokens, batch.objective.asks))
        loss.backward()
        return batch.seen([piece])

    def view(self, rollouts: Sequence[Rollout], tokens: Tokens, asks: Mapping[str, Needs]) -> StudentView:
        full = self.full_logprobs(rollouts)
        ids_NM, view_of = wanted(tokens, asks)
        return view_of(full.gather(-1, ids_NM)).with_(full_logprobs_NV=full)

    @torch.no_grad()
    def measure(
        self, rollouts: Sequence[Rollout], needs: Needs, top_k: int = 0, at_ids_NM: Tensor | None = None
    ) -> dict[str, Tensor]:
        full = self.full_logprobs(rollouts)
        ids_N = torch.tensor([i for r in rollouts for i in r.response_ids], dtype=torch.int64)
        found = {
            "student_logprobs_N": full.gather(-1, ids_N[:, None]).squeeze(-1),
            "student_entropy_N": torch.special.entr(full.exp()).sum(-1),
        }
        if Needs.STUDENT_TOPK in needs:
            top = full.topk(min(top_k, self.start), -1)
            found |= {"student_topk_ids_NJ": top.indices, "student_topk_logprobs_NJ": top.values}
        if at_ids_NM is not None:
            found["at_NM"] = full.gather(-1, at_ids_NM)
        return found

    @torch.no_grad()
    def reverse_kl(self, rollouts: Sequence[Rollout], teacher: Teacher, as_read: Sequence[Rollout]) -> Tensor:
        assert isinstance(teacher, TabularLM)
        own, other = self.full_logprobs(rollouts), teacher.full_logprobs(as_read)
        return expected_gap(own.exp(), own, other)

    def spare_passes(self, num_passes: int, world: World) -> int:
        return 0  # nothing here is shared

    def idle(self, num_passes: int) -> None:
        pass

    def update(self) -> tuple[float, float]:
        norm = float(torch.nn.utils.clip_grad_norm_([self.logits], self.max_gradient_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, self.optimizer.param_groups[0]["lr"]


def sequence_kl(p: TabularLM, q: TabularLM, max_new_tokens: int) -> Tensor:
    """KL(p || q) between whole responses of at most `max_new_tokens`, averaged over prompts.  Differentiable."""
    log_p, log_q = p.logits.log_softmax(-1), q.logits.log_softmax(-1)
    at_state_PW = expected_gap(log_p.exp(), log_p, log_q)
    return (visits(p, max_new_tokens) * at_state_PW).sum(-1).mean()


def total_variation(p: TabularLM, q: TabularLM, max_new_tokens: int) -> float:
    """Mean total variation of the next-token distributions over the states that p visits."""
    gap_PW = 0.5 * (p.logits.softmax(-1) - q.logits.softmax(-1)).abs().sum(-1)
    weight = visits(p, max_new_tokens)
    return float(((weight * gap_PW).sum() / weight.sum()).detach())


def visits(model: TabularLM, max_new_tokens: int) -> Tensor:
    """[P, V + 1]: expected number of tokens drawn at each state."""
    probability = model.logits.softmax(-1)
    here = torch.zeros_like(probability[..., 0])
    here[:, -1] = 1.0
    total = torch.zeros_like(here)
    for _ in range(max_new_tokens):
        total = total + here
        drawn = (here[..., None] * probability).sum(1)
        alive = torch.cat([torch.zeros_like(drawn[:, :1]), drawn[:, 1:]], -1)  # END is never continued
        here = torch.cat([alive, torch.zeros_like(drawn[:, :1])], -1)
    return total
