"""Equal budgets: as many steps for each method as the budget allows.

A pilot, one short run of each method, says how many tokens a step trains and how many seconds it takes.  The number of
steps is the budget divided by that, so warm-ups and schedules of all methods end with their runs.  Pilots are kept in
pilots.jsonl, so that a comparison goes on with the same numbers of steps.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from tropd.config.run import Run
from tropd.config.stages import RunEvalConfig
from tropd.errors import TrainingDiverged
from tropd.laboratory.lab import Lab, Trial, steps_of, trials
from tropd.laboratory.trial import Silent, Stopwatch, fingerprint_of, pair_of, run_of, trained_tokens
from tropd.monitoring.records import read_records

PILOT_STEPS = 8
MOST = 10
"""A method that trains next to nothing in a step gets this many times the comparison's steps at most."""


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What a step of a method costs on a testbed."""

    testbed: str
    method: str
    fingerprint: str
    tokens: float
    """Trained in a step: those that some term weighs, whoever wrote them."""
    seconds: float
    """Of CPU time in a step, without evaluation."""

    def steps(self, trial: Trial, lab: Lab) -> int:
        """How many steps the budget allows, at least one."""
        assert trial.budget
        each = self.tokens if trial.budget == "tokens" else self.seconds
        most = MOST * steps_of(lab, trial.testbed)
        return min(max(1, round(lab.budgets[trial.budget] / each)), most) if each > 0 else most


Pilots = Mapping[tuple[str, str], Pilot]
"""By testbed and method."""
_PILOT = TypeAdapter(Pilot)


def with_steps(lab: Lab, pilots: Pilots) -> Iterator[Trial]:
    """The trials of a comparison, each with its number of steps, where that is known."""
    for trial in trials(lab):
        pilot = pilots.get((trial.testbed, trial.method))
        yield dataclasses.replace(trial, steps=pilot.steps(trial, lab)) if trial.budget and pilot else trial


def read_pilots(directory: Path) -> dict[tuple[str, str], Pilot]:
    path = directory / "pilots.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [_PILOT.validate_json(line) for line in lines if line.endswith(b"\n")]
    return {(pilot.testbed, pilot.method): pilot for pilot in found}


def keep_pilot(directory: Path, pilot: Pilot) -> None:
    with (directory / "pilots.jsonl").open("a") as file:
        file.write(json.dumps(dataclasses.asdict(pilot)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def wanted_pilots(lab: Lab, known: Pilots, settled: Iterable[tuple[str, str]]) -> list[Trial]:
    """A trial for each pilot that is not there, or whose method has changed; a method with outcomes keeps its pilot."""
    first = {(trial.testbed, trial.method): trial for trial in reversed(list(trials(lab))) if trial.budget}
    kept = set(settled) & set(known)
    kept |= {arm for arm, trial in first.items() if arm in known and known[arm].fingerprint == _asked(lab, trial)}
    return [trial for arm, trial in reversed(first.items()) if arm not in kept]


def run_pilot(asked: tuple[Lab, Trial]) -> Pilot:
    """Train for a few steps without evaluation."""
    from tropd.run.start import train

    lab, trial = asked
    run, watch = _pilot_of(lab, trial), Stopwatch()
    directory = Path(run.output)
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(TrainingDiverged):  # the trials will say so
        train(run, callbacks=[watch], display=Silent())
    records = read_records(directory / "records.jsonl").steps
    shutil.rmtree(directory)
    number = max(1, len(records))
    return Pilot(
        testbed=trial.testbed,
        method=trial.method,
        fingerprint=fingerprint_of(run),
        tokens=trained_tokens(records) / number,
        seconds=watch.per_step,
    )


def _pilot_of(lab: Lab, trial: Trial) -> Run:
    run = run_of(lab, dataclasses.replace(trial, steps=PILOT_STEPS), pair_of(lab, trial.testbed, trial.seed))
    output = str(Path(lab.output) / "pilots" / trial.folder)
    return dataclasses.replace(run, evaluation=RunEvalConfig(), output=output)


def _asked(lab: Lab, trial: Trial) -> str:
    return fingerprint_of(_pilot_of(lab, trial))
