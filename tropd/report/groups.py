"""Runs that differ in their seed alone belong together: they are one setting, tried several times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tropd.evaluation.statistics import Difference, paired_difference
from tropd.report.history import History
from tropd.report.runs import common_start
from tropd.report.verdict import (
    Tone,
    Verdict,
    comparable,
    judge_many,
    last_score,
    metric_of,
    score_at,
    signed,
    standing,
)

_OF_A_RUN_ALONE = {"seed", "output"}


@dataclass(frozen=True)
class Group:
    """One setting and its runs."""

    label: str
    members: tuple[int, ...]
    """Which of the runs."""


def groups_of(runs: Sequence[History]) -> list[Group]:
    """In the order of their first runs; a run whose configuration is not known is alone."""
    members_of: dict[tuple[object, ...], list[int]] = {}
    for number, run in enumerate(runs):
        settings = sorted((key, value) for key, value in run.config.items() if key not in _OF_A_RUN_ALONE)
        members_of.setdefault((*settings,) if settings else (number,), []).append(number)
    return [Group(_label([runs[i].name for i in members]), tuple(members)) for members in members_of.values()]


def _label(names: Sequence[str]) -> str:
    """What the names have in common, without a seed's number half cut off."""
    if len(names) == 1:
        return names[0]
    common = common_start(names).rstrip("0123456789")
    return re.sub(r"[\W_]*(seed)?[\W_]*$", "", common) or names[0]


def judge_groups(runs: Sequence[History]) -> Verdict:
    """The verdict on settings that were tried with several seeds, else on the runs."""
    groups = groups_of(runs)
    ended = [(group, scores) for group in groups if (scores := _ends(runs, group))]
    if len(groups) == len(runs) or not ended or not comparable(runs):
        return judge_many(runs)
    if len(groups) == 1:
        return _one_setting(runs, *ended[0])
    best, scores = max(ended, key=lambda pair: fmean(pair[1]))
    metric = metric_of(runs[best.members[0]])
    headline = f"{best.label} ended highest: mean {metric} {_over_seeds(scores)}."
    sentences, tone = (
        [f"{len(runs)} runs of {len(groups)} settings. {standing(runs)[0]}", *standing(runs)[1:]],
        "unknown",
    )
    if len(ended) > 2:
        sentences.insert(0, f"The highest of {len(ended)} means is flattered by having been chosen for being high.")
    if best is not groups[0] and (gap := _by_seed(runs, best, groups[0])) is not None:
        sentences.insert(0, f"Against {groups[0].label}, named first, it is {_span(gap)}.")
        tone = _tone(gap)
    return Verdict(tone=tone, headline=headline, sentences=tuple(sentences))


def _one_setting(runs: Sequence[History], group: Group, scores: Sequence[float]) -> Verdict:
    metric = metric_of(runs[group.members[0]])
    starts = [score_at(runs[i], 0, metric) for i in group.members]
    headline = f"One setting with {len(runs)} seeds: mean {metric} {_over_seeds(scores)} at the end."
    sentences, tone = list(standing(runs)), "unknown"
    if len(starts) == len(scores) > 1 and all(starts):
        gap = paired_difference(scores, [start.value for start in starts if start])
        tone = _tone(gap)
        sentences.insert(0, f"Against the student as it came it is {_span(gap)}.")
    return Verdict(tone=tone, headline=headline, sentences=tuple(sentences))


def _tone(gap: Difference) -> Tone:
    if not gap.excludes_zero:
        return "same"
    return "better" if gap.mean > 0 else "worse"


def _span(gap: Difference) -> str:
    word = "excludes" if gap.excludes_zero else "includes"
    return (
        f"{signed(gap.mean)}, 95 % interval [{signed(gap.low)}, {signed(gap.high)}] over {gap.num_items} seeds, which "
        f"{word} 0; so few seeds make a rough interval"
    )


def _ends(runs: Sequence[History], group: Group) -> list[float]:
    return [score.value for i in group.members if (score := last_score(runs[i])) is not None]


def _over_seeds(scores: Sequence[float]) -> str:
    if len(scores) == 1:
        return f"{scores[0]:.3f} with one seed"
    return f"{fmean(scores):.3f} over {len(scores)} seeds ({min(scores):.3f} to {max(scores):.3f})"


def _by_seed(runs: Sequence[History], group: Group, baseline: Group) -> Difference | None:
    """Seeds that both settings were tried with, at least two."""
    ends = [
        {runs[i].config["seed"]: score.value for i in of.members if (score := last_score(runs[i])) is not None}
        for of in (group, baseline)
    ]
    seeds = sorted(ends[0].keys() & ends[1].keys())
    if len(seeds) < 2:
        return None
    return paired_difference([ends[0][seed] for seed in seeds], [ends[1][seed] for seed in seeds])
