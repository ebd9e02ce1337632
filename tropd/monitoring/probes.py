"""What is watched while training: pure functions from evidence to numbers, without gradient.

Token probes run over student-written tokens; x = log pi_T - log pi_S of the written token.  `Sums` holds only sums,
counts, extremes and a histogram, so parts of a batch (micro-batches, ranks, any cut of the rows) add up to the whole.
A probe whose evidence is absent is absent from the result.  NaN is never dropped: it turns the number into NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.monitoring.overlap import support_numbers
from tropd.monitoring.sample import sampled_rows
from tropd.objective.context import World
from tropd.objective.evidence import Tokens, at_least_float32
from tropd.objective.heard import as_heard
from tropd.types import Author, Finish, Rollout, Sampling

MEANS = (
    "trust/share",
    "ratio/mean",
    "ratio/below_-5",
    "ratio/infinite",
    "overlap/top_k",
    "mass/teacher_in_student_top_k",
    "mass/student_in_teacher_top_k",
    "mass/teacher_shared",
    "mass/student_shared",
    "entropy/teacher",
    "entropy/student",
    "entropy/gap",
    "teacher/mean_logprob",
    "mismatch/behavior",
    "staleness/drift",
    "length/mean",
    "finish/truncated",
    "repetition/4gram",
)
LOWS = {"ratio/min": "ratio", "teacher/min_logprob": "teacher"}
HIGHS = {
    "ratio/max": "ratio",
    "teacher/max_logprob": "teacher",
    "mismatch/behavior_max": "mismatch",
    "staleness/drift_max": "drift",
    "length/max": "length",
}
RANGES = ("ratio", "teacher", "mismatch", "drift", "length")
QUANTILES = {"ratio/p01": 0.01, "ratio/p05": 0.05, "ratio/p50": 0.5, "ratio/p95": 0.95, "ratio/p99": 0.99}
HISTOGRAM_LIMIT = 40.0
HISTOGRAM_STEP = 0.01
HISTOGRAM_SIZE = 2 * round(HISTOGRAM_LIMIT / HISTOGRAM_STEP) + 1
NEUTRAL = Sampling()


def mean_names(bins: int) -> tuple[str, ...]:
    """All probes that are a sum over a count, in the order of `Sums.sums_M`."""
    return MEANS + tuple(f"position/{b}/{what}" for b in range(bins) for what in ("ratio", "tv"))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sums:
    """The probes of some rows, before division.  The layout depends on `bins` alone, so ranks can add tensors."""

    bins: int
    sums_M: Tensor
    counts_M: Tensor
    lows_R: Tensor
    """+inf where nothing was seen; ranges are named by `RANGES`."""
    highs_R: Tensor
    histogram_H: Tensor
    """Counts of x rounded to the nearest 0.01 between -40 and 40; what lies outside counts at the end."""

    @classmethod
    def nothing(cls, bins: int = 8) -> Sums:
        num_means = len(mean_names(bins))
        return cls(
            bins=bins,
            sums_M=torch.zeros(num_means, dtype=torch.float64),
            counts_M=torch.zeros(num_means, dtype=torch.float64),
            lows_R=torch.full((len(RANGES),), torch.inf, dtype=torch.float64),
            highs_R=torch.full((len(RANGES),), -torch.inf, dtype=torch.float64),
            histogram_H=torch.zeros(HISTOGRAM_SIZE, dtype=torch.float64),
        )

    def __add__(self, other: Sums) -> Sums:
        assert self.bins == other.bins, f"probes of {self.bins} and of {other.bins} position bins do not add"
        return Sums(
            bins=self.bins,
            sums_M=self.sums_M + other.sums_M,
            counts_M=self.counts_M + other.counts_M,
            lows_R=torch.minimum(self.lows_R, other.lows_R),
            highs_R=torch.maximum(self.highs_R, other.highs_R),
            histogram_H=self.histogram_H + other.histogram_H,
        )

    def gather(self, world: World) -> Sums:
        """The sums of all ranks; every rank must call it."""
        parts = (self.sums_M, self.counts_M, self.lows_R, self.highs_R, self.histogram_H)
        rows = world.gather(torch.cat(parts)[None]).to("cpu", torch.float64)
        total = Sums.nothing(self.bins)
        for row in rows:
            sums_M, counts_M, lows_R, highs_R, histogram_H = row.split([len(part) for part in parts])
            total = total + Sums(
                bins=self.bins,
                sums_M=sums_M,
                counts_M=counts_M,
                lows_R=lows_R,
                highs_R=highs_R,
                histogram_H=histogram_H,
            )
        return total

    def result(self) -> dict[str, float]:
        """Every probe that has evidence, by name."""
        result = {}
        sums_counts = zip(mean_names(self.bins), self.sums_M.tolist(), self.counts_M.tolist(), strict=True)
        for name, total, number in sums_counts:
            if number > 0:
                result[name] = total / number
        if "trust/share" in result:
            result["trust/tv"] = 1.0 - result["trust/share"]
        for names, extremes_R in ((LOWS, self.lows_R), (HIGHS, self.highs_R)):
            for name, what in names.items():
                extreme = float(extremes_R[RANGES.index(what)])
                if abs(extreme) != float("inf"):
                    result[name] = extreme
        if float(self.histogram_H.sum()) > 0:
            result |= {name: self._quantile(q) for name, q in QUANTILES.items()}
        return result

    def _quantile(self, q: float) -> float:
        """The smallest multiple of 0.01 that at least a share q of the tokens does not exceed."""
        cumulated_H = self.histogram_H.cumsum(0)
        bin_ = int(torch.searchsorted(cumulated_H, q * cumulated_H[-1] - 1e-9))
        return (bin_ - HISTOGRAM_SIZE // 2) / round(1.0 / HISTOGRAM_STEP)


@torch.no_grad()
def probe_batch(
    tokens: Tokens,
    rollouts: Sequence[Rollout],
    *,
    bins: int = 8,
    topk_logprobs_NK: Tensor | None = None,
    own_topk_ids_NJ: Tensor | None = None,
    sampled: bool = False,
    sampling: Sampling | None = NEUTRAL,
    stale: bool = False,
) -> Sums:
    """The probes of these rows and these whole rollouts, which need not belong together.  What is said of the teacher
    leaves out responses that it did not read.

    `topk_logprobs_NK` is the student at `tokens.teacher_topk_ids_NK`; `own_topk_ids_NJ` are the student's likeliest
    tokens where `tokens` lack them, -1 in rows that were not looked at; `sampling` is how the rollouts were drawn,
    None if not from the student alone; `sampled` says that the top-k is there for a sample of the tokens
    (`tropd.monitoring.sample`) and those of need.

        trust/share      mean min(exp x, 1)            trust/tv   1 - trust/share, which estimates TV(pi_T, pi_S)
        ratio/mean       mean x, min, max: of finite x; ratio/infinite: the share of others (teacher probability 0)
        ratio/pQQ        quantiles of x on a grid of 0.01 clamped to [-40, 40]; ratio/below_-5: share of x < -5
        position/b/*     mean x and 1 - mean min(exp x, 1) in part b of the answer: b = floor(bins * position / length)
        overlap/top_k    mean |K_S and K_T| / k, k the smaller of the two widths
        mass/teacher_in_student_top_k  mean sum_j pi_T(j), j in K_S;  mass/student_in_teacher_top_k  the reverse
        mass/teacher_shared            mean sum_j pi_T(j), j in K_S and K_T;  mass/student_shared  the same of pi_S
        entropy/*        mean H_T, mean H_S, gap = mean |H_S - H_T|
        teacher/*        mean, min, max of log pi_T (finite ones)
        mismatch/*       mean and max |log behavior - log pi_S| (finite ones), where sampling is neutral
        staleness/drift  the same where `stale`: an older student wrote the rollouts, and has moved since
        length/*, finish/truncated, repetition/4gram   per rollout: see `_probe_rollouts`
    """
    sums = _Collector(bins)
    student_N = tokens.authors_N == Author.STUDENT
    heard_N = as_heard(tokens, [tokens.reader]).authors_N == Author.STUDENT
    _probe_ratio(sums, tokens, heard_N)
    shown_N = heard_N & sampled_rows(tokens) if sampled else heard_N
    for name, values_N in support_numbers(tokens, heard_N, shown_N, topk_logprobs_NK, own_topk_ids_NJ).items():
        sums.add(name, values_N)
    _probe_entropy(sums, tokens, student_N, heard_N)
    if sampling is not None and not sampling.truncates and sampling.temperature == 1.0:
        behavior_N = _pick(tokens.peek("behavior_logprobs_N"), student_N)
        student_logprobs_N = _pick(tokens.peek("student_logprobs_N"), student_N)
        if behavior_N is not None and student_logprobs_N is not None:
            gap_N = (behavior_N - student_logprobs_N).abs()
            sums.add("staleness/drift" if stale else "mismatch/behavior", gap_N)
            sums.stretch("drift" if stale else "mismatch", gap_N)
    _probe_rollouts(sums, rollouts)
    return sums.sums


class _Collector:
    """Sums under construction."""

    def __init__(self, bins: int) -> None:
        self.sums = Sums.nothing(bins)
        self._index = {name: i for i, name in enumerate(mean_names(bins))}

    def add(self, name: str, values_N: Tensor) -> None:
        """Infinite values are left out of the mean, and out of its count."""
        values_N = values_N[~torch.isinf(values_N)]
        self.sums.sums_M[self._index[name]] += values_N.sum()
        self.sums.counts_M[self._index[name]] += len(values_N)

    def stretch(self, name: str, values_N: Tensor) -> None:
        values_N = values_N[~torch.isinf(values_N)]
        if len(values_N):
            r = RANGES.index(name)
            self.sums.lows_R[r] = torch.minimum(self.sums.lows_R[r], values_N.min())
            self.sums.highs_R[r] = torch.maximum(self.sums.highs_R[r], values_N.max())


def _pick(x: Tensor | None, where_N: Tensor) -> Tensor | None:
    """Sums are float64 on the CPU: some devices have no float64, and float32 sums depend on the cut."""
    return None if x is None else at_least_float32(x.detach()[where_N]).cpu().double()


def _probe_ratio(sums: _Collector, tokens: Tokens, student_N: Tensor) -> None:
    teacher_N = _pick(tokens.peek("teacher_logprobs_N"), student_N)
    if teacher_N is None:
        return
    sums.add("teacher/mean_logprob", teacher_N)
    sums.stretch("teacher", teacher_N)
    student_logprobs_N = _pick(tokens.peek("student_logprobs_N"), student_N)
    if student_logprobs_N is None:
        return
    x_N = teacher_N - student_logprobs_N
    trust_N = x_N.clamp(max=0.0).exp()
    sums.add("trust/share", trust_N)
    sums.add("ratio/mean", x_N)
    sums.add("ratio/below_-5", (x_N < -5.0).double())
    sums.add("ratio/infinite", torch.isinf(x_N).double())
    sums.stretch("ratio", x_N)
    grid_N = (x_N[~x_N.isnan()].clamp(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT) / HISTOGRAM_STEP).round().long()
    sums.sums.histogram_H.add_(torch.bincount(grid_N + HISTOGRAM_SIZE // 2, minlength=HISTOGRAM_SIZE))

    length_N = tokens.num_actions_S[tokens.sequences_N][student_N].clamp_min(1).cpu()
    bins = sums.sums.bins
    bin_N = (tokens.positions_N[student_N].cpu() * bins // length_N).clamp(max=bins - 1)
    for b in range(bins):
        sums.add(f"position/{b}/ratio", x_N[bin_N == b])
        sums.add(f"position/{b}/tv", 1.0 - trust_N[bin_N == b])


def _probe_entropy(sums: _Collector, tokens: Tokens, student_N: Tensor, heard_N: Tensor) -> None:
    teacher_N = _pick(tokens.peek("teacher_entropy_N"), heard_N)
    own_N = _pick(tokens.peek("student_entropy_N"), student_N)
    if teacher_N is not None:
        sums.add("entropy/teacher", teacher_N)
    if own_N is not None:
        sums.add("entropy/student", own_N)
    if teacher_N is not None and own_N is not None:
        sums.add("entropy/gap", (own_N[heard_N[student_N].cpu()] - teacher_N).abs())


def _probe_rollouts(sums: _Collector, rollouts: Sequence[Rollout]) -> None:
    """length/mean, length/max: response tokens; finish/truncated: share that hit the limit; repetition/4gram."""
    if not rollouts:
        return
    responses = [rollout.response_ids for rollout in rollouts]
    length_S = torch.tensor([len(ids) for ids in responses], dtype=torch.float64)
    sums.add("length/mean", length_S)
    sums.stretch("length", length_S)
    truncated = [float(rollout.finish == Finish.LENGTH) for rollout in rollouts]
    sums.add("finish/truncated", torch.tensor(truncated, dtype=torch.float64))
    repeated = [repeated_share(ids) for ids in responses if len(ids) >= 4]
    sums.add("repetition/4gram", torch.tensor(repeated, dtype=torch.float64))


def repeated_share(token_ids: Sequence[int], width: int = 4) -> float:
    """1 - (distinct n-grams) / (n-grams) of one response; 0 where it is shorter than one n-gram."""
    num_grams = len(token_ids) - width + 1
    if num_grams < 1:
        return 0.0
    return 1.0 - len(set(zip(*(token_ids[i:] for i in range(width)), strict=False))) / num_grams
