import json
from dataclasses import fields
from math import inf, log, nan
from typing import Any

import pytest
import torch

from tests.monitoring.test_probes import S, make_tokens
from tropd.config.alarms import AlarmConfig
from tropd.errors import CheckpointError, ConfigError
from tropd.monitoring.alarms import Alarm, Alarms
from tropd.monitoring.probes import probe_batch

V = 1000
HEALTHY = {
    "teacher/mean_logprob": -0.9,
    "entropy/teacher": 0.8,
    "entropy/student": 1.0,
    "mismatch/behavior": 0.01,
    "length/mean": 100.0,
    "finish/truncated": 0.1,
    "mass/student_in_teacher_top_k": 0.9,
    "repetition/4gram": 0.05,
    "ratio/min": -3.0,
    "ratio/max": 1.0,
}


def check(alarms: Alarms, probes: dict[str, float], step: int = 1, **changes: Any) -> list[Alarm]:
    facts = dict(vocab_size=V, loss=0.5, gradient_norm=1.0, max_new_tokens=256)
    return alarms.check(probes, step=step, **{**facts, **changes})


def names(alarms: list[Alarm]) -> list[str]:
    return [alarm.name for alarm in alarms]


def test_a_healthy_run_raises_nothing() -> None:
    alarms = Alarms()
    for step in range(60):
        probes = {**HEALTHY, "length/mean": 100.0 + step, "entropy/student": 1.0 - 0.01 * step}
        assert check(alarms, probes, step) == []


def test_a_run_without_any_probes_raises_nothing() -> None:
    alarms = Alarms()
    assert [check(alarms, {}, step) for step in range(30)] == [[]] * 30


def test_a_teacher_without_weights_stops_the_run() -> None:
    uniform = torch.full((50,), -log(V))
    student = torch.linspace(-4.0, -0.1, 50)
    for evidence in ({"teacher_entropy_N": torch.full((50,), log(V))}, {}):
        tokens = make_tokens([S] * 50, [0] * 50, teacher_logprobs_N=uniform, student_logprobs_N=student, **evidence)
        [alarm] = check(Alarms(), probe_batch(tokens, []).result())
        assert (alarm.name, alarm.action) == ("uniform_teacher", "stop")
        assert "the teacher knows nothing" in alarm.message and "-6.908" in alarm.message and "step 1" in alarm.message


def test_a_teacher_that_merely_dislikes_the_student_is_not_taken_for_uniform() -> None:
    dislikes = {**HEALTHY, "teacher/mean_logprob": -log(V)}
    assert check(Alarms(), dislikes) == []
    del dislikes["entropy/teacher"]
    assert check(Alarms(), {**dislikes, "teacher/min_logprob": -30.0, "teacher/max_logprob": -0.01}) == []
    assert check(Alarms(), dislikes) == []  # the mean alone proves nothing
    assert names(check(Alarms(), {**dislikes, "entropy/teacher": 0.96 * log(V)})) == ["uniform_teacher"]
    assert check(Alarms(), {**dislikes, "entropy/teacher": 0.94 * log(V)}) == []


@pytest.mark.parametrize("loss, gradient_norm", [(nan, 1.0), (inf, 1.0), (0.5, nan), (0.5, inf), (nan, nan)])
def test_a_loss_or_gradient_that_is_no_number_stops_the_run(loss: float, gradient_norm: float) -> None:
    [alarm] = check(Alarms(), HEALTHY, loss=loss, gradient_norm=gradient_norm)
    assert (alarm.name, alarm.action) == ("non_finite", "stop") and "learning rate" in alarm.message


def test_a_sampler_that_is_not_the_trainer_stops_the_run() -> None:
    [alarm] = check(Alarms(), {**HEALTHY, "mismatch/behavior": 0.051})
    assert (alarm.name, alarm.action) == ("mismatch", "stop") and "0.0510 nats" in alarm.message
    assert check(Alarms(), {**HEALTHY, "mismatch/behavior": 0.05}) == []


def test_length_blow_up_needs_sudden_growth_and_cut_answers() -> None:
    blown = {**HEALTHY, "length/mean": 201.0, "finish/truncated": 0.51}

    def after(num_steps: int, probes: dict[str, float]) -> list[str]:
        alarms = Alarms()
        for step in range(num_steps):
            assert check(alarms, HEALTHY, step) == []
        return names(check(alarms, probes, num_steps))

    assert after(20, blown) == ["length_blow_up"]
    assert after(5, blown) == ["length_blow_up"]
    assert after(4, blown) == []  # too little history
    assert after(20, {**blown, "length/mean": 200.0}) == []
    assert after(20, {**blown, "finish/truncated": 0.5}) == []


def test_a_whole_response_has_not_grown_from_those_that_a_horizon_cut() -> None:
    cut = {**HEALTHY, "length/mean": 10.0, "finish/truncated": 0.0, "rollout/horizon": 10.0}
    whole = {**HEALTHY, "length/mean": 400.0, "finish/truncated": 0.9}
    alarms = Alarms()
    for step in range(40):
        assert check(alarms, whole if step % 5 == 0 else cut, step) == []
    assert names(check(alarms, {**whole, "length/mean": 900.0}, 40)) == ["length_blow_up"]


def test_length_blow_up_forgets_what_is_older_than_its_window() -> None:
    alarms = Alarms(AlarmConfig(length_window=5))
    for step in range(10):
        check(alarms, {**HEALTHY, "length/mean": 10.0 if step < 5 else 100.0}, step)
    assert check(alarms, {**HEALTHY, "length/mean": 150.0, "finish/truncated": 0.9}, 10) == []


@pytest.mark.parametrize(
    "name, probe, bad, good",
    [
        ("support_collapse", "mass/student_in_teacher_top_k", 0.19, 0.2),
        ("repetition", "repetition/4gram", 0.51, 0.5),
        ("entropy_collapse", "entropy/student", 0.099, 0.1),
    ],
)
def test_collapses_warn_at_their_thresholds(name: str, probe: str, bad: float, good: float) -> None:
    for value, expected in ((bad, [name]), (good, [])):
        alarms = Alarms()
        check(alarms, HEALTHY, 0)
        raised = check(alarms, {**HEALTHY, probe: value}, 1)
        assert names(raised) == expected and all(alarm.action == "warn" for alarm in raised)


def test_a_student_that_starts_sharp_has_not_collapsed() -> None:
    sharp = {**HEALTHY, "entropy/student": 0.01}
    alarms = Alarms()
    assert [check(alarms, sharp, step) for step in range(3)] == [[], [], []]


def test_no_signal_is_an_alarm_of_the_first_step_between_different_models() -> None:
    alarms = Alarms()
    [alarm] = check(alarms, HEALTHY, 0, gradient_norm=0.0)
    assert (alarm.name, alarm.action) == ("no_signal", "warn")
    assert check(alarms, HEALTHY, 1, gradient_norm=0.0) == []
    unread = {**HEALTHY, "unread/teacher": 0.5, "unread/wrong": 1.0}
    [alarm] = check(Alarms(), unread, 0, gradient_norm=0.0)
    assert "exactly 0: wrong read none of its responses" in alarm.message and "trainable" not in alarm.message
    [alarm] = check(Alarms(), {**unread, "unread/wrong": 0.5}, 0, gradient_norm=0.0)
    assert "read none" not in alarm.message
    same = {**HEALTHY, "ratio/min": 0.0, "ratio/max": 0.0}
    assert check(Alarms(), same, 0, gradient_norm=0.0) == []


def test_a_resumed_run_raises_what_an_unbroken_one_raises() -> None:
    blown = {**HEALTHY, "length/mean": 250.0, "finish/truncated": 0.9, "entropy/student": 0.05}
    unbroken, before, after = Alarms(), Alarms(), Alarms()
    for step in range(12):
        check(unbroken, HEALTHY, step)
        check(before, HEALTHY, step)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    expected = check(unbroken, blown, 12, gradient_norm=0.0)
    assert check(after, blown, 12, gradient_norm=0.0) == expected
    assert names(expected) == ["length_blow_up", "entropy_collapse"]
    with pytest.raises(CheckpointError, match="lacks first_entropy, started"):
        after.load_state_dict({"lengths": []})


def test_evidence_adds_up_over_steps_and_is_forgotten_when_it_speaks_for_the_sampler() -> None:
    cold = "draws/student/at temperature 0.7"
    slow, honest = Alarms(), Alarms()
    raised = [names(check(slow, {**HEALTHY, cold: 8.0}, step)) for step in range(3)]
    assert raised == [[], [], ["student_draws"]]
    for step in range(60):
        assert check(honest, {**HEALTHY, cold: -30.0 if step % 2 else 15.0}, step) == []
    resumed = Alarms()
    resumed.load_state_dict(json.loads(json.dumps(slow.state_dict())))
    [alarm] = check(resumed, {**HEALTHY, cold: 0.0}, 3)
    assert "it looks drawn at temperature 0.7, by 24 nats of evidence" in alarm.message


ACTIONS = [f.name for f in fields(AlarmConfig) if isinstance(f.default, str)]
BROKEN: dict[str, dict[str, float]] = {
    "uniform_teacher": {"teacher/mean_logprob": -log(V), "entropy/teacher": log(V)},
    "mismatch": {"mismatch/behavior": 1.0},
    "length_blow_up": {"length/mean": 1000.0, "finish/truncated": 1.0},
    "support_collapse": {"mass/student_in_teacher_top_k": 0.0},
    "entropy_collapse": {"entropy/student": 0.0},
    "repetition": {"repetition/4gram": 1.0},
    "student_draws": {"draws/student/at temperature 0.7": 21.0},
    "teacher_draws": {"draws/teacher/at temperature 0.7": 21.0},
    "equal_answers": {"draws/alike": 21.0},
}


def raise_everything(config: AlarmConfig) -> list[Alarm]:
    alarms, first = Alarms(config), Alarms(config)
    for step in range(6):
        check(alarms, HEALTHY, step)
    broken = {name: x for probes in BROKEN.values() for name, x in probes.items()}
    return check(alarms, HEALTHY | broken, 6, loss=nan) + check(first, HEALTHY, 0, gradient_norm=0.0)


def test_every_alarm_can_be_raised_and_names_a_remedy() -> None:
    raised = raise_everything(AlarmConfig())
    assert sorted(names(raised)) == sorted(ACTIONS) and len(ACTIONS) == 11
    assert all(len(alarm.message) > 120 for alarm in raised)
    assert [alarm.action for alarm in raised[:-1]] == ["stop"] * 6 + ["warn"] * 4


@pytest.mark.parametrize("name", ACTIONS)
def test_every_alarm_can_be_silenced_or_made_to_stop(name: str) -> None:
    assert name not in names(raise_everything(AlarmConfig(**{name: "off"})))
    changed = raise_everything(AlarmConfig(**{name: "stop"}))
    assert [alarm.action for alarm in changed if alarm.name == name] == ["stop"]


def test_a_misspelt_action_or_a_senseless_threshold_is_refused() -> None:
    with pytest.raises(ConfigError, match="alarm 'mismatch' was set to 'ignore'"):
        AlarmConfig(mismatch="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="alarms.repetition_share = 0.0 was asked for"):
        AlarmConfig(repetition_share=0.0)
