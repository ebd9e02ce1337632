"""Dashboards of other packages: trackio (local), tensorboard (local) and wandb, each imported when a run names it.

They get the numbers of each step and nothing else; the truth stays in records.jsonl.  After a resume, tensorboard drops
the steps that are done again; trackio and wandb keep both versions of them.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tropd.errors import ConfigError, require
from tropd.types import StepRecord

PROJECT = "tropd"


class Tracker(Protocol):
    """Takes the numbers of each step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a tracker knows of a run when it opens it."""

    name: str
    config: dict[str, Any]
    directory: Path
    """Where local trackers write."""
    step: int = 0
    """The first step that will be logged: above 0, the run is resumed."""


class TensorboardTracker:
    """Event files in `directory`/tensorboard/`name`."""

    def __init__(self, run: TrackedRun) -> None:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        self._writer = tensorboard.SummaryWriter(
            str(run.directory / "tensorboard" / run.name), purge_step=run.step if run.step > 0 else None
        )
        lines = (f"    {name} = {value!r}" for name, value in run.config.items())
        self._writer.add_text("config", "\n".join(lines), run.step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class TrackioTracker:
    """A local trackio database (TRACKIO_DIR); `trackio show --project tropd` opens it."""

    def __init__(self, run: TrackedRun) -> None:
        trackio = importlib.import_module("trackio")
        self._run = trackio.init(
            project=PROJECT,
            name=run.name,
            config=run.config,
            resume="allow" if run.step > 0 else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class WandbTracker:
    """A wandb run whose id is its name, so that a resume finds it and a second run of that name is refused."""

    def __init__(self, run: TrackedRun) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=PROJECT,
            id=run.name,
            name=run.name,
            config=run.config,
            dir=str(run.directory),
            resume="allow" if run.step > 0 else "never",
        )
        # wandb's own step may only grow and drops what comes again; a named axis keeps it.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorboardTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}


def make_trackers(
    names: Sequence[str], run_name: str, config: dict[str, Any], *, directory: Path = Path("runs"), step: int = 0
) -> list[Tracker]:
    """Opens the named trackers; all names are checked before the first is opened."""
    for name in names:
        if name not in TRACKERS:
            close = difflib.get_close_matches(name, TRACKERS, n=1)
            raise ConfigError(
                f"tracker {name!r} was asked for, but there are {', '.join(TRACKERS)}."
                + (f" Did you mean {close[0]!r}?" if close else " Name one of these, or none.")
            )
        require(name, name, f"tracker {name!r}")
    run = TrackedRun(name=run_name, config=config, directory=directory, step=step)
    return [TRACKERS[name](run) for name in dict.fromkeys(names)]


def numbers_of(record: StepRecord) -> dict[str, float]:
    """Every number of a step under a flat name: `terms/trusted/loss`, `seconds/rollout`, `evaluation/gsm8k`, ..."""
    flat: dict[str, float] = {}
    for name, value in asdict(record).items():
        if name not in ("step", "alarms", "notes"):
            flat.update(_flatten(value, name))
    flat["num_alarms"] = len(record.alarms)
    return flat


def _flatten(value: Any, name: str) -> dict[str, float]:
    if isinstance(value, Mapping):
        return {k: v for part, inner in value.items() for k, v in _flatten(inner, f"{name}/{part}").items()}
    return {} if value is None else {name: value}
