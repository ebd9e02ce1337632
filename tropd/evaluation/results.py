"""The results of an evaluation: every number is printed with the settings that it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from tropd.evaluation.statistics import bootstrap_interval, pass_at_k
from tropd.types import Finish, Sampling

if TYPE_CHECKING:  # which needs torch, and a report does not
    from tropd.config.stages import EvalConfig

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class EvalAnswer:
    text: str
    num_tokens: int
    finish: Finish
    score: float | None = None
    """None when there is no grader."""


@dataclass(frozen=True, kw_only=True)
class EvalItem:
    """All answers to one prompt."""

    id: str
    samples: tuple[EvalAnswer, ...]
    greedy: EvalAnswer | None = None


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Scores with their settings.  Scores are None when there is no grader."""

    config: EvalConfig
    mean: float | None
    """avg@n: the mean over prompts of the mean score of their samples."""
    interval: tuple[float, float] | None
    """95 % of the means when prompts are drawn again."""
    pass_at: dict[int, float]
    greedy: float | None
    greedy_interval: tuple[float, float] | None
    mean_length: float
    """Tokens per sampled answer."""
    truncated: float
    """Share of sampled answers that were cut off at max_new_tokens."""
    items: tuple[EvalItem, ...]

    @property
    def means(self) -> list[float]:
        """By prompt: the mean score of its samples, where an answer without a score counts 0."""
        return [fmean(answer.score or 0.0 for answer in item.samples) for item in self.items]

    def summary(self) -> dict[str, float]:
        """Flat numbers for `StepRecord.evaluation`."""
        numbers: dict[str, float] = {}
        if self.mean is not None and self.interval is not None:
            low, high = self.interval
            name = f"avg@{self.config.num_samples}"
            numbers |= {name: self.mean, f"{name}/low": low, f"{name}/high": high}
        numbers |= {f"pass@{k}": value for k, value in self.pass_at.items()}
        if self.greedy is not None and self.greedy_interval is not None:
            low, high = self.greedy_interval
            numbers |= {"greedy": self.greedy, "greedy/low": low, "greedy/high": high}
        numbers |= {"length/mean": self.mean_length, "finish/truncated": self.truncated}
        return numbers | {"num_prompts": float(len(self.items))}

    def describe(self) -> str:
        """One line per number, each with the settings that it depends on."""
        n = self.config.num_samples
        sampled = self._settings(self.config.sampling)
        lines = []
        if self.mean is not None and self.interval is not None:
            lines.append(f"avg@{n} {self.mean:.3f} {_bracket(self.interval)} ({sampled})")
        lines += [f"pass@{k} {value:.3f} ({n} samples, {sampled})" for k, value in self.pass_at.items()]
        if self.greedy is not None and self.greedy_interval is not None:
            lines.append(f"greedy {self.greedy:.3f} {_bracket(self.greedy_interval)} ({self._settings(GREEDY)})")
        lines.append(f"length {self.mean_length:.1f} tokens, {self.truncated:.1%} truncated ({sampled})")
        return "\n".join(lines)

    def _settings(self, sampling: Sampling) -> str:
        words = [f"T={sampling.temperature:g}"]
        if sampling.temperature > 0.0:
            words.append(f"top_p={sampling.top_p:g}")
            words += [f"top_k={sampling.top_k}"] if sampling.top_k else []
            words += [f"min_p={sampling.min_p:g}"] if sampling.min_p else []
        return ", ".join([*words, f"{self.config.max_new_tokens} tokens", f"{len(self.items)} prompts"])


def summarize(items: Sequence[EvalItem], config: EvalConfig) -> EvalResult:
    """The numbers of graded items."""
    scores = [[a.score for a in item.samples if a.score is not None] for item in items]
    graded = all(len(of_item) == config.num_samples for of_item in scores)
    means = [fmean(of_item) for of_item in scores] if graded else []
    greedy = [item.greedy.score for item in items if item.greedy is not None and item.greedy.score is not None]
    pass_at = {}
    for k in config.pass_k if graded else ():
        correct = [sum(score >= config.correct_from for score in of_item) for of_item in scores]
        pass_at[k] = fmean(pass_at_k(config.num_samples, c, k) for c in correct)
    answers = [answer for item in items for answer in item.samples]
    return EvalResult(
        config=config,
        mean=fmean(means) if means else None,
        interval=bootstrap_interval(means, seed=config.seed) if means else None,
        pass_at=pass_at,
        greedy=fmean(greedy) if greedy else None,
        greedy_interval=bootstrap_interval(greedy, seed=config.seed) if greedy else None,
        mean_length=fmean(answer.num_tokens for answer in answers),
        truncated=fmean(answer.finish == Finish.LENGTH for answer in answers),
        items=tuple(items),
    )


def _bracket(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.2f}, {interval[1]:.2f}]"
