"""Load a trained student: a Hugging Face folder or id, an exported adapter, or a run at one of its checkpoints."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropd.checkpoints import checkpoint as checkpoints
from tropd.config.models import GIVEN, ModelConfig
from tropd.config.run import Run
from tropd.errors import CheckpointError, ConfigError
from tropd.model.loading import base_of, choose_device, load_model, load_tokenizer, wrap_student
from tropd.model.weights import load_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A student, and the run that made it if that is known."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    run: Run | None = None
    step: int | None = None
    state: dict[str, Any] | None = None


def is_run(source: Path) -> bool:
    """Whether a folder is a run's.  An exported model holds a run.toml too, so the model's files decide."""
    model = any((source / name).exists() for name in ("config.json", "adapter_config.json"))
    return (source / "run.toml").exists() and not model


def load_student(source: str, step: int | None, device: str, dtype: Any) -> Trained:
    """Load a student.  `step` picks a checkpoint; without it, a run's finished model or its newest checkpoint."""
    path = Path(source).expanduser()
    if is_run(path):
        if step is None and (path / "model").is_dir():
            run = Run.load(path / "run.toml")
            found = _load_folder(str(path / "model"), device, run.student.dtype if dtype == "auto" else dtype)
            return Trained(model=found.model, tokenizer=found.tokenizer, run=run)
        return load_checkpoint(path, step, device, dtype)
    if step is not None:
        raise ConfigError(f"--step {step} was asked for, but {source} is no run's folder. Leave --step out.")
    return _load_folder(source, device, dtype)


def student_of(run: Run, device: str, dtype: Any = "auto") -> Trained:
    """The student of a run before training."""
    if run.student.path == GIVEN:
        raise ConfigError("the student of the run was given in Python, so no file says where it is. Set student.path.")
    config = run.student if dtype == "auto" else dataclasses.replace(run.student, dtype=dtype)
    model = load_model(config, "student", choose_device(device))
    return Trained(model=model.eval(), tokenizer=load_tokenizer(config, "student"), run=run)


def load_checkpoint(directory: Path, step: int | None, device: str, dtype: Any = "auto") -> Trained:
    """The student of a run as it was after `step` steps, or at the newest checkpoint."""
    if not is_run(directory):
        raise ConfigError(f"{directory} is no run's folder: it needs a run.toml beside its checkpoints.")
    folder = checkpoints.find(directory, step)
    if folder is None:
        raise CheckpointError(f"{directory} holds no checkpoint yet. Train until the first, or name another run.")
    saved = checkpoints.load(folder)
    run = Run.load(folder / "run.toml")
    chosen = choose_device(device)
    student = run.student if dtype == "auto" else dataclasses.replace(run.student, dtype=dtype)
    if student.dtype == "auto" and student.lora is None:  # as it was trained, wherever that was
        widest = max((x.dtype for x in saved.weights.values() if x.is_floating_point()), key=lambda d: d.itemsize)
        student = dataclasses.replace(student, dtype=str(widest).removeprefix("torch."))
    if student.path == GIVEN:
        raise ConfigError(
            f"the student of {directory} was given in Python, so no file says what model its checkpoints fit. Name "
            f"the finished model, {directory / 'model'}."
        )
    tokenizer = load_tokenizer(student, "student")
    model = wrap_student(load_model(student, "student", chosen), student, run.seed)
    checkpoints.load_trained(model, saved.weights, saved.path)
    return Trained(model=model.eval(), tokenizer=tokenizer, run=run, step=saved.step, state=saved.state)


def _load_folder(source: str, device: str, dtype: Any) -> Trained:
    adapter, chosen = Path(source).expanduser() / "adapter_config.json", choose_device(device)
    tokenizer = load_tokenizer(ModelConfig(path=source), "model")
    if not adapter.exists():
        return Trained(model=load_model(ModelConfig(path=source, dtype=dtype), "model", chosen), tokenizer=tokenizer)
    model: Any = load_model(ModelConfig(path=base_of(adapter.parent), dtype=dtype), "base", chosen)
    return Trained(model=load_adapter(model, adapter.parent).eval(), tokenizer=tokenizer)


def stops_of(trained: Trained) -> tuple[int, ...]:
    from tropd.data.chat import stop_ids
    from tropd.model.head import causal_lm_of

    return stop_ids(trained.tokenizer, causal_lm_of(trained.model).generation_config)
