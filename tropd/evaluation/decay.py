"""How far the student's beginning spoils the teacher: the teacher goes on where the student's answers are cut.

    accuracy(l) = accuracy of texts whose first l tokens the student wrote and the others the teacher

"Less is More" (ESR, arXiv:2605.27028) finds 65.3 at l = 0, 62.7 at 100 and 51.8 at 300, where the
student alone has 51.0: what the teacher says of late tokens speaks of texts that it cannot save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tropd.briefings.briefing import AsStudent
from tropd.checkpoints.trained import Trained, stops_of
from tropd.config.models import GIVEN, TeacherConfig
from tropd.config.run import Run
from tropd.config.stages import DataConfig, EvalConfig
from tropd.data.graders import Grader
from tropd.data.prompts import load_prompts
from tropd.errors import ConfigError
from tropd.evaluation.models import limited
from tropd.evaluation.results import EvalResult
from tropd.evaluation.runner import evaluate as draw_and_grade
from tropd.evaluation.statistics import Difference, paired_difference
from tropd.model.loading import load_model, load_tokenizer, model_fingerprint
from tropd.rollout.engine import Engine
from tropd.rollout.transformers import TransformersEngine
from tropd.teachers.local import shared_vocab_size
from tropd.types import Completion, Finish, Request, key_of


class Handed(Engine):
    """A student that writes at most so many tokens, and a teacher that goes on."""

    def __init__(self, student: Engine, teacher: Engine, length: int) -> None:
        self.student, self.teacher, self.length = student, teacher, length

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        cut = [dataclasses.replace(r, max_new_tokens=min(self.length, r.max_new_tokens)) for r in requests]
        begun = self.student.generate(cut) if self.length else [_NOTHING] * len(requests)
        open_ = [i for i, done in enumerate(begun) if _is_open(done, requests[i])]
        rest = [_after(requests[i], begun[i].token_ids) for i in open_]
        ended = dict(zip(open_, self.teacher.generate(rest) if rest else (), strict=True))
        return [_joined(done, ended[i]) if i in ended else done for i, done in enumerate(begun)]


_NOTHING = Completion(token_ids=(), behavior_logprobs=(), model_logprobs=(), finish=Finish.LENGTH)


def _is_open(done: Completion, request: Request) -> bool:
    return done.finish is Finish.LENGTH and len(done.token_ids) < request.max_new_tokens


def _after(request: Request, written: tuple[int, ...]) -> Request:
    """Draws of its own: those of the request belong to the student's tokens."""
    return dataclasses.replace(
        request,
        token_ids=(*request.token_ids, *written),
        max_new_tokens=request.max_new_tokens - len(written),
        seed=key_of(request.seed, "decay", len(written)) if written else request.seed,
    )


def _joined(a: Completion, b: Completion) -> Completion:
    return dataclasses.replace(
        b,
        token_ids=a.token_ids + b.token_ids,
        behavior_logprobs=a.behavior_logprobs + b.behavior_logprobs,
        model_logprobs=a.model_logprobs + b.model_logprobs,
    )


@dataclass(frozen=True, kw_only=True)
class Decay:
    """Answers of the student, and of the teacher after so many tokens of the student."""

    student: EvalResult
    handed: dict[int, EvalResult]
    falls: dict[int, Difference]
    """Score after so many tokens minus that after the fewest, prompt by prompt."""

    def describe(self) -> str:
        lines = [f"the student alone: {line}" for line in self.student.describe().splitlines()]
        for length, result in self.handed.items():
            who = f"the teacher after {length} tokens of the student" if length else "the teacher alone"
            lines += [f"{who}: {line}" for line in result.describe().splitlines()]
            if length:
                lines.append(f"{who}: {self.ended(length):.1%} of the answers had ended by then")
        first = min(self.handed)
        lines += [
            f"decay from {first} to {length} tokens {fall.mean:+.3f} [{fall.low:+.3f}, {fall.high:+.3f}]"
            for length, fall in self.falls.items()
        ]
        return "\n".join(lines)

    def ended(self, length: int) -> float:
        """The share of answers that the student had ended by then."""
        answers = [answer for item in self.handed[length].items for answer in item.samples]
        return fmean(answer.num_tokens <= length for answer in answers)

    def summary(self) -> dict[str, float]:
        """The student's numbers under their own names, the others after `decay/LENGTH/`."""
        numbers = self.student.summary()
        for length, result in self.handed.items():
            numbers |= {f"decay/{length}/{name}": value for name, value in result.summary().items()}
            numbers[f"decay/{length}/ended"] = self.ended(length)
        for length, fall in self.falls.items():
            name = f"decay/{length}/fall"
            numbers |= {name: fall.mean, f"{name}/low": fall.low, f"{name}/high": fall.high}
        return numbers


def check_decay(run: Run, lengths: Sequence[int], most: int) -> TeacherConfig:
    """The teacher; refuses one that cannot go on, and lengths that leave it nothing to write."""
    if len(set(lengths)) < len(lengths) or any(not 0 <= length < most for length in lengths):
        raise ConfigError(
            f"--decay {' '.join(map(str, lengths))}: give lengths of at least 0 and below --max-new-tokens {most}, "
            "each once."
        )
    if len(run.all_teachers) > 1:
        raise ConfigError("--decay lets one teacher go on, and the run has several. Name a run of one of them.")
    (config,) = run.all_teachers.values()
    if config.path == "base":
        config = dataclasses.replace(config, path=run.student.path, revision=run.student.revision)
    if config.servers or not config.is_model or config.path == GIVEN:
        raise ConfigError(
            f"--decay lets the teacher go on in this process, and teacher.path = {config.path!r} is no model that is "
            "read here. Set teacher.path to a model, and teacher.servers to none."
        )
    if config.bridge is not None:
        raise ConfigError(
            "--decay lets the teacher go on after the student's tokens, and the teacher of the run has a tokenizer of "
            "its own (teacher.bridge). Measure it with a teacher that shares the student's tokenizer."
        )
    if config.briefing != AsStudent():
        raise ConfigError(
            "--decay lets the teacher go on from what the student reads, and the teacher of the run is told more. "
            "Leave teacher.briefing out."
        )
    return config


def measure_decay(
    trained: Trained,
    run: Run,
    data: DataConfig,
    settings: EvalConfig,
    grader: Grader,
    lengths: Sequence[int],
    folder: Callable[[str], Path] | None = None,
    *,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Decay, str]:
    """The decay, and the name of the student's weights, of which `folder` makes the place for answers."""
    config = check_decay(run, lengths, settings.max_new_tokens)
    device = next(trained.model.parameters()).device
    teacher: Any = load_model(config, "teacher", device).eval()
    size = shared_vocab_size(trained.model, trained.tokenizer, teacher, load_tokenizer(config, "teacher"))
    student_engine, teacher_engine = (
        TransformersEngine(model, vocab_size=size, max_batch=run.rollout.max_batch)
        for model in (trained.model, teacher)
    )
    contexts = [engine.context for engine in (student_engine, teacher_engine) if engine.context is not None]
    loaded = load_prompts(limited(data, settings, min(contexts, default=None)), trained.tokenizer)
    version, other = (model_fingerprint(model, whole=True) for model in (trained.model, teacher))
    tell(f"{data.path}: {loaded.report}")

    def answered(engine: Engine, name: str, version_: str) -> EvalResult:
        return draw_and_grade(
            engine,
            loaded.prompts,
            grader,
            trained.tokenizer,
            settings,
            stop_ids=stops_of(trained),
            progress_path=None if folder is None else folder(version) / name,
            version=version_,
        )

    alone = answered(student_engine, "items.jsonl", version)
    handed = {
        length: answered(Handed(student_engine, teacher_engine, length), f"decay_{length}.jsonl", f"{version} {other}")
        for length in sorted(lengths)
    }
    first = min(handed)
    falls = {
        length: paired_difference(result.means, handed[first].means, seed=settings.seed)
        for length, result in handed.items()
        if length != first
    }
    return Decay(student=alone, handed=handed, falls=falls), version
