"""Where student and teacher agree for so long that nothing is left to learn: KAT's rule, for writing and for masks.

    z_t  mean of the divergences of the last `window` tokens
    m    the lowest z_t of a response; a queue keeps those of the last responses
    s    the quantile 1 - eta of the queue
    cut  where `streak` windows in a row lie below s, at the first of them

Everything here is a function of plain tensors, in float64.  Axes: T tokens of one response, Q entries of the queue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropd.base.ranges import Between, Count, Ranged, Whole
from tropd.objective.context import Context
from tropd.objective.evidence import Tokens
from tropd.objective.measures import ReverseKLAt
from tropd.objective.selectors import as_weight
from tropd.objective.terms import Measure, Selector
from tropd.types import Author


@dataclass(frozen=True, kw_only=True)
class Trap(Ranged):
    """When a response counts as lost in agreement.

    >>> rule = Trap(window=2, streak=2, exempt=0)
    >>> trace = torch.tensor([3.0, 1.0, 1.0, 0.2, 0.0, 0.0, 0.0])
    >>> smoothed(trace, 2)
    tensor([2.0000, 1.0000, 0.6000, 0.1000, 0.0000, 0.0000], dtype=torch.float64)
    >>> rule.cut(trace, 0.5)  # the windows that end at tokens 4 and 5 lie below 0.5: four tokens are kept
    4
    """

    window: Count = 64
    """Tokens that a mean is taken over (paper: 64). At least 1."""
    streak: Count = 4
    """Windows in a row below the threshold (paper: 4). At least 1."""
    eta: Between = 0.3
    """The threshold is the quantile 1 - eta of the lowest means of earlier responses (paper's appendix: 0.3; an example
    in its text: 0.1). In (0, 1)."""
    exempt: Whole = 128
    """Tokens at the beginning that are never cut off [inferred; the paper has such a zone]. At least 0."""
    capacity: Count = 4096
    """How many lowest means are remembered, the last ones (paper: 4096). At least 1."""
    entries: Count = 512
    """Before there are so many, nothing is cut (paper: 512). At least 1."""
    steps: Whole = 50
    """Steps before anything is cut (paper: 50). At least 0."""

    def threshold(self, queue_Q: Tensor | None, steps: int) -> float | None:
        """Below which a mean is low, after so many steps; None while nothing is cut."""
        if queue_Q is None or len(queue_Q) < self.entries or steps < self.steps:
            return None
        return float(queue_Q.double().quantile(1.0 - self.eta))

    def cut(self, trace_T: Tensor, threshold: float) -> int | None:
        """How many tokens are kept; None: all."""
        low = (smoothed(trace_T, self.window) < threshold).long()
        if len(low) < self.streak:
            return None
        starts = (low.unfold(0, self.streak, 1).sum(-1) == self.streak).nonzero().flatten() + self.window - 1
        starts = starts[starts >= max(self.exempt, 1)]  # a response keeps a token at least
        return int(starts[0]) if len(starts) else None

    def cut_now(self, trace: Sequence[float], threshold: float) -> int | None:
        """The same of a text that is being written and was asked after each token: only its end can be new."""
        tail = trace[-(self.window + self.streak - 1) :]
        before = len(trace) - len(tail)
        if before + self.window - 1 < max(self.exempt, 1):
            return None
        low = smoothed(torch.tensor(tail, dtype=torch.float64), self.window) < threshold
        return before + self.window - 1 if len(low) == self.streak and bool(low.all()) else None

    def pushed(self, queue_Q: Tensor | None, keys: Tensor, lowest: Tensor) -> Tensor:
        """The queue with the lowest means of one more step.  They enter by the keys of their responses, so that neither
        ranks nor orders make a difference."""
        entering = lowest.double().cpu()[torch.argsort(keys.cpu(), stable=True)]
        return (entering if queue_Q is None else torch.cat([queue_Q, entering]))[-self.capacity :]


def smoothed(trace_T: Tensor, window: int) -> Tensor:
    """The means of the last `window` numbers, from the first whole window on."""
    if len(trace_T) < window:
        return trace_T.new_zeros(0, dtype=torch.float64)
    return trace_T.double().unfold(0, window, 1).mean(-1)


def lowest(trace_T: Tensor, window: int) -> Tensor | None:
    """The lowest mean of a response; None if it is shorter than a window."""
    means = smoothed(trace_T, window)
    return means.min() if len(means) else None


@dataclass(frozen=True)
class BeforeTrap(Selector):
    """1 before the place where a response is lost in agreement (`Trap`), 0 from there on; it looks at what the student
    wrote, and remembers the lowest means of earlier steps.

    >>> rule = Trap(window=1, streak=2, exempt=0, entries=1, steps=0)
    >>> context = Context(memory=Memory({"trap/queue": torch.tensor([0.5]), "trap/steps": torch.tensor(1)}))
    >>> BeforeTrap(rule)(some_tokens(reverse_kl_N=[2.0, 1.0, 0.1, 0.1]), context)
    tensor([1., 1., 0., 0.])
    """

    rule: Trap = field(default_factory=Trap)
    divergence: Measure = field(default_factory=ReverseKLAt)
    memory = "trap"

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        kept_N = torch.ones_like(tokens.token_ids_N, dtype=torch.bool)
        divergence_N = self.divergence(tokens, context)
        threshold = self.rule.threshold(*self._remembered(context))
        if threshold is not None:
            for _, rows_T in _responses(tokens):
                length = self.rule.cut(divergence_N[rows_T], threshold)
                if length is not None:
                    kept_N[rows_T[length:]] = False
        return as_weight(kept_N, tokens.token_ids_N)

    def remember(self, tokens: Tokens, context: Context) -> Mapping[str, Tensor]:
        queue_Q, steps = self._remembered(context)
        divergence_N = self.divergence(tokens, context)
        found = {s: lowest(divergence_N[rows_T], self.rule.window) for s, rows_T in _responses(tokens)}
        means = {s: mean for s, mean in found.items() if mean is not None}
        keys = tokens.keys_S[torch.tensor(list(means), dtype=torch.long, device=tokens.keys_S.device)]
        here = torch.tensor([float(mean) for mean in means.values()], dtype=torch.float64, device=keys.device)
        gather = context.world.gather
        return {"queue": self.rule.pushed(queue_Q, gather(keys), gather(here)), "steps": torch.tensor(steps + 1)}

    def _remembered(self, context: Context) -> tuple[Tensor | None, int]:
        return context.memory.get(f"{self.memory}/queue"), int(context.memory.number(f"{self.memory}/steps", 0))


def _responses(tokens: Tokens) -> Iterator[tuple[int, Tensor]]:
    """The student's tokens of each sequence that was read, in order: the number of the sequence, and their rows."""
    rows_N = (tokens.authors_N == Author.STUDENT).nonzero().flatten()
    rows_N = rows_N[torch.argsort(tokens.positions_N[rows_N], stable=True)]
    rows_N = rows_N[torch.argsort(tokens.sequences_N[rows_N], stable=True)]
    counts = torch.bincount(tokens.sequences_N[rows_N], minlength=len(tokens.keys_S)).tolist()
    read_S = tokens.peek("read_S")
    for s, rows_T in enumerate(rows_N.split(counts)):
        if len(rows_T) and (read_S is None or bool(read_S[s])):
            yield s, rows_T
