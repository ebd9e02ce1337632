"""Signs that a run has gone wrong, each with its likely cause and its remedy.

Every alarm is "warn", "stop" or "off".  An alarm whose probes are absent stays silent.  What looks back over steps
(a median, a first value) is saved with `state_dict`, so a resumed run raises the same alarms as one that never stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite, log
from statistics import median
from typing import Any, Literal

from tropd.config.alarms import Action, AlarmConfig
from tropd.errors import CheckpointError
from tropd.monitoring.teachers import by_teacher
from tropd.rollout.draws import Gathered, too_alike

_OF_A_TEACHER = ("uniform_teacher", "support_collapse")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    name: str
    message: str
    action: Literal["warn", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moment:
    """What an alarm may look at."""

    probes: Mapping[str, float]
    vocab_size: int
    loss: float
    gradient_norm: float
    max_new_tokens: int
    first: bool


class Alarms:
    """Checks every step; call it once per step, on the probes of the whole batch."""

    def __init__(self, config: AlarmConfig | None = None) -> None:
        self.config = config or AlarmConfig()
        self._lengths: deque[float] = deque(maxlen=int(self.config.length_window))
        self._first_entropy: float | None = None
        self._started = False
        self._draws = Gathered()

    def check(
        self,
        probes: Mapping[str, float],
        *,
        step: int,
        vocab_size: int,
        loss: float,
        gradient_norm: float,
        max_new_tokens: int,
    ) -> list[Alarm]:
        """The alarms of this step, those that stop the run first."""
        self._draws.add(probes)
        moment = _Moment(
            probes=probes,
            vocab_size=vocab_size,
            loss=loss,
            gradient_norm=gradient_norm,
            max_new_tokens=max_new_tokens,
            first=not self._started,
        )
        alarms = []
        each = by_teacher(probes)
        for name, look in self._looks().items():
            action: Action = getattr(self.config, name)
            if action == "off":
                continue
            if each and name in _OF_A_TEACHER:  # a mean over all would hide one of them
                messages = {f"teacher {own!r}: ": look(replace(moment, probes=its)) for own, its in each.items()}
            else:
                messages = {"": look(moment)}
            for whose, message in messages.items():
                if message is not None:
                    alarms.append(Alarm(name=name, message=f"step {step}: {whose}{message}", action=action))
        self._remember(probes)
        return sorted(alarms, key=lambda alarm: alarm.action != "stop")

    def state_dict(self) -> dict[str, Any]:
        state = {"lengths": list(self._lengths), "first_entropy": self._first_entropy, "started": self._started}
        return state | {"draws": dict(self._draws.evidence)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing = {"lengths", "first_entropy", "started"} - set(state)
        if missing:
            raise CheckpointError(
                f"the state of the alarms lacks {', '.join(sorted(missing))}. Load what `Alarms.state_dict` returned."
            )
        self._lengths = deque(state["lengths"], maxlen=int(self.config.length_window))
        self._first_entropy = state["first_entropy"]
        self._started = state["started"]
        self._draws = Gathered(state.get("draws", {}))

    def _remember(self, probes: Mapping[str, float]) -> None:
        self._started = True
        length, entropy = probes.get("length/mean"), probes.get("entropy/student")
        if length is not None and isfinite(length) and "rollout/horizon" not in probes:  # else it is the horizon's
            self._lengths.append(length)
        if self._first_entropy is None and entropy is not None and isfinite(entropy):
            self._first_entropy = entropy

    def _looks(self) -> dict[str, Callable[[_Moment], str | None]]:
        return {
            "non_finite": self._non_finite,
            "uniform_teacher": self._uniform_teacher,
            "mismatch": self._mismatch,
            "length_blow_up": self._length_blow_up,
            "support_collapse": self._support_collapse,
            "entropy_collapse": self._entropy_collapse,
            "repetition": self._repetition,
            "student_draws": lambda now: self._draws.objection("student", self.config.draws_nats),
            "teacher_draws": lambda now: self._draws.objection("teacher", self.config.draws_nats),
            "equal_answers": lambda now: too_alike(now.probes, self.config.draws_nats),
            "no_signal": self._no_signal,
        }

    def _non_finite(self, now: _Moment) -> str | None:
        bad = [f"{name} is {x}" for name, x in (("loss", now.loss), ("gradient norm", now.gradient_norm)) if _bad(x)]
        if not bad:
            return None
        return (
            f"the {' and the '.join(bad)}. The usual causes are a learning rate that is too high, half-precision "
            "weights, or a teacher that gives a written token no probability. Go back to the last checkpoint, lower "
            "the learning rate, and bound the log-ratio (method 'tropd', 'clip_outlier' or 'topd')."
        )

    def _uniform_teacher(self, now: _Moment) -> str | None:
        """Both |mean log pi_T + ln V| and |H_T - ln V| within 5 % of ln V; lacking H_T, all log pi_T must be there."""
        mean, uniform = now.probes.get("teacher/mean_logprob"), log(max(now.vocab_size, 2))
        others = [now.probes.get("entropy/teacher")]
        if others[0] is None:
            others = [_minus(now.probes.get(f"teacher/{end}_logprob")) for end in ("min", "max")]
        near = self.config.uniform_teacher_tolerance * uniform
        if mean is None or not abs(mean + uniform) < near:
            return None
        if any(other is None or not abs(other - uniform) < near for other in others):
            return None
        return (
            f"the teacher knows nothing: its mean log-probability is {mean:.3f}, and -ln V = {-uniform:.3f} is what a "
            f"model without weights gives every one of {now.vocab_size} tokens. Its weights were probably not loaded, "
            "or were freed while it slept. Reload the teacher, then let `tropd doctor` score a prompt before training."
        )

    def _mismatch(self, now: _Moment) -> str | None:
        mean, limit = now.probes.get("mismatch/behavior"), self.config.mismatch_nats
        if mean is None or mean <= limit:
            return None
        return (
            f"sampler and trainer disagree: log-probabilities of the same student tokens differ by {mean:.4f} nats on "
            f"average, and at most {limit:g} is allowed. Likely causes: the engine holds older weights, another chat "
            "template or token ids, another temperature, or prefix caching that corrupts its log-probabilities. Check "
            "that the engine was synchronised, compare token ids, try vLLM's --no-enable-prefix-caching."
        )

    def _length_blow_up(self, now: _Moment) -> str | None:
        length, truncated = now.probes.get("length/mean"), now.probes.get("finish/truncated")
        if length is None or truncated is None or len(self._lengths) < max(1, self.config.length_window // 4):
            return None
        usual = median(self._lengths)
        if length <= self.config.length_blow_up_factor * usual or truncated <= self.config.length_blow_up_truncated:
            return None
        return (
            f"answers grew to {length:.0f} tokens from a running median of {usual:.0f}, and {truncated:.0%} are cut at "
            f"{now.max_new_tokens}. Student and teacher often end a turn with different tokens (a base student with "
            "an instruct teacher). Compare their stop tokens and chat templates with `tropd doctor`, and give the "
            "student the teacher's end-of-turn token."
        )

    def _support_collapse(self, now: _Moment) -> str | None:
        mass = now.probes.get("mass/student_in_teacher_top_k")
        if mass is None or mass >= self.config.support_collapse_mass:
            return None
        return (
            f"the student puts {mass:.1%} of its probability on the teacher's top-k. It writes what the teacher would "
            "never write, so a loss on the top-k alone says little. Raise top_k, let the teacher write prefixes, "
            "or warm the student up on the teacher's answers; if it fell suddenly, check that both share a tokenizer."
        )

    def _entropy_collapse(self, now: _Moment) -> str | None:
        entropy, first = now.probes.get("entropy/student"), self._first_entropy
        if entropy is None or first is None or entropy >= self.config.entropy_collapse_share * first:
            return None
        return (
            f"the student's entropy fell to {entropy:.4f} nats from {first:.4f} at the start: it has nearly "
            "stopped exploring. Lower the learning rate, or use a loss that keeps the teacher's spread, such as 'eopd'."
        )

    def _repetition(self, now: _Moment) -> str | None:
        share = now.probes.get("repetition/4gram")
        if share is None or share <= self.config.repetition_share:
            return None
        return (
            f"{share:.0%} of the 4-grams of an answer are repeated. Loops are cheap under a per-token reward: teachers "
            "score a repeated token highly. Read some rollouts, shorten max_new_tokens, and check the stop tokens."
        )

    def _no_signal(self, now: _Moment) -> str | None:
        if not now.first or now.gradient_norm != 0.0:
            return None
        if now.probes.get("ratio/min") == 0.0 == now.probes.get("ratio/max"):
            return None
        if unread := [name.partition("/")[2] for name, share in now.probes.items() if _nothing_read(name, share)]:
            return (
                f"the gradient of the first step is exactly 0: {', '.join(unread)} read none of its responses, for the "
                "briefing found nothing to say of them, or does not fit what can be read. Such responses teach "
                "nothing. Look at the grader's rewards and words, at rollout.num_rollouts, and at the lengths."
            )
        return (
            "the gradient of the first step is exactly 0, although the student is not the teacher. The teacher's "
            "scores may be dropped on the way, every weight may be 0, or no parameter is trainable. See the token "
            "shares of the terms, and which parameters require a gradient."
        )


def _nothing_read(name: str, share: float) -> bool:
    return name.startswith("unread/") and share == 1.0


def _bad(x: float) -> bool:
    return not isfinite(x)


def _minus(x: float | None) -> float | None:
    return None if x is None else -x
