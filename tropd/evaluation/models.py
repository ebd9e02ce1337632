"""A model, a run or a student in Python is evaluated: `tropd.evaluate`, and what `tropd evaluate` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tropd.base.names import is_name
from tropd.checkpoints.trained import Trained, is_run, load_student, stops_of
from tropd.config.models import GIVEN
from tropd.config.run import Run
from tropd.config.stages import DataConfig, EvalConfig
from tropd.data.graders import Grader, check_grader, resolve_grader
from tropd.data.prompts import load_prompts
from tropd.data.rows import Table, table_of
from tropd.errors import ConfigError
from tropd.evaluation.results import EvalResult
from tropd.evaluation.runner import evaluate as draw_and_grade
from tropd.model.loading import as_pair, choose_device, model_fingerprint
from tropd.rollout.transformers import TransformersEngine
from tropd.teachers.local import shared_vocab_size


def evaluate(
    model: Any,
    prompts: Any = None,
    *,
    grader: str | Grader | None = None,
    settings: EvalConfig | None = None,
    step: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    output: Path | str | None = None,
    trust_code: bool = False,
) -> EvalResult:
    """Draw answers, grade them, and say how sure the score is.

    `model` is a folder, a hub id, a run's folder (`step` picks a checkpoint), a model of transformers or (model,
    tokenizer); `prompts` a file, a folder, a hub id, a DataConfig, a datasets.Dataset or a list of dicts; `grader` a
    name or a callable.  What is left out comes from the run.  With `output`, answers are kept there and not drawn
    again.  A grader of your own that a run file names is imported only with `trust_code`.
    """
    named = isinstance(model, str | Path)
    run = Run.load(Path(model) / "run.toml") if named and is_run(Path(model)) else None
    settings = settings_of(run) if settings is None else settings
    if not isinstance(settings, EvalConfig):
        raise ConfigError(f"settings: a {type(settings).__name__} was given. Give an EvalConfig.")
    if grader is not None:
        settings = dataclasses.replace(settings, grader=grader if isinstance(grader, str) else None)
    else:
        check_trust(run, settings.grader, trust_code)
    if grader is None or isinstance(grader, str):
        judge = resolve_grader(settings.grader) if settings.grader else None
    else:
        judge = check_grader(grader, getattr(grader, "__name__", type(grader).__name__))
    data, table = data_of(run, prompts)
    if named:
        trained = load_student(str(model), step, device, dtype)
    else:
        loaded, tokenizer = as_pair(model, "model")
        trained = Trained(model=loaded.to(choose_device(device)), tokenizer=tokenizer)
    return judged(trained, data, settings, judge, None if output is None else lambda _: Path(output), table=table)[0]


def settings_of(run: Run | None) -> EvalConfig:
    """How a run's answers are drawn and judged."""
    if run is None:
        return EvalConfig()
    values: dict[str, Any] = {f.name: getattr(run.evaluation, f.name) for f in dataclasses.fields(EvalConfig)}
    values["grader"] = run.evaluation.grader or run.grader
    return EvalConfig(**values)


def check_trust(run: Run | None, grader: str | None, trusted: bool) -> None:
    """Code that a run file names is run only where somebody asks for it."""
    if run is None or grader is None or grader != (run.evaluation.grader or run.grader):
        return
    if grader.endswith(GIVEN):
        raise ConfigError(f"the run's grader, {grader}, is in no file. Give a grader.")
    if is_name(grader) and not trusted:
        raise ConfigError(
            f"grader {grader!r} is code that the run names, and not imported here. Read it, then add --trust-code "
            "(in Python trust_code=True), or give a grader."
        )


def data_of(run: Run | None, prompts: Any) -> tuple[DataConfig, Table | None]:
    """The section, and the rows where they were given in Python."""
    held_out = run.evaluation.data if run is not None else None
    if isinstance(prompts, DataConfig):
        return prompts, None
    if isinstance(prompts, str | Path):
        path = str(prompts)
        return dataclasses.replace(held_out, path=path) if held_out else DataConfig(path=path, split="test"), None
    if prompts is not None:
        return dataclasses.replace(held_out or DataConfig(), path=GIVEN), table_of(prompts, f"prompts {GIVEN}")
    if held_out is None or held_out.path == GIVEN:
        why = "the run's held-out prompts were given in Python" if held_out else "there is nothing to evaluate on"
        raise ConfigError(f"{why}: give --data PATH (in Python prompts), or a run with [evaluation.data].")
    return held_out, None


def judged(
    trained: Trained,
    data: DataConfig,
    settings: EvalConfig,
    grader: Grader | None,
    folder: Callable[[str], Path] | None = None,
    *,
    table: Table | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[EvalResult, str]:
    """The result, and the name of the weights, of which `folder` makes the place for answers."""
    engine = engine_of(trained)
    loaded = load_prompts(limited(data, settings, engine.context), trained.tokenizer, table)
    version = model_fingerprint(trained.model, whole=True)
    progress = None if folder is None else folder(version) / "items.jsonl"
    tell(f"{data.path}: {loaded.report}")
    result = draw_and_grade(
        engine,
        loaded.prompts,
        grader,
        trained.tokenizer,
        settings,
        stop_ids=stops_of(trained),
        progress_path=progress,
        version=version,
    )
    return result, version


def engine_of(trained: Trained) -> TransformersEngine:
    """What writes the model's answers."""
    size = shared_vocab_size(trained.model, trained.tokenizer, trained.model, trained.tokenizer)
    batch = trained.run.rollout.max_batch if trained.run else 64
    return TransformersEngine(trained.model, vocab_size=size, max_batch=batch)


def limited(data: DataConfig, settings: EvalConfig, context: int | None) -> DataConfig:
    """A prompt must leave room for the answer; how many are left out stands in the report."""
    if context is None:
        return data
    room = context - settings.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"--max-new-tokens {settings.max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{context}."
        )
    return dataclasses.replace(data, max_prompt_tokens=min(room, data.max_prompt_tokens or room))
