"""The plan of a batch, made before any backward pass: the weight and the reward of every token in every term.

The plan is made once per batch from evidence without gradient.  It holds, for every term and token, the finished
weight c_k(u) w_k[n] / N_k and the reward; denominators and batch-wide selections are global over ranks.  What remains
is a sum of independent rows, so micro-batches, ranks and tiles simply add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tropd.errors import EvidenceError
from tropd.objective.checks import check_tokens
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, Tokens, trained
from tropd.objective.heard import as_heard
from tropd.objective.terms import Both, Over, Selector, Term
from tropd.types import Author


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Global denominators: over all micro-batches and ranks."""

    actions: int
    student: int
    teacher: int
    sequences: int
    """Sequences with at least one token that can be trained on."""
    apart: Mapping[str, Counts] = field(default_factory=dict)
    """By its name, what a term counts of whose readers one did not read everything."""

    def of(self, term: Term) -> Counts:
        return self.apart.get(term.name, self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Weights and rewards of every term for the rows of one batch."""

    weights: dict[str, Tensor]
    rewards: dict[str, Tensor]
    counts: Counts
    progress: float

    def rows(self, index: Tensor | slice) -> Plan:
        return Plan(
            weights={name: x[index] for name, x in self.weights.items()},
            rewards={name: x[index] for name, x in self.rewards.items()},
            counts=self.counts,
            progress=self.progress,
        )


def count(tokens: Tokens, context: Context, terms: Sequence[Term] = ()) -> Counts:
    """Denominators that depend only on who wrote what and who read it."""
    heard = {term.name: as_heard(tokens, term.readers) for term in terms}
    apart = [name for name, seen in heard.items() if seen is not tokens]  # the same on every rank
    counted = torch.stack([_counted(seen) for seen in (tokens, *(heard[name] for name in apart))])
    whole, *parts = context.world.gather(counted[None]).sum(0).tolist()
    return replace(_named(whole), apart={name: _named(part) for name, part in zip(apart, parts, strict=True)})


def _counted(tokens: Tokens) -> Tensor:
    authors_N = tokens.authors_N
    student, teacher = (authors_N == Author.STUDENT).sum(), (authors_N == Author.TEACHER).sum()
    return torch.stack([student, teacher, (tokens.num_actions_S > 0).sum().to(authors_N.device)])


def _named(counted: Sequence[int]) -> Counts:
    student, teacher, sequences = counted
    return Counts(actions=student + teacher, student=student, teacher=teacher, sequences=sequences)


def make_plan(terms: Sequence[Term], tokens: Tokens, context: Context, counts: Counts | None = None) -> Plan:
    """Weights and rewards of the terms for all rows of `tokens`.

    `counts` lets rows be planned piece by piece when every term reaches no further than the token.
    """
    check_tokens(tokens)
    counts = counts or count(tokens, context, terms)
    weights: dict[str, Tensor] = {}
    rewards: dict[str, Tensor] = {}
    for term in terms:
        try:
            heard = as_heard(tokens, term.readers)
            weights[term.name] = _weigh(term, heard, context, counts.of(term))
            if term.loss.reward is not None:
                rewards[term.name] = _judge(term, heard, context, weights[term.name])
        except EvidenceError as error:
            raise EvidenceError(f"term {term.name!r}: {error}") from error
    return Plan(weights=weights, rewards=rewards, counts=counts, progress=context.progress)


def live_rows(terms: Sequence[Term], tokens: Tokens, context: Context, plan: Plan | None = None) -> Tensor:
    """Rows that some term may weigh: what a forward pass must read.  Without a plan, as far as can be known before."""
    live_N = torch.zeros_like(tokens.authors_N, dtype=torch.bool)
    for term in terms:
        if plan is not None:
            live_N |= plan.weights[term.name] != 0
        else:
            heard = as_heard(tokens, term.readers)
            live_N |= (_bound(term.where, heard, context) > 0) & trained(heard)
    return live_N & trained(tokens)


def _bound(where: Selector, tokens: Tokens, context: Context) -> Tensor:
    """The part of a selector that needs no evidence, such as who wrote a token or where it stands."""
    if isinstance(where, Both):
        return _bound(where.first, tokens, context) * _bound(where.second, tokens, context)
    if where.needs == Needs.NOTHING and where.reach == Reach.TOKEN:
        return where(tokens, context)
    return torch.ones(len(tokens), device=tokens.token_ids_N.device)


def _weigh(term: Term, tokens: Tokens, context: Context, counts: Counts) -> Tensor:
    actions_N = trained(tokens)
    weight_N = term.where(tokens, context).to(tokens.dtype) * actions_N
    if not bool(torch.isfinite(weight_N).all()) or bool((weight_N < 0).any()):
        raise EvidenceError("its selector gave a weight that is negative or not finite. " + _where(weight_N, tokens))
    scale = term.coefficient(context.progress)
    if term.over == "sequences":
        length_N = tokens.num_actions_S[tokens.sequences_N].clamp_min(1)
        return scale * weight_N / length_N / max(counts.sequences, 1)
    return scale * weight_N / _denominator(term.over, weight_N, context, counts)


def _denominator(over: Over, weight_N: Tensor, context: Context, counts: Counts) -> float:
    """A count of zero divides nothing: all weights are zero then."""
    if over == "members":
        total = float(context.world.gather(weight_N.sum().double()[None]).sum())
        return total if total > 0 else 1.0
    return float(max(getattr(counts, over), 1))


def _judge(term: Term, tokens: Tokens, context: Context, weight_N: Tensor) -> Tensor:
    assert term.loss.reward is not None
    reward_N = term.loss.reward(torch.zeros_like(weight_N), tokens.of(term.loss.reader), context)
    bad_N = (weight_N != 0) & ~torch.isfinite(reward_N)
    if bool(bad_N.any()):
        raise EvidenceError(
            f"its reward is not finite at {int(bad_N.sum())} of {int((weight_N != 0).sum())} tokens. "
            + _where(torch.where(bad_N, reward_N, torch.zeros_like(reward_N)), tokens)
            + " A teacher that gives a written token no probability at all breaks an unbounded log-ratio: "
            "use method 'tropd', 'clip_outlier' or 'topd', which bound it."
        )
    return torch.where(weight_N != 0, reward_N, torch.zeros_like(reward_N))


def _where(x_N: Tensor, tokens: Tokens) -> str:
    bad = (~torch.isfinite(x_N) | (x_N < 0)).nonzero().flatten()
    n = int(bad[0])
    return f"First: {float(x_N[n])} at sequence {int(tokens.sequences_N[n])}, position {int(tokens.positions_N[n])}."
