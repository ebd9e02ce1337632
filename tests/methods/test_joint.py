"""What the joint policies promise: TRB's budget, KAT's rule."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tropd.errors import ConfigError, OutOfRange
from tropd.methods import KAT, OPD, SKD, TRB
from tropd.methods.agreement_stop import AgreementStop, Watch
from tropd.methods.joint import Blended, Interleaved, MixedSampling, divergence, geometric, largest_beta
from tropd.methods.kat import KATMask
from tropd.methods.policies import Done, Mixture, TeacherPrefix
from tropd.methods.stacked import POLICIES, stacked
from tropd.objective.context import Alone, Context
from tropd.objective.examples import some_tokens
from tropd.objective.memory import Memory
from tropd.objective.schedules import Schedule
from tropd.objective.trap import BeforeTrap, Trap, lowest, smoothed
from tropd.types import Author, Prompt, Rollout


def two(rows: int = 64, vocab: int = 50, seed: int = 0, sharp: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    p, q = (sharp * torch.randn(rows, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    return p.log_softmax(-1), q.log_softmax(-1)


@pytest.mark.parametrize("epsilon", [0.001, 0.01, 0.05, 1.0])
def test_the_mixture_of_trb_uses_up_its_budget_exactly(epsilon: float) -> None:
    p, q = two()
    beta = largest_beta(p, q, epsilon)
    assert bool(((beta > 0) & (beta < 1)).all())
    spent = divergence(geometric(p, q, beta), p)
    assert spent == pytest.approx(torch.full_like(spent, epsilon), rel=1e-4)
    single = largest_beta(p.float(), q.float(), epsilon)  # as it is drawn in a run
    assert divergence(geometric(p, q, single.double()), p) == pytest.approx(torch.full_like(spent, epsilon), rel=5e-3)


def test_the_mixture_of_trb_grows_with_its_budget_from_the_student_to_the_teacher() -> None:
    p, q = two()
    betas = [largest_beta(p, q, epsilon) for epsilon in (1e-9, 1e-3, 1e-2, 0.1, 1.0, 1e9)]
    assert all(bool((a < b).all()) for a, b in itertools.pairwise(betas[:-1]))
    assert bool((betas[-1] == 1).all())
    assert geometric(p, q, betas[-1]) == pytest.approx(q, abs=1e-12)
    assert torch.equal(geometric(p, q, torch.zeros(len(p))), p)
    spent = [divergence(geometric(p, q, torch.full((len(p),), b, dtype=p.dtype)), p) for b in (0.1, 0.4, 0.7, 1.0)]
    assert all(bool((a < b).all()) for a, b in itertools.pairwise(spent))
    assert largest_beta(p, p, 0.001).tolist() == [1.0] * len(p), "between equals nothing is spent"


def test_epsilon_fades_to_the_student_alone() -> None:
    policy = TRB().rollout
    steps = [policy.decoding(step / 400, Memory()) for step in (0, 24, 25, 399)]
    assert [getattr(x, "epsilon", 0.0) for x in steps] == pytest.approx([0.01, 0.0004, 0.0, 0.0]) and steps[2] is None
    with pytest.raises(ConfigError, match="a divergence is never negative"):
        Blended(epsilon=Schedule(shape="linear", start=0.1, end=-0.1))
    with pytest.raises(OutOfRange):
        MixedSampling(alpha=1.5)


def test_tokens_that_the_teacher_wrote_over_are_learned_from() -> None:
    (term,) = SKD(divergence="jsd").objective.terms
    weights = term.where(some_tokens(authors_N=[Author.STUDENT, Author.TEACHER, Author.CONTEXT]), Context())
    assert weights.tolist() == [1.0, 1.0, 0.0]


def test_two_policies_that_both_draw_are_refused() -> None:
    with pytest.raises(ConfigError, match="both say how tokens are drawn"):
        stacked([Interleaved(), AgreementStop()])
    assert stacked([TeacherPrefix(), AgreementStop()]).writes_jointly
    assert (
        not any(POLICIES[name]().writes_jointly for name in ("on_policy", "mixture"))
        and Mixture().decoding(0.0, Memory()) is None
    )


RULE = Trap(window=4, streak=3, eta=0.3, exempt=0, capacity=10, entries=2, steps=2)


def test_a_response_is_cut_at_the_first_of_several_low_windows() -> None:
    trace = torch.cat([torch.ones(10), torch.zeros(10), torch.ones(5)])
    means = smoothed(trace, 4)
    first = int((means < 0.3).nonzero()[0]) + 3  # the token at which the first low window ends
    assert RULE.cut(trace, 0.3) == first == 12
    assert RULE.cut(torch.ones(30), 0.3) is None and RULE.cut(torch.zeros(3), 0.3) is None
    short = torch.cat([torch.ones(10), torch.zeros(3), torch.ones(10)])  # two low windows
    assert RULE.cut(short, 0.3) is None
    assert Trap(window=1, streak=1, exempt=0).cut(torch.zeros(5), 0.3) == 1, "a response keeps a token"


def test_the_beginning_is_exempt() -> None:
    trace = torch.zeros(40)
    for exempt in (0, 3, 4, 17):
        rule = Trap(window=4, streak=3, exempt=exempt)
        assert rule.cut(trace, 0.3) == max(exempt, 3)


def test_a_text_that_is_asked_after_each_token_is_cut_where_the_whole_one_is() -> None:
    for seed in range(40):
        trace = torch.rand(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for rule, threshold in ((RULE, 0.3), (Trap(window=1, streak=2, exempt=5), 0.1)):
            watch = Watch(trap=rule, threshold=threshold)
            asked = (watch.ends(trace[:length].tolist()) for length in range(1, 61))
            assert next((length for length in asked if length is not None), None) == rule.cut(trace, threshold)
    assert Watch(trap=RULE, threshold=None).ends([0.0] * 50) is None


def test_nothing_is_cut_before_there_are_enough_entries_and_steps() -> None:
    queue = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    assert RULE.threshold(None, 9) is RULE.threshold(queue[:1], 9) is RULE.threshold(queue, 1) is None
    assert RULE.threshold(queue, 2) == pytest.approx(float(queue.double().quantile(0.7)))


def rollout_of(number: int, trace: Tensor) -> Rollout:
    prompt = Prompt(id=f"p{number}", token_ids=(1,))
    ids, authors = (1,) + (2,) * len(trace), (Author.CONTEXT,) + (Author.STUDENT,) * len(trace)
    return Rollout(
        id=f"0/p{number}/0",
        prompt=prompt,
        token_ids=ids,
        authors=authors,
        behavior_logprobs=(0.0,) * len(ids),
        trace=tuple(trace.tolist()),
    )


def done_of(rollouts: list[Rollout], step: int = 0, world=None) -> Done:
    return Done(step=step, progress=0.5, rollouts=rollouts, probes={}, max_new_tokens=99, world=world or Alone())


def test_the_queue_holds_the_lowest_means_of_the_last_responses_whatever_their_order() -> None:
    g = torch.Generator().manual_seed(0)
    traces = [torch.rand(20, generator=g, dtype=torch.float64) for _ in range(14)] + [torch.rand(2, generator=g)]
    rollouts = [rollout_of(i, trace) for i, trace in enumerate(traces)]
    policy, memory, other = AgreementStop(trap=RULE), Memory(), Memory()
    for start in (0, 7):
        policy.remember(done_of(rollouts[start : start + 8]), memory)
        policy.remember(done_of(rollouts[start : start + 8][::-1]), other)
    queue = memory["policy.AgreementStop/queue"]
    assert torch.equal(queue, other["policy.AgreementStop/queue"])
    assert len(queue) == RULE.capacity and memory.number("policy.AgreementStop/steps", 0) == 2
    last = {float(smoothed(trace, 4).min()) for trace in traces[7:14]}
    assert last <= set(queue.tolist()), "the response of two tokens has no window"
    policy.remember(done_of([]), memory)
    assert torch.equal(memory["policy.AgreementStop/queue"], queue)


class Half:
    """One of two ranks: it keeps what it sends, and is told what the other one sends."""

    size = 2

    def __init__(self, rank: int, told: list[Tensor] | None = None) -> None:
        self.rank, self.told, self.sent = rank, told, list[Tensor]()

    def gather(self, x: Tensor) -> Tensor:
        self.sent.append(x)
        other = x[:0] if self.told is None else self.told[len(self.sent) - 1]
        return torch.cat([x, other] if self.rank == 0 else [other, x])


def test_ranks_remember_what_one_process_does() -> None:
    g = torch.Generator().manual_seed(0)
    rollouts = [rollout_of(i, torch.rand(20, generator=g, dtype=torch.float64)) for i in range(6)]
    policy, whole, halves = AgreementStop(trap=RULE), Memory(), (rollouts[::2], rollouts[1::2])
    policy.remember(done_of(rollouts), whole)
    alone = [Half(rank) for rank in (0, 1)]
    for world, half in zip(alone, halves, strict=True):
        policy.remember(done_of(half, world=world), Memory())
    for rank in (0, 1):
        memory = Memory()
        policy.remember(done_of(halves[rank], world=Half(rank, alone[1 - rank].sent)), memory)
        assert torch.equal(memory["policy.AgreementStop/queue"], whole["policy.AgreementStop/queue"])


def test_the_mask_and_the_stop_keep_the_same_tokens_and_remember_the_same() -> None:
    g = torch.Generator().manual_seed(1)
    lengths = [30, 3, 25, 40]
    traces = [torch.rand(n, generator=g, dtype=torch.float64) for n in lengths]
    masked, stopped = Memory(), Memory()
    rule = replace(RULE, streak=1)
    piece, policy = BeforeTrap(rule), AgreementStop(trap=rule)
    order = [(s, t) for s in (2, 0, 3, 1) for t in range(lengths[s])]
    tokens = some_tokens(
        reverse_kl_N=[float(traces[s][t]) for s, t in order],
        sequences_N=[s for s, _ in order],
        positions_N=[t for _, t in order],
        keys_S=[5, 3, 9, 1],
    )
    for step in range(3):
        context = Context(memory=masked)
        weights = piece(tokens, context)
        decoding = policy.decoding(0.0, stopped)
        for s, trace in enumerate(traces):
            asked = (decoding.ends(trace[:n].tolist()) for n in range(1, lengths[s] + 1))  # type: ignore[union-attr]
            kept = next((n for n in asked if n is not None), lengths[s])
            mine = [float(w) for w, (of, _) in zip(weights, order, strict=True) if of == s]
            assert mine == [1.0] * kept + [0.0] * (lengths[s] - kept)
        assert (float(weights.min()) == 0.0) == (step == 2)
        masked.update({f"trap/{name}": x for name, x in piece.remember(tokens, context).items()})
        policy.remember(done_of([rollout_of(i, trace.float()) for i, trace in enumerate(traces)]), stopped)
        assert sorted(masked["trap/queue"].tolist()) == pytest.approx(
            sorted(stopped["policy.AgreementStop/queue"].tolist()), abs=1e-6
        )


def test_what_the_teacher_did_not_read_is_neither_masked_nor_remembered() -> None:
    rule = Trap(window=1, streak=1, exempt=0, entries=1, steps=0)
    memory = Memory({"trap/queue": torch.tensor([0.5], dtype=torch.float64)})
    tokens = some_tokens(
        reverse_kl_N=[0.0] * 6,
        sequences_N=[0, 0, 0, 1, 1, 1],
        positions_N=[0, 1, 2] * 2,
        keys_S=[0, 1],
        read_S=[True, False],
    )
    assert BeforeTrap(rule)(tokens, Context(memory=memory)).tolist() == [1, 0, 0, 1, 1, 1]
    kept = BeforeTrap(rule).remember(tokens, Context(memory=memory))
    assert kept["queue"].tolist() == [0.5, 0.0] and int(kept["steps"]) == 1


def test_half_of_all_responses_are_cut_where_nothing_is_wrong() -> None:
    """The threshold lies above the lowest mean of 70 % of the responses: KAT shortens them whatever they are."""
    g = torch.Generator().manual_seed(0)
    rule, queue, share = Trap(), None, []
    for step in range(12):
        noise = torch.empty(96, 1200, dtype=torch.float64).exponential_(generator=g) * 0.3
        traces = torch.nn.functional.avg_pool1d(noise[:, None], 16, 1)[:, 0]  # tokens near each other are alike
        threshold = rule.threshold(queue, 50)
        if threshold is not None:
            share.append(sum(rule.cut(trace, threshold) is not None for trace in traces) / len(traces))
        means = torch.stack([lowest(trace, rule.window) for trace in traces])  # type: ignore[arg-type]
        queue = rule.pushed(queue, torch.arange(96) + 96 * step, means)
    assert 0.4 < sum(share) / len(share) < 0.75


def test_kat_is_opd_up_to_the_cut() -> None:
    online, mask = KAT(mode="online"), KAT()
    assert online.objective == OPD().objective and online.rollout.writes_jointly
    assert mask.objective != OPD().objective and not mask.rollout.writes_jointly
    extra = OPD(plus=(KATMask(),)).objective
    tokens = some_tokens(
        reverse_kl_N=[0.5] * 3,
        student_logprobs_N=[-1.0] * 3,
        teacher_logprobs_N=[-2.0] * 3,
        behavior_logprobs_N=[-1.0] * 3,
    )
    plans = [objective.plan(tokens).weights["reverse_kl"] for objective in (extra, mask.objective)]
    assert torch.equal(*plans) and math.isclose(float(plans[0].sum()), 1.0, rel_tol=1e-6)
