"""What a briefing is worth: a model answers held-out prompts as the student reads them and as a reader is told them.

    predictive gap = accuracy with the briefing - accuracy without    (The Predictive Law, arXiv:2605.30070)

The paper measures it before training and finds the later gain of self-distillation almost linear in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tropd.base.reading import nearest
from tropd.briefings.briefing import AsStudent, OwnBriefing, WithDemonstrations
from tropd.checkpoints.trained import Trained, stops_of
from tropd.config.models import GIVEN, TeacherConfig
from tropd.config.run import Run
from tropd.config.stages import DataConfig, EvalConfig
from tropd.data.briefer import Briefer, imported
from tropd.data.graders import Grader
from tropd.data.listener import Candidate
from tropd.data.prompts import load_prompts
from tropd.errors import ConfigError, DataError
from tropd.evaluation.models import engine_of, limited
from tropd.evaluation.results import EvalResult
from tropd.evaluation.runner import evaluate as draw_and_grade
from tropd.evaluation.statistics import Difference, paired_difference
from tropd.model.loading import model_fingerprint
from tropd.types import READER, Prompt


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Answers to the same prompts without and with a briefing."""

    reader: str
    plain: EvalResult
    briefed: EvalResult
    gap: Difference
    left_out: int
    """Prompts of which there was nothing to tell, or too much for the model's context."""

    def describe(self) -> str:
        gap, left = self.gap, f"; {self.left_out} could not be told" if self.left_out else ""
        return "\n".join(
            [
                *(f"without the briefing: {line}" for line in self.plain.describe().splitlines()),
                *(f"with that of {self.reader}: {line}" for line in self.briefed.describe().splitlines()),
                f"predictive gap {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] ({gap.num_items} prompts{left})",
            ]
        )

    def summary(self) -> dict[str, float]:
        """The numbers without the briefing under their own names, those with it after `briefed/`."""
        gap = {"gap": self.gap.mean, "gap/low": self.gap.low, "gap/high": self.gap.high}
        briefed = {f"briefed/{name}": value for name, value in self.briefed.summary().items()}
        return {**self.plain.summary(), **briefed, **gap, "left_out": float(self.left_out)}


def check_reader(run: Run, reader: str, trusted: bool = True) -> None:
    """Refuse whoever is told nothing, or only of responses that are there already."""
    for said, config in _told(run, reader).items():
        briefing = config.briefing
        if isinstance(briefing, OwnBriefing):
            if not trusted:
                raise ConfigError(
                    f"the briefing {briefing.kind!r} of {said} is code that the run names, and not imported here. "
                    "Read it, then add --trust-code."
                )
            briefing = imported(briefing)
        if isinstance(briefing, AsStudent):
            raise ConfigError(
                f"{said} is told nothing that the student is not, so there is no briefing to measure. Set `briefing` "
                "in its section, or name a reader with --reader."
            )
        if briefing.needs:
            kind = getattr(briefing, "kind", type(briefing).__name__)
            raise ConfigError(
                f"{said} is told of responses (briefing {kind!r}), and there are none before the model answers. Only "
                "a briefing that is known before the answer can be measured, such as 'column'."
            )


def measure_gap(
    trained: Trained,
    run: Run,
    data: DataConfig,
    settings: EvalConfig,
    grader: Grader,
    folder: Callable[[str], Path] | None = None,
    *,
    reader: str = READER,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Gap, str]:
    """The gap, and the name of the weights, of which `folder` makes the place for answers."""
    check_reader(run, reader)
    engine = engine_of(trained)
    data = dataclasses.replace(data, teacher_column=run.data.teacher_column if reader == READER else None)
    loaded = load_prompts(
        limited(data, settings, engine.context), trained.tokenizer, None, _briefer(run, reader, trained)
    )
    room = None if engine.context is None else engine.context - settings.max_new_tokens
    plain = [prompt for prompt in loaded.prompts if _fits(prompt.told.get(reader, ()), room)]
    if not plain:
        raise DataError(
            f"not one of {len(loaded.prompts)} prompts leaves the model room for {settings.max_new_tokens} tokens "
            f"behind the briefing in its context of {engine.context}. Lower --max-new-tokens."
        )
    version = model_fingerprint(trained.model, whole=True)
    tell(f"{data.path}: {loaded.report}")

    def answered(prompts: Sequence[Prompt], name: str) -> EvalResult:
        return draw_and_grade(
            engine,
            prompts,
            grader,
            trained.tokenizer,
            settings,
            stop_ids=stops_of(trained),
            progress_path=None if folder is None else folder(version) / name,
            version=version,
        )

    told = [dataclasses.replace(prompt, token_ids=prompt.told[reader]) for prompt in plain]
    without, with_it = answered(plain, "items.jsonl"), answered(told, "briefed.jsonl")
    gap = paired_difference(with_it.means, without.means, seed=settings.seed)
    said = "the teacher" if reader == READER else f"reader {reader!r}"
    left_out = len(loaded.prompts) - len(plain)
    return Gap(reader=said, plain=without, briefed=with_it, gap=gap, left_out=left_out), version


def _fits(ids: Sequence[int], room: int | None) -> bool:
    return bool(ids) and (room is None or len(ids) <= room)


def _told(run: Run, reader: str) -> dict[str, TeacherConfig]:
    """Whose briefings are meant, by what errors call them."""
    if reader == READER:
        several = len(run.all_teachers) > 1
        return {f"teacher {name!r}" if several else "the teacher": x for name, x in run.all_teachers.items()}
    if reader not in run.all_readers:
        there = (READER, *run.all_readers)
        raise ConfigError(f"the run has no reader {reader!r}{nearest(reader, there)}; it has {', '.join(there)}.")
    return {f"reader {reader!r}": run.all_readers[reader]}


def _briefer(run: Run, reader: str, trained: Trained) -> Briefer:
    """Prompts as the model itself reads them; examples are those of the run, never held-out ones."""
    if reader == READER:
        return Briefer(run, trained.tokenizer, {name: _candidate(run, x) for name, x in run.all_teachers.items()})
    return Briefer(run, trained.tokenizer, {}, {reader: _candidate(run, run.all_readers[reader])})


def _candidate(run: Run, config: TeacherConfig) -> Candidate:
    briefing = config.briefing
    if isinstance(briefing, WithDemonstrations) and briefing.source is None:
        if run.data.path == GIVEN or run.data.split != "train" or run.data.name is not None:
            raise ConfigError(
                "the briefing shows examples of the data set of the run, and an evaluation can read again only the "
                "split 'train' of what data.path names, without data.name. Name a data set in briefing.source."
            )
        briefing = dataclasses.replace(briefing, source=run.data.path)
    return Candidate(
        config=dataclasses.replace(config, briefing=briefing, bridge=None)
    )  # the model reads its own tokens
