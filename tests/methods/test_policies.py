"""A policy carries itself out: one of a user's own works wherever the built-in ones do."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pytest
from rich.console import Console

from tests.small_runs import run_of, write_models
from tropd.base.ranges import Count
from tropd.doctor.method import check_guidance
from tropd.doctor.subject import read_subject
from tropd.errors import ConfigError, OutOfRange
from tropd.methods import METHODS, Method
from tropd.methods.adaptive_horizon import AdaptiveHorizon
from tropd.methods.drafts import Draft, RolloutJob, Writer, teacher_texts
from tropd.methods.explain import explain, methods
from tropd.methods.horizon import Horizon
from tropd.methods.phased import Phased
from tropd.methods.policies import Mixture, OnPolicy, RolloutPolicy, Shares, TeacherPrefix, TeacherText
from tropd.methods.replay import Replay
from tropd.methods.stacked import POLICIES as BY_NAME
from tropd.methods.stacked import stacked
from tropd.objective.losses import NegativeLogLikelihood, PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.schedules import Schedule
from tropd.objective.selectors import STUDENT, TEACHER
from tropd.objective.terms import Term
from tropd.planning import DEVICES, make_forecast
from tropd.rollout.scripted import ScriptedEngine
from tropd.rollout.stage import roll_out
from tropd.types import Author, Prompt, Sampling

BUDGET, STOP = 10, 99


@dataclass(frozen=True, kw_only=True)
class FirstTokens(RolloutPolicy):
    """The teacher writes the first tokens of every second response."""

    number: Count = 3

    @property
    def needs_teacher_text(self) -> bool:
        return True

    def begin(self, job: RolloutJob, writer: Writer | None) -> list[Draft]:
        chosen = [draft for draft in job.drafts() if draft.number % 2 == 0]
        texts = dict(zip([d.id for d in chosen], teacher_texts(chosen, job, writer), strict=True))
        length, budget = self.number, job.max_new_tokens
        return [d.begun(texts[d.id], length, budget) if d.id in texts else d for d in job.drafts()]

    def shares(self, progress: float, num_rollouts: int, max_new_tokens: int) -> Shares:
        chosen = (num_rollouts + 1) // 2
        return Shares(prefix=min(self.number, max_new_tokens - 1) * chosen / num_rollouts, texts=chosen)


@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    """Log-ratio on the student's tokens, likelihood on the teacher's first ones."""

    name: Literal["mine"] = "mine"
    number: Count = 3
    """Tokens that the teacher writes."""
    beta: float = 0.001
    """Weight of the likelihood."""

    paper = "https://example.org/mine"
    summary = "first tokens by the teacher"

    @property
    def objective(self) -> Objective:
        guidance = Term("guidance", TEACHER, NegativeLogLikelihood(), weight=self.beta)
        return Objective(Term("reward", STUDENT, PolicyGradient(LogRatio())), guidance)

    @property
    def rollout(self) -> RolloutPolicy:
        return FirstTokens(number=self.number)


def job_of(num_prompts: int = 2, num_rollouts: int = 2, progress: float = 0.0, visit: int = 0) -> RolloutJob:
    return RolloutJob(
        prompts=[(Prompt(id=f"p/{n}", token_ids=(n, n + 1)), visit) for n in range(num_prompts)],
        num_rollouts=num_rollouts,
        max_new_tokens=BUDGET,
        sampling=Sampling(),
        stop_ids=(STOP,),
        seed=3,
        progress=progress,
    )


def teacher() -> ScriptedEngine:
    return ScriptedEngine(lambda request: [100] * 30)


def student() -> ScriptedEngine:
    return ScriptedEngine(lambda request: [200] * 30)


def test_a_policy_of_ones_own_is_rolled_out() -> None:
    rollouts = roll_out(FirstTokens(number=4), job_of(), student(), teacher())
    assert [r.response_ids for r in rollouts] == [(100,) * 4 + (200,) * 6, (200,) * 10] * 2
    with pytest.raises(ConfigError, match="teacher cannot write"):
        roll_out(FirstTokens(), job_of(), student(), None)
    with pytest.raises(OutOfRange, match="number"):
        FirstTokens(number=0)


def test_a_policy_of_ones_own_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mine", Mine)
    console = Console(width=200, record=True)
    console.print(explain("mine"), methods())
    shown = console.export_text()
    assert "The teacher writes the first tokens of every second response." in shown
    assert "It also writes text, unless the dataset brings responses." in shown and "sampled, texts" in shown


def test_a_policy_of_ones_own_is_planned_and_examined(tmp_path) -> None:
    run = run_of(write_models(tmp_path), rollout={"max_new_tokens": BUDGET, "num_rollouts": 3, "num_prompts": 2})
    forecast = make_forecast(replace(run, method=Mine()), DEVICES["h100"])
    assert forecast.texts.by_student == 6 and forecast.texts.prefix == 2 and forecast.texts.by_teacher == 4
    assert forecast.texts.written == 6 * (BUDGET - 2)
    assert forecast.seconds["prefix"] > 0
    subject, _ = read_subject(replace(run, method=Mine(number=8)))
    assert subject is not None
    (check,) = check_guidance(subject)
    assert "prefixes of 53% of the answer and beta = 0.001" in check.found


POLICIES: list[RolloutPolicy] = [
    OnPolicy(),
    TeacherText(),
    Mixture(student_share=0.3, coin="rollout"),
    Mixture(student_share=0.3),
    TeacherPrefix(),
    TeacherPrefix(share=0.4, texts="own", draw="uniform"),
    TeacherPrefix(share=0.4, length=Schedule(start=0.6)),
    FirstTokens(),
    Horizon(tokens=4),
    Replay(),
    Phased(verified=False),
]


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_shares_are_what_a_policy_does_on_average(policy: RolloutPolicy, progress: float) -> None:
    num_rollouts, visits = 3, 100
    expected = policy.shares(progress, num_rollouts, BUDGET)
    texts, prefixes, drafts = 0, 0, 0
    for visit in range(visits):
        writer = teacher()
        job = job_of(2, num_rollouts, progress, visit)
        begun = policy.begin(job, writer)
        texts += len(writer.requests)
        drafts += len(begun)
        prefixes += sum(len(draft.prefix) for draft in begun if not draft.whole)
        assert policy.needs_teacher_text or not writer.requests
        own = [sum(a == Author.STUDENT for a in r.authors) for r in roll_out(policy, job, student(), writer)]
        assert all((number == 0) == draft.whole for number, draft in zip(own, begun, strict=True))
    assert texts / (2 * visits) == pytest.approx(expected.texts, abs=0.3)
    assert prefixes / drafts == pytest.approx(expected.prefix * expected.by_student, abs=0.3)


@dataclass(frozen=True, kw_only=True)
class Broken(RolloutPolicy):
    how: Literal["fewer", "full"] = "fewer"

    def begin(self, job: RolloutJob, writer: Writer | None) -> Sequence[Draft]:  # type: ignore[override]
        drafts = job.drafts()
        return drafts[1:] if self.how == "fewer" else [replace(draft, prefix=(1,) * BUDGET) for draft in drafts]


def test_drafts_that_nobody_could_go_on_from_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Broken.begin gave 3 drafts that are not the 2 rollouts"):
        roll_out(Broken(), job_of(), student(), None)
    with pytest.raises(ConfigError, match=r"0/p/0/0 a prefix of 10 tokens, but it may have 9 of the 10"):
        roll_out(Broken(how="full"), job_of(), student(), None)


@pytest.mark.parametrize("policy", BY_NAME.values())
def test_each_policy_has_an_example_that_prints_what_it_shows(policy: type[RolloutPolicy]) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(policy, globs=dict(vars(inspect.getmodule(policy))))
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_policies_that_would_undo_each_other_are_refused() -> None:
    twice = [AdaptiveHorizon(tokens=4), AdaptiveHorizon(tokens=8)]
    with pytest.raises(ConfigError, match="AdaptiveHorizon is there twice"):
        stacked(twice)


@dataclass(frozen=True, kw_only=True)
class Always(Replay):
    def again(self, job: RolloutJob) -> dict[str, list]:
        return {"0/p": []}


def test_what_is_measured_on_whole_responses_is_written_anew() -> None:
    policy = stacked([AdaptiveHorizon(tokens=4, every=2), Always()])
    job = RolloutJob(
        prompts=(), num_rollouts=1, max_new_tokens=16, sampling=Sampling(), stop_ids=(), seed=0, progress=0.0
    )
    assert [policy.again(replace(job, step=step)) for step in (0, 1, 2)] == [{}, {"0/p": []}, {}]
