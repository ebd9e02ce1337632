"""All trials of a comparison, on all cores.  Finished trials are on disk; a kill costs only the trials in flight."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import IO, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from tropd.checkpoints.run_folder import locked
from tropd.config.methods import complete
from tropd.config.run import Run
from tropd.errors import ConfigError, MethodWarning
from tropd.laboratory.budget import Pilot, keep_pilot, read_pilots, run_pilot, wanted_pilots, with_steps
from tropd.laboratory.lab import Lab, Trial, trials
from tropd.laboratory.trial import Outcome, fingerprint_of, pair_of, run_of, run_trial
from tropd.testbeds import TESTBEDS

_OUTCOME = TypeAdapter(Outcome)
A = TypeVar("A")
R = TypeVar("R")


def compare(
    lab: Lab,
    *,
    workers: int = 1,
    tell: Callable[[str], None] = print,
    only: Collection[str] = (),
    minutes: float | None = None,
) -> list[Outcome]:
    """Every outcome of the comparison, in order; those on disk are not repeated.  `only` these methods are run, and
    after so many minutes no trial starts any more."""
    quiet()
    until = time.time() + 60 * minutes if minutes is not None else math.inf
    lab = dataclasses.replace(lab, methods={name: complete(m, f"methods.{name}") for name, m in lab.methods.items()})
    directory = Path(lab.output)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.jsonl").touch()
    with locked(directory, "results.jsonl"):
        known = read_outcomes(directory / "results.jsonl")
        _make_pairs(lab, known, workers, tell)
        pilots = _fly(lab, known, workers, tell, only)
        asked = list(with_steps(lab, pilots))
        _check(lab, known, asked)
        shared = _take_over(lab, known, asked)
        wanted = [trial for trial in asked if not only or trial.method in only]
        left = [trial for trial in wanted if trial.key not in known]
        if known:
            said = f" ({len(shared)} of them the same runs in comparisons beside it)" if shared else ""
            tell(f"{len(known)} outcomes are there already{said}; {len(left)} trials to go")
        with (directory / "results.jsonl").open("a") as file:
            for outcome in shared:
                _write(file, outcome)
            for trial, outcome in _run_all(lab, left, workers, until):
                known[trial.key] = outcome
                _write(file, outcome)
                tell(f"{len(left) - sum(t.key not in known for t in left)}/{len(left)}  {_line(outcome)}")
    return [known[trial.key] for trial in asked if trial.key in known]


def _fly(
    lab: Lab, known: dict[str, Outcome], workers: int, tell: Callable[[str], None], only: Collection[str]
) -> dict[tuple[str, str], Pilot]:
    """The pilots, those of the methods that are run made where they are missing."""
    directory = Path(lab.output)
    pilots = read_pilots(directory)
    settled = {(outcome.testbed, outcome.method) for outcome in known.values()}
    missing = [trial for trial in wanted_pilots(lab, pilots, settled) if not only or trial.method in only]
    if missing:
        tell(f"measuring a step of {len(missing)} methods")
    for pilot in _spread(run_pilot, [(lab, trial) for trial in missing], workers):
        pilots[pilot.testbed, pilot.method] = pilot
        keep_pilot(directory, pilot)
    return pilots


def _write(file: IO[str], outcome: Outcome) -> None:
    file.write(json.dumps(asdict(outcome)) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _take_over(lab: Lab, known: dict[str, Outcome], asked: Sequence[Trial]) -> list[Outcome]:
    """Reuse outcomes of comparisons in sibling folders with the same settings, even under another name."""
    beside = Path(lab.output).parent.glob("*/results.jsonl")
    there = {(o.testbed, o.fingerprint): o for path in sorted(beside) for o in _peek(path)}
    taken = []
    for trial in asked:
        if trial.key in known or trial.testbed.endswith(".toml") or not there:
            continue
        fingerprint = fingerprint_of(run_of(lab, trial, pair_of(lab, trial.testbed, trial.seed)))
        if (found := there.get((trial.testbed, fingerprint))) is not None:
            known[trial.key] = dataclasses.replace(found, method=trial.method, budget=trial.budget)
            taken.append(known[trial.key])
    return taken


def _peek(path: Path) -> list[Outcome]:
    """The complete lines of a file that another process may be writing; none if it is no comparison's."""
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        return [_OUTCOME.validate_json(line) for line in lines]
    except ValidationError:
        return []


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """Outcomes by the key of their trials.  A torn last line is cut off, and its trial is run again."""
    if not path.exists():
        return {}
    found: dict[str, Outcome] = {}
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines[:-1]))
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            outcome = _OUTCOME.validate_json(line)
        except ValidationError as error:
            raise ConfigError(
                f"{path}, line {number}, is no outcome of a trial: {error.errors()[0]['msg']}. Remove the line, and "
                "its trial is run again."
            ) from None
        found[_trial_of(outcome).key] = outcome
    return found


def _trial_of(outcome: Outcome) -> Trial:
    return Trial(
        testbed=outcome.testbed,
        method=outcome.method,
        learning_rate=outcome.learning_rate,
        seed=outcome.seed,
        budget=outcome.budget,
    )


def _check(lab: Lab, known: dict[str, Outcome], asked: Sequence[Trial]) -> None:
    """Refuse outcomes on disk whose settings differ from the current ones."""
    for trial in asked:
        outcome = known.get(trial.key)
        if outcome is None:
            continue
        fingerprint = fingerprint_of(run_of(lab, trial, pair_of(lab, trial.testbed, trial.seed)))
        if fingerprint not in (outcome.fingerprint, _written_down(lab, trial)):
            raise ConfigError(
                f"{lab.output} holds an outcome of '{trial.key}' with other settings than are asked for now. Set "
                "another output, or put the settings back. New methods, seeds and learning rates may be added freely."
            )


def _written_down(lab: Lab, trial: Trial) -> str:
    """The fingerprint of the run in the trial's folder.  Options that are newer than that run have their defaults."""
    path = Path(lab.output) / "trials" / trial.folder / "run.toml"
    try:
        return fingerprint_of(Run.load(path))
    except ConfigError:  # no such file, or an option that is gone
        return ""


def _make_pairs(lab: Lab, known: dict[str, Outcome], workers: int, tell: Callable[[str], None]) -> None:
    """Make all pairs first, so that no two trials make the same one."""
    wanted = list(dict.fromkeys((t.testbed, t.seed) for t in trials(lab) if t.testbed in TESTBEDS))
    missing = [(bed, seed) for bed, seed in wanted if not (Path(lab.pairs) / f"{bed}-{seed}" / "pair.json").exists()]
    if not missing:
        return
    tell(f"making {len(missing)} pairs of teacher and student in {lab.pairs}")
    for (bed, seed), facts in _spread(_pair_facts, [(lab, bed, seed) for bed, seed in missing], workers):
        said = ", ".join(f"{who} {facts[f'{who}_accuracy']:.3f}" for who in ("teacher", "student"))
        tell(f"{bed}, seed {seed}: {said}, {facts['seconds']:.0f} s of CPU time")


def _pair_facts(asked: tuple[Lab, str, int]) -> tuple[tuple[str, int], dict[str, float]]:
    lab, bed, seed = asked
    pair = pair_of(lab, bed, seed)
    assert pair is not None
    return (bed, seed), pair.facts


def _run_all(lab: Lab, left: list[Trial], workers: int, until: float) -> Iterator[tuple[Trial, Outcome]]:
    for trial, outcome in _spread(_run_one, [(lab, trial, until) for trial in left], workers):
        if outcome is not None:
            yield trial, outcome


def _run_one(asked: tuple[Lab, Trial, float]) -> tuple[Trial, Outcome | None]:
    lab, trial, until = asked
    return trial, run_trial(lab, trial) if time.time() < until else None


def _spread(work: Callable[[A], R], asked: list[A], workers: int) -> Iterator[R]:
    """Outcomes as trials finish.  After a failure no further trials start."""
    if workers == 1 or len(asked) < 2:
        yield from map(work, asked)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_core)
    try:
        futures: list[Future[R]] = [pool.submit(work, a) for a in asked]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _one_core() -> None:
    """Restrict a worker to one core, leave Ctrl-C to the process that started it, and avoid repeated messages."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", MethodWarning)
    quiet()


def quiet() -> None:
    """Hide transformers' progress bars: thousands of models are read and written here."""
    from tropd.model import hf

    hf.quiet()


def _line(outcome: Outcome) -> str:
    end = f"{outcome.scores[0]:.3f} -> {outcome.score:.3f}" if outcome.status == "done" else "diverged"
    rate = f"rate {outcome.learning_rate:g}" + (f", budget of {outcome.budget}" if outcome.budget else "")
    return f"{outcome.testbed}, {outcome.method}, {rate}, seed {outcome.seed}: {end} ({outcome.seconds:.0f} s)"
