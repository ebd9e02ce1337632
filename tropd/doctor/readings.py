"""Checks of the numbers of a measured sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.readers import says_as_teacher
from tropd.doctor.sample import Diagnosis, Sample
from tropd.methods.horizon import horizons
from tropd.monitoring.alarms import Alarms
from tropd.types import READER

if TYPE_CHECKING:
    from tropd.teachers.teacher import Teacher
    from tropd.training.assembly import Parts

_LOW_OVERLAP = 0.5  # 0.72 before and 0.91 after are usual of distillation that works (arXiv:2606.01249)
_HIGH_TV = 0.5
_STOP_WARNING, _STOP_ERROR = -8.0, -15.0


def check_scores(parts: Parts, found: Diagnosis) -> Iterator[Check]:
    """Does the teacher know anything, and are its scores repeatable?"""
    probes, uniform = found.probes, math.log(parts.vocab_size)
    if not _heard(found):
        yield warning(
            "teacher",
            "the teacher says nothing of what the student wrote in the sample, so what it knows was not measured.",
            "Let the doctor sample more: --sample-prompts, --sample-tokens.",
        )
        return
    said = (
        f"mean log-probability of the student's tokens {probes['teacher/mean_logprob']:.2f}, entropy "
        f"{_shown(probes, 'entropy/teacher')} (a teacher that knows nothing: {-uniform:.2f} and "
        f"{uniform:.2f})"
    )
    alarm = _alarm(parts, found, "uniform_teacher")
    if alarm is not None:
        yield error("teacher", f"{said}. {alarm}")
    else:
        yield ok("teacher", said)
    if found.repeat_gap > found.teacher.noise:
        yield warning(
            "teacher repeats itself",
            f"the same texts in another order differ by up to {found.repeat_gap:.2g} nats.",
            "Such noise is added to every log-ratio. Use float32, or another attention implementation.",
        )


def check_agreement(parts: Parts, found: Diagnosis) -> Iterator[Check]:
    """How far apart the two models are on the student's texts."""
    p, readers = found.probes, parts.run.method.objective.readers
    if not _heard(found):
        return
    others = [name for name in readers if name != READER and not says_as_teacher(parts.run, name)]
    overlap = f"top-k overlap {p['overlap/top_k']:.1%}, " if "overlap/top_k" in p else ""
    said = (
        f"total variation {p['trust/tv']:.1%} (the share of outliers), "
        f"{overlap}"
        f"log pi_T - log pi_S {p['ratio/mean']:.3f} on average, from {p.get('ratio/min', math.nan):.2f} to "
        f"{p.get('ratio/max', math.nan):.2f}; entropy of student {p['entropy/student']:.2f}, teacher "
        f"{_shown(p, 'entropy/teacher')}, mean difference {_shown(p, 'entropy/gap')}"
    )
    if p.get("ratio/min") == 0.0 == p.get("ratio/max") and not p.get("ratio/infinite"):
        if others or not readers:
            yield ok("agreement", f"the teacher is the student; the method learns from {', '.join(others) or 'texts'}")
            return
        own = _is_base(parts, found.teacher)
        if own and _data_teaches(parts):
            yield ok(
                "agreement",
                "a new adapter changes nothing, so student and teacher are one model now: at first texts of the data "
                "set alone teach, later the base draws what the student writes back to itself",
            )
            return
        yield error(
            "agreement",
            "the student already is its teacher: both give every token of the sample exactly the same probability, so "
            "log-ratios are zero and nothing is learned.",
            "A new adapter changes nothing, so its base cannot teach it: set teacher.path."
            if own
            else "Set teacher.path to a stronger model.",
        )
    elif READER not in readers:
        yield ok("agreement", f"{said}; the method learns from {', '.join(readers) or 'texts'}")
    elif p.get("ratio/infinite"):
        yield warning(
            "agreement",
            f"{said}; the teacher gives {p['ratio/infinite']:.1%} of the student's tokens no probability at all.",
            "Use a method that bounds the log-ratio: 'tropd', 'clip_outlier' or 'topd'.",
        )
    elif p["trust/tv"] > _HIGH_TV or p.get("overlap/top_k", 1.0) < _LOW_OVERLAP:
        yield warning(
            "agreement",
            f"{said}. The two models want different things on most tokens, where plain on-policy distillation is "
            "known to collapse.",
            "Use method 'tropd' with teacher prefixes, warm the student up on the teacher's answers, or take a teacher "
            "of the same family.",
        )
    else:
        yield ok("agreement", said)
    alarm = _alarm(parts, found, "support_collapse")
    if alarm is not None:
        yield warning("support", alarm, "")


def _heard(found: Diagnosis) -> bool:
    """Whether the teacher read any of the student's tokens."""
    return "teacher/mean_logprob" in found.probes


def check_ends(parts: Parts, found: Diagnosis) -> Iterator[Check]:
    """A teacher that never writes the student's stop token punishes every answer that ends."""
    total, ended = len(found.rollouts), found.num_ended
    said = f"{ended} of {total} answers ended within {found.limit} tokens"
    if not found.stop_ratios:
        whole = found.limit >= parts.run.rollout.max_new_tokens
        unknown = f"{said}, so what the teacher thinks of the student's stop token was not measured"
        if whole:
            yield warning("ends", f"{unknown}; every rollout is cut off.", "Raise rollout.max_new_tokens.")
        else:
            yield ok("ends", f"{unknown}; --sample-tokens draws longer ones")
        return
    mean = sum(found.stop_ratios) / len(found.stop_ratios)
    said += f"; log pi_T - log pi_S of the token that ended them is {mean:.2f} on average"
    stands_out = mean < found.other_ratio + _STOP_WARNING
    if mean > _STOP_WARNING or not stands_out:
        yield ok("ends", said)
        return
    yield (error if mean < _STOP_ERROR else warning)(
        "ends",
        f"{said} ({found.other_ratio:.2f} elsewhere): the teacher does not end answers with that "
        "token. The student will unlearn to stop, and lengths will explode within dozens of steps.",
        "Give both models the same end-of-turn token: see 'stop tokens' above.",
    )


def check_sampler(parts: Parts, found: Diagnosis) -> Iterator[Check]:
    mean, largest = found.sampler_gap
    said = f"log-probabilities of sampler and trainer differ by {mean:.2g} nats on average, {largest:.2g} at most"
    if mean > parts.run.alarms.mismatch_nats:
        yield error(
            "sampler",
            f"{said}; at most {parts.run.alarms.mismatch_nats:g} on average is healthy.",
            "Look for dropout, another precision, or weights that were changed in between.",
        )
    else:
        yield ok("sampler", said)


def check_step(parts: Parts, sample: Sample) -> Iterator[Check]:
    """One whole training step on the sample; its result is discarded."""
    step, limit = sample.step, parts.run.optimizer.max_gradient_norm
    norm = step.gradient_norms[-1]
    terms = ", ".join(f"{name} {part.loss:.3g} on {part.tokens:.0f} tokens" for name, part in step.terms.items())
    said = f"loss {step.loss:.4g} ({terms}), gradient norm {norm:.3g}"
    if not (math.isfinite(step.loss) and math.isfinite(norm)):
        yield error("one step", f"{said}: not a finite number.", "Use bfloat16 or float32, and check the weights.")
    elif norm == 0.0 and _data_teaches(parts) and parts.run.student.lora and _is_base(parts, parts.teacher):
        yield ok("one step", f"{said}: at the end, without texts of the data set, a new adapter and its base agree")
    elif norm == 0.0:
        yield error(
            "one step",
            f"{said}: nothing would be learned.",
            "Either the models agree exactly, or no term has a token with a weight.",
        )
    elif norm > limit:
        yield ok("one step", f"{said}, scaled down to {limit:g} as optimizer.max_gradient_norm says")
    else:
        yield ok("one step", said)


def _is_base(parts: Parts, teacher: Teacher) -> bool:
    """Whether the teacher is the student itself, without its adapter."""
    return teacher.forward is not None and teacher.forward.model is parts.model


def _data_teaches(parts: Parts) -> bool:
    """Whether answers in the data set replace the teacher's texts."""
    return parts.run.data.response_column is not None or parts.run.data.last_assistant == "prefix"


def check_seconds(parts: Parts, sample: Sample) -> Iterator[Check]:
    """Seconds per step, scaled up by tokens from a small sample: an upper bound on a GPU, where batches are cheap."""
    run = parts.run
    num_rollouts = run.rollout.num_prompts * run.rollout.num_rollouts
    horizon = fmean(horizons(run.policy, run.rollout.max_new_tokens, run.steps))
    lengths = [
        min(horizon, len(r.response_ids)) if len(r.response_ids) < sample.limit else horizon for r in sample.rollouts
    ]
    written = num_rollouts * sum(lengths) / len(lengths)
    read = written + num_rollouts * sum(len(r.prompt.token_ids) for r in sample.rollouts) / len(lengths)
    seconds = {
        "rollout": sample.seconds["rollout"] * written / max(sum(sample.lengths), 1),
        "score": sample.seconds["score"] * read / max(sample.num_tokens, 1),
        "train": sample.seconds["train"] * read / max(sample.num_tokens, 1),
    }
    each = sum(seconds.values())
    parts_said = ", ".join(f"{name} {value:.2g}" for name, value in seconds.items())
    yield ok(
        "seconds",
        f"about {each:.2g} per step of {num_rollouts} rollouts ({parts_said}), {each * run.steps / 3600:.2g} hours for "
        f"{run.steps} steps, without evaluation; measured on {len(sample.rollouts)} answers of up to {sample.limit} "
        "tokens, so roughly",
    )


def _alarm(parts: Parts, found: Diagnosis, name: str) -> str | None:
    """The message of a training alarm for these probes."""
    raised = Alarms(parts.run.alarms).check(
        found.probes,
        step=0,
        vocab_size=parts.vocab_size,
        loss=0.0,
        gradient_norm=1.0,
        max_new_tokens=parts.run.rollout.max_new_tokens,
    )
    return next((alarm.message.removeprefix("step 0: ") for alarm in raised if alarm.name == name), None)


def _shown(probes: Mapping[str, float], name: str) -> str:
    """An entropy as text; servers give none."""
    value = probes.get(name, math.nan)
    return "unknown" if math.isnan(value) else f"{value:.2f}"
