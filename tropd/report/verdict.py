"""The verdict on a run in sentences: better or not, how sure that is, and which problems and alarms limit it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tropd.evaluation.statistics import Difference, paired_difference
from tropd.monitoring.scores import PromptScores
from tropd.report.history import History

Tone = Literal["better", "worse", "same", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A number with its 95 % interval, where one was recorded."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.bounds else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    tone: Tone
    headline: str
    sentences: tuple[str, ...]


def metric_of(history: History) -> str | None:
    """The score that the verdict is about: avg@n, else greedy."""
    numbers = history.evaluations[max(history.evaluations)] if history.evaluations else {}
    sampled = [name for name in numbers if name.startswith("avg@") and "/" not in name]
    return sampled[0] if sampled else ("greedy" if "greedy" in numbers else None)


def score_at(history: History, step: int, metric: str | None) -> Score | None:
    numbers = history.evaluations.get(step, {})
    value = numbers.get(metric) if metric else None
    if metric is None or value is None or not math.isfinite(value):
        return None
    return Score(metric=metric, value=value, low=numbers.get(f"{metric}/low"), high=numbers.get(f"{metric}/high"))


def last_score(history: History) -> Score | None:
    return score_at(history, max(history.evaluations), metric_of(history)) if history.evaluations else None


def difference(
    after: dict[str, PromptScores] | None, before: dict[str, PromptScores] | None, metric: str | None
) -> Difference | None:
    """after - before over the prompts that both have; None where scores of single prompts were not kept."""
    pairs = []
    for prompt, scores in (after or {}).items():
        other = (before or {}).get(prompt)
        if other is None:
            continue
        x, y = (scores.greedy, other.greedy) if metric == "greedy" else (scores.mean, other.mean)
        if x is not None and y is not None:
            pairs.append((x, y))
    return _paired(tuple(pairs)) if len(pairs) > 1 else None


@lru_cache(maxsize=1024)
def _paired(pairs: tuple[tuple[float, float], ...]) -> Difference:
    """Resampling is slow, and a live page asks the same again and again."""
    return paired_difference([x for x, _ in pairs], [y for _, y in pairs])


def gain(history: History) -> Difference | None:
    """The last evaluation against the student as it came."""
    if len(history.evaluations) < 2:
        return None
    last, metric = max(history.evaluations), metric_of(history)
    return difference(history.scores.get(last), history.scores.get(0), metric)


def signed(x: float) -> str:
    return f"{x:+.3f}".replace("-", "−")


def judge(history: History) -> Verdict:
    """One run: is the student better than the student as it came?"""
    tone, headline, why = _compare(history)
    sentences = [*why, _how_far(history), _alarms(history), *_problems([history])]
    return Verdict(tone=tone, headline=headline, sentences=tuple(sentences))


def _compare(history: History) -> tuple[Tone, str, list[str]]:
    if not history.steps:
        return "unknown", "No step is recorded.", []
    if not history.evaluations:
        advice = "Set evaluation.data to held-out prompts, or see what it does now: `tropd evaluate RUN`."
        return "unknown", "Whether the student became better is not known: nothing was evaluated.", [advice]
    metric = metric_of(history)
    if metric is None:
        return "unknown", "Whether the student became better is not known: it was evaluated without a grader.", []
    before, after = score_at(history, 0, metric), last_score(history)
    if after is None:
        return "unknown", f"Whether the student became better is not known: its last {metric} is not a number.", []
    if before is None or max(history.evaluations) == 0:
        only = before or after
        return "unknown", f"{metric} is {only}; there is no second evaluation to compare it with yet.", []
    paired = gain(history)
    if paired is None:
        return _by_intervals(before, after)
    span = f"{signed(paired.mean)}, 95 % interval [{signed(paired.low)}, {signed(paired.high)}]"
    finding = f"On the same {paired.num_items} prompts {metric} changed by {span}, paired prompt by prompt"
    seed = "The interval covers other prompts of this kind, not other seeds."
    change = f"{metric} went from {before} to {after}"
    if not paired.excludes_zero:
        return "same", f"No difference can be told: {change}.", [f"{finding}: it includes 0.", seed]
    tone, word = ("better", "Better") if paired.mean > 0 else ("worse", "Worse")
    return tone, f"{word}: {change}.", [f"{finding}: it excludes 0.", seed]


def _by_intervals(before: Score, after: Score) -> tuple[Tone, str, list[str]]:
    change = f"{after.metric} went from {before} to {after}"
    lost = "Scores of single prompts were not kept, so the difference has no interval of its own."
    if before.bounds is None or after.bounds is None:
        return "unknown", f"{change}, without intervals.", [lost]
    if after.bounds[0] > before.bounds[1]:
        return "better", f"Better: {change}.", [lost, "The two intervals do not touch."]
    if after.bounds[1] < before.bounds[0]:
        return "worse", f"Worse: {change}.", [lost, "The two intervals do not touch."]
    return "same", f"No difference can be told: {change}.", [lost, "The two intervals overlap."]


def _how_far(history: History) -> str:
    done, planned = len(history.steps), history.planned_steps
    if not history.steps:
        return "The run has not finished its first step, or left no readable record of it."
    if history.finished:
        return f"The run is finished: {done:,} of {planned:,} steps are recorded."
    if planned is None:
        return f"{done:,} {_steps(done)} recorded; how many were planned is not known."
    return f"{done:,} of {planned:,} steps are recorded: the run is going on, or stopped early."


def _steps(number: int) -> str:
    return "step is" if number == 1 else "steps are"


def _alarms(history: History) -> str:
    if not history.alarms:
        return "No alarm was raised."
    counted = Counter(name for _, name, _ in history.alarms)
    listed = ", ".join(f"{name} at {count:,} {'step' if count == 1 else 'steps'}" for name, count in counted.items())
    return f"Alarms were raised: {listed}."


def _problems(histories: Sequence[History]) -> list[str]:
    number = sum(len(history.problems) for history in histories)
    if not number:
        return []
    what = "One thing in the records is" if number == 1 else f"{number:,} things in the records are"
    return [f"{what} broken or missing; they are listed under Records."]


def judge_many(histories: Sequence[History]) -> Verdict:
    """Several runs: which one ended highest, and whether it can be told from the first one."""
    ended = [(history, score) for history in histories if (score := last_score(history)) is not None]
    sentences = [f"{len(histories)} runs. {standing(histories)[0]}", *standing(histories)[1:]]
    if not ended:
        return Verdict(tone="unknown", headline="No run has a score to compare.", sentences=tuple(sentences))
    if not comparable(histories):
        head = "The runs were evaluated in different ways, so their scores cannot be compared."
        return Verdict(tone="unknown", headline=head, sentences=tuple(sentences))
    best, score = max(ended, key=lambda pair: pair[1].value)
    head = f"{best.name} ended highest: {score.metric} {score}."
    if len(ended) > 2:
        sentences.insert(0, f"The highest of {len(ended)} scores is flattered by having been chosen for being high.")
    tone: Tone = "unknown"
    first = histories[0]
    gap = None if best is first else against(best, first)
    if gap is not None:
        tone = ("better" if gap.mean > 0 else "worse") if gap.excludes_zero else "same"
        word = "excludes" if gap.excludes_zero else "includes"
        sentences.insert(
            0,
            f"Against {first.name}, the first run named, it is {signed(gap.mean)} on the same {gap.num_items} prompts, "
            f"95 % interval [{signed(gap.low)}, {signed(gap.high)}], which {word} 0.",
        )
    return Verdict(tone=tone, headline=head, sentences=tuple(sentences))


def standing(histories: Sequence[History]) -> list[str]:
    """How far several runs are, and their alarms and problems."""
    finished, raised = sum(h.finished for h in histories), sum(bool(h.alarms) for h in histories)
    sentences = ["All are finished." if finished == len(histories) else f"{finished} of {len(histories)} are finished."]
    sentences.append(f"{raised} of {len(histories)} runs raised alarms." if raised else "No run raised an alarm.")
    return sentences + _problems(histories)


def against(history: History, baseline: History) -> Difference | None:
    """The last evaluations of two runs, prompt by prompt."""
    if not history.evaluations or not baseline.evaluations or not comparable([history, baseline]):
        return None
    last, other = (h.scores.get(max(h.evaluations)) for h in (history, baseline))
    return difference(last, other, metric_of(history))


def comparable(histories: Sequence[History]) -> bool:
    """Whether all that were evaluated were evaluated alike, as far as their configurations say."""
    skipped = {"evaluation.every", "evaluation.prompts_per_call"}
    settings = {
        (
            metric_of(h),
            tuple(sorted((k, v) for k, v in h.config.items() if k.startswith("evaluation.") and k not in skipped)),
        )
        for h in histories
        if h.evaluations
    }
    return len(settings) <= 1
