"""One training run of a comparison: the real loop on the trial's pair, and its outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tropd.base.names import Own
from tropd.config.models import StudentConfig, TeacherConfig
from tropd.config.run import Run
from tropd.config.stages import CheckpointConfig, DataConfig, OptimizerConfig, RolloutConfig, RunEvalConfig
from tropd.config.tables import to_dict
from tropd.errors import TrainingDiverged
from tropd.laboratory.lab import EMBEDDED, Lab, Trial, bed_of, steps_of
from tropd.monitoring.callbacks import Callback
from tropd.monitoring.display import Display
from tropd.monitoring.records import read_records
from tropd.testbeds import Pair, embedded, make_pair
from tropd.types import StepRecord

FIRST_STEPS = 10
_OF_STUDENT = ("start", "student", "base")
"""Teachers that are no folder of a pair."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a trial.  Entry i of each evaluated list belongs to steps[i]; the first is before training."""

    testbed: str
    method: str
    learning_rate: float
    seed: int
    status: Literal["done", "diverged"]
    fingerprint: str
    steps: tuple[int, ...]
    scores: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...] = ()
    """95 % intervals of the scores over the held-out prompts."""
    greedy: tuple[float, ...]
    lengths: tuple[float, ...]
    """Lengths of answers to held-out prompts, in tokens."""
    gradient_norm: tuple[float, ...]
    """At each step, before clipping."""
    tokens: dict[str, int]
    """Tokens trained on over the run, by author."""
    probes: dict[str, tuple[float, float]]
    """Means over the first and over the last ten steps."""
    seconds: float
    """CPU seconds, evaluation included."""
    error: str = ""
    budget: Literal["", "tokens", "seconds"] = ""
    trained: float = 0.0
    """Tokens that some term weighed, whoever wrote them; known where there is a budget."""
    training_seconds: float = 0.0
    """CPU seconds of the steps, evaluations left out."""

    @property
    def score(self) -> float:
        return self.scores[-1]


class Silent(Display):
    """Shows nothing, because many runs share a terminal."""

    def start(self, facts: Mapping[str, str]) -> None: ...
    def update(self, record: StepRecord) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class Stopwatch(Callback):
    """CPU seconds of the steps: not of the first one, which warms up, nor of those after which the student was
    evaluated."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.each: list[float] = []

    def on_step(self, record: StepRecord) -> None:
        now = time.process_time()
        if self.last is not None and not record.evaluation:
            self.each.append(now - self.last)
        self.last = now

    @property
    def per_step(self) -> float:
        return statistics.fmean(self.each) if self.each else 0.0


def pair_of(lab: Lab, testbed: str, seed: int) -> Pair | None:
    """The testbed's models for a seed, made if they do not exist; None for a run file, which has its own."""
    if testbed.endswith(".toml"):
        return None
    if testbed.startswith(EMBEDDED):
        return embedded(testbed.removeprefix(EMBEDDED))
    return make_pair(bed_of(testbed), seed, Path(lab.pairs) / f"{testbed}-{seed}")


def run_of(lab: Lab, trial: Trial, pair: Pair | None) -> Run:
    """The run of a trial."""
    run = _run_of_file(lab, trial) if pair is None else _run_of_pair(lab, trial, pair)
    changes = {**lab.run, **lab.runs.get(trial.method, {})}
    run = Run.from_dict(_changed(to_dict(run), changes), f"method {trial.method!r}") if changes else run
    other = None if pair is None else pair.others.get(run.teacher.path)
    return run if other is None else dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, path=str(other)))


def _changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged key by key; one that names its kind or rule is taken whole."""
    whole = dict(table)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(whole.get(name), Mapping) and not {"kind", "rule"} & set(value)
        whole[name] = _changed(whole[name], value) if both else value
    return whole


def _run_of_pair(lab: Lab, trial: Trial, pair: Pair) -> Run:
    bed = bed_of(trial.testbed)
    steps = trial.steps or steps_of(lab, trial.testbed)
    return Run(
        student=StudentConfig(path=str(pair.student)),
        teacher=TeacherConfig(path=str(pair.teacher)),
        data=DataConfig(path=str(pair.prompts)),
        method=lab.methods[trial.method],
        rollout=RolloutConfig(
            num_prompts=lab.num_prompts or bed.num_prompts,
            num_rollouts=lab.num_rollouts,
            max_new_tokens=pair.max_new_tokens,
            save_every=lab.save_rollouts,
        ),
        optimizer=OptimizerConfig(learning_rate=trial.learning_rate, warmup_steps=min(lab.warmup_steps, steps)),
        evaluation=RunEvalConfig(
            data=DataConfig(path=str(pair.held_out)),
            every=_every(lab, steps),
            num_samples=lab.num_samples,
            max_new_tokens=pair.max_new_tokens,
            prompts_per_call=256,
        ),
        checkpoint=CheckpointConfig(every=steps),
        grader=pair.grader,
        probes=_probes(lab, ()),
        steps=steps,
        seed=trial.seed,
        output=str(Path(lab.output) / "trials" / trial.folder),
        device=lab.device,
    )


def _run_of_file(lab: Lab, trial: Trial) -> Run:
    run = Run.load(Path(trial.testbed))
    return dataclasses.replace(
        run,
        method=lab.methods[trial.method],
        optimizer=dataclasses.replace(run.optimizer, learning_rate=trial.learning_rate),
        steps=trial.steps or steps_of(lab, trial.testbed),
        probes=_probes(lab, run.probes),
        seed=trial.seed,
        output=str(Path(lab.output) / "trials" / trial.folder),
    )


def _probes(lab: Lab, own: tuple[Own, ...]) -> tuple[Own, ...]:
    """Where trained tokens are counted, the probe that counts them."""
    there = any(probe.name == "trained" for probe in own)
    return own if there or not lab.budgets else (*own, Own(name="trained"))


def _every(lab: Lab, steps: int) -> int:
    return max(1, steps // lab.num_evaluations)


def fingerprint_of(run: Run) -> str:
    """A hash of everything that determines the outcome; the pair counts by name, not by its folder."""
    values = to_dict(run)
    for name in ("output", "trackers", "device"):
        values.pop(name, None)
    for part in ("student", "data", *(() if run.teacher.path in _OF_STUDENT else ("teacher",))):
        path = Path(values[part].pop("path"))
        if path.name.startswith("teacher-"):  # one of several teachers of a pair
            values[part]["path"] = path.name
    values["evaluation"].get("data", {}).pop("path", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def run_trial(lab: Lab, trial: Trial) -> Outcome | None:
    """Train from the start, and ignore an earlier attempt; None if the run was stopped."""
    run = run_of(lab, trial, pair_of(lab, trial.testbed, trial.seed))
    directory = Path(run.output)
    shutil.rmtree(directory, ignore_errors=True)
    from tropd.run.start import train

    started, error, watch = time.process_time(), "", Stopwatch()
    try:
        train(run, callbacks=[watch], display=Silent())
    except TrainingDiverged as diverged:
        error = str(diverged)
    seconds = time.process_time() - started
    records = read_records(directory / "records.jsonl")
    if not error and len(records.steps) < run.steps:
        return None
    _slim(directory)
    found = _outcome(trial, run, records.header["before"], records.steps, seconds, error)
    return dataclasses.replace(found, training_seconds=watch.per_step * len(records.steps))


def _outcome(
    trial: Trial, run: Run, before: dict[str, float], records: list[StepRecord], seconds: float, error: str
) -> Outcome:
    evaluated = [(0, before)] + [(r.step + 1, r.evaluation) for r in records if r.evaluation]
    name = f"avg@{run.evaluation.num_samples}"
    return Outcome(
        testbed=trial.testbed,
        method=trial.method,
        learning_rate=run.optimizer.learning_rate,
        seed=trial.seed,
        status="diverged" if error else "done",
        fingerprint=fingerprint_of(run),
        steps=tuple(step for step, _ in evaluated),
        scores=tuple(found[name] for _, found in evaluated),
        intervals=tuple((found[f"{name}/low"], found[f"{name}/high"]) for _, found in evaluated),
        greedy=tuple(found["greedy"] for _, found in evaluated if "greedy" in found),
        lengths=tuple(found["length/mean"] for _, found in evaluated),
        gradient_norm=tuple(r.gradient_norm for r in records),
        tokens={author: sum(r.tokens[author] for r in records) for author in ("student", "teacher")},
        probes=_ends(records),
        seconds=seconds,
        error=error,
        budget=trial.budget,
        trained=trained_tokens(records),
    )


def trained_tokens(records: list[StepRecord]) -> float:
    """In all; 0 where nobody counted them."""
    return sum(r.probes.get("trained/share", 0.0) * (r.tokens["student"] + r.tokens["teacher"]) for r in records)


def _ends(records: list[StepRecord]) -> dict[str, tuple[float, float]]:
    names = {name for r in records for name in r.probes}
    return {
        name: (_mean_of(records[:FIRST_STEPS], name), _mean_of(records[-FIRST_STEPS:], name)) for name in sorted(names)
    }


def _mean_of(records: list[StepRecord], name: str) -> float:
    known: list[Any] = [r.probes[name] for r in records if name in r.probes]
    return statistics.fmean(known) if known else float("nan")


def _slim(directory: Path) -> None:
    """Delete the models of a trial: a comparison keeps only records."""
    for name in ("model", "checkpoints"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for path in directory.glob("teacher_texts.sqlite*"):
        path.unlink()
